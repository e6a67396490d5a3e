"""The arguments of TRL's training scripts, under TRL's names: model, adapter, quantization and data.

Scripts take them from `fastrl`; the commands of `fastrl.cli` have the same fields. Importing this needs no package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import DatasetDict

_NO_STREAMS = "not supported: trainers need to know all rows"


@dataclass
class ScriptArguments:
    """Which data set a script trains on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or folder; `datasets` has precedence."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split of evaluations."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Only False: trainers take no streams."})
    ignore_bias_buffers: bool = field(default=False, metadata={"help": "For scripts that hide buffers from DDP."})

    def __post_init__(self) -> None:
        if self.dataset_streaming:
            raise ValueError(f"dataset_streaming: {_NO_STREAMS}")


@dataclass
class ModelConfig:
    """Which model a script trains, and under which LoRA adapter: see `get_peft_config`, `get_quantization_config`."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or hub name of the model."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="float32", metadata={"help": "Of the weights."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As in from_pretrained."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, times its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Modules that get an adapter."})
    lora_target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters that get an adapter."})
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full."})
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "PEFT's task type; SEQ_CLS for rewards."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha over the root of lora_r."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    load_in_8bit: bool = field(default=False, metadata={"help": "The frozen model in 8 bits (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "The frozen model in 4 bits (bitsandbytes)."})
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = field(default="nf4", metadata={"help": "Form of the 4 bits."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the 4 bits' scales, too."})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "dtype that holds the 4 bits."})

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit, load_in_4bit: exclude each other")
        if self.load_in_4bit and self.dtype == "auto":
            raise ValueError("load_in_4bit: 4 bits are computed with in dtype: name one, 'auto' is none")
        modules = self.lora_target_modules
        if isinstance(modules, list) and len(modules) == 1:
            self.lora_target_modules = modules[0]  # type: ignore[assignment] # "all-linear", or a regular expression


@dataclass
class DatasetConfig:
    """One data set of a mixture: `path`, `name`, `data_dir`, `data_files` and `split` are those of
    `datasets.load_dataset`.

    Args:
        columns: only these; None: all.
        fraction: its share of the mixture, for all data sets or none; they are scaled to sum to 1, and the mixture is
            as large as it can be without a row twice: the first rows of each are taken. None: every row.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, Any] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


@dataclass
class DatasetMixtureConfig:
    """Data sets to train on one after another; entries of a YAML file become `DatasetConfig`s."""

    datasets: list[DatasetConfig] = field(default_factory=list, metadata={"help": "The data sets of the mixture."})
    streaming: bool = field(default=False, metadata={"help": "Only False: trainers take no streams."})
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share of a test split; 1 and more: its rows."}
    )

    def __post_init__(self) -> None:
        if self.streaming:
            raise ValueError(f"streaming: {_NO_STREAMS}")
        self.datasets = [DatasetConfig(**entry) if isinstance(entry, dict) else entry for entry in self.datasets]


def get_dataset(mixture_config: DatasetMixtureConfig) -> DatasetDict:
    """The rows of all data sets of a mixture as the split "train", or as "train" and "test" with `test_split_size`.

    Which rows go into the test split is the same in every call; TRL draws it anew, so that a resumed run would train
    on rows that it was evaluated on.

    Raises:
        ValueError: no data set, or a `fraction` for some of them only.
    """
    import datasets

    if not mixture_config.datasets:
        raise ValueError("datasets: expected at least one data set, got none")
    parts = []
    for config in mixture_config.datasets:
        rows = datasets.load_dataset(
            config.path, name=config.name, data_dir=config.data_dir, data_files=config.data_files, split=config.split
        )
        parts.append(rows if config.columns is None else rows.select_columns(config.columns))
    fractions = [config.fraction for config in mixture_config.datasets if config.fraction is not None]
    if fractions:
        if len(fractions) < len(parts) or min(fractions) < 0 or sum(fractions) == 0:
            raise ValueError("fraction: expected one for each data set, none negative, or none at all")
        shares = [fraction / sum(fractions) for fraction in fractions]
        total = min(len(rows) / share for rows, share in zip(parts, shares, strict=True) if share)
        parts = [rows.select(range(round(share * total))) for rows, share in zip(parts, shares, strict=True)]
    mixture = datasets.concatenate_datasets(parts)
    size = mixture_config.test_split_size
    if size is None:
        return datasets.DatasetDict(train=mixture)
    return mixture.train_test_split(test_size=size if size < 1 else int(size), seed=0)


def get_peft_config(model_args: ModelConfig) -> Any:
    """A `peft.LoraConfig`, or None without `use_peft`.

    Raises:
        ImportError: peft is not installed.
    """
    if not model_args.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("use_peft: needs the package peft; get it with: pip install 'fastrl[peft]'") from error
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        task_type=model_args.lora_task_type,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )


def get_quantization_config(model_args: ModelConfig) -> Any:
    """A `transformers.BitsAndBytesConfig`, or None where no weights are quantized. 4 bits are computed with in
    `dtype`."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=model_args.dtype,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
    )

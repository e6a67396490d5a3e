"""`SFTConfig`: TRL 1.16's arguments of supervised fine-tuning."""

from dataclasses import dataclass, field
from typing import ClassVar

from fastrl.objectives.supervised import SFT_LOSSES
from fastrl.trainers.arguments import JsonDict
from fastrl.trainers.offline_config import OfflineConfig

PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped")


@dataclass
class SFTConfig(OfflineConfig):
    """Arguments of `SFTTrainer`. Names, meanings and defaults are those of TRL 1.16's `SFTConfig`, except what
    `OfflineConfig` says, and:

    - `padding_free`: nothing is ever padded where the model makes that exact, whatever it is set to;
    - `packing`: a row of the batch is a block of up to `max_length` tokens. Its sequences do not see each other, except
      with the strategy "wrapped";
    - `loss_type="chunked_nll"`, TRL's old name of "nll", is "nll".

    `packing_strategy`: "bfd" puts whole sequences, cut at `max_length`, into as few blocks as best-fit decreasing
    finds. "bfd_split" does so with the pieces of `max_length` tokens of longer ones, each a sequence of its own.
    "wrapped" makes one stream of all texts and cuts it every `max_length` tokens: within a block a text sees those
    before it.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *OfflineConfig._VALID_DICT_FIELDS,
        "dataset_kwargs",
    ]

    learning_rate: float = field(default=2e-5, metadata={"help": "Initial learning rate of AdamW."})

    # Model
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A Jinja file, or a tokenizer whose chat template to take."}
    )

    # Data
    dataset_text_field: str = field(default="text", metadata={"help": "Column of the text."})
    dataset_kwargs: JsonDict = field(
        default=None, metadata={"help": "Only {'skip_prepare_dataset': bool}: rows have 'input_ids' and are not cut."}
    )
    eos_token: str | None = field(default=None, metadata={"help": "Ends a sequence. None: the tokenizer's own."})
    pad_token: str | None = field(default=None, metadata={"help": "Deprecated in TRL. None: the tokenizer's own."})
    truncation_mode: str = field(default="keep_start", metadata={"help": "'keep_start' or 'keep_end' of max_length."})
    shuffle_dataset: bool = field(default=False, metadata={"help": "Shuffle once, before packing."})
    packing: bool = field(default=False, metadata={"help": "Fill blocks of max_length tokens."})
    packing_strategy: str = field(default="bfd", metadata={"help": "'bfd', 'bfd_split' or 'wrapped'."})
    padding_free: bool = field(default=False, metadata={"help": "Always so where the model makes that exact."})
    eval_packing: bool | None = field(default=None, metadata={"help": "Of evaluation datasets. None: as packing."})

    # Loss
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "Count the completion's tokens only. None: where a row has one."}
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Count only what the chat template marks as the assistant's."}
    )
    loss_type: str = field(default="nll", metadata={"help": "'nll' or 'dft' (Dynamic Fine-Tuning)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type == "chunked_nll":
            self.loss_type = "nll"
        if self.packing_strategy == "bfd-requeue":  # TRL's old name
            self.packing_strategy = "bfd_split"
        self._require("loss_type", self.loss_type in SFT_LOSSES, f"one of {', '.join(SFT_LOSSES)}")
        self._require("truncation_mode", self.truncation_mode in ("keep_start", "keep_end"), "'keep_start', 'keep_end'")
        known = self.packing_strategy in PACKING_STRATEGIES
        self._require("packing_strategy", known, f"one of {', '.join(PACKING_STRATEGIES)}")
        packs = self.packing or self.eval_packing
        self._require("max_length", not packs or self.max_length is not None, "the length of a block, with packing")
        keys = set(self.dataset_kwargs or {})
        self._require("dataset_kwargs", keys <= {"skip_prepare_dataset"}, "no other key than 'skip_prepare_dataset'")

    @property
    def skip_prepare_dataset(self) -> bool:
        """Whether rows are taken as they are."""
        return bool((self.dataset_kwargs or {}).get("skip_prepare_dataset", False))

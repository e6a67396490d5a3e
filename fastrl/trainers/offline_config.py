"""`OfflineConfig`: the arguments that trainers on a fixed dataset share, beside `transformers.TrainingArguments`."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from fastrl.trainers.arguments import JsonDict, fill_in_defaults, refuse_text


@dataclass
class OfflineConfig(TrainingArguments):
    """Arguments of `OfflineTrainer`; names, meanings and defaults are TRL 1.16's, except:

    - `bf16` unset means True only where the GPU has bf16 (TRL: everywhere, which fails or crawls on a CPU);
    - `pad_to_multiple_of` must be "auto" or None: nothing is padded;
    - fastrl's own arguments: `share_prompts`, `tokens_per_pass`, `loss_backend`.

    Raises:
        ValueError: an argument out of its range, or one that is not supported and not at its default.
        TypeError: an argument that does not exist.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]

    # What is refused when it is set to another value than this one: name -> (value, why). Subclasses add theirs.
    REFUSED: ClassVar[dict[str, tuple[Any, str]]] = {
        "use_liger_kernel": (False, "it replaces the forward that fastrl patches"),
        "label_smoothing_factor": (0.0, "it needs the logits of every token, which are never built"),
        "average_tokens_across_devices": (True, "the loss is normalized over all processes"),
        "include_for_metrics": ([], "compute_metrics gets logits, which are never built"),
        "batch_eval_metrics": (False, "compute_metrics gets logits, which are never built"),
    }

    # TrainingArguments with other defaults
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Compute activations anew in the backward, for their memory."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 autocast. Unset: on where the GPU has bf16 and fp16 is off."}
    )

    # Model
    model_init_kwargs: JsonDict = field(
        default=None, metadata={"help": "Arguments of from_pretrained, when the model is given by path."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code that ships with a model."})
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of a mixture of experts' load-balancing loss; None: the model's own; 0: none."},
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep what the backward needs in the CPU's memory until then."}
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Set every dropout of the model to 0."})

    # Data
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize a datasets.Dataset; a list is tokenized by this one."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Tokens of a sequence, at most; None: what the model can attend to."}
    )
    pad_to_multiple_of: int | str | None = field(default="auto", metadata={"help": "Only 'auto' or None."})

    # fastrl's own
    share_prompts: bool | None = field(
        default=None,
        metadata={"help": "Encode equal prompts once. None: where the model makes that exact; True: or fail."},
    )
    tokens_per_pass: int | None = field(
        default=None,
        metadata={"help": "Most tokens of one forward and backward; None: chosen by device. Not with FSDP."},
    )
    loss_backend: str | None = field(
        default=None, metadata={"help": "'reference', 'cpu', 'triton', 'cuda'; None: chosen."}
    )

    def __post_init__(self) -> None:
        fill_in_defaults(self)
        super().__post_init__()
        refuse_text(self)
        self._refuse_unsupported()
        self._require("max_length", self.max_length is None or self.max_length >= 1, "None or at least 1")
        passes = self.tokens_per_pass
        self._require("tokens_per_pass", passes is None or passes >= 1, "None or at least 1")
        self._require("pad_to_multiple_of", self.pad_to_multiple_of in (None, "auto"), "'auto' or None")
        strategies = ("random", "sequential")
        strategy = str(getattr(self.train_sampling_strategy, "value", self.train_sampling_strategy))
        self._require(
            "train_sampling_strategy",
            strategy in strategies,
            f"one of {', '.join(strategies)} (passes are filled by tokens_per_pass)",
        )

    def _require(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _refuse_unsupported(self) -> None:
        given = [
            f"{name}={getattr(self, name)!r} ({why}; leave it at {value!r})"
            for name, (value, why) in self.REFUSED.items()
            if getattr(self, name) != value
        ]
        if given:
            raise ValueError(f"{type(self).__name__}: not supported: {'; '.join(given)}")
        parallelism = self.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError("parallelism_config: context and sequence parallelism are not supported")

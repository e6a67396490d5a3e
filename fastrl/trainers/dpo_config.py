"""`DPOConfig` and `KTOConfig`: TRL 1.16's arguments of preference optimisation, and those of the methods that TRL keeps
apart (CPO, SimPO, AlphaPO, ORPO, TPO)."""

from dataclasses import dataclass, field, fields
from typing import Any

from fastrl.objectives import CPOObjective, KTOObjective, ORPOObjective, PreferenceObjective, TPOObjective
from fastrl.objectives.dpo import LOSS_TYPES
from fastrl.objectives.kto import KTO_LOSS_TYPES
from fastrl.objectives.pairs import PairObjective
from fastrl.trainers.offline_config import OfflineConfig

# Loss types that are not DPO's: the objective, and the name that it has for the loss.
_OTHERS: dict[str, tuple[Any, str | None]] = {
    **{name: (KTOObjective, name) for name in KTO_LOSS_TYPES},
    "cpo": (CPOObjective, "sigmoid"),
    "cpo_hinge": (CPOObjective, "hinge"),
    "cpo_ipo": (CPOObjective, "ipo"),
    "simpo": (CPOObjective, "simpo"),
    "alphapo": (CPOObjective, "alphapo"),
    "orpo": (ORPOObjective, None),
    "tpo": (TPOObjective, "sigmoid"),
    "tpo_hinge": (TPOObjective, "hinge"),
    "tpo_ipo": (TPOObjective, "ipo"),
    "tpo-l": (TPOObjective, "tpo-l"),
}
_OBJECTIVES = (PreferenceObjective, KTOObjective, CPOObjective, ORPOObjective, TPOObjective)


@dataclass
class DPOConfig(OfflineConfig):
    """Arguments of `DPOTrainer`. Names, meanings and defaults are those of TRL 1.16's `DPOConfig`, except what
    `OfflineConfig` says, and:

    - `loss_type` also takes, each alone: "kto" and "apo_zero_unpaired" (TRL's `KTOTrainer`); "cpo", "cpo_hinge",
      "cpo_ipo", "simpo" and "alphapo" (its `CPOTrainer`); "orpo"; "tpo", "tpo_hinge", "tpo_ipo" and "tpo-l"
      (its `TPOTrainer`). Their arguments are here under TRL's names, with its defaults but for `beta`, which TPO has at
      0.01. An argument that the loss type has no use for is refused when it is set.
    - `cpo_alpha=None` is 1, TRL's default, and 0 for "alphapo".
    - `padding_free`: nothing is ever padded where the model makes that exact, whatever it is set to.
    - `f_divergence_type`, `label_smoothing`, `loss_weights` and so on: see `fastrl.PreferenceObjective`, which also
      has the remedies of likelihood displacement, `rpo_alpha` and `dpop_lambda`, and `reference_free`.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the models to 0."})

    # Data
    truncation_mode: str = field(default="keep_start", metadata={"help": "'keep_start' or 'keep_end' of max_length."})
    padding_free: bool = field(default=False, metadata={"help": "Always so where the model makes that exact."})
    pad_token: str | None = field(default=None, metadata={"help": "Deprecated in TRL. None: the tokenizer's own."})
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Run the reference once, before training, and keep no copy of the model."}
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per batch of that. None: the batch size of training or evaluation."}
    )

    # Loss
    loss_type: list[str] | str = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "One or several of " + ", ".join(LOSS_TYPES) + ", or one of " + ", ".join(_OTHERS) + "."},
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "Per loss type; None: 1 each."})
    ld_alpha: float | None = field(
        default=None, metadata={"help": "LD-DPO: weight of the tokens beyond the shorter answer's length."}
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": "'reverse_kl', 'forward_kl', 'js_divergence' or 'alpha_divergence'."},
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "alpha of the alpha divergence."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of labels believed to be flipped."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the pull to the reference."})
    use_weighting: bool = field(default=False, metadata={"help": "WPO: weight pairs by the policy's probability."})
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of DiscoPOP."})
    sync_ref_model: bool = field(default=False, metadata={"help": "TR-DPO: let the reference follow the policy."})
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"help": "Share of the policy in the new reference."})
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Optimizer steps between two of these."})

    # Of TRL's KTOConfig, CPOConfig and TPOConfig
    desirable_weight: float = field(default=1.0, metadata={"help": "KTO: weight of good answers."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "KTO: weight of bad answers."})
    cpo_alpha: float | None = field(default=None, metadata={"help": "CPO, SimPO: weight of the chosen answers' NLL."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "SimPO, AlphaPO: target margin."})
    alpha: float = field(default=0.0, metadata={"help": "AlphaPO: shape of the reward."})
    tpo_alpha: float = field(default=1.0, metadata={"help": "TPO: weight of the gold answers' NLL."})
    tpo_l_gamma: float = field(default=0.5, metadata={"help": "TPO-L: target margin."})

    # fastrl's own
    reference_free: bool = field(default=False, metadata={"help": "DPO's losses without a reference."})
    rpo_alpha: float = field(default=0.0, metadata={"help": "Weight of the chosen answers' NLL (RPO)."})
    dpop_lambda: float = field(default=0.0, metadata={"help": "Price of a chosen answer that falls (DPO-Positive)."})

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()
        self._require("truncation_mode", self.truncation_mode in ("keep_start", "keep_end"), "'keep_start', 'keep_end'")
        size = self.precompute_ref_batch_size
        self._require("precompute_ref_batch_size", size is None or size >= 1, "None or at least 1")
        self._require("ref_model_mixup_alpha", 0 <= self.ref_model_mixup_alpha <= 1, "a number in [0, 1]")
        self._require("ref_model_sync_steps", self.ref_model_sync_steps >= 1, "at least 1")
        objective = self.objective()
        if not needs_reference(objective):
            for name in ("precompute_ref_log_probs", "sync_ref_model"):
                self._require(name, not getattr(self, name), f"False, {' and '.join(self.loss_type)} has no reference")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("sync_ref_model: not with precompute_ref_log_probs, which takes the reference as fixed")
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if isinstance(objective, KTOObjective) and objective.needs_kl and rows < 2:
            raise ValueError(
                "per_device_train_batch_size: kto compares with answers of other rows of the optimizer step, expected "
                "at least 2 rows (per_device_train_batch_size x gradient_accumulation_steps x processes), got 1"
            )

    def objective(self) -> PairObjective | KTOObjective:
        """The objective that these arguments describe.

        Raises:
            ValueError: an argument out of its range or of no use to the loss type.
        """
        types = list(self.loss_type)
        others = [name for name in types if name in _OTHERS]
        known = bool(types) and set(types) <= {*LOSS_TYPES, *_OTHERS}
        self._require("loss_type", known, f"some of {', '.join(LOSS_TYPES)}, or one of {', '.join(_OTHERS)}")
        self._require("loss_type", not others or len(types) == 1, f"{' and '.join(others)} alone")
        objective, name = _OTHERS[types[0]] if others else (PreferenceObjective, None)
        own = _arguments(objective)
        for argument in sorted(set().union(*map(_arguments, _OBJECTIVES)) - own - {"loss_type"}):
            default = type(self).__dataclass_fields__.get(argument)
            if default is not None and getattr(self, argument) != default.default:
                self._require(argument, False, f"{default.default!r}: {' and '.join(types)} has no use for it")
        given = {argument: getattr(self, argument) for argument in own if hasattr(self, argument)}
        if others:
            given.pop("loss_type", None)
            given |= {} if name is None else {"loss_type": name}
        made: PairObjective | KTOObjective = objective(**given)
        return made


def needs_reference(objective: PairObjective | KTOObjective) -> bool:
    """Whether log-probabilities under a reference enter the loss or the metrics."""
    return isinstance(objective, KTOObjective) or objective.needs_reference


def _arguments(objective: Any) -> set[str]:
    return {item.name for item in fields(objective) if item.init}


@dataclass
class KTOConfig(DPOConfig):
    """Arguments of `KTOTrainer`: TRL 1.16's `KTOConfig`. As `DPOConfig`, with KTO's defaults.

    `train_sampling_strategy` may also be "random", which TRL refuses: the answer that a row's prompt is mismatched with
    belongs to the row, wherever it comes.
    """

    loss_type: str = field(default="kto", metadata={"help": "'kto' or 'apo_zero_unpaired'."})
    train_sampling_strategy: str = field(default="sequential", metadata={"help": "'sequential' or 'random'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("loss_type", self.loss_type[0] in KTO_LOSS_TYPES, f"one of {', '.join(KTO_LOSS_TYPES)}")

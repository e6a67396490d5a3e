"""`RewardConfig` and `PRMConfig`: TRL's arguments of reward models."""

from dataclasses import dataclass, field

from fastrl.objectives.reward_model import RANKING_KINDS
from fastrl.trainers.offline_config import OfflineConfig

LOSS_TYPES = ("bradley_terry", *RANKING_KINDS, "orm", "prm")

# Arguments that only one loss type has a use for.
_ONLY = {
    "center_rewards_coefficient": "bradley_terry",
    "step_separator": "prm",
    "train_on_last_step_only": "prm",
    "max_prompt_length": "prm",
    "max_completion_length": "prm",
}


@dataclass
class RewardConfig(OfflineConfig):
    """Arguments of `RewardTrainer`. Names, meanings and defaults are those of TRL 1.16's `RewardConfig`, except what
    `OfflineConfig` says, and:

    - `max_length`: rows with a longer sequence are left out, as in TRL; with "prm" sequences are cut, as in TRL's
      `PRMTrainer`.
    - `model_init_kwargs`: `dtype` is float32 if it does not say otherwise, as in TRL; `num_labels` can only be said for
      "prm", where it is 2 if it is not.
    - `router_aux_loss_coef` is 0.0: TRL's reward models have no auxiliary loss. None: what the model declares.
    - `loss_type`, one of

        bradley_terry   pairs, with a margin where the rows have one (TRL's RewardTrainer)
        pairwise        K-ranked answers: all their pairs, every prompt weighted alike (InstructGPT)
        plackett_luce   K-ranked answers: the likelihood of the ranking
        orm             unpaired rows: every token of an answer predicts its label
        prm             stepwise rows: the token that ends a step predicts the step's label (TRL's PRMTrainer)

    - `step_separator`, `train_on_last_step_only`, `max_prompt_length`, `max_completion_length`: of TRL's former
      `PRMConfig`, for "prm" only.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})

    # Model
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Weight of a mixture of experts' load-balancing loss; None: the model's own."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A Jinja file, or a tokenizer whose chat template to take."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to 0."})

    # Data
    eos_token: str | None = field(default=None, metadata={"help": "Ends a sequence. None: the tokenizer's own."})
    pad_token: str | None = field(default=None, metadata={"help": "Deprecated in TRL. None: the tokenizer's own."})

    # Loss
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of the squared sum of a pair's rewards; TRL recommends 0.01."}
    )
    loss_type: str = field(default="bradley_terry", metadata={"help": "One of " + ", ".join(LOSS_TYPES) + "."})

    # Of TRL's PRMConfig
    step_separator: str = field(default="\n", metadata={"help": "prm: text after each step."})
    train_on_last_step_only: bool = field(default=False, metadata={"help": "prm: not in evaluation."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "prm: a longer prompt loses its beginning."})
    max_completion_length: int | None = field(default=None, metadata={"help": "prm: longer steps lose their end."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("loss_type", self.loss_type in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}")
        for name, user in _ONLY.items():
            default = type(self).__dataclass_fields__[name].default
            unused = self.loss_type != user and getattr(self, name) != default
            self._require(name, not unused, f"{default!r}: only loss_type {user!r} has a use for it")
        for name in ("max_prompt_length", "max_completion_length"):
            size = getattr(self, name)
            self._require(name, size is None or size >= 1, "None or at least 1")
        centering = self.center_rewards_coefficient
        self._require("center_rewards_coefficient", centering is None or centering >= 0, "None or at least 0")
        given = (self.model_init_kwargs or {}).get("num_labels", 1)
        if self.loss_type != "prm" and given != 1:
            raise ValueError(f"model_init_kwargs: num_labels=1, a reward model has one score, got {given!r}")


@dataclass
class PRMConfig(RewardConfig):
    """Arguments of `PRMTrainer`: those of TRL's former `PRMConfig` with its defaults, and `RewardConfig`'s."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    max_prompt_length: int | None = field(default=512, metadata={"help": "A longer prompt loses its beginning."})
    loss_type: str = field(default="prm", metadata={"help": "Only 'prm'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("loss_type", self.loss_type == "prm", "'prm'")

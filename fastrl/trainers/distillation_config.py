"""`DistillationConfig`: TRL 1.16's arguments of distillation, and what its GKD has besides.

What this version does not do is refused when it is set to something else than its default: never accepted and ignored.
Arguments of vLLM that have no meaning where they are given are the exception; see `grpo_config`.
"""

from dataclasses import dataclass, field, fields
from typing import ClassVar

from fastrl.trainers.arguments import JsonDict
from fastrl.trainers.online_config import OnlineConfig

# How the help of fields begins that are without effect here, and keep their defaults.
ONLY_DEFAULT = "Only the default: "
NO_REWARDS = {"help": f"{ONLY_DEFAULT}there are no rewards."}
NO_CORRECTION = {"help": f"{ONLY_DEFAULT}nothing is corrected."}


@dataclass
class DistillationConfig(OnlineConfig):
    """Arguments of `DistillationTrainer`.

    Names, meanings and defaults are those of TRL 1.16's `DistillationConfig`, except:
      - `lmbda` and `seq_kd` are those of TRL's `GKDConfig`, whose other arguments are called as here: `max_new_tokens`
        is `max_completion_length`. The defaults are TRL's on-policy distillation: lmbda 1, beta 1;
      - `bf16` unset means True only where the GPU has bf16 (TRL: everywhere, which fails or crawls on a CPU);
      - `max_completion_length` must be a number, `pad_to_multiple_of` "auto" or None;
      - the other arguments are those of `OnlineConfig`, of which those about rewards and about a correction for the
        engine's log-probabilities must have their defaults: there are none here.

    Raises:
        ValueError, TypeError: see `OnlineConfig`.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*OnlineConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # type: ignore[misc]

    # With other defaults than elsewhere
    num_generations: int = field(default=1, metadata={"help": "Completions per prompt in a rollout."})

    # Teacher
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher, where the trainer gets none."}
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Of a teacher given by path."})
    teacher_model_init_kwargs: JsonDict = field(
        default=None, metadata={"help": "Arguments of from_pretrained, when the teacher is given by path."}
    )

    # Objective
    beta: float = field(
        default=1.0,
        metadata={"help": "0: forward KL; 1: reverse KL; between: generalized JSD. Not a weight of a reference."},
    )
    lmbda: float = field(
        default=1.0, metadata={"help": "Share of rollouts that the student samples; the others are the dataset's."}
    )
    seq_kd: bool = field(
        default=False, metadata={"help": "Let the teacher sample the completions that the student does not."}
    )
    max_tool_calling_iterations: int | None = field(default=None, metadata={"help": "Only None."})

    # Of the other online methods, without effect here
    reward_weights: list[float] | None = field(default=None, metadata=NO_REWARDS)
    reward_timeout: float | None = field(default=None, metadata=NO_REWARDS)
    reward_workers: int = field(default=8, metadata=NO_REWARDS)
    max_failed_reward_batches: int = field(default=3, metadata=NO_REWARDS)
    vllm_importance_sampling_correction: bool = field(default=True, metadata=NO_CORRECTION)
    vllm_importance_sampling_mode: str = field(default="sequence_mask", metadata=NO_CORRECTION)
    vllm_importance_sampling_clip_max: float | None = field(default=3.0, metadata=NO_CORRECTION)
    vllm_importance_sampling_clip_min: float | None = field(default=None, metadata=NO_CORRECTION)
    vllm_importance_sampling_cap: float | None = field(default=None, metadata=NO_CORRECTION)

    @property
    def kind(self) -> str:
        """Of `fastrl.linear_distillation_loss`."""
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta, "jsd")

    @property
    def needs_completions(self) -> bool:
        """Whether rows of the dataset must have a completion."""
        return self.lmbda < 1 and not self.seq_kd

    def _check_values(self) -> None:
        require = self._require
        require("max_completion_length", self.max_completion_length is not None, "a number of tokens")
        super()._check_values()
        require("beta", 0 <= self.beta <= 1, "a number in [0, 1]")
        require("lmbda", 0 <= self.lmbda <= 1, "a number in [0, 1]")
        require("seq_kd", self.lmbda < 1 or not self.seq_kd, "False with lmbda 1, where the student samples everything")
        if self.lmbda == 0:
            require("use_vllm", not self.use_vllm, "False with lmbda 0, where the student samples nothing")
        if self.needs_completions:
            require(
                "remove_unused_columns",
                not self.remove_unused_columns,
                "False with lmbda < 1: completions are a column",
            )
        for item in fields(self):
            why = item.metadata.get("help", "")
            if why.startswith(ONLY_DEFAULT):
                expected = f"{item.default!r}, as {why.removeprefix(ONLY_DEFAULT).rstrip('.')}"
                require(item.name, getattr(self, item.name) == item.default, expected)

"""`GRPOConfig`: TRL 1.16's arguments of GRPO.

Every argument of TRL's exists here, under its name and with its default. What this version does not do yet is refused
when it is set to something else than its default: never accepted and ignored. Arguments of vLLM have no meaning without
`use_vllm`, as in TRL, nor have those of the other `vllm_mode`; with a server, a warning names those that are its own.
"""

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from fastrl.objectives import PolicyObjective, RolloutCorrection
from fastrl.trainers.online_config import OnlineConfig

# Estimators of verl's that need no more than a reward per completion, by their names in `fastrl.compute_advantages`.
ESTIMATORS = ("grpo_passk", "opo", "gpg", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


@dataclass
class GRPOConfig(OnlineConfig):
    """Arguments of `GRPOTrainer`.

    Names, meanings and defaults are those of TRL 1.16's `GRPOConfig`, except:
      - `bf16` unset means True only where the GPU has bf16 (TRL: everywhere, which fails or crawls on a CPU);
      - `pad_to_multiple_of` must be "auto" or None: nothing is padded;
      - `vllm_importance_sampling_*` apply to every engine that is not the trained model itself and gives the
        log-probabilities of its tokens, with or without `use_vllm`;
      - fastrl's own arguments are those of `OnlineConfig` and of this class under "fastrl's own".

    Raises:
        ValueError: an argument out of its range, a combination that cannot work, or an argument of TRL's that this
            version does not support and that is not at its default.
        TypeError: an argument that does not exist.
    """

    MIN_GENERATIONS: ClassVar[int] = 2

    # Reference model
    sync_ref_model: bool = field(default=False, metadata={"help": "Let the reference follow the policy."})
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"help": "Weight of the policy in a new reference."})
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Optimizer steps between two of them."})

    # Objective (see fastrl.PolicyObjective)
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL to the reference; 0: no reference model."})
    epsilon: float = field(default=0.2, metadata={"help": "Lower clip of the ratio."})
    delta: float | None = field(default=None, metadata={"help": "Upper bound of the ratio (two-sided clip)."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip; None: epsilon."})
    sapo_temperature_neg: float = field(default=1.05, metadata={"help": "sapo: for negative advantages."})
    sapo_temperature_pos: float = field(default=1.0, metadata={"help": "sapo: for positive advantages."})
    vespo_k_pos: float = field(default=2.0, metadata={"help": "vespo: power of the weight, advantage >= 0."})
    vespo_lambda_pos: float = field(default=3.0, metadata={"help": "vespo: decay of the weight, advantage >= 0."})
    vespo_k_neg: float = field(default=3.0, metadata={"help": "vespo: power of the weight, advantage < 0."})
    vespo_lambda_neg: float = field(default=2.0, metadata={"help": "vespo: decay of the weight, advantage < 0."})
    importance_sampling_level: str = field(default="token", metadata={"help": "'token', or 'sequence' (GSPO)."})
    multi_objective_aggregation: str = field(
        default="sum_then_normalize", metadata={"help": "'sum_then_normalize' or 'normalize_then_sum' (GDPO)."}
    )
    scale_rewards: Literal["group", "batch", "none", True, False] = field(
        default="group", metadata={"help": "'group' or True, 'batch', 'none' or False (Dr. GRPO)."}
    )
    loss_type: str = field(default="dapo", metadata={"help": "The policy term; see PolicyObjective."})
    top_entropy_quantile: float = field(default=1.0, metadata={"help": "Share of the tokens that enter the loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    use_adaptive_entropy: bool = field(default=False, metadata={"help": "Steer entropy_coef towards entropy_target."})
    entropy_coef_min: float = field(default=0.0, metadata={"help": "Lower bound of the adaptive coefficient."})
    entropy_coef_max: float = field(default=1.0, metadata={"help": "Upper bound of the adaptive coefficient."})
    entropy_coef_delta: float = field(default=0.005, metadata={"help": "Its change per optimizer step."})
    entropy_target: float = field(default=0.2, metadata={"help": "Mean entropy per token to hold, in nats."})
    max_tool_calling_iterations: int | None = field(default=None, metadata={"help": "Only None."})
    off_policy_mask_threshold: float | None = field(
        default=None, metadata={"help": "Leave out sequences of negative advantage that drifted further than this."}
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Multiply the KL by the ratio, where loss type and preset have one per token."}
    )

    # fastrl's own
    preset: str | None = field(default=None, metadata={"help": "'trl', 'verl' or 'openrlhf': that project's numbers."})
    aggregation: str | None = field(default=None, metadata={"help": "Of the tokens' losses; None: the loss type's."})
    kl_estimator: str = field(default="k3", metadata={"help": "One of kl_estimate's, or 'full': the exact KL."})
    nll_coef: float = field(default=0.0, metadata={"help": "Weight of the likelihood of positive examples (VAPO)."})
    clip_ratio_c: float | None = field(default=None, metadata={"help": "ppo: dual clip; dppo_*: cap of the ratio."})
    clip_cov_ratio: float = field(default=0.0002, metadata={"help": "clip_cov: share of the tokens left out."})
    clip_cov_lb: float = field(default=1.0, metadata={"help": "clip_cov: least covariance of those."})
    clip_cov_ub: float = field(default=5.0, metadata={"help": "clip_cov: largest covariance of those."})
    kl_cov_ratio: float = field(default=0.0002, metadata={"help": "kl_cov: share of the tokens penalised."})
    ppo_kl_coef: float = field(default=0.1, metadata={"help": "kl_cov: weight of the penalty."})
    dro_beta: float = field(default=1.0, metadata={"help": "dro: weight of the quadratic penalty."})
    advantage_baseline: str = field(default="mean", metadata={"help": "'mean', 'leave_one_out' or 'best_of_k'."})
    advantage_estimator: str | None = field(
        default=None,
        metadata={"help": f"One of verl's: {', '.join(ESTIMATORS)}; then without baseline and scale_rewards."},
    )
    dynamic_sampling: bool = field(
        default=False, metadata={"help": "Replace groups whose rewards are all equal by other prompts' (DAPO)."}
    )
    max_resample_rounds: int = field(
        default=3, metadata={"help": "dynamic_sampling: how often further prompts are sampled for one rollout."}
    )
    old_logps_from_engine: bool = field(
        default=False, metadata={"help": "Take the engine's log-probabilities for the old ones: no scoring pass."}
    )
    skip_dead_sequences: bool = field(
        default=True, metadata={"help": "Skip the model's forward and backward of sequences that carry no gradient."}
    )
    grad_tolerance: float = field(
        default=0.0,
        metadata={"help": "Share of the loss's gradient that may be left out, the smallest rows first. 0: exact."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.per_device_train_batch_size * self.steps_per_generation
        if self.dynamic_sampling and own % self.num_generations:
            raise ValueError(
                f"dynamic_sampling: a process's completions ({own} = per_device_train_batch_size x "
                f"steps_per_generation) must be whole groups of num_generations ({self.num_generations})"
            )
        self.objective()  # the objective checks its own arguments

    def objective(self) -> PolicyObjective:
        """The objective that these arguments describe; the adaptive coefficient is the trainer's to put in."""
        names = [item.name for item in fields(PolicyObjective) if item.init]
        settings = {name: getattr(self, name) for name in names}
        if self.use_bias_correction_kl:
            settings["use_bias_correction_kl"] = None  # where the loss type and the preset have it
        return PolicyObjective(**settings)

    def correction(self) -> RolloutCorrection | None:
        """See `OnlineConfig.correction`; where the old log-probabilities are the engine's, nothing is corrected."""
        return None if self.old_logps_from_engine else super().correction()

    def _check_values(self) -> None:
        super()._check_values()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        require = self._require
        require("grad_tolerance", 0 <= self.grad_tolerance < 1, "a number in [0, 1)")
        require("scale_rewards", self.scale_rewards in ("group", "batch", "none"), "'group', 'batch' or 'none'")
        baselines = ("mean", "leave_one_out", "best_of_k")
        require("advantage_baseline", self.advantage_baseline in baselines, " or ".join(baselines))
        aggregations = ("sum_then_normalize", "normalize_then_sum")
        require(
            "multi_objective_aggregation", self.multi_objective_aggregation in aggregations, " or ".join(aggregations)
        )
        if self.advantage_estimator is not None:
            require("advantage_estimator", self.advantage_estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}")
            for name in ("scale_rewards", "advantage_baseline", "multi_objective_aggregation"):
                default = type(self).__dataclass_fields__[name].default
                require(name, getattr(self, name) == default, f"{default!r} with advantage_estimator, which sets it")
        if self.old_logps_from_engine and not self.sampling_params().from_policy:
            raise ValueError(
                "old_logps_from_engine: expected sampling from the policy itself, but top_p, top_k, min_p, "
                "repetition_penalty or generation_kwargs change its distribution"
            )
        require("max_resample_rounds", self.max_resample_rounds >= 1, "at least 1")
        if self.vllm_importance_sampling_cap is not None:
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap
        correction = self.correction()
        foreign = self.use_vllm or self.async_rollouts
        if foreign and correction is not None and correction.level == "sequence" and self.loss_type == "vespo":
            raise ValueError(
                "vllm_importance_sampling_mode: vespo multiplies ratios of tokens, expected 'token_truncate' or "
                f"'token_mask', got {self.vllm_importance_sampling_mode!r}"
            )
        require("beta", self.beta >= 0, "a number of at least 0")
        if self.sync_ref_model:
            require("sync_ref_model", self.beta != 0, "False without a reference (beta is 0)")
            require("ref_model_mixup_alpha", 0 <= self.ref_model_mixup_alpha <= 1, "a number in [0, 1]")
            require("ref_model_sync_steps", self.ref_model_sync_steps >= 1, "at least 1")
        if self.use_adaptive_entropy and self.top_entropy_quantile < 1:
            raise ValueError("use_adaptive_entropy: not supported together with top_entropy_quantile < 1 yet")
        if self.use_adaptive_entropy and self.preset == "verl":
            raise ValueError("use_adaptive_entropy: not with preset 'verl', whose bonus is no mean over tokens")

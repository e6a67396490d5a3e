"""`PPOConfig`: the arguments of PPO in TRL's last version that had it."""

import math
from dataclasses import dataclass, field

from fastrl.objectives import AdaptiveKL, FixedKL, PolicyObjective
from fastrl.trainers.online_config import OnlineConfig

ESTIMATORS = ("k1", "k2", "k3", "abs")
# Arguments that TRL computes itself, whatever they are set to.
COMPUTED = ("micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size", "mini_batch_size")


_OWN_NAMES = {"num_iterations": "num_ppo_epochs", "max_completion_length": "response_length"}


@dataclass
class PPOConfig(OnlineConfig):
    """Arguments of `PPOTrainer`.

    A rollout has per_device_train_batch_size x gradient_accumulation_steps completions on each process, as in TRL. It
    is split into `num_mini_batches`, an optimizer step each, and trained on `num_ppo_epochs` times. With more than one
    of them per_device_train_batch_size and gradient_accumulation_steps then become those of a mini-batch; give
    `steps_per_generation` (= gradient_accumulation_steps x num_mini_batches) to set these directly.

    Names, meanings and defaults are those of TRL's `PPOConfig`, except:
      - `sft_model_path` and `reward_model_path` are None unless given (TRL: pythia-160m) and are used by the trainer
        where it gets no model;
      - `logging_steps`, `save_steps`, `eval_steps`, `max_steps` and the learning rate schedule count optimizer steps
        (TRL: rollouts);
      - an optimizer step is a mini-batch (in TRL accumulation runs across mini-batches, so that it is a whole epoch);
      - `kl_estimator` may also be "k2" or "abs";
      - `num_sample_generations` must be 10 or 0, neither of which shows anything: `log_completions` shows the
        completions, `eval_strategy` samples for the evaluation prompts;
      - the sizes that TRL computes (`batch_size`, ..., `num_total_batches`) may be read, not set; `world_size` is
        transformers' property;
      - `dataset_num_proc` is for scripts, as in TRL: the trainer itself processes no dataset.
    The other arguments are those of `OnlineConfig`, of which `num_iterations` and `max_completion_length` are called
    `num_ppo_epochs` and `response_length` here.

    Raises:
        ValueError, TypeError: see `OnlineConfig`.
    """

    # With other defaults than elsewhere
    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of AdamW."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature, which the loss scores with too."})
    num_generations: int = field(default=1, metadata={"help": "Completions per prompt in a rollout."})
    num_iterations: int = field(  # type: ignore[assignment]  # never None once made
        default=None, metadata={"help": "Only num_ppo_epochs, which sets it."}
    )
    max_completion_length: int = field(  # type: ignore[assignment]  # never None once made
        default=None, metadata={"help": "Only response_length, which sets it."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the models to 0."})

    # Rollouts
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps that a rollout is split into."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Completions to train on, rounded up to whole rollouts; sets max_steps."}
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Most sequences of a forward without gradient."}
    )
    num_sample_generations: int = field(default=10, metadata={"help": "Only 10 or 0, without effect."})
    response_length: int = field(default=53, metadata={"help": "Tokens per completion, at most."})
    stop_token: str | None = field(
        default=None, metadata={"help": "'eos': the tokenizer's ends a completion. None: stop_token_id does."}
    )
    stop_token_id: int | None = field(
        default=None, metadata={"help": "Token that ends a completion. None without stop_token: none does."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the score of a completion without an end-of-sequence token."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "For scripts that process a dataset."})

    # Models
    sft_model_path: str | None = field(default=None, metadata={"help": "The policy, where the trainer gets none."})
    reward_model_path: str | None = field(
        default=None, metadata={"help": "The reward model, where the trainer gets neither one nor reward functions."}
    )
    model_adapter_name: str | None = field(default=None, metadata={"help": "The PEFT adapter that is trained."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "The PEFT adapter that is the reference."})

    # Objective
    num_ppo_epochs: int = field(default=4, metadata={"help": "Optimizer epochs over each rollout."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Divide the rewards per token by their deviation."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL in the reward; 0: no reference model."})
    kl_estimator: str = field(default="k1", metadata={"help": "Of the KL per token: 'k1', 'k2', 'k3' or 'abs'."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip of the policy's ratio."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "Clip of the values around those of the rollout; None: none."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})

    # Computed
    num_total_batches: int | None = field(default=None, metadata={"help": "Rollouts, where total_episodes is given."})
    micro_batch_size: int | None = field(default=None, metadata={"help": "Completions of a backward, all processes."})
    local_batch_size: int | None = field(default=None, metadata={"help": "Completions of a rollout, one process."})
    batch_size: int | None = field(default=None, metadata={"help": "Completions of a rollout, all processes."})
    local_mini_batch_size: int | None = field(default=None, metadata={"help": "Completions of a step, one process."})
    mini_batch_size: int | None = field(default=None, metadata={"help": "Completions of a step, all processes."})

    # fastrl's own
    whiten_advantages: bool = field(default=True, metadata={"help": "Advantages of mean 0 and variance 1."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    kl_target: float | None = field(
        default=None, metadata={"help": "Nats per completion that kl_coef is steered to (Ziegler et al. 2019)."}
    )
    kl_horizon: float = field(
        default=10000.0, metadata={"help": "kl_target: completions over which kl_coef may change by e^0.2."}
    )

    def __post_init__(self) -> None:
        for general, name in _OWN_NAMES.items():
            if getattr(self, general) not in (None, getattr(self, name)):
                raise ValueError(
                    f"{general}: it is called {name} here, expected None or {getattr(self, name)}, got "
                    f"{getattr(self, general)!r}"
                )
            setattr(self, general, getattr(self, name))
        super().__post_init__()
        self._compute_sizes()

    def _require(self, name: str, valid: bool, expected: str) -> None:
        super()._require(_OWN_NAMES.get(name, name), valid, expected)

    def objective(self) -> PolicyObjective:
        """The policy term and the entropy bonus; without PPO's dual clip, which the paper does not have."""
        return PolicyObjective(
            loss_type="ppo", epsilon=self.cliprange, clip_ratio_c=math.inf, entropy_coef=self.entropy_coef
        )

    def kl_controller(self) -> FixedKL:
        """Of the KL's weight."""
        if self.kl_target is None:
            return FixedKL(self.kl_coef)
        return AdaptiveKL(self.kl_coef, target=self.kl_target, horizon=self.kl_horizon)

    def _check_values(self) -> None:
        super()._check_values()
        require = self._require
        for name in ("num_ppo_epochs", "num_mini_batches", "response_length", "local_rollout_forward_batch_size"):
            require(name, getattr(self, name) >= 1, "at least 1")
        require("total_episodes", self.total_episodes is None or self.total_episodes >= 1, "None or at least 1")
        require(
            "num_sample_generations",
            self.num_sample_generations in (0, 10),
            "10 or 0 (log_completions shows the completions, eval_strategy samples for the evaluation prompts)",
        )
        require("stop_token", self.stop_token in (None, "eos"), "None or 'eos'")
        require("stop_token_id", self.stop_token is None or self.stop_token_id is None, "None with stop_token")
        stops = self.stop_token is not None or self.stop_token_id is not None
        require("mask_truncated_completions", stops or not self.mask_truncated_completions, "False without stop_token")
        require("missing_eos_penalty", (self.missing_eos_penalty or 1) > 0, "None or a number above 0")
        require("kl_coef", self.kl_coef >= 0, "a number of at least 0")
        require("kl_estimator", self.kl_estimator in ESTIMATORS, " or ".join(ESTIMATORS))
        require("cliprange", self.cliprange >= 0, "a number of at least 0")
        require("cliprange_value", (self.cliprange_value or 0) >= 0, "None or a number of at least 0")
        require("vf_coef", self.vf_coef >= 0, "a number of at least 0")
        require("gamma", 0 <= self.gamma <= 1, "a number in [0, 1]")
        require("lam", 0 <= self.lam <= 1, "a number in [0, 1]")
        if self.ref_adapter_name is not None:
            require("ref_adapter_name", self.kl_coef > 0, "None without a KL (kl_coef is 0)")

    def _set_generation_batch(self) -> None:
        if self.steps_per_generation is None and self.generation_batch_size is None:
            local, parts = self.per_device_train_batch_size * self.gradient_accumulation_steps, self.num_mini_batches
            self._require(
                "num_mini_batches",
                local % parts == 0,
                f"a divisor of per_device_train_batch_size x gradient_accumulation_steps ({local})",
            )
            micro = math.gcd(local // parts, self.per_device_train_batch_size)
            self.per_device_train_batch_size, self.gradient_accumulation_steps = micro, local // parts // micro
            self.steps_per_generation = local // micro
        super()._set_generation_batch()
        expected = self.gradient_accumulation_steps * self.num_mini_batches
        self._require(
            "steps_per_generation",
            self.steps_per_generation == expected,
            f"gradient_accumulation_steps x num_mini_batches ({expected})",
        )

    def _compute_sizes(self) -> None:
        micro, steps, world = self.per_device_train_batch_size, self.gradient_accumulation_steps, self.world_size
        rollout = micro * self.steps_per_generation
        sizes = (micro * world, rollout, rollout * world, micro * steps, micro * steps * world)
        for name, size in zip(COMPUTED, sizes, strict=True):
            self._set_computed(name, size)
        rollouts = None if self.total_episodes is None else math.ceil(self.total_episodes / (rollout * world))
        self._set_computed("num_total_batches", rollouts)
        if rollouts is not None:
            optimizer_steps = rollouts * self.num_ppo_epochs * self.num_mini_batches
            self._require(
                "max_steps", self.max_steps in (-1, optimizer_steps), f"-1 with total_episodes ({optimizer_steps} then)"
            )
            self.max_steps = optimizer_steps
        if self.kl_target is not None:
            self._require(
                "kl_target", self.kl_coef > 0 and self.kl_target > 0, "a number above 0, and kl_coef likewise"
            )
            self._require("kl_horizon", self.kl_horizon >= rollout * world, f"at least a rollout ({rollout * world})")

    def _set_computed(self, name: str, value: int | None) -> None:
        self._require(name, getattr(self, name) in (None, value), f"None, as it is computed (here {value})")
        setattr(self, name, value)

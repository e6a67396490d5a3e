"""`OnlineConfig`: what the online methods share of TRL 1.16's arguments, on top of `transformers.TrainingArguments`.

What this version does not do yet is refused when it is set to something else than its default: never accepted and
ignored.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from fastrl.rollout import SamplingParams

# Arguments of TRL's that this version refuses to be given another value than this one, their default.
NOT_SUPPORTED_YET: dict[str, Any] = {
    "cast_lm_head_to_fp32": False,
    "ds3_gather_for_generation": True,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_model_impl": "vllm",
    "vllm_enable_sleep_mode": False,
    "vllm_structured_outputs_regex": None,
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0,
    "vllm_group_port": 51216,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": None,
    "vllm_tensor_parallel_size": 1,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_cap": None,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "max_tool_calling_iterations": None,
    "log_completions": False,
    "log_multimodal": True,
    "num_completions_to_print": None,
    "log_unique_prompts": False,
    "log_completions_hub_repo": None,
    "use_transformers_continuous_batching": False,
    "transformers_continuous_batching_config": None,
    "use_transformers_paged": False,
}


@dataclass
class OnlineConfig(TrainingArguments):
    """Arguments of `OnlineTrainer`: model, prompts, generation, rollouts. Names and defaults are those of TRL's GRPO.

    `_check_values` is for a subclass to extend.

    Raises:
        ValueError: an argument out of its range, a combination that cannot work, or an argument of TRL's that this
            version does not support and that is not at its default.
        TypeError: an argument that does not exist.
    """

    MIN_GENERATIONS: ClassVar[int] = 1  # completions per prompt that the method needs

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
        "transformers_continuous_batching_config",
    ]

    # TrainingArguments with other defaults
    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 autocast. Unset: on where the GPU has bf16 and fp16 is off."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep only the column 'prompt', so that rewards see no other."}
    )

    # Model and reference model
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained, when the model is given by path."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code that ships with a model."})
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "Only None or 0.0."})
    disable_dropout: bool = field(default=False, metadata={"help": "Set every dropout of the model to 0."})
    cast_lm_head_to_fp32: bool = field(default=False, metadata={"help": "Not supported yet."})

    # Data
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt, G."})
    num_generations_eval: int | None = field(default=None, metadata={"help": "G in evaluation; None: as in training."})
    max_completion_length: int = field(default=512, metadata={"help": "Tokens per completion, at most."})
    ds3_gather_for_generation: bool = field(default=True, metadata={"help": "Not supported yet."})
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts of each epoch."})
    pad_to_multiple_of: int | str | None = field(default="auto", metadata={"help": "Only 'auto' or None."})

    # Generation
    generation_batch_size: int = field(  # type: ignore[assignment]  # never None once made
        default=None,
        metadata={"help": "Completions per rollout, over all processes; excludes steps_per_generation."},
    )
    steps_per_generation: int = field(  # type: ignore[assignment]  # never None once made
        default=None,
        metadata={"help": "Micro-batches per rollout. Default: gradient_accumulation_steps."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature, which the loss scores with too."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling, in (0, 1]."})
    top_k: int = field(default=0, metadata={"help": "Sample among the k likeliest tokens; 0: all."})
    min_p: float | None = field(default=None, metadata={"help": "Least probability relative to the likeliest token."})
    generation_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "More entries of transformers.GenerationConfig; they win over the others."}
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments of apply_chat_template for conversational prompts."}
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1 discourages repetition."})
    cache_implementation: str | None = field(default=None, metadata={"help": "The KV cache of model.generate."})

    # vLLM (not supported yet)
    use_vllm: bool = field(default=False, metadata={"help": "Not supported yet."})
    vllm_mode: str = field(default="colocate", metadata={"help": "Not supported yet."})
    vllm_model_impl: str = field(default="vllm", metadata={"help": "Not supported yet."})
    vllm_enable_sleep_mode: bool = field(default=False, metadata={"help": "Not supported yet."})
    vllm_structured_outputs_regex: str | None = field(default=None, metadata={"help": "Not supported yet."})
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "Not supported yet."})
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Not supported yet."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Not supported yet."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Not supported yet."})
    vllm_group_port: int = field(default=51216, metadata={"help": "Not supported yet."})
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata={"help": "Not supported yet."})
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Not supported yet."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "Not supported yet."})
    vllm_importance_sampling_correction: bool = field(default=True, metadata={"help": "Not supported yet."})
    vllm_importance_sampling_mode: str = field(default="sequence_mask", metadata={"help": "Not supported yet."})
    vllm_importance_sampling_clip_max: float | None = field(default=3.0, metadata={"help": "Not supported yet."})
    vllm_importance_sampling_clip_min: float | None = field(default=None, metadata={"help": "Not supported yet."})
    vllm_importance_sampling_cap: float | None = field(default=None, metadata={"help": "Not supported yet."})

    # Training on rollouts
    num_iterations: int = field(default=1, metadata={"help": "Optimizer epochs over each rollout."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One per reward function."})
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave completions without an end-of-sequence token out of the loss."}
    )

    # Logging
    log_completions: bool = field(default=False, metadata={"help": "Not supported yet."})
    log_multimodal: bool = field(default=True, metadata={"help": "Not supported yet."})
    num_completions_to_print: int | None = field(default=None, metadata={"help": "Not supported yet."})
    log_unique_prompts: bool = field(default=False, metadata={"help": "Not supported yet."})
    log_completions_hub_repo: str | None = field(default=None, metadata={"help": "Not supported yet."})
    use_transformers_continuous_batching: bool = field(default=False, metadata={"help": "Not supported yet."})
    transformers_continuous_batching_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Not supported yet."}
    )
    use_transformers_paged: bool = field(default=False, metadata={"help": "Not supported yet."})

    # fastrl's own
    share_prompts: bool | None = field(
        default=None,
        metadata={"help": "Encode a group's prompt once. None: where the model makes that exact; True: or fail."},
    )
    tokens_per_pass: int | None = field(
        default=None,
        metadata={"help": "Most tokens of one forward and backward; None: chosen by device. Not with FSDP."},
    )
    loss_backend: str | None = field(
        default=None, metadata={"help": "'reference', 'cpu', 'triton', 'cuda'; None: chosen."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        # transformers 5.23 renamed gradient_checkpointing, warns about the old name, and mirrors one to the other.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = True if self.gradient_checkpointing is None else self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()
        self._refuse_unsupported()
        self._check_values()
        self._set_generation_batch()

    def sampling_params(self) -> SamplingParams:
        """What the rollout engine is asked for."""
        engine_kwargs = dict(self.generation_kwargs or {})
        if self.cache_implementation is not None:
            engine_kwargs.setdefault("cache_implementation", self.cache_implementation)
        return SamplingParams(
            max_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            engine_kwargs=engine_kwargs,
        )

    def _refuse_unsupported(self) -> None:
        given = [name for name, default in NOT_SUPPORTED_YET.items() if getattr(self, name, default) != default]
        if given:
            shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise ValueError(f"{type(self).__name__}: not supported by fastrl yet: {shown}. Leave it at its default")
        if self.router_aux_loss_coef not in (None, 0.0):
            raise ValueError(
                f"router_aux_loss_coef: expected None or 0.0, got {self.router_aux_loss_coef} "
                "(the auxiliary loss of a mixture of experts is not supported yet)"
            )
        if self.pad_to_multiple_of not in (None, "auto"):
            raise ValueError(f"pad_to_multiple_of: expected 'auto' or None, got {self.pad_to_multiple_of!r}")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel: not supported, it replaces the forward that fastrl patches")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size: not supported, a smaller batch would break up the groups of num_generations "
                "completions; lower per_device_train_batch_size instead"
            )
        parallelism = self.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError("parallelism_config: context and sequence parallelism are not supported")

    def _require(self, name: str, valid: bool, expected: str) -> None:
        """Raises ValueError, which names the argument, unless it is valid."""
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _check_values(self) -> None:
        require, steps, least = self._require, self.steps_per_generation, self.MIN_GENERATIONS
        require("num_generations", self.num_generations >= least, f"at least {least} completions per prompt")
        require("num_iterations", self.num_iterations >= 1, "at least 1")
        require("tokens_per_pass", self.tokens_per_pass is None or self.tokens_per_pass >= 1, "None or at least 1")
        require("steps_per_generation", steps is None or steps >= 1, "None or at least 1")
        require("max_completion_length", self.max_completion_length >= 1, "at least 1 token")
        require("temperature", self.temperature > 0, "a number above 0")
        require("top_p", 0 < self.top_p <= 1, "a number in (0, 1]")
        require("top_k", self.top_k >= 0, "0 (all tokens) or more")
        require("min_p", self.min_p is None or 0 <= self.min_p <= 1, "None or a number in [0, 1]")
        require("repetition_penalty", self.repetition_penalty > 0, "a number above 0")

    def _set_generation_batch(self) -> None:
        """Completes the pair generation_batch_size, steps_per_generation from whichever is given, as TRL does."""
        per_step = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            # A copy of the arguments (dataclasses.replace) passes both, and then they agree.
            if self.generation_batch_size != per_step * self.steps_per_generation:
                raise ValueError("generation_batch_size and steps_per_generation cannot both be set")
        elif self.generation_batch_size is not None:
            if self.generation_batch_size % per_step:
                raise ValueError(
                    f"generation_batch_size ({self.generation_batch_size}) must be divisible by "
                    f"per_device_train_batch_size x processes ({per_step})"
                )
            self.steps_per_generation = self.generation_batch_size // per_step
        else:
            if self.steps_per_generation is None:
                self.steps_per_generation = self.gradient_accumulation_steps
            self.generation_batch_size = per_step * self.steps_per_generation
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"generation_batch_size ({self.generation_batch_size} = per_device_train_batch_size x processes x "
                f"steps_per_generation) must be divisible by num_generations ({self.num_generations})"
            )
        if self.eval_strategy != "no":
            self.check_eval_batch()

    def check_eval_batch(self) -> None:
        """Raises ValueError unless an evaluation batch holds whole groups."""
        batch = self.per_device_eval_batch_size * self.world_size
        count = self.num_generations_eval or self.num_generations
        if batch % count:
            raise ValueError(
                f"per_device_eval_batch_size x processes ({batch}) must be divisible by the completions per prompt in "
                f"evaluation ({count}: num_generations_eval, or else num_generations)"
            )

"""`OnlineConfig`: what the online methods share of TRL 1.16's arguments, on top of `transformers.TrainingArguments`.

What this version does not do yet is refused when it is set to something else than its default: never accepted and
ignored.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from fastrl.objectives import RolloutCorrection
from fastrl.rollout import SamplingParams, check_engine_args, engine_kwargs
from fastrl.trainers.arguments import JsonDict, fill_in_defaults, refuse_text

# Arguments of TRL's whose every other value than this, the default, is refused, and why.
REFUSED: dict[str, tuple[Any, str]] = {
    "ds3_gather_for_generation": (True, "it is about DeepSpeed, which is not supported"),
    "max_tool_calling_iterations": (None, "tools are not supported"),
    "log_completions_hub_repo": (None, "completions are kept in output_dir and sent to report_to's loggers alone"),
    "pad_to_multiple_of": ("auto", "nothing is padded"),
    "use_liger_kernel": (False, "it replaces the forward that fastrl patches"),
    "auto_find_batch_size": (
        False,
        "a smaller batch would break up the groups of num_generations completions; lower per_device_train_batch_size",
    ),
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
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Compute activations anew in the backward, for their memory."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 autocast. Unset: on where the GPU has bf16 and fp16 is off."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep only the column 'prompt', so that rewards see no other."}
    )

    # Model and reference model
    model_init_kwargs: JsonDict = field(
        default=None, metadata={"help": "Arguments of from_pretrained, when the model is given by path."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code that ships with a model."})
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of a mixture of experts' auxiliary loss."}
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Set every dropout of the model to 0."})
    cast_lm_head_to_fp32: bool = field(
        default=False, metadata={"help": "Keep the lm_head in fp32; not with tied embeddings."}
    )

    # Data
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt, G."})
    num_generations_eval: int | None = field(default=None, metadata={"help": "G in evaluation; None: as in training."})
    max_completion_length: int = field(default=512, metadata={"help": "Tokens per completion, at most."})
    ds3_gather_for_generation: bool = field(default=True, metadata={"help": "Only True."})
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
    generation_kwargs: JsonDict = field(
        default=None, metadata={"help": "More entries of transformers.GenerationConfig; they win over the others."}
    )
    chat_template_kwargs: JsonDict = field(
        default=None, metadata={"help": "Arguments of apply_chat_template for conversational prompts."}
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1 discourages repetition."})
    cache_implementation: str | None = field(default=None, metadata={"help": "The KV cache of model.generate."})

    # vLLM
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM."})
    vllm_mode: str = field(
        default="colocate", metadata={"help": "'colocate': in this process; 'server': `fastrl vllm-serve` elsewhere."}
    )
    vllm_model_impl: str = field(default="vllm", metadata={"help": "Only 'vllm' in this process."})
    vllm_enable_sleep_mode: bool = field(default=False, metadata={"help": "Only False in this process."})
    vllm_structured_outputs_regex: str | None = field(
        default=None, metadata={"help": "What every completion must match."}
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "URL of the server; has precedence over host and port."}
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Of the server."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Of the server."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait for the server."})
    vllm_group_port: int = field(default=51216, metadata={"help": "Only the default: weights go over HTTP."})
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory for vLLM in this process."}
    )
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Context of vLLM in this process."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "Only 1 in this process."})
    vllm_importance_sampling_correction: bool = field(
        default=True, metadata={"help": "Correct for the mismatch with an engine other than the trained model."}
    )
    vllm_importance_sampling_mode: str = field(
        default="sequence_mask", metadata={"help": "'token_' or 'sequence_' with 'truncate' or 'mask'."}
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=3.0, metadata={"help": "Upper bound of the importance ratio; None: none."}
    )
    vllm_importance_sampling_clip_min: float | None = field(
        default=None, metadata={"help": "Lower bound of the importance ratio; None: none."}
    )
    vllm_importance_sampling_cap: float | None = field(
        default=None, metadata={"help": "Old name of vllm_importance_sampling_clip_max."}
    )

    # Training on rollouts
    num_iterations: int = field(default=1, metadata={"help": "Optimizer epochs over each rollout."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One per reward function."})
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave completions without an end-of-sequence token out of the loss."}
    )

    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that a call of a reward function may take; None: no limit."}
    )
    reward_workers: int = field(default=8, metadata={"help": "Calls of reward functions at a time, with a limit."})
    max_failed_reward_batches: int = field(
        default=3, metadata={"help": "A reward function that fails for so many whole batches in a row ends the run."}
    )

    # Logging
    log_completions: bool = field(default=False, metadata={"help": "Show and keep samples of the completions."})
    log_multimodal: bool = field(default=True, metadata={"help": "Without effect: there are no images."})
    num_completions_to_print: int | None = field(default=None, metadata={"help": "How many to show; None: all."})
    log_unique_prompts: bool = field(default=False, metadata={"help": "Send loggers one completion per prompt."})
    log_completions_hub_repo: str | None = field(default=None, metadata={"help": "Only None."})
    use_transformers_continuous_batching: bool = field(
        default=False, metadata={"help": "Let completions leave the batch when they end."}
    )
    transformers_continuous_batching_config: JsonDict = field(
        default=None, metadata={"help": "Entries of transformers.ContinuousBatchingConfig."}
    )
    use_transformers_paged: bool = field(
        default=False, metadata={"help": "Old name of use_transformers_continuous_batching."}
    )

    # fastrl's own
    async_rollouts: bool = field(
        default=False, metadata={"help": "Sample the next rollouts while this one is trained on; see AsyncRollouts."}
    )
    max_staleness: int = field(default=1, metadata={"help": "Rollouts sampled ahead, with async_rollouts."})
    share_prompts: bool | None = field(
        default=None,
        metadata={"help": "Encode a group's prompt once. None: where the model makes that exact; True: or fail."},
    )
    tokens_per_pass: int | None = field(
        default=None,
        metadata={"help": "Most tokens of one forward and backward; None: chosen by device. Not with FSDP."},
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep what the backward needs in the CPU's memory."}
    )
    loss_backend: str | None = field(
        default=None, metadata={"help": "'reference', 'cpu', 'triton', 'cuda'; None: chosen."}
    )

    def __post_init__(self) -> None:
        fill_in_defaults(self)
        super().__post_init__()
        refuse_text(self)
        self._refuse_unsupported()
        self._check_values()
        self._set_generation_batch()

    def sampling_params(self, logps: bool = False) -> SamplingParams:
        """What the rollout engine is asked for; logps: of the sampled tokens, too."""
        return SamplingParams(
            max_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            logps=logps,
            engine_kwargs=engine_kwargs(self),
        )

    def correction(self) -> RolloutCorrection | None:
        """The correction for an engine that is not the trained model; None: off."""
        if not self.vllm_importance_sampling_correction:
            return None
        bounds = (self.vllm_importance_sampling_clip_max, self.vllm_importance_sampling_clip_min)
        return RolloutCorrection.trl(self.vllm_importance_sampling_mode, *bounds)

    def _refuse_unsupported(self) -> None:
        if self.pad_to_multiple_of is None:
            self.pad_to_multiple_of = "auto"
        for name, (default, reason) in REFUSED.items():
            value = getattr(self, name, default)
            if value != default:
                raise ValueError(f"{name}: not supported, expected {default!r}, got {value!r}: {reason}")
        check_engine_args(self)
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
        require("max_staleness", self.max_staleness >= 1, "at least 1 rollout")
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

"""What all trainers and their configs do alike with arguments: defaults that depend on others, and refusals."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import Trainer, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

Config = TypeVar("Config", bound=Any)

# A mapping, which a command line gives as JSON text: `HfArgumentParser` needs `str` as the second of the types, and
# `TrainingArguments` reads the text of its `_VALID_DICT_FIELDS`.
if TYPE_CHECKING:
    JsonDict = dict[str, Any] | None
else:
    JsonDict = dict[str, Any] | str | None


def fill_in_defaults(args: TrainingArguments) -> None:
    """bf16 where the GPU has it, and TRL's gradient checkpointing; before TrainingArguments' own `__post_init__`.

    Raises:
        ValueError: an optimizer step of no rows.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(args, name)!r}")
    if args.bf16 is None:
        args.bf16 = not args.fp16 and not args.use_cpu and is_torch_bf16_gpu_available()
    # transformers 5.23 renamed gradient_checkpointing, warns about the old name, and mirrors one to the other.
    if args.activation_checkpointing is None:
        args.activation_checkpointing = True if args.gradient_checkpointing is None else args.gradient_checkpointing
    if args.activation_checkpointing_kwargs is None:
        args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs


def refuse_text(args: TrainingArguments) -> None:
    """Raises ValueError for a `JsonDict` of ours that is still text after TrainingArguments' own `__post_init__`."""
    for name in set(args._VALID_DICT_FIELDS) - set(TrainingArguments._VALID_DICT_FIELDS):
        if isinstance(getattr(args, name), str):
            raise ValueError(f"{name}: expected a mapping, or its JSON text {{...}}, got {getattr(args, name)!r}")


def refuse_given(arguments: Mapping[str, tuple[Any, str]]) -> None:
    """Raises ValueError for the first argument, name -> (value, why it is not supported), that is not None."""
    for name, (value, why) in arguments.items():
        if value is not None:
            raise ValueError(f"{name}: not supported: {why}")


def with_quantization(args: Config, model: Any, quantization_config: Any) -> Config:
    """The arguments with a quantization of the model among `model_init_kwargs`, as TRL's trainers take it apart.

    Raises:
        ValueError: the model is an object, which is quantized or not; or there already is one among them.
    """
    if quantization_config is None:
        return args
    settings = args.model_init_kwargs or {}
    if not isinstance(model, str) or "quantization_config" in settings:
        raise ValueError("quantization_config: only for a model given by path, and not in model_init_kwargs, too")
    args = copy.copy(args)
    args.model_init_kwargs = {**settings, "quantization_config": quantization_config}
    return args


def refuse_launch(trainer: Trainer) -> None:
    """Raises ValueError where the trainer was launched in a way that it does not work with."""
    if trainer.args.n_gpu > 1:
        raise ValueError("several GPUs in one process (DataParallel) are not supported: use torchrun or accelerate")
    if trainer.is_deepspeed_enabled:
        raise ValueError("DeepSpeed is not supported yet")
    if trainer.is_fsdp_enabled and getattr(trainer.args, "sync_ref_model", False):
        raise ValueError("sync_ref_model: expected False with FSDP, whose shards the reference cannot follow, got True")

"""What a trainer is given, made ready: the model (by path or object, under PEFT or not), its tokenizer and its
reference."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_peft_available, logging

logger = logging.get_logger(__name__)


def load_model(
    model: str | nn.Module,
    model_init_kwargs: dict[str, Any] | None,
    trust_remote_code: bool,
    auto_class: Any = AutoModelForCausalLM,
) -> Any:
    """The model itself, or the one `auto_class` finds at a path or hub id.

    In float32 if `model_init_kwargs` does not say otherwise, as in TRL: small steps are lost in bf16 weights.

    Raises:
        TypeError: neither a path nor a transformers or PEFT model.
    """
    if isinstance(model, str):
        settings = {"trust_remote_code": trust_remote_code, "dtype": "float32", **(model_init_kwargs or {})}
        return auto_class.from_pretrained(model, **settings)
    if not isinstance(model, PreTrainedModel) and not is_peft_model(model):
        raise TypeError(f"model: expected a path or a transformers model, got {type(model).__name__}")
    if model_init_kwargs:
        raise ValueError("model_init_kwargs: only used with a model given by path, but the model is an object")
    return model


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, model: nn.Module, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one that lies with the model.

    Raises:
        TypeError: something else than a tokenizer (a multimodal processor, say).
        ValueError: none given, and the model does not say where it came from.
    """
    if tokenizer is None:
        path = getattr(model.config, "_name_or_path", "")
        if not path:
            raise ValueError(
                "processing_class: needed, the model does not name a place that a tokenizer is loaded from"
            )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class: expected a tokenizer, got {type(tokenizer).__name__} (multimodal processors are not "
            "supported yet)"
        )
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> tuple[int, list[int]]:
    """The padding id and every id that ends a completion: the tokenizer's and all that the model declares.

    A tokenizer without a pad token gets its end-of-sequence token, as in TRL, or its token 0: padding is masked, so
    any id will do. The model's configs are told, so that a saved model agrees with its tokenizer.
    """
    declared, own = _declared_eos(model), tokenizer.eos_token_id
    eos_token_ids = ([] if own is None or own in declared else [own]) + declared
    if not eos_token_ids and _generation_config(model) is not None:
        logger.warning("Neither the tokenizer nor the model has an end-of-sequence token: every completion is cut off.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    pad_token_id = int(tokenizer.pad_token_id)
    model.config.get_text_config().pad_token_id = pad_token_id  # type: ignore[union-attr, operator]
    if _generation_config(model) is not None:
        _generation_config(model).pad_token_id = pad_token_id
    return pad_token_id, eos_token_ids


def set_eos_token(tokenizer: PreTrainedTokenizerBase, model: nn.Module, token: str) -> None:
    """Makes a token of the vocabulary the one that ends a sequence; tokens that the model declares still do, too.

    Raises:
        ValueError: not in the vocabulary.
    """
    if token not in tokenizer.get_vocab():
        raise ValueError(f"eos_token: {token!r} is not in the vocabulary of the {type(tokenizer).__name__}")
    tokenizer.eos_token = token
    ends: list[Any] = [tokenizer.eos_token_id, *_declared_eos(model)]
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id  # type: ignore[union-attr, operator]
    if _generation_config(model) is not None:
        _generation_config(model).eos_token_id = list(dict.fromkeys(ends))


def _generation_config(model: Any) -> Any:
    """None for a classifier."""
    return getattr(model, "generation_config", None)


def _declared_eos(model: nn.Module) -> list[int]:
    declared = getattr(_generation_config(model), "eos_token_id", None)
    return [] if declared is None else [declared] if isinstance(declared, int) else list(declared)


def set_pad_token(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Makes a token of the vocabulary the one that pads.

    Raises:
        ValueError: not in the vocabulary.
    """
    if token not in tokenizer.get_vocab():
        raise ValueError(f"pad_token: {token!r} is not in the vocabulary of the tokenizer")
    tokenizer.pad_token = token


def use_named_tokens(tokenizer: PreTrainedTokenizerBase, model: nn.Module, args: Any, has_adapter: bool) -> None:
    """The end-of-sequence token, the pad token and the chat template that a trainer's arguments name.

    Raises:
        ValueError: a token that is not in the vocabulary; tokens of a template that an adapter would not train.
    """
    if args.eos_token is not None:
        set_eos_token(tokenizer, model, args.eos_token)
    if args.pad_token is not None:
        set_pad_token(tokenizer, args.pad_token)
    if args.chat_template_path is not None:
        added = use_chat_template(tokenizer, model, args.chat_template_path)
        if added and has_adapter:
            raise ValueError(
                f"chat_template_path: its tokenizer adds {len(added)} tokens, whose embeddings an adapter would not "
                "train; add them to the model before, and train them with modules_to_save"
            )


def use_chat_template(tokenizer: PreTrainedTokenizerBase, model: nn.Module, path: str) -> list[int]:
    """Takes the chat template of a Jinja file (.jinja, .j2), or of the tokenizer at a path or hub id; from the latter
    also its end-of-sequence token and the added tokens that are missing, for which the embeddings grow.

    Returns:
        The ids of the tokens that were added.

    Raises:
        ValueError: the tokenizer there has no chat template.
    """
    if path.endswith((".jinja", ".j2")) and Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return []
    source = AutoTokenizer.from_pretrained(path)
    if source.chat_template is None:
        raise ValueError(f"chat_template_path: the tokenizer at {path!r} has no chat template")
    tokenizer.chat_template = source.chat_template
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in source.added_tokens_decoder.values() if token.content not in vocabulary]
    tokenizer.add_tokens(missing)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # type: ignore[operator]
        model.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]
    set_eos_token(tokenizer, model, source.eos_token)
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token.content] for token in missing]


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model is wrapped by PEFT."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def add_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """The model under a new PEFT adapter.

    Raises:
        ImportError: peft is not installed. TypeError: not a PeftConfig. ValueError: the model already has an adapter.
    """
    if not is_peft_available():
        raise ImportError("peft_config: peft is not installed; install it with `pip install peft`")
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config: expected a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}")
    if is_peft_model(model):
        raise ValueError("peft_config: the model already has a PEFT adapter; merge it first, or leave peft_config out")
    return get_peft_model(model, peft_config)


def check_adapters(model: nn.Module, **names: str | None) -> None:
    """Raises ValueError unless each argument is None or names an adapter of the model."""
    adapters: Any = model.peft_config if is_peft_model(model) else {}
    for argument, name in names.items():
        if name not in (None, *adapters):
            known = ", ".join(adapters) or "it has none"
            raise ValueError(f"{argument}: expected None or an adapter of the model ({known}), got {name!r}")


@contextmanager
def active_adapter(model: Any, name: str, otherwise: str) -> Iterator[nn.Module]:
    """The model under one of its PEFT adapters, and afterwards under another."""
    model.set_adapter(name)
    try:
        yield model
    finally:
        model.set_adapter(otherwise)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A reference: the model as it is now, in eval mode, without gradients."""
    reference = copy.deepcopy(model).eval()
    return reference.requires_grad_(False)


def cast_head_to_fp32(model: nn.Module) -> None:
    """The lm_head in fp32, and what goes into it.

    Raises:
        ValueError: the head is tied to the embeddings.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        raise ValueError("cast_lm_head_to_fp32: not with tied embeddings, which would be cast too")
    head.float()
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))


def has_dropout(model: nn.Module) -> bool:
    """Whether training mode is random: a dropout module, or a probability that a module hands to its attention."""
    for module in model.modules():
        rates = [value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates.append(module.p)
        if any(rate > 0 for rate in rates):
            return True
    return False


def disable_dropout(model: nn.Module) -> None:
    """Sets the probability of every dropout module to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.AlphaDropout):
            module.p = 0.0


def fill_missing_gradients(model: nn.Module) -> None:
    """Zeros for the trainable parameters without a gradient, so that an optimizer treats them as the eager loss would
    have it: momentum decays and weight decay acts. Without a gradient AdamW would leave them alone."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)

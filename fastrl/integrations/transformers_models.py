"""Scoring without logits on any transformers causal LM, and on sequence and token classifiers with a causal backbone.

`patch_model` lets `model(..., fastrl_head=f)` run the backbone and hand its last hidden state, with the LM head, to
`f`. The logits are never built. The head is read while its own module runs, so that whatever gathers a sharded weight
(FSDP2's hooks, ZeRO-3's) has done so; a wrapper that is not understood is refused, never bypassed.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrl.integrations.logits_source import LogitsRecipe, UnsupportedHeadError, read_logits_recipe

_STATE = "_fastrl_patch"


class LMHead(NamedTuple):
    """The projection to the vocabulary: logit = softcap_(hidden W^T + bias) * logit_scale, in that module's order.

    z = (hidden W^T + bias) * logit_scale; z = softcap * tanh(z / softcap) if softcap is not None. Its fields carry the
    names of the arguments of `fastrl.linear_policy_loss` and `fastrl.linear_logprobs`.
    """

    weight: Tensor  # (V, D); (V, D + r) under LoRA, with the hidden states widened to match
    bias: Tensor | None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    router_logits: tuple[Tensor, ...] | None = None  # a mixture of experts', if asked for: (tokens, experts) each


HeadFunction = Callable[[Tensor, LMHead], Any]


class ModelPatch:
    """The handle of `patch_model`: `remove()` undoes it, and so does leaving it as a context manager."""

    def __init__(self, model: nn.Module, recipe: LogitsRecipe) -> None:
        self.model = model
        self.recipe = recipe
        self._removed = False

    def remove(self) -> None:
        """Restores the model's own forward; a second call does nothing. Nested patches end with the last handle."""
        if self._removed:
            return
        self._removed = True
        state = self.model.__dict__[_STATE]
        state["users"] -= 1
        if state["users"]:
            return
        del self.model.__dict__[_STATE]
        # Something else (accelerate's autocast, say) may have wrapped our forward since: then ours stays inside that
        # wrapper and, without its state, only calls the original.
        if self.model.__dict__.get("forward") == state["installed"]:
            if state["original"] is None:
                del self.model.__dict__["forward"]
            else:
                self.model.__dict__["forward"] = state["original"]

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *exception: object) -> None:
        self.remove()


def patch_model(model: nn.Module, *, logit_scale: float | None = None, softcap: float | None = None) -> ModelPatch:
    """Lets a causal LM be scored without logits: `model(input_ids=..., fastrl_head=f)` returns `f(hidden, head)`.

    So does a sequence or token classifier, whose score layer takes the LM head's place: `f` sees every token's hidden
    state, behind the model's dropout if it has one, and which of them counts is its own affair.

    `f` gets `hidden` [B, S, D], the backbone's last hidden state, and an `LMHead`, with a mixture of experts also its
    router's logits if `output_router_logits=True` is passed. What it returns goes through the wrappers around the model
    unchanged (return tensors, tuples or dicts of tensors, so that DDP and FSDP see the graph). Without `fastrl_head`
    the original forward runs, bit for bit, and `generate` is untouched.

    Works on the innermost causal LM of PEFT, DDP, FSDP and torch.compile wrappers. The head may be a plain `nn.Linear`,
    one under PEFT's LoRA (dropout and several adapters included: its low-rank part becomes extra columns of the
    weight), in PEFT's `modules_to_save`, or tied to embeddings with `trainable_token_indices`. Under autocast, hidden
    states and head are cast as `F.linear` would.

    Args:
        model: a transformers causal LM or classifier, wrapped or not.
        logit_scale, softcap: state what the model does to its logits, instead of reading it from the source of its
            forward (needed only for a model whose source cannot be read or understood). The backbone is then
            `model.base_model`.

    Returns:
        A `ModelPatch`; `remove()` it, or use it in a `with` statement.

    Raises:
        UnsupportedHeadError: (a ValueError) the model has an encoder, has no output embedding or score layer, treats
            its logits in a way that is neither a scale nor a tanh soft cap, or is a classifier whose tokens see what
            comes after them.

    Equivalent eager code: `model(input_ids=...).logits` and then whatever `f` computes from them.
    """
    causal_lm = innermost_causal_lm(model)
    state = causal_lm.__dict__.get(_STATE)
    if state is not None:
        state["users"] += 1
        return ModelPatch(causal_lm, state["recipe"])
    if getattr(causal_lm.config, "is_encoder_decoder", False):
        raise UnsupportedHeadError(
            f"{type(causal_lm).__name__} has an encoder: only decoders are supported, which read prompt and completion "
            "as one sequence"
        )
    head = head_of(causal_lm)
    if is_classifier(causal_lm):
        if logit_scale is not None or softcap is not None:
            raise ValueError("logit_scale, softcap: not for a classifier, whose scores have neither")
        recipe = _score_recipe(causal_lm, head)
    elif logit_scale is None and softcap is None:
        recipe = read_logits_recipe(causal_lm, head)
    else:
        prefix = getattr(causal_lm, "base_model_prefix", "")
        if not hasattr(causal_lm, prefix):
            raise UnsupportedHeadError(f"{type(causal_lm).__name__} has no backbone under base_model_prefix={prefix!r}")
        recipe = LogitsRecipe(prefix, 1.0 if logit_scale is None else logit_scale, softcap)
    original = causal_lm.__dict__.get("forward")
    forward = types.MethodType(_forward_with_head(type(causal_lm), original), causal_lm)
    causal_lm.__dict__[_STATE] = {"users": 1, "recipe": recipe, "original": original, "installed": forward}
    causal_lm.__dict__["forward"] = forward
    return ModelPatch(causal_lm, recipe)


def head_of(model: nn.Module) -> nn.Module:
    """The output embedding of a causal LM, or the score layer of a sequence or token classifier (neither wrapped).

    Raises:
        UnsupportedHeadError: it has neither.
    """
    embedding = model.get_output_embeddings()  # type: ignore[operator]
    for head in (embedding, getattr(model, "score", None), getattr(model, "classifier", None)):
        if isinstance(head, nn.Module):
            return head
    raise UnsupportedHeadError(f"{type(model).__name__} has no output embedding (lm_head) and no score layer")


def is_classifier(model: nn.Module) -> bool:
    """Whether it has a score layer instead of an output embedding (not wrapped)."""
    return not isinstance(model.get_output_embeddings(), nn.Module)  # type: ignore[operator]


def _score_recipe(model: nn.Module, head: nn.Module) -> LogitsRecipe:
    name = type(model).__name__
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if not causal or not all(causal):
        raise UnsupportedHeadError(
            f"{name}: only classifiers with causal attention are supported, and its attention modules "
            f"{'are not' if causal else 'do not say that they are'}"
        )
    recipe = read_logits_recipe(model, head, pooled=True)
    if recipe.logit_scale != 1.0 or recipe.softcap is not None:
        raise UnsupportedHeadError(f"{name} scales or caps its scores: expected those of a linear layer as they are")
    return recipe


def innermost_causal_lm(model: nn.Module) -> nn.Module:
    """The model that owns the lm_head, or of a classifier the score layer, inside torch.compile, DDP, FSDP1, DeepSpeed
    and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # type: ignore[assignment]
        else:
            break
    if not hasattr(model, "get_output_embeddings"):
        raise UnsupportedHeadError(f"{type(model).__name__} is not a transformers causal LM (no get_output_embeddings)")
    return model


def _forward_with_head(cls: type[nn.Module], original: Callable[..., Any] | None) -> Callable[..., Any]:
    # `wraps` keeps the signature: generate() and Trainer inspect it for the arguments they may pass. The original is
    # called through the class and not as a bound method, so that a deepcopy of the model does not run its source.
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, fastrl_head: HeadFunction | None = None, **kwargs: Any) -> Any:
        if fastrl_head is None:
            return cls.forward(self, *args, **kwargs) if original is None else original(*args, **kwargs)
        state = self.__dict__.get(_STATE)
        if state is None:
            raise RuntimeError("fastrl_head was passed to a model whose fastrl patch has been removed")
        recipe: LogitsRecipe = state["recipe"]
        kwargs["use_cache"] = False
        outputs = attrgetter(recipe.backbone)(self)(*args, **kwargs)
        hidden = outputs[0] if isinstance(outputs, tuple) else outputs.last_hidden_state
        if recipe.dropout is not None:
            hidden = attrgetter(recipe.dropout)(self)(hidden)
        router_logits = None
        if kwargs.get("output_router_logits"):
            router_logits = getattr(outputs, "router_logits", None)
            if router_logits is None:
                raise ValueError(f"output_router_logits: the backbone of {type(self).__name__} gives none")

        def call(module: nn.Module, x: Tensor) -> Any:
            states, head = _read_head(module, x, recipe)
            return fastrl_head(states, head._replace(router_logits=router_logits))

        return _run_inside(head_of(self), hidden, call)

    return forward


def _run_inside(module: nn.Module, hidden: Tensor, function: Callable[[nn.Module, Tensor], Any]) -> Any:
    """Calls `module` with its forward replaced by `function`, so that its own hooks surround the reading."""
    with _swapped_forward(module, functools.partial(function, module)):
        return module(hidden)


@contextmanager
def _swapped_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    missing = object()
    before = module.__dict__.get("forward", missing)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _read_head(module: nn.Module, hidden: Tensor, recipe: LogitsRecipe) -> tuple[Tensor, LMHead]:
    hidden, weight, bias = _linear(module, hidden)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif weight.dtype != hidden.dtype and weight.is_floating_point():
        hidden = hidden.to(weight.dtype)  # as F.linear would demand; a few families cast before their lm_head
    return hidden, LMHead(weight, bias, recipe.logit_scale, recipe.softcap)


def _linear(module: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) with module(hidden) == hidden W^T + bias, differentiable in all of them."""
    # nn.Linear, or a subclass that computes the same (its forward not overridden, its weight not packed)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and module.weight.ndim == 2:
        return hidden, module.weight, module.bias
    if "peft" in sys.modules:  # a PEFT layer can only exist once peft is imported
        from peft.tuners.lora import Linear as LoraLinear
        from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        if isinstance(module, ModulesToSaveWrapper):
            trained = not module.disable_adapters and bool(module.active_adapters)
            inner = module.modules_to_save[module.active_adapters[0]] if trained else module.original_module
            return _linear(inner, hidden)
        if isinstance(module, LoraLinear):
            return _lora_linear(module, hidden)
        if isinstance(module, TrainableTokensWrapper | TrainableTokensLayer):
            return _trained_rows(getattr(module, "token_adapter", module), hidden)
    raise UnsupportedHeadError(
        f"an lm_head of type {type(module).__module__}.{type(module).__qualname__} is not supported: expected "
        "torch.nn.Linear, or one under PEFT's LoRA, modules_to_save or trainable_token_indices"
    )


def _trained_rows(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    # A head that is tied to embeddings of which PEFT trains some tokens: these rows of the weight are others.
    if module.disable_adapters and module.merged:
        module.unmerge()
    hidden, weight, bias = _linear(module.base_layer, hidden)
    if module.disable_adapters or module.merged:
        return hidden, weight, bias
    return hidden, module.get_merged_weights(module.active_adapters), bias


def _lora_linear(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    # hidden W^T + s * drop(hidden) A^T B^T is one product of [hidden, s * drop(hidden) A^T] with [W, B]: exact also
    # in bf16, where B A added into W would be rounded away, and with dropout, which no effective weight can express.
    if module.disable_adapters and module.merged:
        module.unmerge()
    hidden, weight, bias = _linear(module.base_layer, hidden)
    if module.disable_adapters or module.merged:
        return hidden, weight, bias
    columns, factors = [hidden], [weight]
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in module.lora_variant:
            variant = type(module.lora_variant[name]).__name__
            raise UnsupportedHeadError(
                f"LoRA adapter {name!r} on the lm_head uses {variant}: only plain LoRA is supported"
            )
        lora_a, lora_b, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        low_rank = lora_a(module.lora_dropout[name](hidden.to(lora_a.weight.dtype))) * scaling
        columns.append(low_rank.to(hidden.dtype))
        factors.append(lora_b.weight.to(weight.dtype))
        if lora_b.bias is not None:
            extra = (lora_b.bias * scaling).to(weight.dtype)
            bias = extra if bias is None else bias + extra
    if len(columns) == 1:
        return hidden, weight, bias
    return torch.cat(columns, dim=-1), torch.cat(factors, dim=-1), bias

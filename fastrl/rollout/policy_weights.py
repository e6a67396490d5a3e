"""The policy's weights as another engine loads them: adapters merged, shards gathered, under the checkpoint's names."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from fastrl.integrations.transformers_models import innermost_causal_lm

CRITIC = "fastrl_critic"  # a child that a trainer may add to a policy, and that is no part of it


@torch.no_grad()
def policy_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each weight, as `save_pretrained` of the merged model would name them.

    One at a time, unless the checkpoint's layout differs from the model's (fused experts, say). A tied weight comes
    once, under its first name; an lm_head that an adapter has made differ from the embedding comes as "lm_head.weight".
    The model is not changed: adapters are merged into copies of their layers. The tensors may be the model's own.

    Under FSDP2 every process must go through all of it, for gathering a shard is a collective.

    Raises:
        ValueError: the weights are not to be had here (FSDP1, ZeRO-3, an adapter under FSDP).
    """
    causal_lm: Any = innermost_causal_lm(model)
    weights = _weights(causal_lm, "", set())
    if getattr(causal_lm, "_weight_conversions", None) or get_model_conversion_mapping(causal_lm, add_legacy=False):
        yield from revert_weight_conversion(causal_lm, dict(weights)).items()
    else:
        yield from weights


def lm_head_is_tied(model: nn.Module) -> bool:
    """Whether the lm_head is the embedding itself: not so where an adapter sits on either of them, but for PEFT's
    trained tokens, which it ties with the rest."""
    causal_lm: Any = innermost_causal_lm(model)
    embedding, head = _adapter_of(causal_lm.get_input_embeddings()), _adapter_of(causal_lm.get_output_embeddings())
    if getattr(head, "tied_adapter", None) is not None:
        return True
    if any(_is_adapter(module) or _is_trained_copy(module) for module in (embedding, head)):
        return False
    return head is not None and head.weight is embedding.weight


def _weights(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    module = _adapter_of(module)
    if getattr(module, "tied_adapter", None) is not None:  # the embedding's trained tokens: it has come already
        return
    if _is_adapter(module):
        yield from ((prefix + name, tensor.detach()) for name, tensor in _merged(module, prefix).named_parameters())
        return
    if _is_trained_copy(module):
        trained = not module.disable_adapters and bool(module.active_adapters)
        module = module.modules_to_save[module.active_adapters[0]] if trained else module.original_module
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:  # by identity: only for parameters that stay alive
            seen.add(id(parameter))
            yield prefix + name, _whole(parameter, prefix + name)
    for name, child in module.named_children():
        if name == CRITIC:
            continue
        yield from _weights(child, f"{prefix}{name}.", seen)


def _merged(layer: Any, name: str) -> nn.Module:
    """The layer below the adapters, with them merged in: a copy, so that no rounding reaches the trained weights."""
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return layer.get_base_layer()
    if any(hasattr(parameter, "full_tensor") for parameter in layer.parameters()):
        raise ValueError(f"model: merging the adapter of the sharded layer {name} is not supported")
    layer = copy.deepcopy(layer)
    layer.merge()
    return layer.get_base_layer()


def _whole(parameter: Tensor, name: str) -> Tensor:
    if hasattr(parameter, "ds_id") or "_flat_param" in name or "_fsdp_wrapped_module" in name:
        raise ValueError(f"model: {name} is sharded by DeepSpeed or FSDP1; rollouts from it need FSDP2 or DDP")
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    return parameter.detach()


def _adapter_of(module: Any) -> Any:
    """The adapter in PEFT's wrapper for trained tokens; any other module as it is."""
    if "peft" not in sys.modules:
        return module
    from peft.utils.other import TrainableTokensWrapper

    return module.token_adapter if isinstance(module, TrainableTokensWrapper) else module


def _is_adapter(module: nn.Module) -> bool:
    if "peft" not in sys.modules:  # a PEFT layer can only exist once peft is imported
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _is_trained_copy(module: nn.Module) -> bool:
    if "peft" not in sys.modules:
        return False
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)

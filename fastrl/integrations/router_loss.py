"""The load-balancing loss of a mixture of experts, from the router's logits of one forward."""

import sys
from typing import Any

from torch import Tensor, nn

from fastrl.integrations.transformers_models import innermost_causal_lm

_FUNCTION = "load_balancing_loss_func"  # transformers' name of it in every family


def router_loss_coef(model: nn.Module, coef: float | None) -> float:
    """The weight of the loss: `coef`, or where that is None what the model's config declares; 0 without experts.

    Raises:
        ValueError: a weight for a model without a mixture of experts, or one whose auxiliary loss is not known.
    """
    causal_lm: Any = innermost_causal_lm(model)
    config = causal_lm.config.get_text_config()
    has_router = hasattr(config, "output_router_logits")
    declared = getattr(config, "router_aux_loss_coef", 0.0) if has_router else 0.0
    weight = float(declared if coef is None else coef)
    name = type(causal_lm).__name__
    if weight and not has_router:
        raise ValueError(f"router_aux_loss_coef: {weight}, but {name} has no mixture of experts; leave it at None")
    if weight and not hasattr(sys.modules[type(causal_lm).__module__], _FUNCTION):
        raise ValueError(
            f"router_aux_loss_coef: the auxiliary loss of {name} is not known; set it to 0.0 to train without"
        )
    return weight


def router_loss(model: nn.Module, router_logits: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
    """The model's own auxiliary loss, not weighted: Switch Transformers' (Fedus et al. 2021), eq. 4-6.

    Args:
        model: a causal LM, wrapped or not.
        router_logits: of each layer, (R * S, experts).
        tokens: (R, S) bool: what is not padding.
    """
    causal_lm: Any = innermost_causal_lm(model)
    function = getattr(sys.modules[type(causal_lm).__module__], _FUNCTION)
    config = causal_lm.config.get_text_config()
    top_k = getattr(causal_lm, "num_experts_per_tok", None) or config.num_experts_per_tok
    loss: Tensor = function(router_logits, router_logits[0].shape[-1], top_k, tokens.long())
    return loss

"""Which models can have several completions in one row after their prompt, and give each its own hidden states."""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any, NamedTuple

from torch import nn

from fastrl.integrations.transformers_models import innermost_causal_lm


class PromptSharing(NamedTuple):
    """Where sharing a prompt gives a model's own hidden states."""

    longest: float  # for sequences of at most so many tokens: 0 for none, inf for all
    why: str  # what limits it; "" where nothing does


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward has an argument `position_ids`."""
    forward = type(innermost_causal_lm(model)).forward
    return "position_ids" in inspect.signature(forward).parameters


def prompt_sharing(model: nn.Module) -> PromptSharing:
    """For which sequences completions in one row after their prompt have the hidden states of rows of their own.

    It takes a model whose tokens meet in attention only, attention that follows any mask it is given, and positions
    that are told and not counted. A sliding window or chunk changes nothing for sequences that fit into it.
    """
    causal_lm: Any = innermost_causal_lm(model)
    config = causal_lm.config.get_text_config()
    name = type(causal_lm).__name__

    def never(why: str) -> PromptSharing:
        return PromptSharing(0, f"{name} {why}")

    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return PromptSharing(0, "PEFT prompt learning puts tokens of its own before each row")
    if not takes_positions(model):
        return never("takes no position_ids")
    if config._attn_implementation not in ("sdpa", "eager"):
        return never(f"has the attention {config._attn_implementation!r}, which takes no arbitrary mask")
    if getattr(causal_lm, "_is_stateful", False):
        return never("is recurrent")
    if any(isinstance(module, nn.Conv1d) for module in causal_lm.modules()):
        return never("mixes neighbouring tokens by convolutions")
    if getattr(config, "alibi", False):
        return never("biases its attention by the distance of places in the row (ALiBi)")
    if "local" in getattr(config, "attention_layers", ()):
        return never("has local attention by places in the row")
    module = sys.modules[type(causal_lm).__module__]
    if not hasattr(module, "create_causal_mask"):  # transformers' own, which hands a 4D mask on as it is
        return never("makes its attention mask in a way that is not known")
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if unknown:
        return never(f"has layers of the kind {', '.join(sorted(unknown))}")
    limits = {}
    if not kinds or "sliding_attention" in kinds:
        limits["sliding window"] = getattr(config, "sliding_window", None)
    if "chunked_attention" in kinds:
        limits["attention chunk"] = getattr(config, "attention_chunk_size", None)
    known = {what: size for what, size in limits.items() if size}
    if not known:
        return PromptSharing(math.inf, "")
    what = min(known, key=lambda key: known[key])
    return PromptSharing(known[what], f"{name} has {'an' if what[0] == 'a' else 'a'} {what} of {known[what]} tokens")

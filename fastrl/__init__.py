"""fastrl: fused losses for reinforcement learning of language models, straight from hidden states and the LM head."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastrl_kernels import TokenStats, linear_divergence, linear_logprobs, logprobs_from_logits

from . import objectives
from .objectives import *  # noqa: F403 - its __all__ is part of ours

if TYPE_CHECKING:
    from .integrations.transformers_models import patch_model
    from .trainers.grpo import GRPOTrainer
    from .trainers.grpo_config import GRPOConfig

__version__ = "0.1.0"

# What needs transformers is imported when it is first used: the losses work without it.
_LAZY = {
    "patch_model": ".integrations.transformers_models",
    "GRPOTrainer": ".trainers.grpo",
    "GRPOConfig": ".trainers.grpo_config",
}

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "TokenStats",
    "linear_divergence",
    "linear_logprobs",
    "logprobs_from_logits",
    "patch_model",
]
__all__ += objectives.__all__


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

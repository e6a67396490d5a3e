"""fastrl: fused losses for reinforcement learning of language models, straight from hidden states and the LM head."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastrl_kernels import TokenStats, linear_divergence, linear_logprobs, logprobs_from_logits

from . import objectives
from .objectives import *  # noqa: F403 - its __all__ is part of ours

if TYPE_CHECKING:
    from .integrations.transformers_models import patch_model
    from .trainers import (
        DistillationConfig,
        DistillationTrainer,
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        KTOConfig,
        KTOTrainer,
        PPOConfig,
        PPOTrainer,
        PRMConfig,
        PRMTrainer,
        RewardConfig,
        RewardTrainer,
        SFTConfig,
        SFTTrainer,
    )

__version__ = "0.1.0"

# What needs transformers is imported when it is first used: the losses work without it.
_LAZY = {
    "patch_model": ".integrations.transformers_models",
    "DPOTrainer": ".trainers.dpo",
    "KTOTrainer": ".trainers.dpo",
    "DPOConfig": ".trainers.dpo_config",
    "KTOConfig": ".trainers.dpo_config",
    "DistillationTrainer": ".trainers.distillation",
    "DistillationConfig": ".trainers.distillation_config",
    "GRPOTrainer": ".trainers.grpo",
    "GRPOConfig": ".trainers.grpo_config",
    "PPOTrainer": ".trainers.ppo",
    "PPOConfig": ".trainers.ppo_config",
    "RewardTrainer": ".trainers.reward",
    "PRMTrainer": ".trainers.reward",
    "RewardConfig": ".trainers.reward_config",
    "PRMConfig": ".trainers.reward_config",
    "SFTTrainer": ".trainers.sft",
    "SFTConfig": ".trainers.sft_config",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PRMConfig",
    "PRMTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
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

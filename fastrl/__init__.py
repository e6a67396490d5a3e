"""fastrl: fused losses for reinforcement learning of language models, straight from hidden states and the LM head."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastrl_kernels import TokenStats, linear_divergence, linear_logprobs, logprobs_from_logits

from . import objectives
from .objectives import *  # noqa: F403 - its __all__ is part of ours

if TYPE_CHECKING:
    from .data.row_functions import (
        apply_chat_template,
        extract_prompt,
        is_conversational,
        maybe_apply_chat_template,
        maybe_convert_to_chatml,
        maybe_extract_prompt,
        maybe_unpair_preference_dataset,
        unpair_preference_dataset,
    )
    from .integrations.transformers_models import patch_model
    from .scripts.arguments import (
        DatasetConfig,
        DatasetMixtureConfig,
        ModelConfig,
        ScriptArguments,
        get_dataset,
        get_peft_config,
        get_quantization_config,
    )
    from .scripts.parser import TrlParser
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
    "DatasetConfig": ".scripts.arguments",
    "DatasetMixtureConfig": ".scripts.arguments",
    "ModelConfig": ".scripts.arguments",
    "ScriptArguments": ".scripts.arguments",
    "TrlParser": ".scripts.parser",
    "get_dataset": ".scripts.arguments",
    "get_peft_config": ".scripts.arguments",
    "get_quantization_config": ".scripts.arguments",
    "apply_chat_template": ".data.row_functions",
    "extract_prompt": ".data.row_functions",
    "is_conversational": ".data.row_functions",
    "maybe_apply_chat_template": ".data.row_functions",
    "maybe_convert_to_chatml": ".data.row_functions",
    "maybe_extract_prompt": ".data.row_functions",
    "maybe_unpair_preference_dataset": ".data.row_functions",
    "unpair_preference_dataset": ".data.row_functions",
}

# Names of TRL's, and of its experimental and former parts, that are something else here.
_ELSEWHERE = {
    "AutoModelForCausalLMWithValueHead": "PPOTrainer, which makes the value head itself",
    "BEMACallback": "sync_ref_model=True in the configuration; it keeps no average of the policy over time",
    "CPOConfig": "DPOConfig(loss_type='cpo')",
    "CPOTrainer": "DPOTrainer with loss_type 'cpo', 'simpo' or 'alphapo'",
    "GKDConfig": "DistillationConfig, with lmbda and seq_kd",
    "GKDTrainer": "DistillationTrainer",
    "GMPOConfig": "GRPOConfig(loss_type='gmpo')",
    "GMPOTrainer": "GRPOTrainer with loss_type 'gmpo'",
    "LogCompletionsCallback": "log_completions=True in the configuration",
    "ORPOConfig": "DPOConfig(loss_type='orpo')",
    "ORPOTrainer": "DPOTrainer with loss_type 'orpo'",
    "RLOOConfig": "GRPOConfig with the settings that docs/migration.md gives",
    "RLOOTrainer": "GRPOTrainer with the settings that docs/migration.md gives",
    "RichProgressCallback": "no callback, every trainer shows its progress so where the package rich is",
    "SyncRefModelCallback": "sync_ref_model=True in the configuration",
    "TPOConfig": "DPOConfig(loss_type='tpo')",
    "TPOTrainer": "DPOTrainer with loss_type 'tpo'",
    "clone_chat_template": "chat_template_path in SFTConfig and RewardConfig",
    "create_reference_model": "no reference, trainers make their own",
    "get_kbit_device_map": "no device_map",
    "pack_dataset": "SFTConfig(packing=True)",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "DatasetConfig",
    "DatasetMixtureConfig",
    "DistillationConfig",
    "DistillationTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ModelConfig",
    "PPOConfig",
    "PPOTrainer",
    "PRMConfig",
    "PRMTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "ScriptArguments",
    "TokenStats",
    "TrlParser",
    "apply_chat_template",
    "extract_prompt",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
    "is_conversational",
    "linear_divergence",
    "linear_logprobs",
    "logprobs_from_logits",
    "maybe_apply_chat_template",
    "maybe_convert_to_chatml",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "patch_model",
    "unpair_preference_dataset",
]
__all__ += objectives.__all__


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    if name in _ELSEWHERE:  # an AttributeError's text would not reach who writes `from fastrl import ...`
        raise ImportError(f"fastrl has no {name}: use {_ELSEWHERE[name]} (docs/migration.md)")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

"""fastrl: fused losses for reinforcement learning of language models, straight from hidden states and the LM head."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastrl_kernels import TokenStats, linear_divergence, linear_logprobs, logprobs_from_logits

from .objectives import (
    AdaptiveEntropy,
    AdaptiveKL,
    CorrectedRollouts,
    CPOObjective,
    DistillationOutput,
    FixedKL,
    KLClamp,
    KTOObjective,
    LikelihoodWatch,
    LossOutput,
    ORPOObjective,
    PolicyObjective,
    PPOOutput,
    PreferenceObjective,
    PreferenceOutput,
    Rejection,
    RewardOutput,
    RolloutCorrection,
    RunningMean,
    Sequences,
    TPOObjective,
    ValueOutput,
    aggregate_loss,
    best_of_k_advantages,
    combine_rewards,
    compute_advantages,
    discounted_returns,
    distillation_loss,
    explained_variance,
    gae,
    gpg_advantages,
    group_advantages,
    group_length_reward,
    kl_estimate,
    kto_kl,
    kto_loss,
    length_penalty,
    linear_distillation_loss,
    linear_kto_loss,
    linear_outcome_reward_loss,
    linear_policy_loss,
    linear_ppo_loss,
    linear_preference_loss,
    linear_process_reward_loss,
    linear_reward_model_loss,
    linear_sft_loss,
    linear_topk_distillation_loss,
    linear_value_loss,
    opo_advantages,
    optimal_token_baseline,
    outcome_reward_loss,
    overlong_penalty,
    policy_loss,
    ppo_loss,
    preference_loss,
    process_reward_loss,
    ranking_loss,
    remax_advantages,
    reward_model_loss,
    rewards_tensor,
    rollout_correction,
    sft_loss,
    stop_properly_penalty,
    token_rewards,
    topk_distillation_loss,
    value_loss,
    whiten,
)

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
    "AdaptiveEntropy",
    "AdaptiveKL",
    "CPOObjective",
    "CorrectedRollouts",
    "DistillationOutput",
    "FixedKL",
    "GRPOConfig",
    "GRPOTrainer",
    "KLClamp",
    "KTOObjective",
    "LikelihoodWatch",
    "LossOutput",
    "ORPOObjective",
    "PPOOutput",
    "PolicyObjective",
    "PreferenceObjective",
    "PreferenceOutput",
    "Rejection",
    "RewardOutput",
    "RolloutCorrection",
    "RunningMean",
    "Sequences",
    "TPOObjective",
    "TokenStats",
    "ValueOutput",
    "aggregate_loss",
    "best_of_k_advantages",
    "combine_rewards",
    "compute_advantages",
    "discounted_returns",
    "distillation_loss",
    "explained_variance",
    "gae",
    "gpg_advantages",
    "group_advantages",
    "group_length_reward",
    "kl_estimate",
    "kto_kl",
    "kto_loss",
    "length_penalty",
    "linear_distillation_loss",
    "linear_divergence",
    "linear_kto_loss",
    "linear_logprobs",
    "linear_outcome_reward_loss",
    "linear_policy_loss",
    "linear_ppo_loss",
    "linear_preference_loss",
    "linear_process_reward_loss",
    "linear_reward_model_loss",
    "linear_sft_loss",
    "linear_topk_distillation_loss",
    "linear_value_loss",
    "logprobs_from_logits",
    "opo_advantages",
    "optimal_token_baseline",
    "outcome_reward_loss",
    "overlong_penalty",
    "patch_model",
    "policy_loss",
    "ppo_loss",
    "preference_loss",
    "process_reward_loss",
    "ranking_loss",
    "remax_advantages",
    "reward_model_loss",
    "rewards_tensor",
    "rollout_correction",
    "sft_loss",
    "stop_properly_penalty",
    "token_rewards",
    "topk_distillation_loss",
    "value_loss",
    "whiten",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

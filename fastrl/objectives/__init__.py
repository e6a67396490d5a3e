"""Objectives, each written once: a form on given logps and a fused form that takes its coefficients from the former.

`README.md` beside this file lists them with their options, made from the code.
"""

from .advantages import best_of_k_advantages, combine_rewards, gpg_advantages, group_advantages, opo_advantages
from .aggregation import aggregate_loss
from .distillation import (
    DistillationOutput,
    distillation_loss,
    linear_distillation_loss,
    linear_topk_distillation_loss,
    topk_distillation_loss,
)
from .dpo import PreferenceObjective, RunningMean
from .entropy import AdaptiveEntropy
from .estimators import compute_advantages
from .kl import AdaptiveKL, FixedKL, KLClamp, kl_estimate
from .kto import KTOObjective, kto_kl, kto_loss, linear_kto_loss
from .likelihood import LikelihoodWatch
from .policy import LossOutput, linear_policy_loss, policy_loss
from .policy_objective import PolicyObjective
from .ppo import PPOOutput, linear_ppo_loss, ppo_loss
from .preference import PreferenceOutput, linear_preference_loss, preference_loss
from .reference_free import CPOObjective, ORPOObjective, TPOObjective
from .reward_model import (
    RewardOutput,
    linear_outcome_reward_loss,
    linear_process_reward_loss,
    linear_reward_model_loss,
    outcome_reward_loss,
    process_reward_loss,
    ranking_loss,
    reward_model_loss,
)
from .reward_shaping import (
    group_length_reward,
    length_penalty,
    overlong_penalty,
    pf_ppo_resample,
    pf_ppo_weights,
    rewards_tensor,
    stop_properly_penalty,
    token_rewards,
)
from .rollout_correction import CorrectedRollouts, Rejection, RolloutCorrection, rollout_correction
from .sequences import Sequences
from .supervised import linear_sft_loss, sft_loss
from .token_advantages import (
    discounted_returns,
    gae,
    linear_sum_pi_squared,
    optimal_token_baseline,
    remax_advantages,
    whiten,
)
from .token_selection import covariance_tokens, entropy_threshold
from .value import ValueOutput, explained_variance, linear_value_loss, value_loss

__all__ = [
    "AdaptiveEntropy",
    "AdaptiveKL",
    "CPOObjective",
    "CorrectedRollouts",
    "DistillationOutput",
    "FixedKL",
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
    "ValueOutput",
    "aggregate_loss",
    "best_of_k_advantages",
    "combine_rewards",
    "compute_advantages",
    "covariance_tokens",
    "discounted_returns",
    "distillation_loss",
    "entropy_threshold",
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
    "linear_kto_loss",
    "linear_outcome_reward_loss",
    "linear_policy_loss",
    "linear_ppo_loss",
    "linear_preference_loss",
    "linear_process_reward_loss",
    "linear_reward_model_loss",
    "linear_sft_loss",
    "linear_sum_pi_squared",
    "linear_topk_distillation_loss",
    "linear_value_loss",
    "opo_advantages",
    "optimal_token_baseline",
    "outcome_reward_loss",
    "overlong_penalty",
    "pf_ppo_resample",
    "pf_ppo_weights",
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

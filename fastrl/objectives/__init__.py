"""Objectives, each written once: a form on given logps and a fused form that takes its coefficients from the former."""

from .advantages import combine_rewards, gae, group_advantages
from .entropy import AdaptiveEntropy
from .kl import kl_estimate
from .policy import LossOutput, PolicyObjective, linear_policy_loss, policy_loss

__all__ = [
    "AdaptiveEntropy",
    "LossOutput",
    "PolicyObjective",
    "combine_rewards",
    "gae",
    "group_advantages",
    "kl_estimate",
    "linear_policy_loss",
    "policy_loss",
]

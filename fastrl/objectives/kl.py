"""Per-token estimators of KL(policy || reference) from samples of the policy."""

from __future__ import annotations

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str = "k3") -> Tensor:
    """Schulman's estimators ("Approximating KL divergence", 2020) of KL(policy || reference), per token, in nats.

    With `d = ref_logps - logps`: k1 is `-d` (unbiased, may be negative), k2 is `d^2 / 2` (its gradient is that of the
    KL), k3 is `exp(d) - d - 1` (unbiased, never negative; TRL's only one).

    Args:
        logps, ref_logps: log-probabilities of the same tokens, of one shape.
        estimator: "k1", "k2" or "k3".

    Raises:
        ValueError: an unknown estimator.
    """
    d = ref_logps - logps
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.exp(d) - d - 1
    raise ValueError(f"kl_estimator: expected one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}")

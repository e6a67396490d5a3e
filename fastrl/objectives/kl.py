"""Per-token estimators of KL(policy || reference) from samples of the policy, and controllers of its coefficient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .masking import known_finite

KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+")


@dataclass(frozen=True, kw_only=True)
class KLClamp:
    """Bounds that keep an estimate finite (verl's and OpenRLHF's, see `kl_estimate`). No gradient beyond them.

    Args:
        low, high: of `ref_logps - logps` inside k3's exponential, in nats; the other estimators do not have one.
        value: largest magnitude of the estimate of any kind, in nats.

    Raises:
        ValueError: low above high, or a value that is not above 0.
    """

    low: float = -math.inf
    high: float = math.inf
    value: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"low: expected at most high = {self.high}, got {self.low}")
        if not self.value > 0:
            raise ValueError(f"value: expected a number above 0, got {self.value}")


KL_CLAMPS = {"verl": KLClamp(low=-20.0, high=20.0, value=10.0), "openrlhf": KLClamp(high=10.0, value=10.0)}


def kl_estimate(
    logps: Tensor,
    ref_logps: Tensor,
    estimator: str = "k3",
    *,
    clamp: KLClamp | str | None = None,
    gradient_weight: Tensor | None = None,
) -> Tensor:
    """Schulman's estimators ("Approximating KL divergence", 2020) of KL(policy || reference), per token, in nats.

    With `d = ref_logps - logps`:

        k1     -d               unbiased, may be negative; its gradient has expectation 0: for rewards, not for losses
        k2     d^2 / 2          biased, but its gradient is that of the KL on samples of the policy: for losses
        k3     exp(d) - d - 1   unbiased, never negative, low variance (GRPO, Shao et al. 2024, eq. 4); TRL's only one
        abs    |d|              verl's; gradient 0 at d = 0
        k1+, k2+, k3+, abs+     straight-through: the value of the base (clamps included), the gradient of k2 (clamps
                                not included). verl 0.9's suffix; OpenRLHF 0.11's `unbiased_gradient`

    Where only one of the two logps is -inf the estimate is infinite (k2, and k3 where it is that of the policy, have no
    gradient there); where both are, the token does not tell the two apart and the estimate is 0.

    Args:
        logps, ref_logps: log-probabilities of the same tokens, of one shape; differentiable in both.
        estimator: one of `KL_ESTIMATORS`.
        clamp: bounds, or "verl" (k3 only: d within 20, estimate within 10) or "openrlhf" (all: estimate within 10; k3:
            d at most 10); None: TRL has none, and neither do we: a bound hides a policy that runs away.
        gradient_weight: factor of a straight-through estimator's gradient, of the shape of logps, held constant; None:
            1. OpenRLHF's is `(logps - old_logps).exp().clamp(max=10)`, for tokens sampled by an older policy.

    Raises:
        ValueError: an unknown estimator or clamp, or a gradient_weight for an estimator that is not straight-through.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator: expected one of {', '.join(KL_ESTIMATORS)}, got {estimator!r}")
    base = estimator.removesuffix("+")
    bounds = _bounds(clamp, base)
    d = ref_logps - logps
    finite = known_finite(d)
    if not finite:
        d = torch.where(torch.isneginf(logps) & torch.isneginf(ref_logps), 0.0, d)
    if base == estimator:
        if gradient_weight is not None:
            raise ValueError(f"gradient_weight: only for a straight-through estimator such as {base}+, not {estimator}")
        return _value(d, base, bounds, finite)
    surrogate = 0.5 * (d if finite else torch.where(d.isfinite(), d, 0.0)).square()
    if gradient_weight is not None:
        surrogate = surrogate * gradient_weight.detach()
    return _value(d.detach(), base, bounds, finite) + (surrogate - surrogate.detach())


def _bounds(clamp: KLClamp | str | None, base: str) -> KLClamp:
    if isinstance(clamp, KLClamp):
        return clamp
    if clamp is None or (clamp == "verl" and base != "k3"):
        return KLClamp()
    if clamp not in KL_CLAMPS:
        raise ValueError(f"clamp: expected a KLClamp, None or one of {', '.join(KL_CLAMPS)}, got {clamp!r}")
    return KL_CLAMPS[clamp]


def _value(d: Tensor, base: str, bounds: KLClamp, finite: bool) -> Tensor:
    # A finite bound where d may be infinite: inf - inf and 0 * inf would be NaN.
    largest = math.inf if finite else torch.finfo(d.dtype).max
    if base == "k1":
        kl = -d
    elif base == "k2":
        kl = 0.5 * _clamp(d, -largest, largest).square()
    elif base == "abs":
        kl = d.abs()
    else:
        d = _clamp(d, bounds.low, min(bounds.high, largest))
        kl = torch.exp(d) - d - 1
    return _clamp(kl, -bounds.value, bounds.value)


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    return x if low == -math.inf and high == math.inf else x.clamp(low, high)


@dataclass
class FixedKL:
    """A KL coefficient that stays as it is; has what `AdaptiveKL` has.

    Raises:
        ValueError: a coefficient below 0.
    """

    coef: float

    def __post_init__(self) -> None:
        if not self.coef >= 0:
            raise ValueError(f"coef: expected a number of at least 0, got {self.coef!r}")

    def update(self, kl: float, samples: int) -> None:
        """Nothing: the coefficient is fixed."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = float(state["coef"])


@dataclass
class AdaptiveKL(FixedKL):
    """Steers the KL to a target: `coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon`.

    Ziegler et al. 2019 ("Fine-tuning language models from human preferences", section 2.2); verl 0.9's
    `AdaptiveKLController`. Use it with a KL in the reward (`r - coef * KL`), with a budget of nats to spend.

    Args:
        coef: initial coefficient, at least 0 (0 stays 0).
        target: KL in nats, in the unit that `update` is given, above 0.
        horizon: samples over which the coefficient may change by a factor of e^0.2, about; above 0.

    Raises:
        ValueError: an argument out of its range.
    """

    target: float
    horizon: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target", "horizon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")

    def update(self, kl: float, samples: int) -> None:
        """After a batch: its mean KL in nats, and its number of samples (sequences in verl).

        Raises:
            ValueError: a KL of NaN, which would make the coefficient NaN for good.
        """
        if math.isnan(kl):
            raise ValueError("kl: expected a number of nats, got NaN")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * samples / self.horizon

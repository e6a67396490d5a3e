"""Advantage estimators by the names that verl, OpenRLHF and TRL give them: presets of the functions they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fastrl_kernels import validation

from .advantages import (
    best_of_k_advantages,
    gpg_advantages,
    group_advantages,
    group_statistics,
    normalized_sum,
    opo_advantages,
)
from .masking import inside
from .reward_shaping import token_rewards
from .sequences import Sequences, sequences_of
from .token_advantages import discounted_returns, gae, optimal_token_baseline, remax_advantages, whiten


@dataclass(frozen=True)
class _Batch:
    """What every estimator is given."""

    rewards: Tensor  # (B,), or (B, T) or (N,), or (B, F) for gdpo
    mask: Tensor  # (B, T) or (N,) bool
    sequences: Sequences
    group_ids: Tensor | None  # (B,)
    cu_seqlens: Tensor | None
    backend: str | None

    @property
    def groups(self) -> Tensor:
        if self.group_ids is None:
            raise ValueError(
                "group_ids: this estimator compares completions of a prompt, expected a (B,) tensor, got None"
            )
        return self.group_ids

    @cached_property
    def scores(self) -> Tensor:
        """(B,): a reward per sequence, the sum of a sequence's where they are per token."""
        if self.rewards.shape == self.mask.shape:
            return self.sequences.sum(inside(self.rewards, self.mask))
        validation.check_shape("rewards", self.rewards, (self.sequences.count,), "one per sequence, or one per token")
        return self.rewards

    @property
    def tokens(self) -> Tensor:
        """In the shape of mask, outside which they may be anything."""
        if self.rewards.shape == self.mask.shape:
            return self.rewards
        return token_rewards(self.rewards, self.mask, cu_seqlens=self.cu_seqlens)

    @property
    def layout(self) -> dict[str, Any]:
        return {"cu_seqlens": self.cu_seqlens, "backend": self.backend}

    def with_missing(self, per_sequence: Tensor) -> Tensor:
        """NaN where a sequence has no reward, so that whitening leaves it out."""
        return per_sequence.masked_fill(~self.scores.isfinite(), torch.nan)

    def spread(self, per_sequence: Tensor) -> Tensor:
        return inside(self.sequences.spread(per_sequence), self.mask)


Estimate = tuple[Tensor, Tensor]


def _twice(advantages: Tensor) -> Estimate:
    """An outcome's estimator: its return is its advantage."""
    return advantages, advantages


def _group(
    batch: _Batch, *, baseline: str = "mean", scale: str = "group", eps: float = 1e-4, lone: str = "zero"
) -> Estimate:
    options = {"baseline": baseline, "scale": scale, "eps": eps, "lone": lone, "backend": batch.backend}
    return _twice(batch.spread(group_advantages(batch.scores, batch.groups, **options)))  # type: ignore[arg-type]


def _best_of_k(
    batch: _Batch, *, k: int | None = None, scale: str = "group", eps: float = 1e-4, lone: str = "zero"
) -> Estimate:
    return _twice(batch.spread(best_of_k_advantages(batch.scores, batch.groups, k=k, scale=scale, eps=eps, lone=lone)))


def _opo(batch: _Batch, *, lone: str = "zero") -> Estimate:
    lengths = batch.sequences.counts(batch.mask, torch.float64)
    return _twice(batch.spread(opo_advantages(batch.scores, lengths, batch.groups, lone=lone)))


def _gpg(batch: _Batch, *, f_norm: float = 1.0, count: str = "advantages", lone: str = "zero") -> Estimate:
    options = {"f_norm": f_norm, "count": count, "lone": lone, "backend": batch.backend}
    return _twice(batch.spread(gpg_advantages(batch.scores, batch.groups, **options)))  # type: ignore[arg-type]


def _gdpo(
    batch: _Batch, *, weights: Tensor | None = None, scale: str = "group", eps: float = 1e-4, lone: str = "zero"
) -> Estimate:
    options = {"scale": scale, "eps": eps, "lone": lone, "backend": batch.backend}
    combined = normalized_sum(batch.rewards, weights, batch.groups, **options)
    return _twice(whiten(batch.spread(combined), batch.mask))


def _group_whitened(batch: _Batch, *, baseline: str = "mean", lone: str = "zero") -> Estimate:
    options = {"baseline": baseline, "scale": "none", "lone": lone, "backend": batch.backend}
    advantages = group_advantages(batch.scores, batch.groups, **options)  # type: ignore[arg-type]
    return _twice(whiten(batch.spread(batch.with_missing(advantages)), batch.mask))


def _rloo(batch: _Batch, *, normalize: bool = False) -> Estimate:
    """TRL's: with normalize over the sequences whose reward has another to be compared with."""
    advantages = group_advantages(
        batch.scores, batch.groups, baseline="leave_one_out", scale="none", backend=batch.backend
    )
    if normalize:
        compared = batch.scores.isfinite() & (group_statistics(batch.scores, batch.groups)[2] > 1)
        advantages = whiten(advantages, compared, preset="trl").to(advantages.dtype)
    return _twice(batch.spread(advantages))


def _reinforce_plus_plus(batch: _Batch, *, gamma: float = 1.0) -> Estimate:
    returns = discounted_returns(batch.tokens, batch.mask, gamma=gamma, **batch.layout)
    return whiten(returns, batch.mask), returns


def _remax(batch: _Batch, *, baseline_rewards: Tensor) -> Estimate:
    return remax_advantages(batch.tokens, baseline_rewards, batch.mask, **batch.layout)


def _optimal_token_baseline(
    batch: _Batch,
    *,
    logps: Tensor,
    sum_pi_squared: Tensor,
    importance_weights: Tensor | None = None,
    skip_holes: bool = True,
    zero_tail: bool = True,
    eps: float = 1e-8,
) -> Estimate:
    return optimal_token_baseline(
        batch.tokens, batch.mask, logps, sum_pi_squared, batch.groups, importance_weights=importance_weights,
        skip_holes=skip_holes, zero_tail=zero_tail, eps=eps, **batch.layout,
    )  # fmt: skip


def _gae(batch: _Batch, *, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Estimate:
    advantages, returns = gae(batch.tokens, values, batch.mask, gamma=gamma, lam=lam, **batch.layout)
    return whiten(advantages, batch.mask), returns


def _shaped(
    batch: _Batch,
    *,
    baseline: str | None = None,
    scale: str = "none",
    clip_range: tuple[float, float] | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """OpenRLHF's token rewards: baseline first, then the clip, then the KL."""
    if baseline is None and scale != "none":
        raise ValueError(f"scale: without a baseline nothing is scaled, got {scale!r}")
    rewards = batch.rewards
    if baseline is not None:
        groups = torch.zeros_like(batch.scores, dtype=torch.int64) if baseline == "batch_mean" else batch.groups
        over = "mean" if baseline == "batch_mean" else baseline
        rewards = batch.with_missing(
            group_advantages(batch.scores, groups, baseline=over, scale=scale, eps=1e-9, backend=batch.backend)
        )
    return token_rewards(
        rewards, batch.mask, kl=kl, kl_coef=kl_coef, clip_range=clip_range, cu_seqlens=batch.cu_seqlens
    )


def _reinforce(
    batch: _Batch,
    *,
    baseline: str | None = None,
    scale: str = "none",
    gamma: float = 1.0,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    clip_range: tuple[float, float] | None = None,
    normalize: bool = True,
    divide_by_std: bool = True,
) -> Estimate:
    shaped = _shaped(batch, baseline=baseline, scale=scale, clip_range=clip_range, kl=kl, kl_coef=kl_coef)
    returns = discounted_returns(shaped, batch.mask, gamma=gamma, through_mask=True, **batch.layout)
    if not normalize and not divide_by_std:
        raise ValueError("divide_by_std: this estimator does not normalize, there is no division to leave out")
    if not normalize:
        return _twice(inside(returns, batch.mask & returns.isfinite()))
    return whiten(returns, batch.mask, preset="openrlhf", divide_by_std=divide_by_std), returns


def _gae_openrlhf(
    batch: _Batch,
    *,
    values: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    clip_range: tuple[float, float] | None = None,
    divide_by_std: bool = True,
) -> Estimate:
    shaped = _shaped(batch, clip_range=clip_range, kl=kl, kl_coef=kl_coef)
    advantages, returns = gae(shaped, values, batch.mask, gamma=gamma, lam=lam, through_mask=True, **batch.layout)
    return whiten(advantages, batch.mask, preset="openrlhf", divide_by_std=divide_by_std), returns


_plain = partial(_reinforce, normalize=False)

ESTIMATORS: Mapping[str, Mapping[str, Callable[..., Estimate]]] = {
    "verl": {
        "gae": _gae,
        "grpo": partial(_group, eps=1e-6, lone="score"),
        "grpo_vectorized": partial(_group, eps=1e-6, lone="score"),
        "grpo_passk": partial(_best_of_k, eps=1e-6),
        "gdpo": partial(_gdpo, eps=1e-6, lone="score"),
        "rloo": partial(_group, baseline="leave_one_out", scale="none", lone="score"),
        "rloo_vectorized": partial(_group, baseline="leave_one_out", scale="none"),
        "opo": partial(_opo, lone="score"),
        "gpg": partial(_gpg, count="rewards", lone="score"),
        "reinforce_plus_plus": _reinforce_plus_plus,
        "reinforce_plus_plus_baseline": partial(_group_whitened, lone="score"),
        "remax": _remax,
        "optimal_token_baseline": partial(_optimal_token_baseline, skip_holes=False),
        "tir_optimal_token_baseline": _optimal_token_baseline,
    },
    "openrlhf": {
        "gae": _gae_openrlhf,
        "reinforce": _reinforce,
        "reinforce_baseline": partial(_reinforce, baseline="mean"),
        "rloo": partial(_plain, baseline="leave_one_out"),
        "group_norm": partial(_plain, baseline="mean", scale="group"),
        "dr_grpo": partial(_plain, baseline="mean"),
        "flash_reinforce": partial(_plain, baseline="batch_mean"),
    },
    "trl": {
        "grpo": _group,
        "rloo": _rloo,
    },
}


@cache
def _options(preset: str, estimator: str) -> tuple[str, ...]:
    """What the estimator takes beyond the batch."""
    return tuple(inspect.signature(ESTIMATORS[preset][estimator]).parameters)[1:]


def compute_advantages(
    estimator: str,
    rewards: Tensor,  # (B,), or (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,)
    *,
    preset: str = "verl",
    group_ids: Tensor | None = None,  # (B,)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns per token by the name of an estimator in verl 0.9, OpenRLHF 0.11 or TRL 1.16; no gradient.

    A table of presets over the functions of this library, which can be called on their own: `ESTIMATORS[preset]` lists
    the names. Each reproduces its origin inside the mask. Options beyond the below are the estimator's: gamma; lam and
    values (gae); scale, eps, lone (grpo and kin); k (grpo_passk); weights (gdpo); f_norm, count (gpg);
    baseline_rewards (remax); logps, sum_pi_squared, importance_weights, zero_tail, eps (optimal token baselines);
    normalize (TRL's rloo); kl, kl_coef, clip_range, divide_by_std (OpenRLHF).

    Where the presets differ by more than a constant: OpenRLHF takes the baseline from the raw scores, then clips, then
    takes the KL off each token, discounts through tokens outside the mask, and whitens with the biased variance; verl's
    KL is in the token rewards (`token_rewards`) before any baseline, tokens outside the mask are skipped.

    Args:
        estimator: the name.
        rewards: `(B,)`, one per sequence, or in the shape of mask, one per token (the latter where both fit). `(B, F)`,
            one per function, for gdpo. Never read outside the mask (verl's outcome estimators do add what is there).
        mask: `(B, T)`, or `(N,)` with cu_seqlens, nonzero where the token counts.
        preset: "verl", "openrlhf" or "trl".
        group_ids: `(B,)` integers, for estimators that compare the completions of a prompt.
        cu_seqlens: offsets of packed sequences.
        backend: of the scan and the group statistics; None chooses.

    Returns:
        advantages and returns (those of the critic, or the advantages again where there is none), in the shape of mask,
        exactly 0 outside it. A sequence whose reward is NaN or infinite gets advantages of 0 and is left out of all
        statistics; its returns, where they are a critic's, are not finite.

    Raises:
        ValueError: an unknown preset or estimator, an option that this estimator does not have, no group_ids where it
            needs them.
        TypeError: an option that it needs is missing.
    """
    if preset not in ESTIMATORS:
        raise ValueError(f"preset: expected one of {', '.join(ESTIMATORS)}, got {preset!r}")
    if estimator not in ESTIMATORS[preset]:
        raise ValueError(f"estimator: {preset} has {', '.join(ESTIMATORS[preset])}, got {estimator!r}")
    compute = ESTIMATORS[preset][estimator]
    parameters = _options(preset, estimator)
    if unknown := [name for name in options if name not in parameters]:
        raise ValueError(f"{', '.join(unknown)}: {preset}'s {estimator} takes {', '.join(parameters) or 'no option'}")
    validation.check_floating("rewards", rewards)
    sequences = sequences_of(mask, cu_seqlens, "mask")
    with torch.no_grad():
        return compute(_Batch(rewards, mask.bool(), sequences, group_ids, cu_seqlens, backend), **options)

"""Which tokens a policy term acts on, where that depends on other tokens than the one in question."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl_kernels import TokenBatch, backends

from .policy_inputs import checked_tokens, clean
from .surrogates import mask_of, ratio_clipped, sequences_in

if TYPE_CHECKING:
    from .policy_objective import PolicyObjective


@torch.no_grad()
def entropy_threshold(
    entropy: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,)
    top_entropy_quantile: float,
) -> Tensor:
    """The entropy from which on a token belongs to the share `top_entropy_quantile` of highest entropy.

    The quantile `1 - top_entropy_quantile` over the tokens of the mask, linear between two, in fp32, as TRL 1.16
    (after Wang et al. 2025, arXiv:2506.01939). Taken over a whole batch and passed to `policy_loss` with each of its
    micro-batches, it makes their losses add up to the batch's. NaN where no token counts.
    """
    values = torch.where(mask != 0, entropy.detach().float(), torch.nan).flatten()
    if values.numel() == 0:
        return values.new_full((), torch.nan)
    return torch.nanquantile(values, 1 - top_entropy_quantile)


def on_policy(tokens: TokenBatch, sampling_logps: Tensor | None, threshold: float) -> Tensor:
    """Where the policy term stays: advantage not negative, or the sequence's mean log-ratio within the threshold."""
    logps, sequences = tokens.logps.detach(), sequences_in(tokens)
    behaviour = tokens.old_logps if sampling_logps is None else sampling_logps
    drift = torch.zeros_like(logps) if behaviour is None else torch.nan_to_num(behaviour - logps, nan=0.0)
    return (tokens.advantages >= 0) | (sequences.spread(sequences.mean(drift, mask_of(tokens))) <= threshold)


@torch.no_grad()
def by_covariance(objective: PolicyObjective, tokens: TokenBatch, scores: Tensor | None = None) -> Tensor:
    """Tokens that clip_cov cuts, or that kl_cov penalises: see `covariance_tokens`."""
    logps, mask = tokens.logps, mask_of(tokens)
    advantages = tokens.advantages.expand_as(logps)
    known = mask & logps.isfinite() & advantages.isfinite()
    centred = [x - torch.where(known, x, 0.0).sum() / known.sum().clamp(min=1) for x in (advantages, logps)]
    covariance = torch.where(known, centred[0] * centred[1], -torch.inf)
    if objective.loss_type == "kl_cov":
        return _largest(covariance, objective.kl_cov_ratio, mask)
    low, high = ratio_clipped(objective, tokens, objective._ratio(tokens))
    between = (covariance > objective.clip_cov_lb) & (covariance < objective.clip_cov_ub)
    scores = torch.rand_like(logps) if scores is None else scores
    candidates = between & ~(low | high)
    return _largest(torch.where(candidates, scores, -torch.inf), objective.clip_cov_ratio, mask)


@torch.no_grad()
def fast_by_covariance(objective: PolicyObjective, tokens: TokenBatch) -> Tensor:
    """`by_covariance` with a kernel of the CPU; where all candidates of clip_cov are taken, nothing is drawn."""
    kernel, mask = backends.load("cpu").covariances, mask_of(tokens)  # type: ignore[attr-defined]
    if objective.loss_type == "kl_cov":
        covariance, _ = kernel(tokens, objective.ratio_bounds, None)
        return _largest(covariance, objective.kl_cov_ratio, mask)
    bounds = objective.clip_cov_lb, objective.clip_cov_ub
    candidates, found = kernel(tokens, objective.ratio_bounds, bounds)
    if found <= max(1, int(objective.clip_cov_ratio * int(mask.sum()))):
        return candidates
    scores = torch.where(candidates, torch.rand_like(tokens.logps), -torch.inf)
    return _largest(scores, objective.clip_cov_ratio, mask)


def covariance_tokens(
    objective: PolicyObjective,
    logps: Tensor,  # (B, T) or (N,)
    *,
    advantages: Tensor,  # (B,) or of the shape of logps
    mask: Tensor,  # (B, T) or (N,)
    old_logps: Tensor | None = None,  # (B, T) or (N,)
    scores: Tensor | None = None,  # (B, T) or (N,)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> Tensor:
    """The tokens that `clip_cov` cuts, or that `kl_cov` penalises (Cui et al. 2025), bool in the shape of logps.

    With `cov = (A - mean A)(logps - mean logps)`, means over the N tokens of the mask that are finite: kl_cov takes the
    `max(1, int(kl_cov_ratio N))` tokens of largest cov; clip_cov takes `max(1, int(clip_cov_ratio N))` at random, or
    all if there are fewer, of those with `clip_cov_lb < cov < clip_cov_ub` that the ratio's clip has left alone.

    verl 0.9's `clip_cov` and `kl_cov`. `policy_loss` does this by itself for the tokens it is given. For micro-batches,
    call this once with the whole batch and pass each part of the answer as `selected`: their losses then add up to the
    batch's.

    Args:
        objective: of loss_type "clip_cov" or "kl_cov".
        scores: clip_cov takes the candidates of largest score; None: uniform random numbers (torch's generator).
        The rest: see `policy_loss`.

    Raises:
        ValueError: another loss type, scores for kl_cov, or a wrong shape.
    """
    if not objective.surrogate.covariance:
        raise ValueError(f"objective: expected loss_type clip_cov or kl_cov, got {objective.loss_type!r}")
    if scores is not None and objective.loss_type == "kl_cov":
        raise ValueError("scores: kl_cov takes the largest covariances, nothing is drawn")
    tokens, checked = checked_tokens(
        logps.shape, logps.dtype, logps.device, advantages=advantages, mask=mask, old_logps=old_logps,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    inside = torch.where(checked, logps.detach(), 0.0)
    tokens = replace(tokens, logps=inside, old_logps=clean(tokens.old_logps, checked), mask=checked)
    return by_covariance(objective, tokens, scores)


def _largest(values: Tensor, share: float, mask: Tensor) -> Tensor:
    """The share of the mask's tokens of largest value (rounded down, at least one), never one that is -inf.

    Without a synchronisation: the number of tokens that is looked at is that of a full mask.
    """
    flat = values.flatten()
    most = min(flat.shape[0], max(1, int(share * flat.shape[0])))
    top = flat.topk(most)
    count = (share * mask.sum().double()).floor().clamp(min=1)
    chosen = (torch.arange(most, device=flat.device) < count) & (top.values > -torch.inf)
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(0, top.indices, chosen).view_as(values)

"""The critic's loss: squared error of the values against the returns, clipped around the values of the rollout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels import validation
from fastrl_kernels.head import accumulation_dtype

from .aggregation import aggregation_weights
from .masking import inside
from .score_head import row_scores
from .sequences import sequences_of


class ValueOutput(NamedTuple):
    """What a value loss returns."""

    loss: Tensor  # scalar, differentiable
    values: Tensor  # in the shape of the tokens, detached; 0 outside the mask
    metrics: dict[str, Tensor]  # detached scalars, verl's names without "critic/"


def value_loss(
    values: Tensor,  # (B, T)
    returns: Tensor,  # (B, T)
    *,
    mask: Tensor,  # (B, T)
    old_values: Tensor | None = None,  # (B, T)
    cliprange_value: float | None = 0.2,
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
    eps: float = 0.0,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> ValueOutput:
    """The clipped value loss of PPO (Schulman et al. 2017; the clip is that of OpenAI's baselines).

        v_c  = clamp(values, old_values - cliprange_value, old_values + cliprange_value)
        L    = max((values - returns)^2, (v_c - returns)^2)          cliprange_value None: (values - returns)^2
        loss = 0.5 * sum of weights * L, the weights given by `aggregation`

    Use it to train a critic beside a policy objective; for both in one call see `ppo_loss`. The factor 0.5 is that of
    TRL, verl and OpenRLHF alike; what differs between them is how tokens are averaged:

        verl 0.9        aggregation=loss_agg_mode, eps=1e-8, length=loss_scale_factor (else T)
        OpenRLHF 0.11   aggregation="token-mean" if token_level_loss else "seq-mean-token-mean", eps=1e-8
        TRL's PPO       aggregation="token-mean"
        verl, OpenRLHF  on dp_size ranks: normalizer=the whole batch's tokens or sequences / dp_size

    Args:
        values: `(B, T)`, or `(N,)` with cu_seqlens: the critic's, now. fp32, fp64, bf16 or fp16.
        returns: targets, in the shape of values; no gradient flows into them.
        mask: nonzero where the token counts. Values elsewhere are never used and may be NaN or inf.
        old_values: the critic's values when the returns were made; needed with cliprange_value, else not used.
        cliprange_value: at least 0, or None for no clipping.
        aggregation, normalizer, length, eps: see `aggregation_weights`. The losses of micro-batches that share the
            whole batch's normalizer add up to the whole batch's loss.
        cu_seqlens: `(B + 1,)` bounds of packed sequences.

    Returns:
        ValueOutput in fp32 (fp64 where an input is fp64). Metrics, over the tokens of the mask: vf_loss; vf_clipfrac,
        the share where the clipped square is the larger one; vpred_mean; vf_explained_var, see `explained_variance`.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or number, or old_values missing.
    """
    validation.check_floating("values", values)
    sequences = sequences_of(values, cu_seqlens, "values")
    checked = _checked_mask(mask, values)
    if cliprange_value is not None and not cliprange_value >= 0:
        raise ValueError(f"cliprange_value: expected None or a number of at least 0, got {cliprange_value!r}")
    if cliprange_value is not None and old_values is None:
        raise ValueError("old_values: needed by cliprange_value (None: no clipping)")
    dtype = accumulation_dtype(torch.promote_types(values.dtype, returns.dtype))

    def clean(name: str, x: Tensor) -> Tensor:
        validation.check_shape(name, x, tuple(values.shape), "one per token, as values")
        validation.check_device(name, x, values.device)
        return inside(x.to(dtype), checked)

    values, returns = clean("values", values), clean("returns", returns.detach())
    errors = values - returns
    squares = errors.square()
    weights = aggregation_weights(
        aggregation, checked, sequences, normalizer=normalizer, length=length, eps=eps, dtype=dtype
    )
    clipped = torch.zeros_like(checked)
    at_bound = weights.new_zeros(())  # the part of the loss that the clip makes constant
    if cliprange_value is not None and old_values is not None:
        old, now = clean("old_values", old_values.detach()), values.detach()
        held = now.clamp(old - cliprange_value, old + cliprange_value)
        held_squares = (held - returns).square()
        clipped = held_squares > squares
        tied = (held_squares == squares) & (held != now)
        free = inside(weights, ~clipped).sub_(inside(weights, tied), alpha=0.5)  # the gradient of max at a tie
        at_bound = ((weights - free) * inside(held_squares, clipped | tied)).sum()
        weights = free
    loss = 0.5 * ((weights * squares).sum() + at_bound)
    count = checked.sum().clamp(min=1)
    metrics = {
        "vf_loss": loss.detach(),
        "vf_clipfrac": clipped.sum().to(dtype) / count,
        "vpred_mean": values.detach().sum() / count,
        "vf_explained_var": _explained_variance(errors.detach(), returns, checked),
    }
    return ValueOutput(loss, values.detach(), metrics)


def linear_value_loss(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (1, D)
    returns: Tensor,  # (B, T)
    *,
    mask: Tensor,  # (B, T)
    bias: Tensor | None = None,  # (1,)
    old_values: Tensor | None = None,  # (B, T)
    cliprange_value: float | None = 0.2,
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
    eps: float = 0.0,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> ValueOutput:
    """The value loss straight from hidden states and the value head.

    Eager equivalent: `value_loss((hidden @ weight.T + bias).squeeze(-1), returns, ...)`. Only the rows of the mask are
    multiplied, in fp32 for half-precision inputs; the others are never read and get a gradient of exactly 0.

    Args:
        hidden: `(B, T, D)`, or `(N, D)` with cu_seqlens; fp32, fp64, bf16 or fp16.
        weight: `(1, D)` value head; bias: `(1,)`.
        The rest: see `value_loss`.

    Raises:
        ValueError, TypeError: as `value_loss`; a head of more than one output.
    """
    tokens = hidden[..., 0]
    sequences_of(tokens, cu_seqlens, "hidden without D")
    if weight.ndim != 2 or weight.shape[0] != 1:
        raise ValueError(f"weight: expected a value head of shape (1, D), got {tuple(weight.shape)}")
    checked = _checked_mask(mask, tokens)
    rows = checked.reshape(-1).nonzero().squeeze(-1)
    scores = row_scores(hidden, weight, bias, rows).squeeze(-1)
    values = scores.new_zeros(checked.numel()).index_copy(0, rows, scores).view(checked.shape)
    return value_loss(
        values, returns, mask=checked, old_values=old_values, cliprange_value=cliprange_value, aggregation=aggregation,
        normalizer=normalizer, length=length, eps=eps, cu_seqlens=cu_seqlens,
    )  # fmt: skip


@torch.no_grad()
def explained_variance(
    values: Tensor,  # (...)
    returns: Tensor,  # (...)
    *,
    mask: Tensor,  # (...)
    eps: float = 1e-5,
) -> Tensor:
    """`1 - var(returns - values) / (var(returns) + eps)` over the tokens of the mask; no gradient.

    1: the critic explains the returns; 0: no better than their mean; below: worse than that. Semantics of verl 0.9
    (`critic/vf_explained_var`: unbiased variances, eps 1e-5). NaN where fewer than two tokens count.
    """
    checked = _checked_mask(mask, values)
    values, returns = (inside(x.detach(), checked) for x in (values, returns))
    return _explained_variance(values - returns, returns, checked, eps)


def _explained_variance(errors: Tensor, returns: Tensor, mask: Tensor, eps: float = 1e-5) -> Tensor:
    """Both 0 outside the mask."""
    count = mask.sum()

    def variance(x: Tensor) -> Tensor:
        return inside(x - x.sum() / count, mask).square().sum() / (count - 1)

    explained = 1 - variance(errors) / (variance(returns) + eps)
    return torch.where(count > 1, explained, torch.nan)


def _checked_mask(mask: Tensor, tokens: Tensor) -> Tensor:
    """The mask as booleans."""
    checked = validation.check_mask(mask, tuple(tokens.shape), tokens.device)
    if checked is None:
        raise ValueError("mask: expected a tensor with one entry per token, got None")
    return checked

"""From the losses of tokens to one number: the only place where a mean over tokens or sequences is defined."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl_kernels import validation

from .masking import as_numbers, weighted_sum
from .sequences import Sequences, sequences_of

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def aggregation_weights(
    aggregation: str,
    mask: Tensor,  # (B, T) or (N,), bool
    sequences: Sequences,
    *,
    normalizer: Tensor | float | None = None,
    length: float | None = None,
    eps: float = 0.0,
    dtype: torch.dtype,
) -> Tensor:
    """Weight of each token's loss, so that the loss is `(weights * token_loss).sum()`; exactly 0 outside the mask.

    With n_i the tokens of the mask in sequence i, N their sum and S the number of sequences with n_i > 0:

        token-mean                 1 / N             every token counts alike (DAPO, Yu et al. 2025, eq. 8)
        token-sum                  1
        seq-mean-token-sum         1 / S
        seq-mean-token-mean        1 / (S n_i)       every sequence counts alike (GRPO, Shao et al. 2024, eq. 3)
        seq-mean-token-sum-norm    1 / (S length)    no bias by length (Dr. GRPO, Liu et al. 2025)

    The names, and S over the sequences that have a token, are verl 0.9's `agg_loss` (OpenRLHF 0.11 has token-mean and
    seq-mean-token-mean; TRL's S counts every row: pass it as normalizer). Weights of a part of a batch under the
    normalizer of the whole are those that the whole would have, so any split into micro-batches or ranks sums to the
    whole batch's loss.

    Args:
        mask: bool `(B, T)` or `(N,)`.
        normalizer: global count in place of N (token-mean) or S (seq-*), above 0; None: this batch's own.
        length: tokens, above 0; the divisor of seq-mean-token-sum-norm, which needs it (verl's default, the padded
            width T, would change with the micro-batch).
        eps: added to n_i in seq-mean-token-mean; 1e-8 in verl and OpenRLHF. Nothing else divides by n_i.
        dtype: of the weights.

    Raises:
        ValueError: an unknown aggregation; a normalizer that is not above 0 or that token-sum has no use for; a length
            that is missing, not above 0, or has no use.
    """
    _check(aggregation, normalizer, length)
    weights = as_numbers(mask, dtype)
    if aggregation == "token-sum":
        return weights
    divisor = _divisor(
        aggregation, weights.sum, lambda: sequences.counts(mask, dtype), normalizer=normalizer, length=length, eps=eps
    )
    if aggregation == "seq-mean-token-mean" and isinstance(divisor, Tensor):
        divisor = sequences.spread(divisor)
    return weights / divisor


def row_weights(
    aggregation: str,
    counts: Tensor,  # (B,)
    total: float,
    *,
    normalizer: Tensor | float | None = None,
    length: float | None = None,
    eps: float = 0.0,
) -> Tensor:
    """What `aggregation_weights` gives the tokens of the mask in each row of a padded batch, `(B, 1)`, from `counts`.

    Args:
        counts: `(B,)`, tokens of the mask in each row, in the dtype of the weights; total: their sum.
        The rest: see `aggregation_weights`.
    """
    _check(aggregation, normalizer, length)
    divisor: Tensor | float = 1.0
    if aggregation != "token-sum":
        divisor = _divisor(aggregation, lambda: total, lambda: counts, normalizer=normalizer, length=length, eps=eps)
    if aggregation == "seq-mean-token-mean" and isinstance(divisor, Tensor):
        return divisor.to(counts.dtype).reciprocal().unsqueeze(-1)
    return counts.new_full((counts.shape[0], 1), 1 / float(divisor))  # a number is faster than a tensor of one


def _divisor(
    aggregation: str,
    tokens: Callable[[], Tensor | float],
    counts: Callable[[], Tensor],
    *,
    normalizer: Tensor | float | None,
    length: float | None,
    eps: float,
) -> Tensor | float:
    """What a token's loss is divided by: one number, or for seq-mean-token-mean one per sequence, `(B,)`."""
    if aggregation == "token-mean" and normalizer is None:
        number = tokens()
        return number.clamp(min=1) if isinstance(number, Tensor) else max(1.0, number)
    if aggregation == "token-mean":
        assert normalizer is not None
        return normalizer
    each = aggregation == "seq-mean-token-mean"
    if each or normalizer is None:
        lengths = counts()
        normalizer = (lengths > 0).to(lengths.dtype).sum().clamp(min=1) if normalizer is None else normalizer
        if each:
            return (lengths.clamp(min=1) + eps) * normalizer
    return normalizer if length is None else normalizer * length


def _check(aggregation: str, normalizer: Tensor | float | None, length: float | None) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: expected one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    if aggregation == "token-sum" and normalizer is not None:
        raise ValueError(f"normalizer: token-sum divides by nothing, got {normalizer!r}")
    if normalizer is not None and not isinstance(normalizer, Tensor) and not normalizer > 0:
        raise ValueError(f"normalizer: expected a number above 0, got {normalizer!r}")
    if aggregation == "seq-mean-token-sum-norm":
        if length is None or not length > 0:
            raise ValueError(f"length: seq-mean-token-sum-norm needs a number of tokens above 0, got {length!r}")
    elif length is not None:
        raise ValueError(f"length: only seq-mean-token-sum-norm divides by it, not {aggregation}, got {length!r}")


def aggregate_loss(
    token_loss: Tensor,  # (B, T) or (N,)
    aggregation: str,
    *,
    mask: Tensor,  # (B, T) or (N,)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: Tensor | float | None = None,
    length: float | None = None,
    eps: float = 0.0,
) -> Tensor:
    """One number from the losses (or entropies, or KLs) of tokens, differentiable; 0 where every token is masked.

    `sum of aggregation_weights * token_loss`: verl 0.9's `agg_loss`, and the averages of TRL's and OpenRLHF's losses,
    by name. For a token loss of one's own; the objectives do it by themselves.

    Args:
        token_loss: `(B, T)`, or `(N,)` with cu_seqlens, floating point; never read outside the mask.
        aggregation, normalizer, length, eps: see `aggregation_weights`.
        mask: of the same shape, nonzero where the token counts.
        cu_seqlens: `(B + 1,)` integers, the offsets of packed sequences.

    Raises:
        ValueError, TypeError: as `aggregation_weights`, or an argument of the wrong shape, dtype or device.
    """
    validation.check_floating("token_loss", token_loss)
    sequences = sequences_of(token_loss, cu_seqlens, "token_loss")
    checked = validation.check_mask(mask, tuple(token_loss.shape), token_loss.device)
    assert checked is not None  # only None gives None
    weights = aggregation_weights(
        aggregation, checked, sequences, normalizer=normalizer, length=length, eps=eps, dtype=token_loss.dtype
    )
    return weighted_sum(token_loss, weights, checked)

"""A score head: a linear layer of few outputs on chosen rows of the hidden states.

Only the rows that a loss asks for are multiplied; the others are never read, and their gradient is exactly 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl_kernels import validation
from fastrl_kernels.functional import harmonize
from fastrl_kernels.head import accumulation_dtype

from .sequences import Sequences


def row_scores(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (C, D)
    bias: Tensor | None,  # (C,)
    rows: Tensor,  # (n,) int64, positions among the rows of hidden
    present: Tensor | None = None,  # (n,) bool
) -> Tensor:
    """Scores `hidden[rows] @ weight.T + bias`, (n, C), in fp32 (fp64 for fp64); differentiable, twice if need be.

    2nCD FLOPs. Beside inputs and gradients it holds the chosen rows once in the forward and once in the backward; what
    is kept in between is hidden itself.

    Args:
        rows: a row may appear more than once.
        present: entries that are False score 0 plus the bias; what their row holds is not used and gets no gradient.
    """
    validation.check_weight(weight, bias, hidden)
    hidden, weight, bias = harmonize(hidden, weight, bias)
    states = hidden.reshape(-1, hidden.shape[-1])
    if states.shape[0] == 0:  # an entry that is not present needs a row to point at
        states = F.pad(states, (0, 0, 0, 1))
    return _RowScores.apply(states, weight, bias, rows, present)


class _RowScores(torch.autograd.Function):
    """`row_scores` on (N, D)."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, present: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(states, weight, rows, present)
        ctx.bias_dtype = None if bias is None else bias.dtype
        dtype = accumulation_dtype(states.dtype)
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(_gather(states, rows, present), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, rows, present = ctx.saved_tensors
        by_states = by_weight = by_bias = None
        with torch.autocast(states.device.type, enabled=False):
            if ctx.needs_input_grad[2]:
                by_bias = grad.sum(0).to(ctx.bias_dtype)
            if ctx.needs_input_grad[1]:
                by_weight = (grad.t() @ _gather(states, rows, present)).to(weight.dtype)
            if ctx.needs_input_grad[0]:
                kept = grad if present is None else grad.masked_fill(~present.unsqueeze(-1), 0.0)
                by_rows = (kept @ weight.to(grad.dtype)).to(states.dtype)
                by_states = torch.zeros_like(states).index_add(0, rows, by_rows)
        return by_states, by_weight, by_bias, None, None


def _gather(states: Tensor, rows: Tensor, present: Tensor | None) -> Tensor:
    x = states.index_select(0, rows).to(accumulation_dtype(states.dtype))
    return x if present is None else x.masked_fill(~present.unsqueeze(-1), 0.0)


def last_rows(mask: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Position, among all tokens, of the last token of each sequence's mask, (B,), and whether there is one, (B,)."""
    places = torch.arange(1, mask.numel() + 1, dtype=torch.float64, device=mask.device).view(mask.shape)
    last = sequences.last(places, mask).to(torch.int64) - 1
    return last.clamp(min=0), last >= 0

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

    2nCD FLOPs. Beside inputs and gradients it holds few rows at a time; what the backward needs is hidden itself.

    Args:
        rows: different ones in ascending order, or any where `present` is given.
        present: entries that are False score the bias alone; what their row holds is not used, and no gradient flows.
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
        head = (weight.to(dtype), None if bias is None else bias.to(dtype))
        with torch.autocast(states.device.type, enabled=False):
            parts = _parts(states, rows, present)
            return torch.cat([F.linear(_gather(states, rows, present, part), *head) for part in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, rows, present = ctx.saved_tensors
        need_states, need_weight, need_bias = ctx.needs_input_grad[:3]
        by_states = by_weight = by_bias = None
        if present is not None:
            grad = grad.masked_fill(~present.unsqueeze(-1), 0.0)
        with torch.autocast(states.device.type, enabled=False):
            if need_states:
                by_states = _states_gradient(grad, states, weight.to(grad.dtype), rows, present)
            if need_weight:
                parts = [grad[p].t() @ _gather(states, rows, present, p) for p in _parts(states, rows, present)]
                by_weight = torch.stack(parts).sum(0).to(weight.dtype)
            if need_bias:
                by_bias = grad.sum(0).to(ctx.bias_dtype)
        return by_states, by_weight, by_bias, None, None


def _states_gradient(grad: Tensor, states: Tensor, head: Tensor, rows: Tensor, present: Tensor | None) -> Tensor:
    """Gradient of states, (N, D), from that of the scores; exactly 0 in the rows that were not chosen."""

    def scatter(zeros: Tensor, part: slice, x: Tensor) -> Tensor:
        # Rows that are not present may repeat one that is: their zeros are added, not written over it.
        return (zeros.index_copy_ if present is None else zeros.index_add_)(0, rows[part], x)

    if head.shape[0] == 1 and states.dtype == grad.dtype:  # an outer product writes memory once
        return scatter(grad.new_zeros(states.shape[0], 1), slice(None), grad) * head
    out = torch.zeros_like(states)
    for part in _parts(states, rows, present):
        out = scatter(out, part, (grad[part] @ head).to(states.dtype))
    return out


def _are_all(states: Tensor, rows: Tensor, present: Tensor | None) -> bool:
    """Whether the rows are simply all of them, so that none has to be copied."""
    return present is None and rows.shape[0] == states.shape[0]


def _parts(states: Tensor, rows: Tensor, present: Tensor | None) -> list[slice]:
    """Runs of rows to gather at a time: as many numbers as stay in a core's cache, 256 MiB of them on a GPU."""
    count = rows.shape[0]
    if _are_all(states, rows, present) and states.dtype == accumulation_dtype(states.dtype):
        return [slice(0, count)]
    numbers = 2**17 if states.device.type == "cpu" else 2**26
    step = max(1, numbers // max(1, states.shape[1]))
    return [slice(start, start + step) for start in range(0, max(1, count), step)]


def _gather(states: Tensor, rows: Tensor, present: Tensor | None, part: slice) -> Tensor:
    """A part of the rows in the accumulation dtype, zeros for those that are not present."""
    picked = states[part] if _are_all(states, rows, present) else states.index_select(0, rows[part])
    x = picked.to(accumulation_dtype(states.dtype))
    return x if present is None else x.masked_fill(~present[part].unsqueeze(-1), 0.0)


def last_rows(mask: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Position, among all tokens, of the last token of each sequence's mask, (B,), and whether there is one, (B,)."""
    places = torch.arange(1, mask.numel() + 1, dtype=torch.float64, device=mask.device).view(mask.shape)
    last = sequences.last(places, mask).to(torch.int64) - 1
    return last.clamp(min=0), last >= 0

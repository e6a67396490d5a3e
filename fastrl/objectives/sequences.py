"""How the tokens of a batch form sequences: rows of a padded batch, or runs of a packed one; reductions over either.

No loop over sequences or tokens, no atomics: the same call twice gives the same bits, and NaN or inf in one sequence
never reaches another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .masking import as_numbers, inside


class Sequences(ABC):
    """Rows of a padded `(B, T)` batch, or runs of a packed `(N,)` one.

    Token values have the shape of the batch, per-sequence values `(B,)`. Masks are bool. All sums are differentiable
    any number of times.
    """

    count: int  # B

    @staticmethod
    def padded(b: int) -> Sequences:
        """Each row of a `(B, T)` batch is a sequence."""
        return _Padded(b)

    @staticmethod
    def packed(cu_seqlens: Tensor, tokens: int) -> Sequences:
        """Sequence i is the tokens `cu_seqlens[i]:cu_seqlens[i + 1]` of an `(N,)` batch, N being `tokens`.

        Args:
            cu_seqlens: `(B + 1,)` int32 or int64, from 0 to N, never decreasing; equal neighbours: an empty one.
            tokens: N.

        Raises:
            ValueError, TypeError: cu_seqlens is not that. Its values are not looked at under torch.compile.
        """
        return _Packed(cu_seqlens, tokens)

    @abstractmethod
    def sum(self, x: Tensor) -> Tensor:
        """Token values to `(B,)`: the sum over each sequence, 0 for an empty one."""

    @abstractmethod
    def spread(self, per_sequence: Tensor) -> Tensor:
        """`(B,)` to `(B, 1)` or `(N,)`: what broadcasts against token values."""

    @abstractmethod
    def _largest(self, x: Tensor) -> Tensor:
        """Token values to `(B,)`: the largest of each sequence, -inf for an empty one."""

    def sum_inside(self, x: Tensor, mask: Tensor) -> Tensor:
        """`(B,)`: sum over the tokens of the mask, 0 where there is none. x is not read elsewhere."""
        return self.sum(inside(x, mask))

    def counts(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """`(B,)`: tokens of the mask in each sequence, in a floating dtype."""
        return self.sum(as_numbers(mask, dtype))

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """`(B,)`: mean over the tokens of the mask, 0 where there is none. x is not read elsewhere."""
        return self.sum_inside(x, mask) / self.counts(mask, x.dtype).clamp(min=1)

    def last_token(self, mask: Tensor) -> Tensor:
        """The mask with only the last of its tokens left in each sequence."""
        # fp64 holds every position exactly, and segment_reduce takes floats only.
        position = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.float64).expand(mask.shape)
        return mask & (position == self.spread(self.max(position, mask)))

    def last(self, x: Tensor, mask: Tensor) -> Tensor:
        """`(B,)`: value at the last token of the mask, 0 where there is none."""
        return self.sum_inside(x, self.last_token(mask))

    def max(self, x: Tensor, mask: Tensor) -> Tensor:
        """`(B,)`: largest value over the tokens of the mask, 0 where there is none; detached."""
        largest = self._largest(torch.where(mask, x.detach(), -torch.inf))
        return torch.where(self.counts(mask, x.dtype) > 0, largest, 0.0)

    def min(self, x: Tensor, mask: Tensor) -> Tensor:
        """`(B,)`: smallest value over the tokens of the mask, 0 where there is none; detached."""
        return -self.max(-x, mask)


def sequences_of(logps: Tensor, cu_seqlens: Tensor | None = None, name: str = "logps") -> Sequences:
    """The sequences of a padded `(B, T)` tensor, or with cu_seqlens of a packed `(N,)` one.

    Args:
        logps: any tensor of the batch's shape; name: what errors call it.
        cu_seqlens: see `Sequences.packed`; None for a padded batch.

    Raises:
        ValueError, TypeError: a wrong shape, or cu_seqlens do not describe it.
    """
    if cu_seqlens is None:
        if logps.ndim != 2:
            raise ValueError(f"{name}: expected shape (B, T), or (N,) with cu_seqlens, got {tuple(logps.shape)}")
        return Sequences.padded(logps.shape[0])
    if logps.ndim != 1:
        raise ValueError(f"{name}: expected packed tokens of shape (N,) with cu_seqlens, got {tuple(logps.shape)}")
    if cu_seqlens.device != logps.device:
        raise ValueError(f"cu_seqlens: expected on {logps.device}, where {name} is, got {cu_seqlens.device}")
    return Sequences.packed(cu_seqlens, logps.shape[0])


class _Padded(Sequences):
    def __init__(self, b: int) -> None:
        self.count = b

    def sum(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[0] != self.count:
            raise ValueError(f"x: expected shape ({self.count}, T), one value per token, got {tuple(x.shape)}")
        return x.sum(-1)

    def spread(self, per_sequence: Tensor) -> Tensor:
        return per_sequence.unsqueeze(-1)

    def _largest(self, x: Tensor) -> Tensor:
        return x.amax(-1) if x.shape[-1] > 0 else x.new_full((self.count,), -torch.inf)


class _Packed(Sequences):
    def __init__(self, cu_seqlens: Tensor, tokens: int) -> None:
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")
        self.count, self._tokens = cu_seqlens.shape[0] - 1, tokens
        self._lengths = cu_seqlens.to(torch.int64).diff()
        if not torch.compiler.is_compiling():
            wrong = (cu_seqlens[0] != 0) | (cu_seqlens[-1] != tokens) | (self._lengths < 0).any()
            if wrong.item():
                raise ValueError(
                    f"cu_seqlens: expected offsets from 0 to {tokens}, the number of tokens, that never decrease, "
                    f"got {cu_seqlens.tolist() if self.count < 16 else cu_seqlens}"
                )
        sequence = torch.arange(self.count, device=cu_seqlens.device)
        self._index = sequence.repeat_interleave(self._lengths, output_size=tokens)  # (N,) sequence of each token

    def sum(self, x: Tensor) -> Tensor:
        if x.shape != (self._tokens,):
            raise ValueError(f"x: expected shape ({self._tokens},), one value per token, got {tuple(x.shape)}")
        return _Sum.apply(x, self._lengths, self._index)

    def spread(self, per_sequence: Tensor) -> Tensor:
        return _Spread.apply(per_sequence, self._lengths, self._index)

    def _largest(self, x: Tensor) -> Tensor:
        return _segment_reduce(x, "max", self._lengths, -torch.inf)


def _segment_reduce(x: Tensor, reduce: str, lengths: Tensor, empty: float) -> Tensor:
    if x.shape[0] == 0:
        return x.new_full((lengths.shape[0],), empty)
    # unsafe: the lengths were checked when the object was made.
    return torch.segment_reduce(x.contiguous(), reduce, lengths=lengths, axis=0, unsafe=True)


class _Sum(torch.autograd.Function):
    """Sum of each run. Its gradient is a spread, whose gradient is a sum: it can be differentiated again."""

    @staticmethod
    def forward(x: Tensor, lengths: Tensor, index: Tensor) -> Tensor:
        return _segment_reduce(x, "sum", lengths, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(grad, *ctx.saved_tensors), None, None


class _Spread(torch.autograd.Function):
    """Each sequence's value at each of its tokens. Indexing's own gradient would add with atomics on a GPU."""

    @staticmethod
    def forward(x: Tensor, lengths: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Sum.apply(grad, *ctx.saved_tensors), None, None

"""The CUDA C++ backend: the row passes, group advantages and the GAE scan of `csrc/cuda`, on torch's current stream.

It exists where the extension was built with FASTRL_CUDA=on (or auto, on a machine with a driver). Its row passes take
the tiles that the Triton ones take, but write no wider dtype than the tile's. What it lacks is Triton's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]
from .native import NativeKernels
from .objective import PolicyTerms


@contextmanager
def _stream(device: torch.device) -> Iterator[int]:
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


_native = NativeKernels(_C.cuda, "cuda", _stream, mixed_outputs=True)
row_stats = _native.row_stats
row_grad = _native.row_grad
group_advantages = _native.group_advantages
gae = _native.gae


def policy_terms(*args: Any, **options: Any) -> PolicyTerms:
    """Loss terms of (B, T) tokens, by the Triton kernel: no row of logits is in them. See `objective.PolicyTerms`."""
    from .triton import policy_terms as kernel

    return kernel(*args, **options)


def divergence_rows(*args: Any) -> Tensor:
    """Divergence of each row of two tiles, by the Triton kernel. See `reference.divergence_rows`."""
    from .triton import divergence_rows as kernel

    return kernel(*args)

"""What every Triton launcher shares: the table of launch configurations and the checks before a pointer is taken.

The table is explicit so that the test-suite can compile each of its entries for real chips on a machine that has none;
nothing here is chosen at run time from a timing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class RowConfig(NamedTuple):
    """How one row of `V` logits is cut: columns per block and warps per program."""

    block_size: int
    num_warps: int


class GroupConfig(NamedTuple):
    """Tile of the rewards x rewards comparison: rows of one program, columns of one step, warps per program."""

    block_rows: int
    block_cols: int
    num_warps: int


ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_COLUMNS = 2**31 - 2**16  # column offsets are int32 (row offsets are int64)

# Blocks are powers of two. 16 elements per thread keep an fp32 block, its running sums and its entropy terms in
# registers, and are a whole number of 16-byte loads in every dtype; fp64 takes half as many. Short rows take fewer
# warps, since a warp without columns still pays for the reductions.
_SHORT_ROW, _MEDIUM_ROW, _LONG_ROW = RowConfig(512, 4), RowConfig(2048, 4), RowConfig(4096, 8)
_SHORT_ROW_FP64, _LONG_ROW_FP64 = RowConfig(512, 4), RowConfig(2048, 8)
GROUP_CONFIG = GroupConfig(16, 128, 4)


def row_config(vocabulary: int, dtype: torch.dtype) -> RowConfig:
    """The launch configuration of the row kernels for rows of `vocabulary` logits held in `dtype`."""
    if dtype == torch.float64:
        return _SHORT_ROW_FP64 if vocabulary <= _SHORT_ROW_FP64.block_size else _LONG_ROW_FP64
    if vocabulary <= _SHORT_ROW.block_size:
        return _SHORT_ROW
    return _MEDIUM_ROW if vocabulary <= _MEDIUM_ROW.block_size else _LONG_ROW


def row_configs(dtype: torch.dtype) -> tuple[RowConfig, ...]:
    """Every configuration that `row_config` may return for `dtype`."""
    if dtype == torch.float64:
        return (_SHORT_ROW_FP64, _LONG_ROW_FP64)
    return (_SHORT_ROW, _MEDIUM_ROW, _LONG_ROW)


def launch_device(kernel: object, tensor: Tensor, name: str) -> AbstractContextManager[object]:
    """A context with `tensor`'s GPU current, since Triton launches on the current device, not on the tensors' device.

    Raises:
        RuntimeError: the tensor is not on a GPU and `kernel` is not interpreted.
    """
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if not isinstance(kernel, triton.runtime.jit.JITFunction):
        return nullcontext()
    raise RuntimeError(
        f"the triton backend runs on CUDA tensors, but {name} is on {tensor.device} "
        "(to run it in Python for a test, set TRITON_INTERPRET=1 before Triton is imported)"
    )


def check_tile(name: str, tile: Tensor, written: bool = False) -> None:
    """Raises TypeError or ValueError unless `tile` is (n, V), its rows contiguous (and apart, if they are written)."""
    if tile.dtype not in ROW_DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, ROW_DTYPES))}, got {tile.dtype}")
    if tile.dim() != 2 or not 1 <= tile.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"{name} must have shape (n, V) with 1 <= V <= {MAX_COLUMNS}, got {tuple(tile.shape)}")
    n, vocabulary = tile.shape
    if n and vocabulary > 1 and tile.stride(1) != 1:
        raise ValueError(f"{name} must have a contiguous last dimension, got strides {tile.stride()}")
    if written and n > 1 and tile.stride(0) < vocabulary:
        raise ValueError(
            f"{name} must have rows that do not overlap, got shape {(n, vocabulary)}, strides {tile.stride()}"
        )


def vector(name: str, x: Tensor | None, length: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """`x` as a contiguous (length,) vector of `dtype` (converted from another floating dtype), or None for None.

    Raises:
        TypeError: `x` is of another kind than `dtype` (floating against integer).
        ValueError: another shape or device.
    """
    if x is None:
        return None
    if x.dtype != dtype and not (x.dtype.is_floating_point and dtype.is_floating_point):
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")
    return x.to(dtype).contiguous()

"""What every Triton launcher shares: the tables of launch configurations and the checks before a pointer is taken.

The tables are explicit so that the test-suite can compile each of their entries for real chips on a machine that has
none: whatever is chosen, by rule or by `tuning`, is one of them.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class RowConfig(NamedTuple):
    """How one row of `V` logits is cut: columns per block, warps per program, blocks in flight (row_stats only)."""

    block_size: int
    num_warps: int
    num_stages: int = 1


class GroupConfig(NamedTuple):
    """Tile of the rewards x rewards comparison: rows of one program, columns of one step, warps per program."""

    block_rows: int
    block_cols: int
    num_warps: int


class LinearConfig(NamedTuple):
    """Tile of the fused GEMM and how it is fed."""

    block_rows: int
    block_cols: int  # of the vocabulary
    block_depth: int
    pieces: int  # in which a tile of logits is reduced: 1, 2, 4 or 8
    num_warps: int
    num_stages: int
    descriptors: bool  # TMA (compute capability 9 and later)

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor holds: with two, one reduces its tile while the other multiplies."""
        return 2 if self.num_warps == 4 else 1

    @property
    def step_flops(self) -> int:
        """FLOPs of one step of a program: one product of tiles."""
        return 2 * self.block_rows * self.block_cols * self.block_depth

    def step_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of operands that one step brings in."""
        return (self.block_rows + self.block_cols) * self.block_depth * dtype.itemsize

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory of the operands in flight, in bytes."""
        return self.num_stages * self.step_bytes(dtype)


class MergeConfig(NamedTuple):
    """Tile of the merge of partial statistics: rows of one program, splits of one step, warps per program."""

    block_rows: int
    block_splits: int
    num_warps: int


class LinearSchedule(NamedTuple):
    """How the product is shared out: each program takes a block of rows and `span` blocks of the vocabulary."""

    row_blocks: int
    splits: int
    span: int
    group_rows: int  # row blocks that run at the same time, times all splits


class Chip(NamedTuple):
    """What a choice depends on."""

    processors: int
    capability: int  # major
    shared_bytes: int  # that one program may have


ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LINEAR_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_COLUMNS = 2**31 - 2**16  # column offsets are int32 (row offsets are int64)

# Blocks are powers of two. 16 elements per thread keep an fp32 block, its running sums and its entropy terms in
# registers, and are a whole number of 16-byte loads in every dtype; fp64 takes half as many. Short rows take fewer
# warps, since a warp without columns still pays for the reductions.
_SHORT_ROW, _MEDIUM_ROW, _LONG_ROW = RowConfig(512, 4), RowConfig(2048, 4), RowConfig(4096, 8)
_SHORT_ROW_FP64, _LONG_ROW_FP64 = RowConfig(512, 4), RowConfig(2048, 8)
# What a measurement may choose instead for long rows: more blocks in flight, wider or narrower programs.
_LONG_ROW_CANDIDATES = (
    _LONG_ROW,
    RowConfig(2048, 4),
    RowConfig(2048, 4, 3),
    RowConfig(4096, 8, 3),
    RowConfig(8192, 16),
    RowConfig(4096, 8, 2),
)
_LONG_ROW_CANDIDATES_FP64 = (_LONG_ROW_FP64, RowConfig(1024, 4), RowConfig(2048, 8, 3))
GROUP_CONFIG = GroupConfig(16, 128, 4)
MERGE_CONFIG = MergeConfig(32, 16, 4)

# The fused GEMM. A tile of 128 x 256 needs the fewest bytes per FLOP; two programs of 128 x 128 on a multiprocessor
# hide the exponentials of one behind the products of the other, which counts where D is small. Low tiles are for few
# rows: there the weight is read once and that read is all the time.
_TMA_HOPPER = {
    "wide": LinearConfig(128, 256, 64, 8, 8, 4, True),
    "pair": LinearConfig(128, 128, 64, 2, 4, 3, True),
    "low": LinearConfig(64, 128, 64, 2, 4, 4, True),
    "tall": LinearConfig(256, 128, 64, 4, 8, 4, True),
    "deep": LinearConfig(128, 256, 128, 8, 8, 2, True),
}
# Tensor memory takes no tile lower than 128 rows without a detour, and holds the tile itself: four warps are enough.
_TMA_BLACKWELL = {
    "wide": LinearConfig(128, 256, 64, 4, 4, 4, True),
    "pair": LinearConfig(128, 128, 64, 4, 4, 3, True),
    "two groups": LinearConfig(128, 256, 64, 4, 8, 4, True),
    "tall": LinearConfig(256, 128, 64, 4, 8, 4, True),
}
_POINTERS = {
    "wide": LinearConfig(128, 128, 64, 1, 8, 3, False),
    "pair": LinearConfig(64, 128, 64, 1, 4, 3, False),
    "low": LinearConfig(32, 128, 64, 1, 4, 4, False),
    "shallow": LinearConfig(128, 128, 32, 1, 8, 4, False),
}
_TMA_HOPPER_TF32 = {
    "wide": LinearConfig(128, 256, 32, 8, 8, 4, True),
    "pair": LinearConfig(128, 128, 32, 2, 4, 3, True),
    "low": LinearConfig(64, 128, 32, 2, 4, 4, True),
}
_TMA_BLACKWELL_TF32 = {
    "wide": LinearConfig(128, 256, 32, 4, 4, 4, True),
    "pair": LinearConfig(128, 128, 32, 4, 4, 3, True),
}
_POINTERS_TF32 = {
    "wide": LinearConfig(128, 128, 32, 1, 8, 3, False),
    "pair": LinearConfig(64, 128, 32, 1, 4, 3, False),
    "low": LinearConfig(32, 128, 32, 1, 4, 4, False),
}
# Exact fp32 products run on the plain cores, whose tiles are small.
_POINTERS_FP32 = {
    "wide": LinearConfig(128, 64, 16, 1, 8, 3, False),
    "low": LinearConfig(16, 128, 32, 1, 4, 3, False),
}
# Rows that are not at multiples of 16 elements are read one element at a time: small tiles, or the addresses alone
# would fill the registers. No model at hand has such a head.
_POINTERS_ELEMENTS = {"wide": LinearConfig(64, 64, 16, 1, 4, 2, False), "low": LinearConfig(32, 64, 16, 1, 4, 2, False)}
# Up to this depth the exponentials take a share of the time that is worth hiding.
_SMALL_DEPTH = 1536


def row_config(vocabulary: int, dtype: torch.dtype) -> RowConfig:
    """The launch configuration of the row kernels for rows of `vocabulary` logits held in `dtype`."""
    if dtype == torch.float64:
        return _SHORT_ROW_FP64 if vocabulary <= _SHORT_ROW_FP64.block_size else _LONG_ROW_FP64
    if vocabulary <= _SHORT_ROW.block_size:
        return _SHORT_ROW
    return _MEDIUM_ROW if vocabulary <= _MEDIUM_ROW.block_size else _LONG_ROW


def row_candidates(vocabulary: int, dtype: torch.dtype) -> tuple[RowConfig, ...]:
    """What a measurement may choose from for such rows; `row_config`'s choice is the first."""
    default = row_config(vocabulary, dtype)
    if default == _LONG_ROW_FP64:
        return _LONG_ROW_CANDIDATES_FP64
    return _LONG_ROW_CANDIDATES if default == _LONG_ROW and dtype != torch.float64 else (default,)


def row_grad_candidates(vocabulary: int, dtype: torch.dtype) -> tuple[RowConfig, ...]:
    """The same for row_grad, whose programs take one block each: nothing is in flight beside it."""
    return tuple(c for c in row_candidates(vocabulary, dtype) if c.num_stages == 1)


def row_configs(dtype: torch.dtype) -> tuple[RowConfig, ...]:
    """Every configuration that may be launched for `dtype`."""
    return tuple(dict.fromkeys(c for v in (512, 2048, MAX_COLUMNS) for c in row_candidates(v, dtype)))


def linear_table(
    dtype: torch.dtype, tf32: bool, capability: int, descriptors: bool, vectors: bool = True
) -> dict[str, LinearConfig]:
    """Every configuration of the fused GEMM that may be launched, by name.

    Args:
        dtype: of the operands.
        tf32: whether fp32 operands may be rounded to tf32.
        capability: major compute capability; tensor cores fed by TMA are those of 9, 10 and 11.
        descriptors: whether TMA can read the operands.
        vectors: whether 16 bytes at a time can be read through pointers.
    """
    if dtype == torch.float32 and not tf32:  # without tensor cores there is nothing for TMA to feed
        return _POINTERS_FP32 if vectors else _POINTERS_ELEMENTS
    half = dtype != torch.float32
    if descriptors and capability == 9:
        return _TMA_HOPPER if half else _TMA_HOPPER_TF32
    if descriptors and capability in (10, 11):
        return _TMA_BLACKWELL if half else _TMA_BLACKWELL_TF32
    if not vectors:
        return _POINTERS_ELEMENTS
    return _POINTERS if half else _POINTERS_TF32


def linear_config(
    n: int, depth: int, dtype: torch.dtype, tf32: bool, descriptors: bool, vectors: bool, chip: Chip
) -> tuple[LinearConfig, tuple[LinearConfig, ...]]:
    """The table's choice for (n, D) rows, and all that a measurement may choose from.

    Raises:
        RuntimeError: no configuration fits the chip's shared memory.
    """
    table = linear_table(dtype, tf32, chip.capability, descriptors, vectors)
    fitting = {k: c for k, c in table.items() if c.shared_bytes(dtype) + 2048 <= chip.shared_bytes}
    if not fitting:
        raise RuntimeError(f"the fused forward needs more shared memory than this GPU's {chip.shared_bytes} bytes")
    if n <= 64:
        order = ("low", "pair", "wide")
    elif depth <= _SMALL_DEPTH:
        order = ("pair", "wide", "low")
    else:
        order = ("wide", "pair", "low")
    name = next(name for name in (*order, *fitting) if name in fitting)
    return fitting[name], tuple(fitting.values())


@functools.lru_cache(maxsize=1024)
def linear_schedule(n: int, vocabulary: int, config: LinearConfig, processors: int) -> LinearSchedule:
    """Splits of the vocabulary that leave the fewest multiprocessors idle and keep both operands in L2."""
    row_blocks, blocks = -(-n // config.block_rows), -(-vocabulary // config.block_cols)
    slots = processors * config.programs
    # Programs of one moment read group_rows blocks of x and `splits` blocks of the weight: a square reads the least.
    group_rows = round(math.sqrt(slots * config.block_cols / config.block_rows))
    group_rows = max(1, min(group_rows, row_blocks))
    square = slots / group_rows
    choices = []
    for aim in range(1, min(blocks, math.ceil(4 * square), 4 * slots) + 1):
        span = -(-blocks // aim)
        splits = -(-blocks // span)
        waves = -(-row_blocks * splits // slots)
        choices.append((waves * (span + 0.5), abs(splits - square), splits, span))  # half a tile to start and to store
    best = min(choices)[0]
    _, _, splits, span = min((c for c in choices if c[0] <= 1.02 * best), key=lambda c: c[1:])
    return LinearSchedule(row_blocks, splits, span, group_rows)


@functools.cache
def _gpu(index: int) -> Chip:
    properties: Any = torch.cuda.get_device_properties(index)  # torch's stub does not know all of them
    return Chip(properties.multi_processor_count, properties.major, properties.shared_memory_per_block_optin)


def chip(device: torch.device) -> Chip:
    """The chip behind a CUDA device; on the CPU, where Triton's interpreter runs, a small one with TMA."""
    if device.type != "cuda":
        return Chip(4, 9, 232448)
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of `run` on the current stream, warm; infinity if it needs more than the chip has."""
    try:
        run()
    except triton.runtime.errors.OutOfResources:
        return math.inf
    times = []
    for _ in range(9):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        else:  # Triton's interpreter: a time that only shows that the path works
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded(n: int) -> int:
    """The next power of two: shapes that are new in every batch must not be measured in every batch."""
    return 1 << (n - 1).bit_length()


def row_key(tile: Tensor) -> str:
    """What the choice among row configurations depends on."""
    return f"{dtype_name(tile.dtype)} n{min(rounded(tile.shape[0]), 1024)} V{rounded(tile.shape[1])}"


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

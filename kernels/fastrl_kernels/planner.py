"""Which schedule a call runs, in chunks of how many rows, through a tile of what dtype: decided here and nowhere else.

The inputs are shapes, free memory, the rows that carry a gradient, which gradients are wanted, and a small cost model
(GEMM rate, memory bandwidth, time per chunk) whose rates are measured by `calibrate` and kept on disk.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from . import tuning
from .head import accumulation_dtype

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What bounds a plan on a kind of device."""

    tile_bytes: int  # all tiles of logits together
    min_rows: int  # of a chunk that a backward uses, whatever tile_bytes says: under it the GEMMs only stream dW
    weight_block: int  # weight rows per GEMM on the CPU
    score_rows: int  # rows scored at a time on the CPU, through a tile of weight_block columns
    lanes: int  # tiles in flight: with two, the row passes of a chunk run beside the GEMMs of another
    tile_dtype: torch.dtype | None = None  # None: the accumulation dtype, so that logits are never rounded
    fused_forward: bool | None = None  # None: where the cost model says so


# CPU, measured on Zen 4 with MKL: 256 rows x 49152 (48 MiB, 1.5 times the last-level cache) beat 128 and 512; GEMMs
# over weight blocks of 1,024 rows beat one call by a tenth to a quarter for D from 576 to 4096, and widen a
# half-precision weight one block at a time. GPU: assumed, not yet measured.
LIMITS = {
    "cpu": Limits(48 * MIB, 128, 1024, 2048, 1),
    "cuda": Limits(512 * MIB, 128, 0, 0, 2),
}
MOST_OF_FREE_MEMORY = 0.5  # share of the free memory that tiles may take
OVERLAP_FROM = 0.02  # share of a chunk's time in row passes from which two lanes are worth two half tiles


@dataclass(frozen=True)
class Costs:
    """Rates of a device for one dtype of weights."""

    gemm: float  # FLOP/s of the head's GEMMs
    bandwidth: float  # bytes/s of the row passes
    chunk: float  # seconds per chunk beside both: launches, coefficients
    fused_share: float  # rate of the fused forward as a share of gemm; 0: there is none, or it was not measured
    origin: str  # "measured" or "assumed"


def _assumed(device: torch.device, dtype: torch.dtype) -> Costs:
    if device.type == "cpu":  # per core, Zen 4
        cores = torch.get_num_threads()
        return Costs(75e9 * cores * (0.5 if dtype == torch.float64 else 1.0), 7e9 * cores, 2e-3, 0.0, "assumed")
    return Costs(7e14 if dtype.itemsize == 2 else 5e13, 3e12, 6e-5, 0.0, "assumed")


@dataclass(frozen=True)
class Plan:
    """What the engine carries out."""

    schedule: str  # "forward only" | "fused forward" | "single pass" | "two pass" | "keep logits"
    chunk_rows: int
    columns: int  # of the tile
    weight_block: int  # weight rows per GEMM; the vocabulary: one GEMM
    tile_dtype: torch.dtype
    lanes: int
    tile_bytes: int  # all tiles
    seconds: float  # as the cost model has it
    reasons: tuple[str, ...]

    def explain(self) -> str:
        """The plan and its reasons, one per line."""
        through = f"{self.lanes} tiles" if self.lanes > 1 else "a tile"
        head = f"fastrl plan: {self.schedule}"
        if self.schedule != "fused forward":
            head += (
                f", {self.chunk_rows} rows at a time through {through} of {self.columns} columns in "
                f"{str(self.tile_dtype).removeprefix('torch.')} ({self.tile_bytes / MIB:.1f} MiB)"
            )
        return "\n".join([head, *(f"  - {reason}" for reason in self.reasons)])


@dataclass(frozen=True)
class Work:
    """What is to be planned: rows through a head, and what is wanted of them."""

    kind: str  # "score": statistics; "single pass": statistics and gradients; "backward": gradients of given statistics
    rows: int  # that carry a gradient ("score": that are scored)
    total: int  # of the call
    hidden_size: int
    vocabulary: int  # rows of the weight, or of the group's largest shard: every rank must cut the same chunks
    dtype: torch.dtype  # of the operands
    device: torch.device
    hidden_grad: bool = False
    weight_grad: bool = False
    scored: int = 0  # further rows that are only scored
    sharded: bool = False  # vocabulary-parallel: nothing that differs between ranks may enter
    kept: bool = False  # "backward": the logits of the forward are still there
    fused_forward: bool = False  # the backend has one for these operands
    memory_budget: int | None = None  # bytes of tiles, None: the device's own
    tiles: int = 1  # of logits that a row needs at once: 2 where it is compared with that of a second head
    second_hidden_size: int = 0  # of the second head, whose logits are made and get no gradient


_forced: dict[str, Any] = {}  # of the process, because a backward runs in a thread of its own


@contextmanager
def forced(**limits: Any) -> Iterator[None]:
    """Fields of `Limits` that plans made inside the block take instead of the device's: for tests and measurements."""
    before = dict(_forced)
    _forced.update(limits)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def limits_of(device: torch.device, memory_budget: int | None = None) -> Limits:
    """The limits in force on a device."""
    limits = replace(LIMITS.get(device.type, LIMITS["cpu"]), **_forced)
    return limits if memory_budget is None else replace(limits, tile_bytes=memory_budget, min_rows=1)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, its allocator's own cache included; None if unknown."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # the driver must not be asked then
            return None
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return None


def keeps_logits(
    rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, memory_budget: int | None
) -> bool:
    """Whether the logits of all rows, and a chunk's gradient beside them, fit the budget: then a backward reuses them.

    It depends on shapes only, so that a traced program can know it.
    """
    limits = limits_of(device, memory_budget)
    row_bytes = vocabulary * accumulation_dtype(dtype).itemsize
    return rows > 0 and (rows + min(rows, limits.min_rows)) * row_bytes <= limits.tile_bytes


def native_half(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether GEMMs with operands of this half-precision dtype beat those of widened operands on the device."""
    if device.type != "cpu":
        return dtype.itemsize == 2
    # Zen 4 with AVX512-BF16: 45 ms against 85 ms (256 x 49152 x 576), 88 ms against 200 ms (256 x 16384 x 4096).
    return dtype == torch.bfloat16 and _cpu_multiplies_bf16()


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


WEIGHT_BLOCKS = (512, 1024, 2048, 4096)


def weight_block(hidden_size: int, dtype: torch.dtype, limits: Limits) -> int:
    """Weight rows per GEMM on the CPU: the table's, or what was measured here with FASTRL_AUTOTUNE=1."""
    if "weight_block" in _forced:
        return limits.weight_block

    def seconds(block: int) -> float:
        x, tile = torch.randn(256, hidden_size), torch.empty(256, block)
        weight = torch.randn(max(WEIGHT_BLOCKS), hidden_size, dtype=dtype)

        def run() -> None:
            for start in range(0, weight.shape[0], block):
                torch.mm(x, weight[start : start + block].float().t(), out=tile)

        return _seconds(run, torch.device("cpu"))

    key = f"D {hidden_size} {str(dtype).removeprefix('torch.')} {torch.get_num_threads()} threads"
    return tuning.tuned("cpu weight block", key, WEIGHT_BLOCKS, seconds, limits.weight_block)


def make_plan(work: Work) -> Plan:
    """The schedule for some work; pure but for free memory (and the calibration on disk)."""
    limits, costs = limits_of(work.device, work.memory_budget), costs_of(work.device, work.dtype)
    scoring = work.kind == "score"
    accumulate = accumulation_dtype(work.dtype)
    tile_dtype = accumulate if limits.tile_dtype is None or work.dtype == torch.float64 else limits.tile_dtype
    gemm = 2.0 * work.hidden_size * work.vocabulary  # FLOPs of one GEMM of one row
    gradients = int(work.hidden_grad) + int(work.weight_grad)
    projections = work.rows + work.scored if work.kind != "backward" else (0 if work.kept else work.rows)
    flops = gemm * (projections + (0 if scoring else gradients * work.rows))
    flops += 2.0 * work.second_hidden_size * work.vocabulary * projections
    live = f"{work.rows:,} of {work.total:,} rows {'are scored' if scoring else 'carry a gradient'}"
    if work.scored:
        live += f", {work.scored:,} more are scored"
    shape = f"D {work.hidden_size:,}, V {work.vocabulary:,}, {str(work.dtype).removeprefix('torch.')} on {work.device}"
    reasons = [f"{live}; {shape}"]

    # Bytes that the row passes move per row: pass 1 reads the logits, pass 2 reads them and writes their gradient.
    passes = 1 if scoring else (2 if work.kind == "backward" else 3)
    logit_bytes = work.tiles * tile_dtype.itemsize
    row_pass = passes * work.vocabulary * logit_bytes / costs.bandwidth
    row_gemm = gemm / costs.gemm

    if scoring:
        # The tile costs a write by the GEMM and a read by the row pass; the fused kernel costs its slower GEMM.
        fused = costs.fused_share > 0 and row_gemm / costs.fused_share < row_gemm + 2 * row_pass
        if limits.fused_forward is not None:
            fused = limits.fused_forward
        if work.fused_forward and fused:
            seconds = row_gemm / costs.fused_share * work.rows if costs.fused_share else math.nan
            reasons.append("writing and reading a tile of logits would cost more than the fused kernel's slower GEMM")
            reasons.append(_expected(seconds, flops, costs))
            block = limits.weight_block or work.vocabulary
            return Plan("fused forward", work.rows, 0, block, tile_dtype, 1, 0, seconds, tuple(reasons))
        schedule = "forward only"
        reasons.append("no gradient is made here: 2NDV" if work.tiles == 1 else "no gradient is made here")
    elif work.kind == "single pass":
        schedule = "single pass"
        reasons.append("token-local objective: a chunk is finished before the next begins, logits are made once")
    elif work.kept:
        schedule = "keep logits"
        reasons.append("the logits of all rows fit the budget: the backward reuses those of the forward")
    else:
        schedule = "two pass"
        reasons.append("the backward makes the logits again: they would not fit the budget")
    if not scoring:
        absent = [name for name, wanted in (("dX", work.hidden_grad), ("dW", work.weight_grad)) if not wanted]
        if absent:
            reasons.append(f"no {' and no '.join(absent)} wanted: neither its GEMM nor its memory")
    if work.tiles > 1:
        reasons.append(f"compared with a second head, D {work.second_hidden_size:,}: its tile shares the budget")

    budget, why = limits.tile_bytes, "the caller's" if work.memory_budget is not None else f"{work.device.type}'s"
    if work.kept:
        budget -= work.total * work.vocabulary * accumulate.itemsize
    free = None if work.sharded else free_memory(work.device)
    least = limits.min_rows
    if free is not None and free * MOST_OF_FREE_MEMORY < max(budget, least * work.vocabulary * logit_bytes):
        budget, why, least = int(free * MOST_OF_FREE_MEMORY), f"{MOST_OF_FREE_MEMORY:.0%} of the free memory as", 1

    lanes = 1
    measured = costs.origin == "measured" or "lanes" in _forced  # two streams only where they were seen to work
    several = limits.lanes > 1 and work.rows > least and work.tiles == 1
    if schedule == "single pass" and gradients and several and measured:
        share = row_pass / (row_pass + (1 + gradients) * row_gemm)
        if share >= OVERLAP_FROM:
            lanes = limits.lanes
            reasons.append(f"row passes take {share:.0%} of a chunk: they run beside the GEMMs of the next one")
    block = work.vocabulary
    if limits.weight_block:
        block = min(block, weight_block(work.hidden_size, work.dtype, limits))
    if scoring and work.device.type == "cpu" and work.tiles == 1:
        # No whole row is needed in memory, so some columns serve many rows; for fewer rows more columns, in a tile of
        # the same size, for fewer calls of the row pass.
        most = max(least, min(limits.score_rows, budget // (block * tile_dtype.itemsize)))
        even = -(-work.rows // -(-work.rows // most)) if work.rows else most
        columns = min(block * max(1, most // even), work.vocabulary)
    else:
        columns = work.vocabulary
        # A GPU's gradient tile in half precision stands beside an fp32 tile.
        half = 0 if scoring or work.device.type == "cpu" or tile_dtype.itemsize == 2 else work.dtype.itemsize % 4
        row_bytes = columns * (logit_bytes + half) * lanes
        most = budget // row_bytes
        most = max(least, most // 64 * 64 if most >= 64 else most)
    rows = work.rows
    chunks = -(-rows // most) if rows else 0
    chunk_rows = -(-rows // chunks) if chunks else 0
    tile_bytes = chunk_rows * columns * logit_bytes * lanes
    reasons.append(
        f"{chunks} chunk{'s' * (chunks != 1)}: at most {most} rows fit {why} budget of {budget / MIB:.0f} MiB"
    )
    overlapped = 0.0 if lanes > 1 else row_pass
    seconds = flops / costs.gemm + overlapped * rows + costs.chunk * chunks
    reasons.append(_expected(seconds, flops, costs))
    return Plan(schedule, chunk_rows, columns, block, tile_dtype, lanes, tile_bytes, seconds, tuple(reasons))


def _expected(seconds: float, flops: float, costs: Costs) -> str:
    return (
        f"{flops / 1e9:,.1f} GFLOP, about {seconds:.3g} s ({costs.origin} rates: {costs.gemm / 1e9:,.0f} GFLOP/s, "
        f"{costs.bandwidth / 1e9:,.0f} GB/s in row passes)"
    )


# Calibration --------------------------------------------------------------------------------------------------------


@functools.cache
def _costs_of(device: torch.device, dtype: torch.dtype, threads: int) -> Costs:
    stored = tuning.load("costs", _key(device, dtype, threads))
    return _assumed(device, dtype) if stored is None else Costs(**stored)


def costs_of(device: torch.device, dtype: torch.dtype) -> Costs:
    """The rates of a device: those that `calibrate` measured and kept, or assumed ones."""
    return _costs_of(device, dtype, torch.get_num_threads() if device.type == "cpu" else 0)


def _key(device: torch.device, dtype: torch.dtype, threads: int) -> str:
    return f"{device.type} {str(dtype).removeprefix('torch.')} {threads} threads"


def calibrate(device: torch.device, dtype: torch.dtype) -> Costs:
    """Measure the rates of a device (a few seconds), keep them on disk for later plans, and return them."""
    from . import backends, engine
    from .head import LogitTransform

    cuda = device.type == "cuda"
    rows, hidden_size, vocabulary = (4096, 2048, 65536) if cuda else (256, 1024, 8192)
    x = torch.randn(rows, hidden_size, device=device, dtype=dtype)
    weight = torch.randn(vocabulary, hidden_size, device=device, dtype=dtype)
    ids = torch.zeros(rows, dtype=torch.int64, device=device)
    backend = backends.load(backends.choose(None, device))
    tile = torch.empty(rows, vocabulary, device=device, dtype=accumulation_dtype(dtype))
    head = engine.Head(x, weight, None, ids, LogitTransform(), backend)
    block = limits_of(device).weight_block or vocabulary
    gemm = _seconds(lambda: head.project(x, tile, block), device)
    row_pass = _seconds(lambda: backend.row_stats(tile, ids, head.transform, None, True), device)
    small = tile[:1]
    chunk = 10 * _seconds(lambda: backend.row_stats(small, ids[:1], head.transform, None, True), device)
    costs = Costs(
        2.0 * rows * hidden_size * vocabulary / gemm,
        tile.numel() * tile.element_size() / row_pass,
        chunk,
        _assumed(device, dtype).fused_share,
        "measured",
    )
    fused = getattr(backend, "linear_row_stats", None)
    if fused is not None and cuda:
        fused_seconds = _seconds(lambda: fused(x, weight, ids, head.transform, None, True), device)
        costs = replace(costs, fused_share=gemm / fused_seconds)
    tuning.store("costs", _key(device, dtype, 0 if cuda else torch.get_num_threads()), asdict(costs))
    _costs_of.cache_clear()
    return costs


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of five runs after a warm-up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(6):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

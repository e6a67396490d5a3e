"""A workload: one job at one size, its floor, who runs it, and the fp64 truth; and how it is measured.

Every contender's result is compared with the truth first; a wrong one gets no time. Then all are timed in turns, so
that a drift of the clock or a busy neighbour touches all alike, and last the peak memory of one call of each is taken.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .memory import peak_growth
from .problems import relative_error

Call = Callable[[], Mapping[str, Tensor]]

# A peer's result further than this from the truth (relative, in the 2-norm) is wrong: its speed is not printed.
# Rounding of bf16 results is near 0.003, sums kept in bf16 near 0.01.
WRONG = {2: 0.05, 4: 1e-4, 8: 1e-8}  # by the bytes of the inputs' dtype
# Ours must be as close as plain PyTorch in the same dtype: this many times its error, plus roundings.
AS_EAGER = 4.0
SLOW = 2.5


@dataclass(frozen=True)
class Entry:
    """Someone's call for a workload, and its cost by formula."""

    name: str
    call: Call
    formula: str
    cost: float  # FLOPs, or bytes where the workload is bound by memory
    ours: bool = False
    judge: bool = False  # plain PyTorch in the same dtype: its error is the measure of ours
    allowed: float | None = None  # error allowed to an approximation, by its own bound


@dataclass
class Workload:
    """One job at one size."""

    op: str
    title: str
    shape: str
    sizes: dict[str, int]
    dtype: str
    floor: Entry
    entries: list[Entry]
    expected: Callable[[], Mapping[str, Tensor]]
    live_share: float = 1.0
    output_bytes: int = 0  # gradients that have to exist in any case
    cost_unit: str = "FLOP"
    not_run: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        sizes = ", ".join(f"{k} {v}" for k, v in self.sizes.items())
        return f"{self.title}, {self.shape} ({sizes})"


@dataclass(frozen=True)
class Effort:
    """How long a workload may take. It runs at least `fewest` rounds, and more up to `most` while time is left."""

    seconds: float
    fewest: int = 3
    most: int = 15
    slow: float = SLOW  # floors; whoever takes more is timed in two rounds only


Say = Callable[[str], None]


def measure(workload: Workload, device: torch.device, effort: Effort, say: Say) -> list[dict[str, Any]]:
    """The rows of one workload: the floor first, then its entries; a row without "median_s" says why in "refused"."""
    deadline = time.monotonic() + effort.seconds
    rows = {entry.name: row_of(workload, entry) for entry in (workload.floor, *workload.entries)}
    say("fp64 truth")
    expected = workload.expected()
    runs: dict[str, Call] = {workload.floor.name: workload.floor.call}
    workload.floor.call()
    eager: dict[str, float] | None = None
    for entry in sorted(workload.entries, key=lambda e: not e.judge):
        say(f"checking {entry.name}")
        row = rows[entry.name]
        try:
            errors = _errors(entry.call(), expected)
        except torch.cuda.OutOfMemoryError:
            row["refused"] = "out of memory"
            torch.cuda.empty_cache()
            continue
        except Exception as error:  # a contender's failure is a line of the table, and the others still run
            row["refused"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        eager = errors if entry.judge else eager
        row["errors"] = errors
        row["allowed"] = allowed_errors(workload.dtype, entry, errors, eager)
        if all(errors[part] <= row["allowed"][part] for part in errors):
            runs[entry.name] = entry.call
        else:
            row["refused"] = "wrong: " + ", ".join(
                f"{part} {errors[part]:.1e} from fp64, allowed {row['allowed'][part]:.1e}" for part in errors
            )
    del expected
    gc.collect()
    for name, timing in interleaved(runs, device, deadline, effort, say, slow_beside=workload.floor.name).items():
        rows[name].update(timing, extra_bytes=extra_bytes(timing["peak_bytes"], workload))
    floor = rows[workload.floor.name]["median_s"]
    for row in rows.values():
        if "median_s" in row:
            row["to_floor"] = row["median_s"] / floor
    return list(rows.values())


def extra_bytes(peak: int | None, workload: Workload) -> int | None:
    """What a call takes beyond the gradients that have to exist in any case."""
    return None if peak is None else max(0, peak - workload.output_bytes)


def allowed_errors(
    dtype: str, entry: Entry, errors: Mapping[str, float], eager: Mapping[str, float] | None
) -> dict[str, float]:
    """The error allowed to an entry in each of its results."""
    kind = getattr(torch, dtype)
    wrong = WRONG[kind.itemsize]
    if entry.allowed is not None:
        return dict.fromkeys(errors, entry.allowed)
    if not entry.ours or eager is None:
        return dict.fromkeys(errors, wrong)
    roundings = torch.finfo(kind).eps * (1 if kind.itemsize == 2 else 8)
    return {part: AS_EAGER * eager[part] + roundings for part in errors}


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: torch.device, deadline: float, effort: Effort, say: Say,
    slow_beside: str,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Median, extremes and peak memory of each contender, timed in turns that begin with another one each round.

    Who takes more than `effort.slow` times what `slow_beside` does is timed in two rounds only. The peak is read in
    each one's last round: what is done for it happens before the clock starts.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int | None] = {}
    names = list(runs)
    took = 0.0
    for round_ in range(effort.most):
        began = time.monotonic()
        last = round_ + 1 == effort.most or (round_ + 1 >= effort.fewest and began + 2 * took > deadline)
        if last:
            gc.collect()  # garbage of earlier calls, freed while one runs, would hide what it takes
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            slow = round_ > 0 and times[name][0] > effort.slow * times[slow_beside][0]
            if slow and round_ > 1 and name in peaks:
                continue
            say(f"round {round_ + 1}: {name}")

            def timed(name: str = name) -> None:
                times[name].append(seconds_of(runs[name], device))

            if last or (slow and round_ == 1):
                peaks[name] = peak_growth(timed, device)
            else:
                timed()
        took = time.monotonic() - began
        if last:
            break
    return {
        name: {
            "median_s": statistics.median(some), "min_s": min(some), "max_s": max(some), "rounds": len(some),
            "peak_bytes": peaks[name],
        }
        for name, some in times.items()
    }  # fmt: skip


SHORT = 1e-3  # seconds; a shorter call is timed over this long, or its time would be that of a cold start


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the wall clock on the CPU, events around the call's own work on a GPU.

    A call shorter than `SHORT` is repeated, and the mean is given.
    """
    once = _seconds_of(run, device, 1)
    return once if once >= SHORT else _seconds_of(run, device, math.ceil(SHORT / once))


def _seconds_of(run: Callable[[], object], device: torch.device, times: int) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(times):
            result = run()
        stop.record()
        torch.cuda.synchronize(device)
        del result
        return start.elapsed_time(stop) / 1e3 / times
    begin = time.perf_counter()
    for _ in range(times):
        result = run()
    end = time.perf_counter()
    del result  # freeing the last one's memory is no part of it
    return (end - begin) / times


def row_of(workload: Workload, entry: Entry) -> dict[str, Any]:
    """A row before it is measured."""
    return {
        "op": workload.op, "workload": workload.title, "shape": workload.shape, **workload.sizes,
        "dtype": workload.dtype, "live_share": workload.live_share, "contender": entry.name, "ours": entry.ours,
        "floor": entry is workload.floor, "formula": entry.formula, "cost": entry.cost, "unit": workload.cost_unit,
    }  # fmt: skip


def _errors(results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    if results.keys() != expected.keys():
        raise RuntimeError(f"gave {', '.join(results)} where {', '.join(expected)} were asked for")
    return {part: relative_error(results[part], expected[part]) for part in expected}

"""How time and memory grow with N, from 1k to the largest that fits, and whether they grow in straight lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import machine
from .head import JOBS, Contender, Job, head_workload
from .problems import Problem, exact, exact_logps, make_problem, relative_error
from .workload import Effort, Entry, Say, allowed_errors, extra_bytes, interleaved, row_of

# A point is on the line when it is this close to it, as a share of the line's value there. Memory may differ by the
# pages that any call touches.
STRAIGHT = 0.2
PAGES = 16e6
# Tensors of the logits' size (fp32) that one who builds them all holds at a time.
LOGITS_HELD = 4


@dataclass(frozen=True)
class Growth:
    """Scoring and training at one head, N doubling from `smallest` until memory, time or `largest` ends it."""

    shape: str
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    device: torch.device
    length: int
    smallest: int
    largest: int | None = None

    def run(self, contenders: Sequence[Contender], effort: Effort, say: Say) -> Iterator[list[dict[str, Any]]]:
        """Yields the rows of each N."""
        end = time.monotonic() + effort.seconds
        n, took = self.smallest, 0.0
        while self.largest is None or n <= self.largest:
            if took and time.monotonic() + 2 * took > end:
                say(f"ends before N={n}: no time left")
                return
            if self._logits_bytes(n) > 0.4 * machine.free_memory(self.device):
                say(f"ends before N={n}: the floor's own logits would not fit")
                return
            began = time.monotonic()
            yield self._point(n, contenders, Effort(0.0, effort.fewest, effort.fewest), say)
            n, took = 2 * n, time.monotonic() - began

    def _logits_bytes(self, n: int) -> int:
        return n * self.vocabulary * self.dtype.itemsize

    def _point(self, n: int, contenders: Sequence[Contender], effort: Effort, say: Say) -> list[dict[str, Any]]:
        t = min(self.length, n)
        problem = make_problem(n // t, t, self.hidden, self.vocabulary, self.dtype, self.device)
        free = machine.free_memory(self.device)
        fits = [c for c in contenders if c.ours or LOGITS_HELD * n * self.vocabulary * 4 < 0.7 * free]
        rows = []
        for job in (JOBS["score"], JOBS["train"]):
            workload = head_workload(problem, job, fits, shape=self.shape)
            kept: list[tuple[Entry, dict[str, Any]]] = []
            eager: dict[str, float] | None = None
            sample = _Sample(problem, job)
            for entry in (workload.floor, *sorted(workload.entries, key=lambda e: not e.judge)):
                say(f"N={n}: checking {entry.name}")
                row = row_of(workload, entry)
                rows.append(row)
                try:
                    result = entry.call()
                except torch.cuda.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    row["refused"] = "out of memory"
                    continue
                if entry is not workload.floor:
                    errors = sample.errors(result)
                    eager = errors if entry.judge else eager
                    row["errors"], row["allowed"] = errors, allowed_errors(workload.dtype, entry, errors, eager)
                    if any(errors[part] > row["allowed"][part] for part in errors):
                        row["refused"] = f"wrong: {errors}"
                        continue
                del result
                kept.append((entry, row))
            runs = {entry.name: entry.call for entry, _ in kept}
            timings = interleaved(
                runs, self.device, 0.0, effort, lambda text: say(f"N={n}: {text}"), workload.floor.name
            )
            floor = timings[workload.floor.name]["median_s"]
            for entry, row in kept:
                timing = timings[entry.name]
                row.update(timing, extra_bytes=extra_bytes(timing["peak_bytes"], workload),
                           to_floor=timing["median_s"] / floor)  # fmt: skip
        return rows


class _Sample:
    """The fp64 truth of the first sequences of a batch; the others change nothing there but the normalizer."""

    def __init__(self, problem: Problem, job: Job) -> None:
        count = min(problem.ids.shape[0], max(1, 64 // problem.ids.shape[1]))
        first = Problem(
            problem.hidden[:count], problem.weight, *(
                x[:count] for x in (problem.ids, problem.advantages, problem.mask, problem.old_logps, problem.ref_logps)
            )
        )  # fmt: skip
        if job.backward:
            share = count / problem.ids.shape[0]
            self.truth = {"d hidden": share * exact(first, job.objective, frozen_weight=True).hidden_grad}
        else:
            self.truth = {"logps": exact_logps(first)}

    def errors(self, result: Any) -> dict[str, float]:
        return {part: relative_error(result[part][: len(x)], x) for part, x in self.truth.items()}


def straight_lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each of our rows and each of time and memory: the line through its points, and the largest distance to it."""
    out = []
    names = dict.fromkeys((row["op"], row["contender"]) for row in rows if row["ours"])
    for op, name in names:
        some = [row for row in rows if (row["op"], row["contender"]) == (op, name) and "median_s" in row]
        for key, what, slack in (("median_s", "time", 0.0), ("peak_bytes", "memory", PAGES)):
            points = [(row["N"], row[key]) for row in some if row[key] is not None]
            if len(points) < 3:
                continue
            base, slope = fit_line(points)
            far = max(max(0.0, abs(y - base - slope * n) - slack) / (base + slope * n) for n, y in points)
            out.append({
                "op": op, "contender": name, "what": what, "points": len(points), "from": points[0][0],
                "to": points[-1][0], "base": base, "per_token": slope, "largest_distance": far,
                "straight": far <= STRAIGHT,
            })  # fmt: skip
    return out


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(base, slope) of the line of least squares of relative distances, so that small and large N count alike."""
    n, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    weight = 1 / y.clamp(min=1e-30)
    left: Tensor = torch.stack([torch.ones_like(n), n], dim=1) * weight[:, None]
    base, slope = torch.linalg.lstsq(left, (y * weight)[:, None]).solution.flatten().tolist()
    return base, slope

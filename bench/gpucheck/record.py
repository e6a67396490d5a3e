"""What a stage leaves behind: checks with their numbers, rows of measurements, and what was not run and why."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Settings:
    """How a run was asked for; the same in every stage."""

    device: torch.device
    backend: str  # the one under test
    tiny: bool
    out: Path
    started: float  # time.time() of the whole run
    deadline: float  # time.time() at which the stage should have ended

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


_SAVED = ("stage", "checks", "rows", "facts", "not_run", "growth", "targets")


@dataclass
class Record:
    """The outcome of one stage, written to disk after every step so that a crash or a timeout loses nothing."""

    stage: str
    settings: Settings
    checks: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    not_run: list[dict[str, str]] = field(default_factory=list)
    growth: list[dict[str, Any]] = field(default_factory=list)  # rows of the growth with N
    targets: list[dict[str, Any]] = field(default_factory=list)  # what is asked for, and whether it was reached

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.settings.started:6.1f} s] {self.stage}: {text}", flush=True)

    def save(self, finished: bool = False) -> None:
        content = {k: getattr(self, k) for k in _SAVED}
        path = self.settings.out / f"stage_{self.stage}.json"
        path.write_text(json.dumps({**content, "finished": finished}, indent=1))

    def skip(self, name: str, reason: str) -> None:
        self.not_run.append({"name": name, "reason": reason})
        self.say(f"{name}: NOT RUN: {reason}")
        self.save()

    def check(self, name: str, ok: bool, **numbers: Any) -> bool:
        """Records one check; a failed one is printed at once, the others are counted by their case."""
        self.checks.append({"name": name, "ok": bool(ok), **numbers})
        if not ok:
            shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
            self.say(f"FAILED {name}{': ' + shown if shown else ''}")
        self.save()
        return ok

    def target(self, name: str, reached: bool, **numbers: Any) -> None:
        """Records a speed that is wanted. A missed one is in the report; it is no failed check."""
        self.targets.append({"name": name, "reached": bool(reached), **numbers})
        shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        self.say(f"{'reached' if reached else 'MISSED'}: {name}: {shown}")
        self.save()

    def close(self, name: str, ours: Tensor, eager: Tensor, exact: Tensor, scale: float | None = None) -> bool:
        """Checks that our error is at most 4 times eager's in the same dtype, plus a few roundings."""
        numbers = compare(ours, eager, exact, scale)
        return self.check(name, numbers["error"] <= numbers["allowed"], **numbers)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """A step whose exception is a failed check of its own; the steps after it still run."""
        first = len(self.checks)
        try:
            yield
            done = self.checks[first:]
            if done and all(c["ok"] for c in done):
                used = max((c["error"] / c["allowed"] for c in done if c.get("allowed")), default=0.0)
                self.say(f"ok {name} ({len(done)} checks; largest error is {used:.2f} of the allowed)")
        except torch.cuda.OutOfMemoryError as error:
            self.skip(name, f"out of memory: {str(error).splitlines()[0]}")
        except Exception:
            self.check(name, False, exception=traceback.format_exc())
        finally:
            if self.settings.on_gpu:
                torch.cuda.empty_cache()


def compare(ours: Tensor, eager: Tensor, exact: Tensor, scale: float | None = None) -> dict[str, float]:
    """Largest errors of ours and of eager against the fp64 truth, and the error allowed to us."""
    if ours.shape != exact.shape:
        raise ValueError(f"shape {tuple(ours.shape)}, expected {tuple(exact.shape)}")
    if exact.numel() == 0:
        return {"error": 0.0, "eager": 0.0, "allowed": 0.0}
    if not torch.isfinite(ours).all():
        return {"error": float("inf"), "eager": float("nan"), "allowed": 0.0}
    largest = exact.abs().max().item() if scale is None else scale
    roundings = 1 if ours.dtype.itemsize == 2 else 8
    error, plain = ((x.double() - exact).abs().max().item() for x in (ours, eager))
    return {"error": error, "eager": plain, "allowed": 4 * plain + roundings * torch.finfo(ours.dtype).eps * largest}


def run_cases(record: Record, cases: dict[str, Callable[[Record], None]]) -> None:
    for name, case in cases.items():
        with record.case(name):
            case(record)

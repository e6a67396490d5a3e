"""Peak memory of stretches of code, measured by the system and not estimated."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

# glibc only
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Lap(NamedTuple):
    """Memory in use when a stretch began, and the most that was in use during it, in bytes."""

    start: int
    peak: int


class MemoryMeter:
    """Measures stretch after stretch: each `lap()` ends one and begins the next.

    On a CUDA device it reads the allocator's counters. On the CPU it reads the resident set of the whole process, whose
    high-water mark Linux resets on request. Where that is not possible every lap is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start = self._begin()

    def lap(self) -> Lap | None:
        """The stretch since the last call, or since the meter was made."""
        start, peak = self._start, self._peak()
        self._start = self._begin()
        return None if start is None or peak is None else Lap(start, max(start, peak))

    def _begin(self) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        try:
            _CLEAR.write_text("5")  # resets VmHWM to VmRSS, see proc_pid_clear_refs(5)
        except OSError:
            return None
        return _status("VmRSS")

    def _peak(self) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def give_back(device: torch.device) -> None:
    """Returns what is free in this process to the system (CPU, glibc; elsewhere nothing happens)."""
    if device.type == "cpu" and _TRIM is not None:
        _TRIM(0)


def peak_growth(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory grows at most while `run` runs, from a state in which everything free was given back.

    Of the process (its resident set) on the CPU, of the allocator on a GPU. What `run` returns is alive at the end and
    counts. None where the system does not tell.
    """
    give_back(device)  # what earlier calls freed would hide what this one takes
    meter = MemoryMeter(device)
    result = run()
    lap = meter.lap()
    del result
    return None if lap is None else lap.peak - lap.start

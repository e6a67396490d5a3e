"""Measured choices, kept on disk: which of several ways to run an op is the fastest on this machine.

One JSON file per machine and versions of torch, triton and fastrl, in `fastrl_cache_dir()`.
Measuring happens only with FASTRL_AUTOTUNE=1; without it a choice that is on file is used, or the caller's default.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
FORMAT = 1  # of the file

_lock = threading.Lock()
_tables: dict[Path, dict[str, dict[str, Any]]] = {}  # file -> op -> key -> value, as JSON has it
_chosen: dict[tuple[Path, str, str], Any] = {}  # what `tuned` has returned from a file or a measurement


def fastrl_cache_dir() -> Path:
    """Where fastrl keeps what it measures and converts: $FASTRL_CACHE, else $XDG_CACHE_HOME/fastrl, else
    ~/.cache/fastrl."""
    if os.environ.get("FASTRL_CACHE"):
        return Path(os.environ["FASTRL_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "fastrl"


def enabled() -> bool:
    """Whether FASTRL_AUTOTUNE=1 asks for measurements."""
    return os.environ.get("FASTRL_AUTOTUNE", "0") == "1"


def can_measure() -> bool:
    """Whether a time measured now would mean something: not in Triton's interpreter, not under CUDA graph capture."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def tuned(op: str, key: str, candidates: Sequence[T], measure: Callable[[T], float], default: T) -> T:
    """The fastest of `candidates` as measured on this machine, or `default` where nothing was measured.

    Args:
        op: what is run; the name of a section of the file.
        key: whatever else the choice depends on: dtype, shapes (rounded, or every new shape is measured).
        candidates: numbers, strings, tuples, named tuples or dataclasses of such; what can be written as JSON.
        measure: candidate -> seconds, or infinity for one that does not run here. Called once for each candidate, only
            with FASTRL_AUTOTUNE=1, when the file has no choice yet and `can_measure()`.
        default: returned when there is neither a stored nor a measured choice.

    Raises:
        TypeError: a candidate that JSON cannot represent.
    """
    if len(candidates) < 2:
        return candidates[0] if candidates else default
    place = (_file(), op, key)
    choice = _chosen.get(place)
    if choice is not None and choice in candidates:
        return choice
    stored = load(op, key)
    if stored is not None:
        for candidate in candidates:
            if _plain(candidate) == stored:
                _chosen[place] = candidate
                return candidate
    if not (enabled() and can_measure()):
        return default
    times = [measure(candidate) for candidate in candidates]
    best = min(range(len(candidates)), key=times.__getitem__)
    if not math.isfinite(times[best]):
        return default
    store(op, key, candidates[best])
    _chosen[place] = candidates[best]
    return candidates[best]


def load(op: str, key: str) -> Any:
    """What `store` kept under these names on this machine, as JSON has it (tuples are lists), or None."""
    return _table(_file()).get(op, {}).get(key)


def store(op: str, key: str, value: Any) -> None:
    """Keep a value (numbers, strings, lists, dicts, tuples, dataclasses) for this and later processes.

    The file is replaced as a whole, so a reader never sees half of it; entries that other processes wrote meanwhile are
    kept. Where the folder can't be written, one warning is given and the value lives as long as the process.
    """
    path, value = _file(), _plain(value)
    with _lock:
        table = _table(path)
        table.setdefault(op, {})[key] = value
        on_disk = _read(path) if path.exists() else {}
        for section, entries in on_disk.items():
            table[section] = {**entries, **table.get(section, {})}
        content = json.dumps({"format": FORMAT, "machine": _machine(), "choices": table}, indent=1, sort_keys=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
        except OSError as error:
            _warn_once(f"measured choices are lost with this process, {path.parent} can't be written: {error}")
            return
        try:
            with os.fdopen(handle, "w") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError as error:
            Path(temporary).unlink(missing_ok=True)
            _warn_once(f"measured choices are lost with this process, {path} can't be written: {error}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value))


def _table(path: Path) -> dict[str, dict[str, Any]]:
    if path not in _tables:
        _tables[path] = _read(path) if path.exists() else {}
    return _tables[path]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The choices in a file; none, and a warning, if it is not one of ours for this machine and these versions."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT or content["machine"] != _machine():
            raise ValueError(f"it is of {content['machine']}")
        choices = content["choices"]
        if not all(isinstance(entries, dict) for entries in choices.values()):
            raise TypeError("choices are not a table of tables")
        return choices
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _warn_once(f"{path} is ignored, it is not a file of measured choices of this machine: {error!r}")
        return {}


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _file() -> Path:
    return _path(os.environ.get("FASTRL_CACHE"), os.environ.get("XDG_CACHE_HOME"))


@functools.cache
def _path(fastrl_cache: str | None, xdg_cache_home: str | None) -> Path:  # what fastrl_cache_dir reads
    name = "_".join(re.sub(r"[^a-z0-9.+]+", "-", part.lower()).strip("-") for part in _machine().values())
    return fastrl_cache_dir() / f"tuning_{name}.json"


@functools.cache
def _machine() -> dict[str, str]:
    """What a time depends on beside the code of the caller: the chips, and the versions of what compiles for them."""
    device = f"{_processor()} x{os.cpu_count()}"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} {device}"
    return {"device": device, **{name: f"{name}{_version(name)}" for name in ("torch", "triton", "fastrl")}}


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-none"

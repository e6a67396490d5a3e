"""Measured choices: measured once, kept on disk for this machine and these versions only, never half written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastrl_kernels import tuning


class Config(NamedTuple):
    block: int
    warps: int


@dataclass(frozen=True)
class Plan:
    rows: int
    note: str = ""


SMALL, LARGE, WIDE = Config(64, 4), Config(128, 4), Config(128, 8)
CONFIGS = (SMALL, LARGE, WIDE)


def forget() -> None:
    """What a new process would not know."""
    for cache in (tuning._tables, tuning._chosen):
        cache.clear()
    for cached in (tuning._warn_once, tuning._path, tuning._machine):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTRL_AUTOTUNE", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    yield tmp_path / "cache"
    forget()


class Clock:
    """Times that were made up, and how often they were asked for."""

    def __init__(self, seconds: dict[object, float]):
        self.seconds, self.asked = seconds, []  # type: ignore[var-annotated]

    def __call__(self, candidate: object) -> float:
        self.asked.append(candidate)
        return self.seconds[candidate]


def test_the_fastest_is_measured_once_and_kept(folder: Path) -> None:
    clock = Clock({SMALL: 3.0, LARGE: 1.0, WIDE: 2.0})
    for _ in range(3):
        assert tuning.tuned("op", "n64", CONFIGS, clock, SMALL) == LARGE
    assert clock.asked == list(CONFIGS)
    forget()
    assert tuning.tuned("op", "n64", CONFIGS, clock, SMALL) is LARGE  # a named tuple again, not JSON's list
    assert clock.asked == list(CONFIGS)
    assert tuning.tuned("op", "n128", CONFIGS, clock, SMALL) == LARGE and len(clock.asked) == 6  # another key
    assert [p.suffix for p in folder.iterdir()] == [".json"], "temporary files stay behind"


def test_off_nothing_is_measured_but_a_choice_on_file_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock({SMALL: 3.0, LARGE: 1.0, WIDE: 2.0})
    monkeypatch.setenv("FASTRL_AUTOTUNE", "0")
    assert tuning.tuned("op", "key", CONFIGS, clock, SMALL) is SMALL and not clock.asked
    monkeypatch.setenv("FASTRL_AUTOTUNE", "1")
    tuning.tuned("op", "key", CONFIGS, clock, SMALL)
    monkeypatch.delenv("FASTRL_AUTOTUNE")
    forget()
    assert tuning.tuned("op", "key", CONFIGS, clock, SMALL) is LARGE and len(clock.asked) == 3


def test_never_under_capture_or_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock({SMALL: 3.0, LARGE: 1.0, WIDE: 2.0})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tuning.tuned("op", "key", CONFIGS, clock, SMALL) is SMALL
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.tuned("op", "key", CONFIGS, clock, SMALL) is SMALL
    assert not clock.asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.tuned("op", "key", CONFIGS, clock, SMALL) is LARGE


def test_nothing_runs() -> None:
    clock = Clock(dict.fromkeys(CONFIGS, math.inf))
    assert tuning.tuned("op", "key", CONFIGS, clock, SMALL) is SMALL
    assert tuning.load("op", "key") is None, "a default must not be kept as if it had been measured"


@pytest.mark.parametrize("candidates", [(1, 2), ("a", "b"), ((1, "x"), (2, "y")), (Plan(1), Plan(2, "b")), (0.5, 0.25)])
def test_kinds_of_candidates(candidates: tuple[object, ...]) -> None:
    clock = Clock({candidates[0]: 2.0, candidates[1]: 1.0})
    assert tuning.tuned("op", "key", candidates, clock, candidates[0]) == candidates[1]
    forget()
    assert tuning.tuned("op", "key", candidates, clock, candidates[0]) == candidates[1] and len(clock.asked) == 2


def test_a_candidate_that_json_cannot_hold() -> None:
    with pytest.raises(TypeError):
        tuning.tuned("op", "key", (torch.float32, torch.bfloat16), lambda c: 1.0, torch.float32)


def test_a_choice_that_is_no_candidate_any_more() -> None:
    tuning.tuned("op", "key", CONFIGS, Clock({SMALL: 3.0, LARGE: 1.0, WIDE: 2.0}), SMALL)
    clock = Clock({SMALL: 1.0, WIDE: 2.0})
    assert tuning.tuned("op", "key", (SMALL, WIDE), clock, WIDE) is SMALL and len(clock.asked) == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 1}', '{"format": 99, "machine": {}, "choices": {}}',
     '{"format": 1, "machine": {"device": "another"}, "choices": {"op": {"key": [64, 4]}}}'],
    ids=["empty", "cut off", "a list", "null", "no machine", "another format", "another machine"],
)  # fmt: skip
def test_a_corrupt_or_foreign_file_is_ignored_with_one_warning(folder: Path, content: str) -> None:
    folder.mkdir()
    tuning._file().write_text(content)
    with pytest.warns(UserWarning, match="ignored") as warned:
        for _ in range(3):
            assert tuning.load("op", "key") is None
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.store("op", "key", [1, 2])  # and is replaced by the next choice
        forget()
        assert tuning.load("op", "key") == [1, 2]


def test_a_damaged_table_is_ignored(folder: Path) -> None:
    tuning.store("op", "key", 1)
    content = json.loads(tuning._file().read_text())
    content["choices"] = {"op": 5}
    tuning._file().write_text(json.dumps(content))
    forget()
    with pytest.warns(UserWarning, match="ignored"):
        assert tuning.load("op", "key") is None


def test_other_processes_keep_their_entries(folder: Path) -> None:
    tuning.store("op", "mine", 1)  # this process has read the file
    program = "from fastrl_kernels import tuning; tuning.store('op', 'theirs', 2); tuning.store('other', 'x', 3)"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    tuning.store("op", "mine too", 4)
    forget()
    found = [tuning.load(*place) for place in (("op", "mine"), ("op", "theirs"), ("other", "x"), ("op", "mine too"))]
    assert found == [1, 2, 3, 4]


def test_threads() -> None:
    threads = [threading.Thread(target=tuning.store, args=("op", f"key {i}", i)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    forget()
    assert [tuning.load("op", f"key {i}") for i in range(16)] == list(range(16))


def test_a_folder_that_can_not_be_written(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    clock = Clock({SMALL: 3.0, LARGE: 1.0, WIDE: 2.0})
    with pytest.warns(UserWarning, match="can't be written") as warned:
        assert tuning.tuned("op", "a", CONFIGS, clock, SMALL) is LARGE
        assert tuning.tuned("op", "b", CONFIGS, clock, SMALL) is LARGE
    assert len(warned) == 1
    assert tuning.tuned("op", "a", CONFIGS, clock, SMALL) is LARGE and len(clock.asked) == 6  # lives with the process


def test_the_file_is_named_by_device_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    here = tuning._file()
    assert f"torch{torch.__version__}".lower() in here.name and "triton" in here.name and "fastrl" in here.name
    forget()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert "nvidia-h200" in tuning._file().name != here.name
    forget()
    monkeypatch.setattr(tuning, "_version", lambda package: "9.9")
    assert "torch9.9" in tuning._file().name

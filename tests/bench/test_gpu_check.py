"""bench/gpu_check.py walks its whole path on the CPU, and notices what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastrl_kernels import backends, reference

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "bench" / "gpu_check.py"


def run_script(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, str(SCRIPT), "--out", str(out), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def gpucheck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, str], object]]:
    """A fresh record of a stage on the CPU."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from gpucheck.record import Record, Settings

    def make(out: Path, stage: str) -> Record:
        now = time.time()
        return Record(stage, Settings(torch.device("cpu"), "reference", True, out, now, now + 100))

    yield make


def test_the_whole_path_on_the_cpu(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--device", "cpu", "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["ok"]
    stages = {stage["stage"]: stage for stage in results["stages"]}
    assert list(stages) == ["environment", "correctness", "memory", "sanitizer", "benchmark"]
    assert all(stage["finished"] for stage in stages.values())
    assert len(stages["correctness"]["checks"]) > 150
    assert {item["name"] for item in stages["memory"]["not_run"]} >= {"addresses past 2^31 elements"}
    timed = {row["contender"]: row for row in stages["benchmark"]["rows"] if row["workload"] == "all live, tiny"}
    assert {"three bare GEMMs", "fastrl", "eager PyTorch"} <= set(timed)
    assert timed["three bare GEMMs"]["times_floor"] == 1.0
    assert all(row["median_ms"] > 0 for row in timed.values())
    absent = {item["name"]: item["reason"] for item in stages["benchmark"]["not_run"]}
    assert "cut-cross-entropy" in absent and all(absent.values())
    dead = next(
        r for r in stages["benchmark"]["rows"] if r["workload"] == "63% dead, tiny" and r["contender"] == "fastrl"
    )
    assert dead["flops"] == 3 / 8 * timed["fastrl"]["flops"]  # 5 of the 8 sequences are dead
    report = (tmp_path / "report.md").read_text()
    assert "| fastrl |" in report and "All checks passed" in report
    try:
        import matplotlib  # noqa: F401

        assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    except ImportError:
        assert "matplotlib" in done.stdout


def test_a_stage_that_crashes_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    done = run_script(
        tmp_path, "--device", "cpu", "--backend", "no-such-backend", "--tiny", "--only", "correctness", "sanitizer"
    )
    assert done.returncode == 1
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert [stage["finished"] for stage in stages] == [False, True]
    assert "no-such-backend" in stages[0]["error"] and "DID NOT FINISH" in done.stdout


def test_a_wrong_kernel_fails(tmp_path: Path, gpucheck: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpucheck import correctness

    class Wrong:
        """The reference with the entropy's gradient dropped, and the rounding of one logit in a thousand off."""

        group_advantages = staticmethod(reference.group_advantages)

        @staticmethod
        def row_stats(tile: Tensor, *args: object) -> object:
            stats = reference.row_stats(tile, *args)
            return stats._replace(logps=stats.logps * 1.001)

        @staticmethod
        def row_grad(*args: object) -> None:
            reference.row_grad(*args[:8], args[8], None, *args[10:])

    monkeypatch.setattr(backends, "load", lambda name: Wrong)
    record = gpucheck(tmp_path, "correctness")
    correctness.run(record)
    failed = [check["name"] for check in record.checks if not check["ok"]]
    assert any(name.endswith("V=507 plain: logps") for name in failed)
    assert any(name.endswith("V=507 plain: grad") for name in failed)
    assert not any("entropy" in name and "policy" not in name for name in failed)


def test_an_exception_is_a_failed_check_and_the_next_case_runs(tmp_path: Path, gpucheck: Callable) -> None:
    from gpucheck.record import run_cases

    record = gpucheck(tmp_path, "memory")

    def broken(record: object) -> None:
        raise ZeroDivisionError("here")

    run_cases(record, {"broken": broken, "fine": lambda r: r.check("fine", True)})
    assert [check["ok"] for check in record.checks] == [False, True]
    assert "ZeroDivisionError" in record.checks[0]["exception"]


def test_a_wrong_contender_gets_no_speed(tmp_path: Path, gpucheck: Callable) -> None:
    from gpucheck import benchmark, problems
    from gpucheck.contenders import Contender, eager

    def wrong(hidden: Tensor, weight: Tensor, problem: problems.Problem) -> Tensor:
        return problems.eager_logps(hidden, 1.2 * weight, problem.ids)

    def broken(hidden: Tensor, weight: Tensor, problem: problems.Problem) -> Tensor:
        raise RuntimeError("no such thing")

    record = gpucheck(tmp_path, "benchmark")
    problem = problems.make_problem(2, 5, 8, 100, torch.float32, torch.device("cpu"))
    peers = [Contender("wrong", wrong), Contender("broken", broken), eager(record.settings)]
    for scoring in (False, True):
        record.rows.clear()
        benchmark._workload(record, "small", problem, peers, scoring, 5.0)
        rows = {row["contender"]: row for row in record.rows}
        assert "median_ms" in rows["eager PyTorch"]
        assert "median_ms" not in rows["wrong"] and "wrong result" in rows["wrong"]["refused"]
        assert "median_ms" not in rows["broken"] and "no such thing" in rows["broken"]["refused"]


def test_a_wrong_result_of_ours_fails_the_benchmark(tmp_path: Path, gpucheck: Callable) -> None:
    from gpucheck import benchmark, problems
    from gpucheck.contenders import Contender, eager

    record = gpucheck(tmp_path, "benchmark")
    problem = problems.make_problem(2, 5, 8, 100, torch.float32, torch.device("cpu"))
    # 0.1 % off: far below what counts as wrong for a peer, far above what rounding explains.
    ours = Contender("fastrl", lambda h, w, p: 1.001 * problems.eager_logps(h, w, p.ids))
    benchmark._workload(record, "small", problem, [ours, eager(record.settings)], True, 5.0)
    assert [check["ok"] for check in record.checks] == [False]
    assert "median_ms" not in next(row for row in record.rows if row["contender"] == "fastrl")

"""bench/gpu_check.py walks its whole path on the CPU, and notices what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
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
    names = ["environment", "correctness", "peers", "compiled", "memory", "schedules", "kernels", "growth"]
    names += ["configurations", "sanitizer"]
    assert list(stages) == names
    assert all(stage["finished"] for stage in stages.values())
    checks = [check["name"] for check in stages["correctness"]["checks"]]
    assert len(checks) > 200
    assert all(
        any(what in name for name in checks) for what in ("capturable", "gae", "divergence rows", "linear_divergence")
    )
    assert {item["name"] for item in stages["memory"]["not_run"]} >= {"addresses past 2^31 elements"}
    rows = stages["peers"]["rows"]
    timed = {row["contender"]: row for row in rows if row["workload"] == "forward + backward"}
    assert {"three bare GEMMs", "fastrl (cpu)", "eager PyTorch"} <= set(timed)
    assert timed["three bare GEMMs"]["to_floor"] == 1.0
    assert all(row["median_s"] > 0 for row in timed.values())
    dead = next(r for r in rows if r["op"] == "live" and r["contender"] == "fastrl (cpu)")
    assert dead["cost"] == 3 / 8 * timed["fastrl (cpu)"]["cost"]  # 5 of the 8 sequences are dead
    absent = {item["name"]: item["reason"] for item in stages["compiled"]["not_run"]}
    assert "cut-cross-entropy" in absent and all(absent.values())
    schedules = {row["contender"] for row in stages["schedules"]["rows"]}
    assert {"one lane", "two lanes", "capturable, not captured", "fp32 tile"} <= schedules
    assert "fastrl plan" in stages["schedules"]["facts"]["plan at tiny"]
    kernels = {row["workload"] for row in stages["kernels"]["rows"]}
    assert kernels >= {"row pass 1: statistics", "row pass 2: gradient", "group advantages", "generalised advantages"}
    assert {row["N"] for row in stages["growth"]["growth"]} == {16, 32, 64}
    targets = [target["name"] for stage in stages.values() for target in stage["targets"]]
    assert "useful rate at live share 1, of the bare GEMM rate" in targets
    assert any(name.startswith("live share 0.38: ahead of eager PyTorch") for name in targets)
    report = (tmp_path / "report.md").read_text()
    assert "**fastrl (cpu)**" in report and "All checks passed" in report and "## What is asked for" in report
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


def test_a_wrong_result_of_ours_fails_the_benchmark(
    tmp_path: Path, gpucheck: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpucheck import speed

    import fastrl
    from fastrl.benchmark import head, problems

    right = fastrl.linear_logprobs
    # 0.1 % off: far below what counts as wrong for a peer in bf16, far above what rounding explains.
    monkeypatch.setattr(
        fastrl, "linear_logprobs", lambda *a, **k: (s := right(*a, **k))._replace(logps=1.001 * s.logps)
    )
    record = gpucheck(tmp_path, "peers")
    problem = problems.make_problem(2, 5, 8, 100, torch.float32, torch.device("cpu"))
    contenders = [head.variant("fastrl", backend="reference"), head.eager_contender()]
    workload = head.head_workload(problem, head.JOBS["score"], contenders, shape="small")
    speed._run(record, workload, 1)
    assert [check["ok"] for check in record.checks] == [False]
    assert "median_s" not in next(row for row in record.rows if row["contender"] == "fastrl")


def test_targets_are_told_and_fail_nothing(tmp_path: Path, gpucheck: Callable) -> None:
    record = gpucheck(tmp_path, "peers")
    record.target("twice as fast", False, times_faster=1.5)
    from gpucheck import report

    stages = [{**json.loads((tmp_path / "stage_peers.json").read_text()), "finished": True}]
    assert report.failures(stages) == []
    report.write(tmp_path, stages, 1.0)
    assert "MISSED: twice as fast: times_faster 1.5" in (tmp_path / "report.md").read_text()


def test_what_a_stage_leaves_over_goes_to_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu_check

    assert sum(gpu_check.STAGES.values()) < 570  # and the report: under ten minutes
    given: dict[str, float] = {}

    def run(command: list[str], timeout: float, **_: object) -> subprocess.CompletedProcess[str]:
        given[command[command.index("--stage") + 1]] = timeout
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    options = Namespace(
        device="cpu", out=tmp_path, tiny=True, backend=None, started=time.time(), only=["memory", "growth"]
    )
    for stage in options.only:
        gpu_check.start_stage(options, stage)
    assert given["growth"] >= gpu_check.STAGES["memory"] + gpu_check.STAGES["growth"] - 2

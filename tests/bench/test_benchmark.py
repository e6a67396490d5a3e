"""What `fastrl bench` measures with: truth, costs, peers, refusal of wrong results, the runner, lines, tables."""

from __future__ import annotations

import functools
import math
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl.benchmark import head, peers, plots, problems, scaling, suite, tables, workload
from fastrl.benchmark.head import JOBS, Contender, head_workload, variant
from fastrl.benchmark.memory import peak_growth
from fastrl.benchmark.vectors import gae_workload, group_advantages_workload, logits_workload
from fastrl.benchmark.workload import Effort, Entry, interleaved, measure, seconds_of

CPU = torch.device("cpu")
ONCE = Effort(0.0, 1, 1)


@pytest.fixture(scope="module")
def problem() -> problems.Problem:
    return problems.make_problem(6, 5, 16, 211, torch.float32, CPU)


def silent(text: str) -> None:
    """Progress that nobody reads."""


def rows_of(some: workload.Workload) -> dict[str, dict]:
    return {row["contender"]: row for row in measure(some, CPU, ONCE, silent)}


# Truth --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "frozen", "entropy", "kl", "nll"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_truth_is_autograd_in_fp64(problem: problems.Problem, name: str, share: float, monkeypatch) -> None:
    job, batch = JOBS[name], problem if share == 1 else problem.with_live_share(share)
    leaves = [x.double().requires_grad_() for x in (batch.hidden, batch.weight)]
    logps, entropy = problems.eager_logps_and_entropy(*leaves, batch.ids)
    loss = -logps.mean() if job.nll else batch.policy(logps, job.objective, entropy if job.entropy else None)
    want = torch.autograd.grad(loss, leaves)
    # Blocks smaller than the problem, so that rows and columns really come in pieces.
    monkeypatch.setattr(problems, "_row_chunks", lambda p: [slice(0, 7), slice(7, 30)])
    monkeypatch.setattr(problems, "_column_blocks", lambda p: [slice(0, 100), slice(100, 211)])
    truth = problems.exact(batch, job.objective, nll=job.nll, frozen_weight=job.frozen)
    assert truth.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert problems.relative_error(truth.hidden_grad, want[0]) < 1e-12
    if job.frozen:
        assert truth.weight_grad is None
    else:
        assert truth.weight_grad is not None and problems.relative_error(truth.weight_grad, want[1]) < 1e-12


def test_live_share_scatters_whole_sequences(problem: problems.Problem) -> None:
    half = problem.with_live_share(0.5)
    assert half.live_tokens == 15 and problem.live_tokens == 30
    live = (half.advantages != 0).nonzero().flatten().tolist()
    assert live != [0, 1, 2]
    assert torch.equal(half.with_live_share(1.0).advantages != 0, torch.ones(6, dtype=torch.bool))


def test_relative_error_sees_nan_and_shape() -> None:
    x = torch.randn(10)
    assert problems.relative_error(x, x.double()) == 0
    assert problems.relative_error(x.view(2, 5), x.double()) == math.inf
    assert problems.relative_error(torch.where(x == x[0], math.nan, x), x.double()) == math.inf
    assert problems.relative_error(torch.tensor(1e-3), torch.tensor(2e-3, dtype=torch.float64)) < 2e-3  # a scalar: / 1


# Costs --------------------------------------------------------------------------------------------------------------


def test_flops_by_formula(problem: problems.Problem) -> None:
    half = problem.with_live_share(0.5)
    one = 2.0 * 30 * 16 * 211  # 2NDV

    def cost(contender: Contender, job: str, batch: problems.Problem = half) -> tuple[str, float]:
        formula, flops = contender.flops(batch, JOBS[job])
        return formula, flops / one

    ours, scored, two = head.fastrl_contenders()[:3]
    assert cost(ours, "train") == ("6nDV", 1.5)
    assert cost(scored, "train") == ("(2N + 4n)DV", 2.0)
    assert cost(two, "train") == ("(2N + 6n)DV", 2.5)
    assert cost(ours, "frozen") == ("4nDV", 1.0)
    assert cost(ours, "score") == ("2NDV", 1.0)
    assert cost(ours, "nll") == ("6nDV", 3.0)  # every token counts
    peer = Contender("x", "x", recompute=True)
    assert cost(peer, "train") == ("8NDV", 4.0)
    assert cost(peer, "frozen") == ("6NDV", 3.0)
    assert cost(peer, "score") == ("2NDV", 1.0)
    assert cost(Contender("x", "x", recompute=True, skips_frozen=False), "frozen") == ("8NDV", 4.0)
    assert cost(Contender("x", "x"), "train") == ("6NDV", 3.0)


def test_the_floor_is_the_products_of_the_job(problem: problems.Problem) -> None:
    want = {"score": ("one", 1), "frozen": ("two", 2), "train": ("three", 3), "kl": ("three", 3)}
    for name, (count, products) in want.items():
        floor = head_workload(problem, JOBS[name], [], shape="x").floor
        assert floor.name.startswith(count) and floor.cost == products * 2.0 * 30 * 16 * 211
        floor.call()


# Contenders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(JOBS))
def test_every_contender_that_runs_here_is_right(problem: problems.Problem, name: str) -> None:
    # Those that go through the compiler take a minute: they are in the full sweep.
    names = tuple(p for p in peers.PEERS if p not in ("compile", "liger-compiled"))
    contenders = [*head.fastrl_contenders(), *peers.peers(names, CPU)]
    some = head_workload(problem, JOBS[name], contenders, shape="tiny")
    rows = rows_of(some)
    assert {"fastrl", "eager PyTorch"} <= rows.keys()
    assert all("median_s" in row for row in rows.values()), {n: r.get("refused") for n, r in rows.items()}
    assert all(row["errors"] for row in rows.values() if not row["floor"])
    for contender in contenders:
        assert contender.name in rows or contender.ours or some.not_run[contender.name]


@pytest.mark.full
@pytest.mark.parametrize("name", list(JOBS))
def test_compiled_contenders_are_right(problem: problems.Problem, name: str) -> None:
    contenders = [head.eager_contender(), *peers.peers(("compile", "liger-compiled"), CPU)]
    rows = rows_of(head_workload(problem, JOBS[name], contenders, shape="tiny"))
    assert all("median_s" in row for row in rows.values()), {n: r.get("refused") for n, r in rows.items()}


def test_dead_rows_and_a_skipping_tolerance(problem: problems.Problem) -> None:
    some = head_workload(
        problem.with_live_share(0.5), JOBS["train"], head.fastrl_contenders(), shape="x", live_share=0.5
    )
    rows = rows_of(some)
    assert rows["fastrl"]["cost"] < rows["fastrl, dead rows scored"]["cost"] < some.floor.cost
    assert all("median_s" in rows[name] for name in ("fastrl", "fastrl, dead rows scored"))
    exact = rows_of(head_workload(problem, JOBS["train"], head.fastrl_contenders(), shape="x"))
    skipping = exact["fastrl, grad_tolerance 2^-7"]
    assert skipping["allowed"]["d hidden"] == pytest.approx(2 * 2**-3.5) and "median_s" in skipping


def test_peers_that_need_a_gpu_say_so() -> None:
    for contender in peers.peers(("cce", "verl-triton", "quack", "liger-scaled"), CPU):
        assert contender.absent and ("CUDA" in contender.absent or "SM90" in contender.absent)


def test_a_peer_that_is_not_installed_is_listed(monkeypatch) -> None:
    for module in ("trl.kernels", "liger_kernel.chunked_loss"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "verl", raising=False)
    for contender in peers.peers(("trl", "liger", "verl"), CPU):
        assert contender.absent and ("can't be imported" in contender.absent or "not installed" in contender.absent)


def test_a_module_is_imported_without_its_packages_init(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "heavy_package" / "inner"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise ImportError('wants everything')")
    (package / "__init__.py").write_text("raise ImportError('too')")
    (package / "op.py").write_text("VALUE = 7")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert peers._import_alone("heavy_package", ("inner",), "heavy_package.inner.op", "VALUE") == (7, None)
    assert "heavy_package" not in sys.modules and "heavy_package.inner" not in sys.modules
    value, reason = peers._import("heavy_package", "VALUE")
    assert value is None and reason is not None and "wants everything" in reason


# Measuring ----------------------------------------------------------------------------------------------------------


def test_a_wrong_contender_gets_no_time_and_a_broken_one_stops_nobody(problem: problems.Problem) -> None:
    def wrong(hidden: Tensor, weight: Tensor, p: problems.Problem, entropy: bool) -> tuple[Tensor, None]:
        return problems.eager_logps(hidden, 1.01 * weight, p.ids), None

    def broken(hidden: Tensor, weight: Tensor, p: problems.Problem, entropy: bool) -> tuple[Tensor, None]:
        raise RuntimeError("no such thing")

    contenders = [Contender("w", "wrong", wrong), Contender("b", "broken", broken), head.eager_contender()]
    for job in ("train", "score"):
        rows = rows_of(head_workload(problem, JOBS[job], contenders, shape="x"))
        assert "median_s" in rows["eager PyTorch"] and rows["eager PyTorch"]["to_floor"] > 0
        assert "median_s" not in rows["wrong"] and rows["wrong"]["refused"].startswith("wrong")
        assert "median_s" not in rows["broken"] and "no such thing" in rows["broken"]["refused"]


def test_ours_must_be_as_good_as_eager(problem: problems.Problem) -> None:
    def nearly(hidden: Tensor, weight: Tensor, p: problems.Problem, entropy: bool) -> tuple[Tensor, None]:
        return (1 + 3e-5) * problems.eager_logps(hidden, weight, p.ids), None  # a peer's would pass

    for key, times in (("fastrl", False), ("peer", True)):
        contenders = [Contender(key, "nearly", nearly), head.eager_contender()]
        row = rows_of(head_workload(problem, JOBS["score"], contenders, shape="x"))["nearly"]
        assert ("median_s" in row) == times


def test_rounds_are_interleaved_rotated_and_end_with_the_time() -> None:
    calls: list[str] = []

    def run(name: str) -> None:
        calls.append(name)
        time.sleep(0.002)  # a shorter call would be repeated

    runs = {name: functools.partial(run, name) for name in "abc"}
    timing = interleaved(runs, CPU, time.monotonic(), Effort(0, 3, 9), silent, slow_beside="a")
    assert "".join(calls[:3]) == "abc" and "".join(calls[3:6]).startswith("b")
    assert all(t["rounds"] >= 2 and t["min_s"] <= t["median_s"] <= t["max_s"] for t in timing.values())
    assert all(t["peak_bytes"] is not None for t in timing.values())


def test_a_short_call_is_timed_over_many() -> None:
    calls: list[None] = []
    seconds = seconds_of(lambda: calls.append(None), CPU)
    assert len(calls) > 10 and 0 < seconds < 1e-3


def test_slow_ones_are_timed_in_two_rounds() -> None:
    runs = {"fast": lambda: time.sleep(0.002), "slow": lambda: time.sleep(0.05)}
    timing = interleaved(runs, CPU, time.monotonic() + 60, Effort(60, 3, 6), silent, slow_beside="fast")
    assert timing["slow"]["rounds"] == 2 and timing["fast"]["rounds"] == 6
    assert timing["slow"]["median_s"] > 10 * timing["fast"]["median_s"]


def test_peak_growth_counts_what_a_call_takes() -> None:
    def run() -> Tensor:
        return torch.ones(40_000_000).mul_(2)

    grown = peak_growth(run, CPU)
    if grown is None:
        pytest.skip("this system does not reset the resident set's high-water mark")
    assert 150e6 < grown < 200e6
    again = peak_growth(run, CPU)
    assert again is not None and abs(again - grown) < 20e6  # a warm process counts alike


# The workloads without a matrix product -----------------------------------------------------------------------------


def test_vector_workloads_are_right() -> None:
    made = [
        logits_workload(12, 500, torch.float32, CPU, ("eager", "trl"), shape="tiny"),
        group_advantages_workload(64, 8, CPU, ("eager",)),
        gae_workload(5, 33, CPU, ("eager",)),
    ]
    for some in made:
        rows = rows_of(some)
        assert all("median_s" in row for row in rows.values()), {n: r.get("refused") for n, r in rows.items()}
        assert rows["fastrl"]["errors"] and rows["fastrl"]["unit"] == "byte"


def test_a_wrong_gae_is_refused(monkeypatch) -> None:
    def wrong(rewards, values, mask, *, gamma, lam, backend=None):  # type: ignore[no-untyped-def]
        advantages, returns = original(rewards, values, mask, gamma=gamma, lam=lam + 0.01)
        return advantages, returns

    original = fastrl.gae
    monkeypatch.setattr(fastrl, "gae", wrong)
    assert rows_of(gae_workload(5, 33, CPU, ("eager",)))["fastrl"]["refused"].startswith("wrong")


# Growth -------------------------------------------------------------------------------------------------------------


def growth_rows(seconds, peak) -> list[dict]:  # type: ignore[no-untyped-def]
    return [
        {"op": "train", "contender": "fastrl", "ours": True, "N": n, "median_s": seconds(n), "peak_bytes": peak(n)}
        for n in (1024, 2048, 4096, 8192)
    ]


def test_straight_lines_are_told_from_bent_ones() -> None:
    straight = scaling.straight_lines(growth_rows(lambda n: 0.01 + 1e-3 * n, lambda n: 1e8 + 2304 * n))
    assert [line["straight"] for line in straight] == [True, True]
    assert straight[0]["per_token"] == pytest.approx(1e-3) and straight[1]["base"] == pytest.approx(1e8)
    bent = scaling.straight_lines(growth_rows(lambda n: 1e-6 * n**2, lambda n: 4.0 * n**2))
    assert [line["straight"] for line in bent] == [False, False]


def test_growth_runs_until_its_largest_n_and_checks_each_point() -> None:
    growth = scaling.Growth("tiny", 16, 300, torch.float32, CPU, 4, 8, 32)

    def wrong(hidden: Tensor, weight: Tensor, p: problems.Problem, entropy: bool) -> tuple[Tensor, None]:
        return 1.01 * problems.eager_logps(hidden, weight, p.ids), None

    contenders = [variant("fastrl"), head.eager_contender(), Contender("w", "wrong", wrong)]
    rows = [row for some in growth.run(contenders, Effort(60, 2, 2), silent) for row in some]
    assert sorted({row["N"] for row in rows}) == [8, 16, 32]
    assert all(("refused" in row) == (row["contender"] == "wrong") for row in rows)
    assert {row["op"] for row in rows} == {"score", "train"}


# The run and what it writes -----------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setitem(suite.SHAPES, "smollm2", suite.Shape("tiny", 16, 300))
    monkeypatch.setattr(suite, "Growth", lambda *a, smallest, largest: scaling.Growth(*a, 8, 32))


def test_a_run_keeps_what_it_has_and_lists_what_did_not_run(small: None, tmp_path: Path) -> None:
    seen: list[int] = []
    ops = tuple(op for op in suite.OPS if op not in ("step", "logits", "gae", "group_advantages", "objectives"))
    options = suite.Options(CPU, ops, ("smollm2",), ("eager", "cce"), tokens=64, length=8, minutes=5, quick=True)
    results = suite.Suite(options, silent, lambda r: seen.append(len(r.rows))).run()
    assert results.failures == [] and seen == sorted(seen) and seen[0] > 0
    assert {row["op"] for row in results.rows} == {"score", "train", "live", "frozen", "entropy", "kl", "nll"}
    assert results.absent == {"cut-cross-entropy": "its kernels need a CUDA device"}
    assert len(results.lines) == 4 and {line["what"] for line in results.lines} == {"time", "memory"}
    page = tables.markdown(results, "fastrl bench")
    for row in results.rows:
        assert row["contender"] in page
    assert "cut-cross-entropy: its kernels need a CUDA device" in page and "Growth with N" in page
    paths = plots.write(results, tmp_path)
    names = {path.name for path in paths}
    assert {"time_against_n.png", "memory_against_n.png", "time_against_live_share.png", "benchmark.png"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)


def test_no_time_left_is_told(small: None) -> None:
    options = suite.Options(
        CPU, ("train", "score", "scaling"), ("smollm2",), ("eager",), tokens=64, length=8, minutes=1e-4
    )
    results = suite.Suite(options, silent, lambda r: None).run()
    assert {item["reason"] for item in results.not_run} == {"no time left for it (--minutes)"}


def test_out_of_memory_ends_one_step_only(small: None, monkeypatch) -> None:
    def oom(self: suite.Suite, effort: Effort) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(suite.Suite, "_scaling", oom)
    options = suite.Options(CPU, ("scaling", "frozen"), ("smollm2",), ("eager",), tokens=64, length=8, minutes=1)
    results = suite.Suite(options, silent, lambda r: None).run()
    assert results.not_run == [{"name": "growth with N", "reason": "out of memory: too large"}]
    assert {row["op"] for row in results.rows} == {"frozen"}


def test_tokens_shrink_with_the_head_on_a_cpu_and_not_on_a_gpu() -> None:
    options = suite.Options(CPU)
    assert options.n("smollm2") == 2048 and options.t == 32 and options.kind == torch.float32
    assert 32 <= options.n("llama-3-8b") < options.n("qwen2.5-0.5b") < 2048
    on_gpu = suite.Options(torch.device("cuda"))
    assert {on_gpu.n(shape) for shape in suite.SHAPES} == {8192} and on_gpu.kind == torch.bfloat16


def test_a_wrong_result_of_ours_is_a_failure_of_the_run() -> None:
    row = {"contender": "fastrl", "workload": "w", "shape": "s", "ours": True, "refused": "wrong: x"}
    assert suite.Results({}, rows=[row, {**row, "ours": False}]).failures == ["fastrl: w, s: wrong: x"]


def test_durations_have_three_digits() -> None:
    shown = [tables.duration(s) for s in (12.345, 1.2345, 0.12345, 0.0012345, 1.2345e-5)]
    assert shown == ["12.3 s", "1.23 s", "123 ms", "1.23 ms", "12.3 µs"]


def test_the_optimizer_step_is_listed_where_its_packages_are_missing(small: None, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "fastrl.benchmark.optimizer_step", None)
    options = suite.Options(CPU, ("step",), ("smollm2",), ("eager",), tokens=64, length=8, minutes=1)
    results = suite.Suite(options, silent, lambda r: None).run()
    assert [item["name"] for item in results.not_run] == ["optimizer step, grpo"]
    assert "fastrl[train]" in results.not_run[0]["reason"]


def test_the_optimizer_steps_rows_are_kept(small: None, monkeypatch) -> None:
    row = {"op": "step", "contender": "fastrl", "ours": True, "floor": False, "B": 4, "prompt_tokens": 70, "rounds": 2,
           "shape": "m", "dtype": "float32", "unit": "FLOP", "cost": 1e12, "formula": "6PN", "completion_tokens": 30,
           "median_s": 2.0, "min_s": 1.0, "max_s": 3.0, "peak_bytes": 5e6, "extra_bytes": None, "to_trl": 0.5,
           "to_eager": 0.25, "errors": {"gradients": 1e-6, "TRL": 2e-7}}  # fmt: skip
    rows = {method: {**row, "workload": f"{method} optimizer step"} for method in ("grpo", "kto")}
    module = types.SimpleNamespace(optimizer_step_rows=lambda device, method, seconds, say: [rows[method]])
    monkeypatch.setitem(sys.modules, "fastrl.benchmark.optimizer_step", module)
    options = suite.Options(CPU, ("step",), ("smollm2",), ("eager",), minutes=1, step=("grpo", "kto"))
    results = suite.Suite(options, silent, lambda r: None).run()
    assert results.rows == list(rows.values())
    page = tables.markdown(results, "c")
    assert "### kto optimizer step" in page and "B 4, 70 prompt and 30 completion tokens; 6PN = 1 TFLOP" in page
    assert "| **fastrl** | 2.00 s | 1.00 s - 3.00 s | 2 | 0.50 | 0.25 | 5 | 1.0e-06 | 2.0e-07 |" in page
    rows["kto"].update(to_trl=None)
    assert "| 2 |  | 0.25 |" in tables.markdown(results, "c")  # PPO, which TRL does not have


def test_entries_that_give_other_results_are_refused(problem: problems.Problem) -> None:
    some = head_workload(problem, JOBS["score"], [], shape="x")
    some.entries.append(Entry("odd", lambda: {"something": torch.zeros(1)}, "2NDV", 1.0))
    assert "something" in rows_of(some)["odd"]["refused"]

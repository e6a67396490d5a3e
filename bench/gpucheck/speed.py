"""The stages that time: our schedules, every peer, and the kernels alone, each against its floor in the same run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fastrl
from fastrl.benchmark.head import JOBS, head_workload, variant
from fastrl.benchmark.head import fastrl_contenders as contenders_of
from fastrl.benchmark.peers import PEERS, peers
from fastrl.benchmark.problems import DAPO, Problem, make_problem
from fastrl.benchmark.scaling import Growth, straight_lines
from fastrl.benchmark.suite import SHAPES
from fastrl.benchmark.tables import duration
from fastrl.benchmark.vectors import (
    gae_workload,
    group_advantages_workload,
    logits_workload,
    row_passes_workloads,
)
from fastrl.benchmark.workload import Effort, Entry, Workload, measure
from fastrl_kernels import backends, planner

from .record import Record

# The bar: B, T, D, V.
BAR = ("Llama-3-8B", (16, 512, 4096, 128256))
TINY = ("tiny", (8, 8, 32, 1000))
LIVE_SHARE = 0.37
# Peers whose kernels are compiled or tuned at the first call, for minutes if it goes wrong: in a process of their own.
COMPILED = ("compile", "liger-compiled", "liger-scaled", "cce", "verl-triton", "quack")
# What the issue of this benchmark asks of a GPU.
USEFUL_RATE = 0.85
AHEAD_WHEN_DEAD = 2.0


def plain_peers(record: Record) -> None:
    """Ours against the peers that run without a compiler: scoring, all live, 37% live."""
    _against(record, tuple(name for name in PEERS if name not in COMPILED))


def compiled_peers(record: Record) -> None:
    """Ours against the rest, in the same way."""
    _against(record, tuple(name for name in COMPILED if not (record.settings.tiny and "compile" in name)))


def _against(record: Record, names: Sequence[str]) -> None:
    settings = record.settings
    shape, sizes = TINY if settings.tiny else BAR
    problem = make_problem(*sizes, _dtype(record), settings.device)
    contenders = [*contenders_of(settings.backend), *peers(names, settings.device)]
    for contender in contenders:
        if contender.absent:
            record.skip(contender.name, contender.absent)
    present = [c for c in contenders if not c.absent]
    jobs = [("train", 1.0), ("train", LIVE_SHARE), ("score", 1.0)]
    jobs += [("nll", 1.0)] if settings.tiny or "quack" in names else []
    for index, (job, share) in enumerate(jobs):
        some = problem if share == 1 else problem.with_live_share(share)
        workload = head_workload(some, JOBS[job], present, shape=shape, live_share=share)
        _run(record, workload, len(jobs) - index)
        _targets(record, workload)
        gc.collect()


def schedules(record: Record) -> None:
    """Our own schedules against each other: lanes, tile dtype, tile size, the fused forward, capture, the backends."""
    settings = record.settings
    on_gpu = settings.on_gpu
    works = backends.available()
    for title, sizes in ({"tiny": TINY[1]} if settings.tiny else {
        "Llama-3-8B": BAR[1], "SmolLM2-135M": (16, 512, 576, 49152)
    }).items():  # fmt: skip
        problem = make_problem(*sizes, _dtype(record), settings.device)
        if not settings.tiny:
            costs = planner.calibrate(settings.device, _dtype(record))
            record.facts["calibrated rates"] = str(costs)
        backend = settings.backend
        rows = [variant("fastrl", backend=backend), variant("one lane", backend=backend, limits={"lanes": 1})]
        rows += [variant("two lanes", backend=backend, limits={"lanes": 2})]
        rows += [variant("capturable, not captured", backend=backend, capturable=True)]
        tiles: dict[str, torch.dtype] = {"fp32 tile": torch.float32}
        if on_gpu:
            tiles["bf16 tile"] = torch.bfloat16
            for mib in (128, 1024):
                rows.append(variant(f"tiles of {mib} MiB", backend=backend, limits={"tile_bytes": mib * 2**20}))
            for name, wanted in (("fused forward", True), ("no fused forward", False)):
                rows.append(variant(name, backend=backend, limits={"fused_forward": wanted}, jobs=frozenset({"score"})))
        rows += [variant(name, backend=backend, limits={"tile_dtype": dtype}) for name, dtype in tiles.items()]
        for name in ("triton", "cuda"):
            if works[name] is not None or not on_gpu:
                record.skip(f"backend {name}", str(works[name] or "it takes CUDA tensors"))
            elif name != backend:
                rows.append(variant(f"backend {name}", backend=name))
        rows += peers(("eager",), settings.device)
        for index, job in enumerate(("train", "score")):
            workload = head_workload(problem, JOBS[job], rows, shape=title)
            if job == "train":
                if on_gpu:
                    graph, cost = _captured(problem, backend), workload.floor.cost
                    workload.entries.append(Entry("CUDA graph replay", graph, "6NDV", cost, ours=True))
                else:
                    record.skip("CUDA graph replay", "needs a CUDA device")
            _run(record, workload, 2 - index)
        record.facts[f"plan at {title}"] = _explained(problem, backend)
        del problem
        gc.collect()


def kernels(record: Record) -> None:
    """The row passes, group advantages and the GAE scan of every backend, in bytes per second against a copy."""
    settings = record.settings
    works = backends.available()
    names = ["reference"]
    for name in ("triton", "cuda") if settings.on_gpu else ("cpu",):
        if works[name] is None:
            names.append(name)
        else:
            record.skip(f"kernels of {name}", str(works[name]))
    tile = (8, 1000) if settings.tiny else (4096, 128256)
    workloads: list[Callable[[], list[Workload]]] = []
    for dtype in (torch.float32, torch.bfloat16):
        workloads.append(lambda dtype=dtype: row_passes_workloads(*tile, dtype, settings.device, names))
    b, t = (4, 16) if settings.tiny else (4096, 4096)
    for name in [n for n in names if n != "reference"]:
        workloads.append(lambda name=name: [group_advantages_workload(16 if settings.tiny else 2**20, 8,
                                                                      settings.device, ("eager",), name)])  # fmt: skip
        workloads.append(lambda name=name: [w for w in [gae_workload(b, t, settings.device, ("eager",), name)] if w])
    workloads.append(lambda: [logits_workload(*tile, _dtype(record), settings.device, ("eager", "trl"),
                                              shape="tiny" if settings.tiny else BAR[0],
                                              backend=settings.backend)])  # fmt: skip
    for index, make in enumerate(workloads):
        for workload in make():
            _run(record, workload, len(workloads) - index)
        gc.collect()


def growth(record: Record) -> None:
    """Scoring and training at SmolLM2's head and at the bar's, N from 1k to the largest that fits the time."""
    settings = record.settings
    if settings.tiny:
        plans = [Growth("tiny", 32, 1000, _dtype(record), settings.device, 8, 16, 64)]
    else:
        heads = [SHAPES["smollm2"], SHAPES["llama-3-8b"]]
        plans = [Growth(s.title, s.hidden, s.vocabulary, _dtype(record), settings.device, 512, 1024) for s in heads]
    contenders = [
        *contenders_of(settings.backend)[:1],
        *peers(("eager",) if settings.tiny else ("eager", "trl"), settings.device),
    ]
    for index, plan in enumerate(plans):
        left = (settings.deadline - time.time()) / (len(plans) - index)
        rows: list[dict[str, Any]] = []
        rounds = 2 if settings.tiny else 3
        for some in plan.run([c for c in contenders if not c.absent], Effort(left, rounds, rounds), record.say):
            rows += some
            record.growth += some
            record.save()
        for line in straight_lines(rows):
            name = f"{plan.shape}: {line['what']} of {line['op']} against N is a straight line"
            record.target(name, line["straight"], largest_distance=line["largest_distance"], to=line["to"])
        for row in rows:
            if row["ours"] and "refused" in row:
                record.check(f"growth, N={row['N']}: {row['contender']}", False, reason=row["refused"])


def _dtype(record: Record) -> torch.dtype:
    return torch.bfloat16 if record.settings.on_gpu else torch.float32


def _run(record: Record, workload: Workload, still: int) -> None:
    """Measures one workload in its share of the stage's time; our own wrong or broken rows are failed checks."""
    left = record.settings.deadline - time.time()
    if left < 10:
        record.skip(workload.name, "no time left for it")
        return
    with record.case(workload.name):
        say = (lambda text: None) if record.settings.tiny else (lambda text: record.say(f"{workload.title}: {text}"))
        effort = Effort(0.0, 2, 2) if record.settings.tiny else Effort(left / still, 3, 15)
        rows = measure(workload, record.settings.device, effort, say)
        record.rows += rows
        for row in rows:
            if "median_s" in row:
                record.say(
                    f"{workload.title}, {workload.shape}: {row['contender']}: {duration(row['median_s'])}, "
                    f"{row['to_floor']:.2f} x floor"
                )
            else:
                record.say(f"{workload.title}, {workload.shape}: {row['contender']}: {row.get('refused')}")
            if row["ours"]:
                record.check(f"{workload.title}, {workload.shape}: {row['contender']}", "median_s" in row,
                             **({"reason": row["refused"]} if "refused" in row else {}))  # fmt: skip
        for name, reason in workload.not_run.items():
            record.not_run.append({"name": f"{name}: {workload.title}", "reason": reason})
        record.save()


def _targets(record: Record, workload: Workload) -> None:
    """What the issue asks of a GPU, from the rows just measured."""
    rows = [r for r in record.rows if r["workload"] == workload.title and r["shape"] == workload.shape]
    timed = {r["contender"]: r for r in rows if "median_s" in r}
    ours = next((r for r in timed.values() if r["ours"]), None)
    if ours is None or workload.op not in ("train", "live"):
        return
    peers_ = {name: r["median_s"] / ours["median_s"] for name, r in timed.items() if not r["ours"] and not r["floor"]}
    if workload.op == "train":
        rate = 1 / ours["to_floor"]
        record.target("useful rate at live share 1, of the bare GEMM rate", rate >= USEFUL_RATE, rate=rate,
                      wanted=USEFUL_RATE, tflops=workload.floor.cost / ours["median_s"] / 1e12)  # fmt: skip
    wanted = AHEAD_WHEN_DEAD if workload.op == "live" else 1.0
    for name, times in peers_.items():
        record.target(f"live share {workload.live_share:.2f}: ahead of {name}", times > wanted, times_faster=times,
                      wanted=wanted)  # fmt: skip


def _captured(problem: Problem, backend: str) -> Callable[[], Mapping[str, Tensor]]:
    """The loss and both gradients as one CUDA graph; a call replays it."""
    hidden, weight = problem.leaves()

    def step() -> dict[str, Tensor]:
        out = fastrl.linear_policy_loss(
            hidden, weight, problem.ids, DAPO, advantages=problem.advantages, mask=problem.mask,
            old_logps=problem.old_logps, backend=backend, capturable=True,
        )  # fmt: skip
        grads = torch.autograd.grad(out.loss, [hidden, weight])
        return {"loss": out.loss.detach(), "d hidden": grads[0], "d weight": grads[1]}

    state: dict[str, Any] = {}

    def replay() -> Mapping[str, Tensor]:
        if not state:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            state["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(state["graph"]):
                state["out"] = step()
        state["graph"].replay()
        return dict(state["out"])

    return replay


def _explained(problem: Problem, backend: str) -> str:
    """What the planner prints for the policy loss of a problem."""
    import contextlib
    import io

    text = io.StringIO()
    hidden, weight = problem.leaves()
    with contextlib.redirect_stdout(text):
        fastrl.linear_policy_loss(
            hidden, weight, problem.ids, DAPO, advantages=problem.advantages, mask=problem.mask,
            old_logps=problem.old_logps, backend=backend, explain=True,
        )  # fmt: skip
    return text.getvalue().strip().replace("\n", " ")

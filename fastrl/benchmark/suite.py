"""The run of `fastrl bench`: which workloads, at which sizes, in what time, and the growth with N that closes it."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from . import machine
from .comparisons import Comparison, objective_workload
from .head import JOBS, Contender, Job, fastrl_contenders, head_workload
from .objective_heads import head_comparisons
from .objective_peers import Absent
from .objectives import (
    advantage_comparisons,
    correction_comparisons,
    critic_comparisons,
    policy_comparisons,
    preference_comparisons,
)
from .peers import PEERS, peers
from .problems import Problem, make_problem
from .scaling import Growth, straight_lines
from .vectors import gae_workload, group_advantages_workload, logits_workload
from .workload import SLOW, Effort, Workload, measure


class Shape(NamedTuple):
    """The LM head of a model."""

    title: str
    hidden: int
    vocabulary: int


SHAPES = {
    "smollm2": Shape("SmolLM2-135M", 576, 49152),
    "qwen2.5-0.5b": Shape("Qwen2.5-0.5B", 896, 151936),
    "llama-3-8b": Shape("Llama-3-8B", 4096, 128256),
    "qwen2.5-7b": Shape("Qwen2.5-7B", 3584, 152064),
}
# Of `fastrl.benchmark.step_methods`, which needs the packages of fastrl[train]: what the op "step" can run.
STEP_METHODS = ("grpo", "grpo_kl", "sft", "dpo", "dpo_precomputed", "reward", "kto", "distillation", "ppo")
OPS = (*JOBS, "live", "logits", "group_advantages", "gae", "objectives", "step", "scaling")
LIVE_SHARES = (0.5, 0.37, 0.2)
# Peers of the workloads that are there for our own options; the main ones run against all of them.
FEW = ("eager", "torch-lce", "trl")
QUICK_PEERS = (*FEW, "liger-wide")


@dataclass(frozen=True)
class Options:
    """What is asked for; None leaves the choice to the device."""

    device: torch.device
    ops: tuple[str, ...] = OPS
    shapes: tuple[str, ...] = tuple(SHAPES)
    peers: tuple[str, ...] = PEERS
    step: tuple[str, ...] = STEP_METHODS[:1]  # methods whose optimizer step is run
    quick: bool = False
    tokens: int | None = None  # N at SmolLM2's shape on the CPU, at every shape on a GPU
    length: int | None = None  # tokens of a completion
    dtype: torch.dtype | None = None
    minutes: float | None = None
    backend: str | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def kind(self) -> torch.dtype:
        """bf16 on a GPU, fp32 on the CPU."""
        return self.dtype or (torch.bfloat16 if self.on_gpu else torch.float32)

    @property
    def t(self) -> int:
        """A completion's tokens: 512 on a GPU; 32 on the CPU, the length of the CPU's optimizer step."""
        return self.length or (512 if self.on_gpu else 32)

    @property
    def seconds(self) -> float:
        return 60 * (self.minutes if self.minutes is not None else 2 if self.quick else 15)

    def n(self, shape: str) -> int:
        """Tokens at a shape, whole completions; on the CPU a larger head gets a quarter of SmolLM2's cost."""
        if self.on_gpu:
            n = self.tokens or (2048 if self.quick else 8192)
        else:
            n = self.tokens or (256 if self.quick else 2048)
            base, this = SHAPES["smollm2"], SHAPES[shape]
            if shape != "smollm2":
                n = n * base.hidden * base.vocabulary // (4 * this.hidden * this.vocabulary)
        return max(1, n // self.t) * self.t


@dataclass
class Results:
    """Everything a run found."""

    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    growth: list[dict[str, Any]] = field(default_factory=list)  # rows of the scaling runs
    lines: list[dict[str, Any]] = field(default_factory=list)  # whether they are straight
    absent: dict[str, str] = field(default_factory=dict)  # contender -> why it can't run here
    not_run: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        """Our own rows that have no time: a wrong result, or an error."""
        return [
            f"{row['contender']}: {row['workload']}, {row['shape']}: {row['refused']}"
            for row in [*self.rows, *self.growth]
            if row["ours"] and "refused" in row
        ]


class _Step(NamedTuple):
    title: str
    cost: float  # seconds on two cores, roughly: for the shares of the time and what is left of it
    run: Callable[[Effort], None]


class Suite:
    """A run: `steps` in their order, each with a share of the time by its cost."""

    def __init__(self, options: Options, say: Callable[[str], None], changed: Callable[[Results], None]) -> None:
        self.options, self.say, self.changed = options, say, changed
        self.results = Results(machine.facts(options.device))
        self.problems: dict[tuple[str, int], Problem] = {}

    def run(self) -> Results:
        """Runs everything; `changed` is called after each step, so that an interrupted run keeps what it has."""
        steps = list(self._steps())
        started = time.monotonic()
        end = started + self.options.seconds
        done = 0.0
        total = sum(step.cost for step in steps)
        for step in steps:
            now = time.monotonic()
            left = end - now
            rest = total - done
            eta = (now - started) / done * rest if done > 0.05 * total else left
            self.step, self.started, self.eta_at = step.title, started, now + min(max(eta, 0.0), max(left, 0.0))
            if left <= 0:
                self.results.not_run.append({"name": step.title, "reason": "no time left for it (--minutes)"})
            else:
                self._guarded(step, Effort(left * step.cost / rest, 2 if self.options.quick else 3))
            done += step.cost
            self.results.seconds = time.monotonic() - started
            self.changed(self.results)
            gc.collect()
        return self.results

    def _guarded(self, step: _Step, effort: Effort) -> None:
        try:
            step.run(effort)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            torch.cuda.empty_cache()
            self.results.not_run.append({"name": step.title, "reason": f"out of memory: {str(error).splitlines()[0]}"})

    def progress(self, text: str) -> None:
        now = time.monotonic()
        self.say(f"[{now - self.started:4.0f} s, about {max(0.0, self.eta_at - now):3.0f} s left] {self.step}: {text}")

    # What is run ----------------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[_Step]:
        """What matters most comes first: where the time ends, the rest is listed as not run."""
        o = self.options
        main, *others = o.shapes
        yield from self._shape_steps(main, _BOTH)
        if "group_advantages" in o.ops:
            yield _Step("group advantages", 1.0, self._group_advantages)
        if "gae" in o.ops:
            yield _Step("generalised advantages", 3.0, self._gae)
        if "logits" in o.ops:
            yield _Step("log-probabilities from logits", 3.0, self._logits)
        if "objectives" in o.ops:
            yield from self._objective_steps()
        if "scaling" in o.ops:
            yield _Step("growth with N", 10.0 if o.quick else 110.0, self._scaling)
        if "step" in o.ops and not o.quick:
            for method in o.step:
                cost = 180.0 if method == "grpo" else 100.0  # GRPO's is run at two live shares
                yield _Step(f"optimizer step, {method}", cost, functools.partial(self._optimizer_step, method))
        yield from self._shape_steps(main, tuple(name for name in JOBS if name not in _BOTH))
        for key in () if o.quick else others:
            yield from self._shape_steps(key, _BOTH)

    def _shape_steps(self, key: str, names: tuple[str, ...]) -> Iterator[_Step]:
        o = self.options
        main = key == o.shapes[0]
        everybody = o.peers if main or o.on_gpu else _few(o.peers)  # a GPU has time for all
        n = o.n(key)
        for job in (JOBS[name] for name in names):
            if job.name in o.ops or (job.name == "train" and "live" in o.ops):
                whole = job.name in _BOTH or o.on_gpu
                yield self._head_step(key, n if whole else max(1, n // 4 // o.t) * o.t, job, 1.0, everybody)
            if job.name == "train" and "live" in o.ops and n >= 4 * o.t:  # a share of whole completions
                for share in LIVE_SHARES if main and not o.quick else (0.37,):
                    shown = everybody if share == 0.37 else _few(everybody)
                    # Peers compute dead rows like live ones: on a CPU the slow repeats of other rows are left out.
                    shown = shown if o.on_gpu else tuple(p for p in shown if p not in _ONCE)
                    yield self._head_step(key, n, job, share, shown)

    def _head_step(self, key: str, n: int, job: Job, share: float, names: tuple[str, ...]) -> _Step:
        shape = SHAPES[key]
        what = job.title if share == 1 else f"{job.title}, live share {share}"
        floor = 0.6 * job.floor[1] * n * shape.hidden * shape.vocabulary / (2048 * 576 * 49152)
        rounds = 3 if self.options.quick else 4
        run = [name for name in names if self.options.on_gpu or name not in _GPU_ONLY]
        cost = rounds * floor * (5 + sum(_FLOORS.get(name, 2) for name in run)) + 15 * ("compile" in names)
        return _Step(f"{what}, {shape.title}", cost, functools.partial(self._head, key, n, job, share, names))

    def _contenders(self, names: Sequence[str]) -> list[Contender]:
        return [*fastrl_contenders(self.options.backend), *peers(names, self.options.device)]

    def _problem(self, shape: str, n: int) -> Problem:
        if (shape, n) not in self.problems:
            self.problems.clear()  # one at a time: a large head is gigabytes
            self.progress(f"inputs, {n} tokens")
            t = min(self.options.t, n)
            _, d, v = SHAPES[shape]
            self.problems[shape, n] = make_problem(n // t, t, d, v, self.options.kind, self.options.device)
        return self.problems[shape, n]

    def _head(self, shape: str, n: int, job: Job, share: float, names: Sequence[str], effort: Effort) -> None:
        problem = self._problem(shape, n)
        if share < 1:
            problem = problem.with_live_share(share)
        contenders = self._contenders(names)
        self._measure(head_workload(problem, job, contenders, shape=SHAPES[shape].title, live_share=share), effort)
        for contender in contenders:
            if contender.absent:
                self.results.absent[contender.name] = contender.absent

    def _measure(self, workload: Workload, effort: Effort) -> None:
        self.results.rows += measure(workload, self.options.device, effort, self.progress)
        for name, reason in workload.not_run.items():
            if name not in self.results.absent:
                self.results.not_run.append({"name": f"{name}: {workload.title}, {workload.shape}", "reason": reason})

    def _logits(self, effort: Effort) -> None:
        o = self.options
        shape = SHAPES[o.shapes[0]]
        n = 128 if o.quick else 8192 if o.on_gpu else 512
        self._measure(
            logits_workload(n, shape.vocabulary, o.kind, o.device, o.peers, shape=shape.title, backend=o.backend),
            effort,
        )

    def _group_advantages(self, effort: Effort) -> None:
        for b in (512,) if self.options.quick else (512, 65536):
            self._measure(group_advantages_workload(b, 8, self.options.device, self.options.peers), _many(effort))

    def _gae(self, effort: Effort) -> None:
        for b, t in ((64, 128),) if self.options.quick else ((64, 128), (512, 2048)):
            workload = gae_workload(b, t, self.options.device, self.options.peers)
            if workload is None:
                self.results.not_run.append({"name": "gae", "reason": "this version of fastrl has no gae"})
                return
            self._measure(workload, _many(effort))

    def _objective_steps(self) -> Iterator[_Step]:
        """Ours against the project that an objective comes from, whatever --peers says."""
        o = self.options
        small = o.quick and not o.on_gpu
        b, t = (16, 128) if small else (64, 512)
        _, d, v = SHAPES[o.shapes[0]]
        head = (2, 16, d, v) if small else (4, 32, d, v)
        groups: dict[str, Callable[[], Iterable[Comparison]]] = {
            "policy losses": functools.partial(policy_comparisons, b, t, o.device),
            "preference losses": functools.partial(preference_comparisons, 2 * b, t, o.device),
            "advantages": functools.partial(advantage_comparisons, b if small else 512, t // 2, o.device),
            "rollout correction": functools.partial(correction_comparisons, b, t, o.device),
            "value loss and KL": functools.partial(critic_comparisons, b, t, o.device),
            "objectives from hidden states": functools.partial(head_comparisons, *head, o.device),
        }
        for title, make in groups.items():
            yield _Step(title, 20.0, functools.partial(self._objectives, make))

    def _objectives(self, make: Callable[[], Iterable[Comparison]], effort: Effort) -> None:
        comparisons = list(make())
        for comparison in comparisons:
            try:
                workload = objective_workload(comparison)
            except Absent as reason:
                self.results.absent[" and ".join(comparison.peers)] = str(reason)
                continue
            few = Effort(effort.seconds / len(comparisons), effort.fewest)
            self._measure(workload, few if comparison.flops else _many(few, slow=math.inf))

    def _optimizer_step(self, method: str, effort: Effort) -> None:
        try:
            from fastrl.data import DemoModelError

            from .optimizer_step import optimizer_step_rows
        except ImportError as error:
            reason = f"it needs the packages of fastrl[train]: {error}"
            self.results.not_run.append({"name": self.step, "reason": reason})
            return
        try:
            rows = optimizer_step_rows(self.options.device, method, seconds=effort.seconds, say=self.progress)
        except DemoModelError as error:
            self.results.not_run.append({"name": self.step, "reason": str(error)})
            return
        self.results.rows += rows

    def _scaling(self, effort: Effort) -> None:
        o = self.options
        shape = SHAPES[o.shapes[0]]
        small = o.quick and not o.on_gpu
        growth = Growth(
            shape.title, shape.hidden, shape.vocabulary, o.kind, o.device, o.t,
            smallest=128 if small else 1024, largest=1024 if small else None,
        )  # fmt: skip
        contenders = [fastrl_contenders(o.backend)[0], *peers(_few(o.peers), o.device)]
        for rows in growth.run([c for c in contenders if not c.absent], effort, self.progress):
            self.results.growth += rows
            self.results.lines = straight_lines(self.results.growth)


_BOTH = ("train", "score")
_ONCE = ("compile", "liger-compiled", "verl")
_GPU_ONLY = ("liger-scaled", "cce", "verl-triton", "quack")
# What a peer takes, in floors, on a CPU.
_FLOORS = {
    "eager": 1.5,
    "compile": 1.5,
    "torch-lce": 1.5,
    "torch-lce-auto": 8,
    "trl": 3.5,
    "liger": 5,
    "liger-compiled": 5,
}


def _few(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in FEW)


def _many(effort: Effort, slow: float = SLOW) -> Effort:
    """Calls of microseconds: rounds enough for a median that holds still."""
    return Effort(effort.seconds / 2, 30, 200, slow)

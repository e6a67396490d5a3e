"""The jobs at the LM head: what is computed, by whom, at how many FLOPs, and the fp64 truth it is compared with.

A peer that gives differentiable log-probabilities of tokens gets the loss of `fastrl.policy_loss` on top; one with a
loss of its own runs that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastrl
from fastrl_kernels import planner

from .problems import DAPO, Problem, eager_logps, eager_logps_and_entropy, exact, exact_logps
from .workload import Call, Entry, Workload


@dataclass(frozen=True)
class Job:
    """What is asked of every contender."""

    name: str
    title: str
    objective: fastrl.PolicyObjective = DAPO
    backward: bool = True
    frozen: bool = False  # the head takes no gradient
    nll: bool = False  # the mean negative log-likelihood instead of the objective

    @property
    def entropy(self) -> bool:
        """Whether gradients flow through the entropy."""
        return self.objective.entropy_coef != 0

    @property
    def floor(self) -> tuple[str, int]:
        """The bare matrix products this job can't do without."""
        products = 1 + self.backward * (2 - self.frozen)
        return ("one bare GEMM", "two bare GEMMs", "three bare GEMMs")[products - 1], products


JOBS = {
    job.name: job
    for job in (
        Job("score", "score", backward=False),
        Job("train", "forward + backward"),
        Job("frozen", "forward + backward, frozen head", frozen=True),
        Job(
            "entropy",
            "forward + backward, entropy bonus",
            fastrl.PolicyObjective(loss_type="dapo", entropy_coef=0.01),
        ),
        Job("kl", "forward + backward, KL to a reference", fastrl.PolicyObjective(loss_type="dapo", beta=0.04)),
        Job("nll", "forward + backward of the mean NLL", nll=True),
    )
}

# Everything a contender can be asked: the jobs, and training where some rows carry no gradient.
ASKED = frozenset({*JOBS, "live"})

# (hidden (B, T, D), weight, problem, whether the entropy is wanted) -> logps (B, T), entropy (B, T) or None
TokenForm = Callable[[Tensor, Tensor, Problem, bool], tuple[Tensor, Tensor | None]]
LossForm = Callable[[Tensor, Tensor, Problem, Job], Tensor]


@dataclass(frozen=True)
class Contender:
    """Somebody who can do some of the jobs."""

    key: str  # what --peers takes
    name: str
    tokens: TokenForm | None = None
    loss: LossForm | None = None  # of its own; else policy_loss on its tokens
    mean_nll: LossForm | None = None  # of its own; else the mean over its tokens
    jobs: frozenset[str] = ASKED
    recompute: bool = False  # the backward forms the logits again (not that of a mean_nll of its own)
    dead: str = "computed"  # rows without gradient: "computed" like all others, "scored", or "dropped"
    skips_frozen: bool = True  # no dW for a frozen head
    two_pass: bool = False  # ours: all rows are scored, live ones formed again
    allowed: float | None = None  # error of an approximation by its own bound
    absent: str | None = None  # why it can't run here

    @property
    def ours(self) -> bool:
        return self.key == "fastrl"

    def evaluate(self, hidden: Tensor, weight: Tensor, problem: Problem, job: Job) -> Tensor:
        """The job's loss, with a graph."""
        own = self.mean_nll if job.nll and self.mean_nll is not None else self.loss
        if own is not None:
            return own(hidden, weight, problem, job)
        if self.tokens is None:
            raise ValueError(f"{self.name} has no loss")
        logps, entropy = self.tokens(hidden, weight, problem, job.entropy)
        return -logps.mean() if job.nll else problem.policy(logps, job.objective, entropy)

    def flops(self, problem: Problem, job: Job) -> tuple[str, float]:
        """Formula and value of its matrix products: N rows in all, n live ones."""
        n_all, d, v = problem.sizes
        grads = job.backward * (2 - (job.frozen and self.skips_frozen))
        of_all, of_live = 2, 2 * grads
        if not job.backward or self.dead == "computed":
            again = self.recompute and job.backward and not (job.nll and self.mean_nll)
            of_all, of_live = 2 * (1 + grads + again), 0
        elif self.two_pass:
            of_live += 2
        elif self.dead == "dropped":
            of_all, of_live = 0, 2 + of_live
        live = n_all if job.nll else problem.live_tokens
        parts = [f"{of_all}N"] * bool(of_all) + [f"{of_live}n"] * bool(of_live)
        formula = f"{parts[0]}DV" if len(parts) == 1 else f"({' + '.join(parts)})DV"
        return formula, float(of_all * n_all + of_live * live) * d * v


def variant(
    name: str,
    *,
    backend: str | None = None,
    limits: Mapping[str, Any] | None = None,
    jobs: frozenset[str] = ASKED,
    dead: str = "dropped",
    tolerance: float = 0.0,
    **options: Any,
) -> Contender:
    """A row of ours: `linear_policy_loss` (scoring: `linear_logprobs`) with options.

    Args:
        backend: as in `fastrl.linear_policy_loss`.
        limits: fields of the planner's `Limits` to force, to measure one schedule against another.
        jobs: what it is asked for.
        dead: "dropped" or "scored", as the options have it.
        tolerance: `grad_tolerance`. The dropped rows hold at most this share of the sum of the rows' norms and are the
            smallest, so at most this share of the sum of squares: the relative error is about its root.
        options: further arguments of both functions.
    """
    forced = dict(limits or {})

    def tokens(hidden: Tensor, weight: Tensor, p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        with planner.forced(**forced):
            stats = fastrl.linear_logprobs(hidden, weight, p.ids, entropy=entropy, backend=backend, **options)
        return stats.logps, stats.entropy

    def loss(hidden: Tensor, weight: Tensor, p: Problem, job: Job) -> Tensor:
        inputs: dict[str, Any] = {"advantages": p.advantages, "old_logps": p.old_logps}
        if job.nll:  # at ratio 1 and advantage 1 the policy gradient is that of the mean log-probability
            inputs = {"advantages": torch.ones_like(p.advantages)}
        if job.objective.beta:
            inputs["ref_logps"] = p.ref_logps
        with planner.forced(**forced):
            out = fastrl.linear_policy_loss(
                hidden, weight, p.ids, job.objective, mask=p.mask, backend=backend, score_dead=dead == "scored",
                grad_tolerance=tolerance, **inputs, **options,
            )  # fmt: skip
        return out.loss + (-out.logps.mean() - out.loss.detach()) if job.nll else out.loss

    allowed = 2 * tolerance**0.5 if tolerance else None
    return Contender("fastrl", name, tokens, loss, jobs=jobs, dead=dead, allowed=allowed)


def two_pass(name: str, *, backend: str | None = None) -> Contender:
    """`policy_loss` on `linear_logprobs`: what an objective takes that is not token-local."""
    tokens = variant(name, backend=backend).tokens
    return Contender("fastrl", name, tokens, jobs=frozenset({"train"}), dead="scored", two_pass=True)


def fastrl_contenders(backend: str | None = None) -> list[Contender]:
    """Our own rows; a forced backend is named in them."""
    name = "fastrl" if backend is None else f"fastrl ({backend})"
    live, train = frozenset({"live"}), frozenset({"train"})
    rows = [
        variant(name, backend=backend),
        variant(f"{name}, dead rows scored", backend=backend, jobs=live, dead="scored"),
        two_pass(f"{name}, two pass", backend=backend),
    ]
    if backend != "reference":  # which drops nothing
        rows.append(variant(f"{name}, grad_tolerance 2^-7", backend=backend, jobs=train, tolerance=2**-7))
    return rows


def eager_contender() -> Contender:
    def tokens(hidden: Tensor, weight: Tensor, p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        if entropy:
            return eager_logps_and_entropy(hidden, weight, p.ids)
        return eager_logps(hidden, weight, p.ids), None

    return Contender("eager", "eager PyTorch", tokens)


def floor_call(problem: Problem, products: int) -> Call:
    """The bare matrix products (logits; dX; dW), whole, into buffers that are there already."""
    x = problem.hidden.flatten(0, 1)
    n, d, v = problem.sizes
    logits = x.new_empty(n, v)
    dx = x.new_empty(n, d) if products > 1 else None
    dw = x.new_empty(v, d) if products > 2 else None

    def run() -> Mapping[str, Tensor]:
        with torch.no_grad():
            torch.mm(x, problem.weight.t(), out=logits)
            if dx is not None:
                torch.mm(logits, problem.weight, out=dx)
            if dw is not None:
                torch.mm(logits.t(), x, out=dw)
        return {}

    return run


def head_workload(
    problem: Problem, job: Job, contenders: list[Contender], *, shape: str, live_share: float = 1.0
) -> Workload:
    """One job at one shape, for those contenders that can do it; the others are listed with the reason."""
    n, d, v = problem.sizes
    live = problem.live_tokens / n
    wanted = "live" if live_share < 1 else job.name
    entries: list[Entry] = []
    not_run: dict[str, str] = {}
    for contender in contenders:
        able = wanted in contender.jobs
        if contender.absent:
            not_run[contender.name] = contender.absent
        elif able:
            formula, flops = contender.flops(problem, job)
            call = _call(contender, problem, job)
            entries.append(
                Entry(contender.name, call, formula, flops, contender.ours, contender.key == "eager", contender.allowed)
            )
        elif not contender.ours:
            not_run[contender.name] = _UNABLE.get(job.name, "it does not do this job")
    name, products = job.floor
    item = problem.hidden.dtype.itemsize
    outputs = (n * d * (products > 1) + v * d * (products > 2)) * item if job.backward else 0

    def expected() -> dict[str, Tensor]:
        if not job.backward:
            return {"logps": exact_logps(problem)}
        truth = exact(problem, job.objective, nll=job.nll, frozen_weight=job.frozen)
        out = {"loss": truth.loss, "d hidden": truth.hidden_grad}
        return out if truth.weight_grad is None else {**out, "d weight": truth.weight_grad}

    title = job.title if live_share == 1 else f"{job.title}, live share {live:.2f}"
    return Workload(
        op=job.name if live_share == 1 else "live",
        title=title,
        shape=shape,
        sizes={"N": n, "D": d, "V": v, "T": problem.ids.shape[1]},
        live_share=1.0 if job.nll or not job.backward else live,
        dtype=str(problem.hidden.dtype).removeprefix("torch."),
        floor=Entry(name, floor_call(problem, products), f"{2 * products}NDV", 2.0 * products * n * d * v),
        entries=entries,
        expected=expected,
        output_bytes=outputs,
        not_run=not_run,
    )


_UNABLE = {
    "score": "it gives a loss, no log-probabilities",
    "entropy": "no entropy, or none that gradients flow through",
    "kl": "its loss has no KL term",
    "nll": "a policy loss only",
}


def _call(contender: Contender, problem: Problem, job: Job) -> Call:
    def train() -> Mapping[str, Tensor]:
        hidden, weight = problem.leaves(job.frozen)
        loss = contender.evaluate(hidden, weight, problem, job)
        grads = torch.autograd.grad(loss, [hidden] if job.frozen else [hidden, weight])
        return dict(zip(("loss", "d hidden", "d weight"), (loss.detach(), *grads), strict=False))

    def score() -> Mapping[str, Tensor]:
        if contender.tokens is None:
            raise ValueError(f"{contender.name} gives no log-probabilities")
        with torch.no_grad():
            return {"logps": contender.tokens(problem.hidden, problem.weight, problem, False)[0]}

    return train if job.backward else score

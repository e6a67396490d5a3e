"""The fused policy loss on the CPU against its floor (the bare GEMMs), eager PyTorch, TRL's op and Liger's loss.

    python bench/policy_loss.py [--tokens 2048] [--hidden 576] [--vocabulary 49152] [--rounds 5] [--out FOLDER]

One interleaved run: every round times every variant once and medians are quoted; a variant's loss and gradients are
compared with fp64 before a time is printed. Peers that are not installed are listed as absent. FLOPs are those of the
GEMMs: 2NDV for the logits and for each gradient.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastrl
from fastrl_kernels import backends

DEAD_SHARE = 0.63
LENGTH = 64  # tokens per completion


class Problem:
    """One batch of completions at the head: hidden states, weight, and the constants of the loss."""

    def __init__(self, tokens: int, hidden: int, vocabulary: int):
        torch.manual_seed(0)
        rows = tokens // LENGTH
        self.hidden = torch.randn(rows, LENGTH, hidden, requires_grad=True)
        self.weight = (torch.randn(vocabulary, hidden) * hidden**-0.5).requires_grad_()
        self.ids = torch.randint(vocabulary, (rows, LENGTH))
        self.mask = torch.ones(rows, LENGTH)
        self.advantages = torch.randn(rows)
        self.sparse_advantages = self.advantages * (torch.arange(rows) >= round(DEAD_SHARE * rows))
        with torch.no_grad():
            logps = fastrl.linear_logprobs(self.hidden, self.weight, self.ids).logps
        self.old = logps + 0.1 * torch.randn_like(logps)
        self.objective = fastrl.PolicyObjective(loss_type="dapo")

    def loss_of(self, logps: Tensor, advantages: Tensor) -> Tensor:
        return fastrl.policy_loss(
            logps, self.objective, advantages=advantages, mask=self.mask, old_logps=self.old.to(logps.dtype)
        ).loss

    def fused(self, advantages: Tensor, *, score_dead: bool = False, frozen: bool = False) -> Tensor:
        weight = self.weight.detach() if frozen else self.weight
        return fastrl.linear_policy_loss(
            self.hidden, weight, self.ids, self.objective, advantages=advantages, mask=self.mask, old_logps=self.old,
            score_dead=score_dead,
        ).loss  # fmt: skip

    def eager(self, hidden: Tensor, weight: Tensor, advantages: Tensor) -> Tensor:
        logps = (hidden @ weight.T).log_softmax(-1).gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)
        return self.loss_of(logps, advantages)

    def trl(self) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        flat = self.hidden.reshape(-1, self.hidden.shape[-1])
        logps, *_ = ChunkedLogProbFunction.apply(
            flat, self.weight, None, self.ids.reshape(-1), 1.0, 32768, None, 1.0, ("entropy",)
        )
        return self.loss_of(logps.view(self.ids.shape), self.advantages)

    def liger(self, loss: Callable[..., tuple[Tensor, object]]) -> Tensor:
        return loss(
            self.hidden, self.weight, self.ids, self.mask, self.advantages, old_per_token_logps=self.old
        )[0]  # fmt: skip


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(run: Callable[[], object]) -> float:
    """MB that the process grows by while `run` runs, sampled each millisecond; gradients that stay are included."""
    gc.collect()
    base, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return (peak - base) / 1e6


def relative_error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("hidden", 576), ("vocabulary", 49152), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md")
    arguments = parser.parse_args()
    if arguments.tokens % LENGTH or min(arguments.tokens, arguments.hidden, arguments.vocabulary, arguments.rounds) < 1:
        parser.error(f"--tokens must be a positive multiple of {LENGTH}, the other numbers at least 1")
    n, d, v = arguments.tokens, arguments.hidden, arguments.vocabulary
    if (reason := backends.available()["cpu"]) is not None:
        parser.error(f"nothing to measure: {reason}")
    problem = Problem(n, d, v)
    x, w = problem.hidden.detach().view(n, d), problem.weight.detach()
    leaves = [problem.hidden, problem.weight]

    def gemms() -> None:
        logits = x @ w.T
        logits @ w
        logits.T @ x

    def score() -> None:
        with torch.no_grad():
            fastrl.linear_logprobs(problem.hidden, problem.weight, problem.ids, entropy=True)

    gemm = 2.0 * n * d * v
    live = float((problem.sparse_advantages != 0).float().mean())
    losses: dict[str, tuple[Callable[[], Tensor], float, bool]] = {  # loss, FLOPs, all rows live
        "fastrl": (lambda: problem.fused(problem.advantages), 3 * gemm, True),
        f"fastrl, {1 - live:.0%} dead": (lambda: problem.fused(problem.sparse_advantages), 3 * live * gemm, False),
        f"fastrl, {1 - live:.0%} dead, scored": (
            lambda: problem.fused(problem.sparse_advantages, score_dead=True), (1 + 2 * live) * gemm, False
        ),
        "eager PyTorch": (lambda: problem.eager(*leaves, problem.advantages), 3 * gemm, True),
    }  # fmt: skip
    absent = {}
    if importlib.util.find_spec("trl"):
        losses["TRL ChunkedLogProbFunction"] = (problem.trl, 4 * gemm, True)
    else:
        absent["TRL ChunkedLogProbFunction"] = "trl is not installed"
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        liger = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.2, compiled=False
        )
        losses["Liger LigerFusedLinearGRPOLoss"] = (lambda: problem.liger(liger), 4 * gemm, True)
    else:
        absent["Liger LigerFusedLinearGRPOLoss"] = "liger-kernel is not installed"

    print("fp64 truth ...", flush=True)
    truth = {}
    for all_live, advantages in ((True, problem.advantages), (False, problem.sparse_advantages)):
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        loss = problem.eager(doubles[0], doubles[1], advantages.double())
        truth[all_live] = (loss.item(), *torch.autograd.grad(loss, doubles))

    errors = {}
    for name, (loss_of, _, all_live) in losses.items():
        print(f"checking {name} ...", flush=True)
        loss = loss_of()
        dx, dw = torch.autograd.grad(loss, leaves)
        want, want_dx, want_dw = truth[all_live]
        errors[name] = max(relative_error(dx, want_dx), relative_error(dw, want_dw), abs(loss.item() - want))
    limit = 4 * errors["eager PyTorch"] + 1e-6
    wrong = {name: e for name, e in errors.items() if e > limit}
    del truth
    gc.collect()

    def train(loss_of: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            problem.hidden.grad = problem.weight.grad = None
            loss_of().backward()

        return run

    runs: dict[str, tuple[Callable[[], object], float]] = {
        "floor: one GEMM": (lambda: x @ w.T, gemm),
        "floor: three GEMMs": (gemms, 3 * gemm),
        "fastrl, scoring": (score, gemm),
        "fastrl, frozen head": (train(lambda: problem.fused(problem.advantages, frozen=True)), 2 * gemm),
        **{name: (train(f), flops) for name, (f, flops, _) in losses.items() if name not in wrong},
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for r in range(arguments.rounds + 1):
        print(f"round {r} of {arguments.rounds}" if r else "warm-up", flush=True)
        for name, (run, _) in runs.items():
            start = time.perf_counter()
            run()
            if r:
                times[name].append(time.perf_counter() - start)
    memory = {}
    for name, (run, _) in runs.items():
        problem.hidden.grad = problem.weight.grad = None
        memory[name] = peak_memory(run)

    packages = {"torch": "torch", "trl": "trl", "liger-kernel": "liger_kernel"}
    versions = {p: importlib.metadata.version(p) for p, module in packages.items() if importlib.util.find_spec(module)}
    versions["fastrl"] = fastrl.__version__
    setting = {
        "tokens": n, "hidden": d, "vocabulary": v, "dtype": "float32", "threads": torch.get_num_threads(),
        "rounds": arguments.rounds, "processor": processor(), "python": platform.python_version(), "versions": versions,
    }  # fmt: skip
    floor = statistics.median(times["floor: three GEMMs"])
    rows = []
    for name, (_, flops) in runs.items():
        median = statistics.median(times[name])
        rows.append({
            "name": name, "median_s": median, "min_s": min(times[name]), "max_s": max(times[name]),
            "to_three_gemms": median / floor, "gflop": flops / 1e9, "peak_mb": memory[name],
            "error_to_fp64": errors.get(name),
        })  # fmt: skip
    table = markdown(rows)
    print("\n" + table)
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    for name, e in wrong.items():
        print(f"WRONG: {name}: error {e:.1e} against fp64, allowed {limit:.1e}; no time is given")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result = {"setting": setting, "rows": rows, "absent": absent, "wrong": wrong}
        (arguments.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
        head = (
            f"`python bench/policy_loss.py --tokens {n} --hidden {d} --vocabulary {v} --rounds {arguments.rounds}`\n\n"
        )
        head += ", ".join(f"{k} {x}" for k, x in setting.items() if k != "versions")
        head += ", " + ", ".join(f"{k} {x}" for k, x in versions.items())
        (arguments.out / "results.md").write_text(head + "\n\n" + table + "\n")
        print(f"wrote {arguments.out / 'results.json'} and {arguments.out / 'results.md'}")
    return 1 if any(name.startswith("fastrl") for name in wrong) else 0


def markdown(rows: list[dict[str, object]]) -> str:
    lines = [
        "| | median s | min - max | / three GEMMs | GFLOP | peak MB | error to fp64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        error = "" if r["error_to_fp64"] is None else f"{r['error_to_fp64']:.1e}"
        lines.append(
            f"| {r['name']} | {r['median_s']:.2f} | {r['min_s']:.2f} - {r['max_s']:.2f} | {r['to_three_gemms']:.2f} "
            f"| {r['gflop']:.0f} | {r['peak_mb']:.0f} | {error} |"
        )
    return "\n".join(lines)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


if __name__ == "__main__":
    sys.exit(main())

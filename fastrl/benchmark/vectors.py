"""The workloads without a matrix product: log-probabilities from logits, group advantages, generalised advantages.

They are bound by memory: the floor is plain reads and copies of their inputs and outputs, and the cost is in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

import fastrl
from fastrl_kernels import LogitTransform, accumulation_dtype, backends, reference

from .peers import _import
from .workload import Call, Entry, Workload


def logits_workload(
    n: int, v: int, dtype: torch.dtype, device: torch.device, peers: tuple[str, ...], *, shape: str,
    backend: str | None = None,
) -> Workload:  # fmt: skip
    """Log-probabilities of given tokens from logits (N, V), forward and backward.

    The floor reads the logits, then copies them: pass 1 reads them, pass 2 reads them again and writes the gradient.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = (2.5 * torch.randn(n, v, generator=generator, device=device)).to(dtype)
    ids = torch.randint(0, v, (n,), generator=generator, device=device)
    upstream = torch.randn(n, generator=generator, device=device)
    out = torch.empty_like(logits)

    def eager(x: Tensor, ids: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return wide.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)

    def call(logps_of: Callable[[Tensor, Tensor], Tensor], x: Tensor = logits) -> Call:
        def run() -> Mapping[str, Tensor]:
            leaf = x.detach().requires_grad_()
            logps = logps_of(leaf, ids)
            (grad,) = torch.autograd.grad(logps, leaf, upstream.to(logps.dtype))
            return {"logps": logps.detach(), "d logits": grad}

        return run

    def ours(x: Tensor, ids: Tensor) -> Tensor:
        return fastrl.logprobs_from_logits(x, ids, backend=backend).logps

    def floor() -> Mapping[str, Tensor]:
        logits.sum()
        out.copy_(logits)
        return {}

    cost = 3.0 * n * v * dtype.itemsize
    entries = [Entry(_ours("fastrl", backend), call(ours), "3NV", cost, ours=True)]
    not_run = {}
    if "eager" in peers:
        entries.append(Entry("eager PyTorch", call(eager), "3NV", cost, judge=True))
    if "compile" in peers:
        entries.append(Entry("torch.compile", call(torch.compile(eager, dynamic=False)), "3NV", cost))
    if "trl" in peers:
        function, absent = _import("trl.trainer.utils", "selective_log_softmax")
        if absent:
            not_run["TRL selective_log_softmax"] = absent
        else:
            t = next(t for t in (512, 32, 1) if n % t == 0)  # (B, T, V), as its trainers have them: it loops over B

            def selective(x: Tensor, ids: Tensor) -> Tensor:
                return function(x.view(-1, t, v), ids.view(-1, t)).flatten()

            entries.append(Entry("TRL selective_log_softmax", call(selective), "3NV", cost))
    return Workload(
        "logits", "log-probabilities from logits, forward + backward", shape, {"N": n, "V": v},
        str(dtype).removeprefix("torch."), Entry("read, then copy", floor, "3NV", cost), entries,
        lambda: _double(call, eager, logits), output_bytes=n * v * dtype.itemsize, cost_unit="byte", not_run=not_run,
    )  # fmt: skip


def _double(call: Callable[..., Call], eager: Callable[[Tensor, Tensor], Tensor], logits: Tensor) -> dict[str, Tensor]:
    return dict(call(eager, logits.double())())


def row_passes_workloads(
    n: int, v: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]
) -> list[Workload]:
    """The two row passes over a tile (N, V) that is there: statistics (a read), gradient (a read and a write)."""
    generator = torch.Generator(device).manual_seed(0)
    tile = (2.5 * torch.randn(n, v, generator=generator, device=device)).to(dtype)
    ids = torch.randint(0, v, (n,), generator=generator, device=device)
    upstream = torch.randn(n, generator=generator, device=device).to(accumulation_dtype(dtype))
    transform = LogitTransform()
    stats = reference.row_stats(tile.double(), ids, transform, None, False)
    truth = torch.empty(n, v, dtype=torch.float64, device=device)
    reference.row_grad(
        tile.double(), truth, ids, transform, None, stats.row_max, stats.log_sum, None, upstream.double(), None, None,
        None, None,
    )  # fmt: skip
    row_max, log_sum = (x.to(accumulation_dtype(dtype)) for x in (stats.row_max, stats.log_sum))
    work = torch.empty_like(tile)

    def statistics_of(name: str) -> Call:
        return lambda: {"logps": backends.load(name).row_stats(tile, ids, transform, None, False).logps}

    def gradient_of(name: str) -> Call:
        # Out of place: an in-place pass would need a fresh tile for every call, and its copy would be timed.
        def run() -> Mapping[str, Tensor]:
            backends.load(name).row_grad(
                tile, work, ids, transform, None, row_max, log_sum, None, upstream, None, None, None, None
            )
            return {"d logits": work}

        return run

    def read() -> Mapping[str, Tensor]:
        tile.sum()
        return {}

    def copy() -> Mapping[str, Tensor]:
        work.copy_(tile)
        return {}

    def workload(title: str, formula: str, floor: tuple[str, Call], make: Callable[[str], Call], part: str) -> Workload:
        cost = float(formula[0]) * n * v * dtype.itemsize
        entries = [
            Entry(name, make(name), formula, cost, ours=name != "reference", judge=name == "reference")
            for name in names
        ]
        exact = {"logps": stats.logps, "d logits": truth}
        return Workload(
            "rows", title, f"tile {n} x {v}", {"N": n, "V": v}, str(dtype).removeprefix("torch."),
            Entry(floor[0], floor[1], formula, cost), entries, lambda: {part: exact[part]}, cost_unit="byte",
        )  # fmt: skip

    return [
        workload("row pass 1: statistics", "1NV", ("one read", read), statistics_of, "logps"),
        workload("row pass 2: gradient", "2NV", ("copy", copy), gradient_of, "d logits"),
    ]


def group_advantages_workload(
    b: int, group: int, device: torch.device, peers: tuple[str, ...], backend: str | None = None
) -> Workload:
    """Group-relative advantages of B rewards in groups of G. The floor copies the rewards."""
    generator = torch.Generator(device).manual_seed(0)
    rewards = torch.randn(b, generator=generator, device=device)
    group_ids = torch.arange(b, device=device) // group
    out = torch.empty_like(rewards)

    def ours() -> Mapping[str, Tensor]:
        return {"advantages": fastrl.group_advantages(rewards, group_ids, backend=backend)}

    def as_trl(rewards: Tensor) -> Tensor:
        # TRL's own lines: groups of equal size that lie together, and no rewards missing.
        grouped = rewards.view(-1, group)
        mean = grouped.mean(dim=1).repeat_interleave(group, dim=0)
        std = grouped.std(dim=1).repeat_interleave(group, dim=0)
        return (rewards - mean) / (std + 1e-4)

    def floor() -> Mapping[str, Tensor]:
        out.copy_(rewards)
        return {}

    cost = 2.0 * b * rewards.element_size()
    entries = [Entry(_ours("fastrl", backend), ours, "2B", cost, ours=True)]
    if "eager" in peers:
        entries.append(
            Entry("eager PyTorch (equal groups)", lambda: {"advantages": as_trl(rewards)}, "2B", cost, judge=True)
        )
    return Workload(
        "group_advantages", "group advantages", f"{b} rewards", {"B": b, "G": group}, "float32",
        Entry("copy", floor, "2B", cost), entries, lambda: {"advantages": as_trl(rewards.double())}, cost_unit="byte",
    )  # fmt: skip


def gae_workload(
    b: int, t: int, device: torch.device, peers: tuple[str, ...], backend: str | None = None
) -> Workload | None:
    """Generalised advantage estimates of (B, T) rewards and values. The floor copies rewards and values.

    None where this version of fastrl has no `gae`.
    """
    function = getattr(fastrl, "gae", None)
    if function is None:
        return None
    generator = torch.Generator(device).manual_seed(0)
    rewards, values = torch.randn(2, b, t, generator=generator, device=device)
    lengths = torch.randint(t // 2, t + 1, (b, 1), generator=generator, device=device)
    mask = torch.arange(t, device=device) < lengths
    gamma, lam = 0.99, 0.95
    out = torch.empty(2, b, t, device=device)

    def ours() -> Mapping[str, Tensor]:
        advantages, returns = function(rewards, values, mask, gamma=gamma, lam=lam, backend=backend)
        return {"advantages": advantages, "returns": returns}

    def loop(rewards: Tensor, values: Tensor) -> dict[str, Tensor]:
        # What trainers run: a step of Python for each token, from the last to the first, masked ones skipped.
        running, following = rewards.new_zeros(b), rewards.new_zeros(b)
        steps = []
        for i in range(t - 1, -1, -1):
            delta = rewards[:, i] + gamma * following - values[:, i]
            running = torch.where(mask[:, i], delta + gamma * lam * running, running)
            following = torch.where(mask[:, i], values[:, i], following)
            steps.append(running)
        advantages = torch.stack(steps[::-1], dim=1)
        return {"advantages": advantages * mask, "returns": (advantages + values) * mask}

    def floor() -> Mapping[str, Tensor]:
        out[0].copy_(rewards)
        out[1].copy_(values)
        return {}

    cost = 4.0 * b * t * 4
    entries = [Entry(_ours("fastrl", backend), ours, "4BT", cost, ours=True)]
    if "eager" in peers:
        entries.append(Entry("eager PyTorch (a loop over T)", lambda: loop(rewards, values), "4BT", cost, judge=True))
    if "compile" in peers and t <= 128:  # the loop is unrolled: minutes of compiling for more
        compiled = torch.compile(loop, dynamic=False)
        entries.append(Entry("torch.compile of the loop", lambda: compiled(rewards, values), "4BT", cost))
    return Workload(
        "gae", "generalised advantages", f"{b} x {t}", {"B": b, "T": t}, "float32", Entry("copy", floor, "4BT", cost),
        entries, lambda: loop(rewards.double(), values.double()), output_bytes=2 * b * t * 4, cost_unit="byte",
    )  # fmt: skip


def _ours(name: str, backend: str | None) -> str:
    return name if backend is None else f"{name} ({backend})"

"""What only a large card can show: addresses past 2^31 elements, 65,537 rows, and peak memory bounded by one chunk."""

from __future__ import annotations

import torch
from torch import Tensor

import fastrl
from fastrl.benchmark.problems import DAPO, make_problem
from fastrl_kernels import planner

from .record import Record, run_cases

MIB = 2**20


def run(record: Record) -> None:
    record.facts["tile bytes"] = planner.LIMITS[record.settings.device.type].tile_bytes
    run_cases(
        record,
        {
            "addresses past 2^31 elements": _wide_addresses,
            "65,537 rows": _many_rows,
            "peak memory of the policy loss": _peak_of_the_loss,
            "peak memory of scoring": _peak_of_scoring,
        },
    )


def _needs_gpu(record: Record, name: str, gib: float) -> bool:
    """False, with the reason recorded, where this case can't run."""
    if not record.settings.on_gpu:
        record.skip(name, "needs a CUDA device")
        return False
    free = torch.cuda.mem_get_info(record.settings.device)[0] / 2**30
    if free < gib:
        record.skip(name, f"needs {gib:.0f} GiB of free GPU memory, {free:.0f} GiB are free")
        return False
    return True


def _logps_and_grad(logits: Tensor, ids: Tensor, upstream: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    x = logits.detach().requires_grad_()
    logps = fastrl.logprobs_from_logits(x, ids, backend=backend).logps
    (grad,) = torch.autograd.grad(logps, x, upstream)
    return logps.detach(), grad


def _wide_addresses(record: Record) -> None:
    if not _needs_gpu(record, "addresses past 2^31 elements", 14):
        return
    device, v = record.settings.device, 128256
    n = 2**31 // v + 300  # the last 300 rows lie wholly beyond 2^31 elements
    logits = torch.empty(n, v, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for start in range(0, n, 1024):
        part = logits[start : start + 1024]
        part.copy_(torch.randn(part.shape, generator=generator, device=device))
    ids = torch.randint(0, v, (n,), generator=generator, device=device)
    upstream = torch.randn(n, generator=generator, device=device)
    logps, grad = _logps_and_grad(logits, ids, upstream, record.settings.backend)
    record.facts["elements of the wide tile"] = n * v
    for name, rows in (("first", slice(0, 64)), ("last", slice(n - 64, n))):
        exact_logps, exact_grad = _logps_and_grad(
            logits[rows].double(), ids[rows], upstream[rows].double(), "reference"
        )
        eager_logps, eager_grad = _logps_and_grad(logits[rows], ids[rows], upstream[rows], "reference")
        record.close(f"{name} rows of {n} x {v}: logps", logps[rows], eager_logps, exact_logps)
        record.close(f"{name} rows of {n} x {v}: gradient", grad[rows], eager_grad, exact_grad)
    zero_rows = sum(int((grad[r : r + 1024] == 0).all(-1).sum()) for r in range(0, n, 1024))
    record.check("every row has a gradient", zero_rows == 0, rows_without=zero_rows)


def _many_rows(record: Record) -> None:
    device = record.settings.device
    n, v = (65_537, 7) if record.settings.tiny else (65_537, 257)
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(n, v, generator=generator, device=device)
    ids = torch.randint(0, v, (n,), generator=generator, device=device)
    upstream = torch.randn(n, generator=generator, device=device)
    logps, grad = _logps_and_grad(logits, ids, upstream, record.settings.backend)
    exact_logps, exact_grad = _logps_and_grad(logits.double(), ids, upstream.double(), "reference")
    eager_logps, eager_grad = _logps_and_grad(logits, ids, upstream, "reference")
    record.close(f"{n} rows: logps", logps, eager_logps, exact_logps)
    record.close(f"{n} rows: gradient", grad, eager_grad, exact_grad)


# A long batch on a large vocabulary: eager logits in fp32 alone would take 15.7 GiB.
BATCH, STEPS, HIDDEN, VOCABULARY = 16, 2048, 1024, 128256


def _peak_of_the_loss(record: Record) -> None:
    if not _needs_gpu(record, "peak memory of the policy loss", 8):
        return
    problem = make_problem(BATCH, STEPS, HIDDEN, VOCABULARY, torch.bfloat16, record.settings.device)
    n, d, v = problem.sizes
    tile = planner.LIMITS["cuda"].tile_bytes
    for name, frozen in (("", False), (", frozen head", True)):
        hidden, weight = problem.leaves(frozen)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = fastrl.linear_policy_loss(
            hidden, weight, problem.ids, DAPO, advantages=problem.advantages, mask=problem.mask,
            old_logps=problem.old_logps, backend=record.settings.backend,
        )  # fmt: skip
        out.loss.backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        gradients = n * d * 2 + (0 if frozen else v * d * 2)
        # The fp32 tile, its bf16 gradient, dW in fp32 while it is summed; 64 MiB for vectors and GEMM workspaces.
        allowed = tile + tile // 2 + (0 if frozen else v * d * 4) + 64 * MIB
        record.check(
            f"policy loss{name}: peak beyond inputs and gradients", peak - gradients <= allowed,
            measured_mib=(peak - gradients) / MIB, allowed_mib=allowed / MIB, eager_logits_mib=n * v * 4 / MIB,
        )  # fmt: skip
        del out, hidden, weight


def _peak_of_scoring(record: Record) -> None:
    if not _needs_gpu(record, "peak memory of scoring", 8):
        return
    problem = make_problem(BATCH, STEPS, HIDDEN, VOCABULARY, torch.bfloat16, record.settings.device)
    n, _, v = problem.sizes
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        fastrl.linear_logprobs(
            problem.hidden, problem.weight, problem.ids, entropy=True, backend=record.settings.backend
        )
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    allowed = planner.LIMITS["cuda"].tile_bytes + 64 * MIB
    record.check(
        "scoring: peak beyond inputs", peak <= allowed,
        measured_mib=peak / MIB, allowed_mib=allowed / MIB, eager_logits_mib=n * v * 4 / MIB,
    )  # fmt: skip

"""The kernels alone, under pytest-benchmark: `pytest bench`, or `pytest bench --benchmark-compare` against a saved run.

Each result is compared with fp64 before it is timed. extra_info holds the bytes and the rate of the median.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl.benchmark.problems import DAPO, make_problem, relative_error
from fastrl.benchmark.vectors import gae_workload, group_advantages_workload, row_passes_workloads
from fastrl.benchmark.workload import Workload, allowed_errors

Timed = Callable[[Callable[[], object]], None]
DTYPES = (torch.float32, torch.bfloat16)


def _sizes(device: torch.device) -> tuple[int, int]:
    """A tile of Llama 3's vocabulary on a GPU, of SmolLM2's on the CPU."""
    return (1024, 128256) if device.type == "cuda" else (256, 49152)


def _check_and_time(workload: Workload, backend: str, timed: Timed, benchmark: Any) -> None:
    expected = workload.expected()
    judge = next((e for e in workload.entries if e.judge), None)
    eager = None if judge is None else _errors(judge.call(), expected)
    entry = next(e for e in workload.entries if backend in e.name)
    errors = _errors(entry.call(), expected)
    allowed = allowed_errors(workload.dtype, entry, errors, eager)
    assert all(errors[part] <= allowed[part] for part in errors), (errors, allowed)
    timed(entry.call)
    benchmark.extra_info.update(bytes=entry.cost, formula=entry.formula, errors=errors)
    benchmark.extra_info["GB_per_s"] = entry.cost / benchmark.stats.stats.median / 1e9


def _errors(results: Any, expected: Any) -> dict[str, float]:
    return {part: relative_error(results[part], truth) for part, truth in expected.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["row_stats", "row_grad"])
def test_row_pass(
    which: int, dtype: torch.dtype, backend: str, device: torch.device, timed: Timed, benchmark: Any
) -> None:
    names = ["reference"] if backend == "reference" else ["reference", backend]
    workload = row_passes_workloads(*_sizes(device), dtype, device, names)[which]
    _check_and_time(workload, backend, timed, benchmark)


def test_group_advantages(backend: str, device: torch.device, timed: Timed, benchmark: Any) -> None:
    workload = group_advantages_workload(65536, 8, device, ("eager",), backend)
    _check_and_time(workload, backend, timed, benchmark)


def test_gae(backend: str, device: torch.device, timed: Timed, benchmark: Any) -> None:
    if backend == "reference":
        pytest.skip("the reference is the loop over T that the others are compared with")
    workload = gae_workload(512, 2048, device, ("eager",), backend)
    _check_and_time(workload, backend, timed, benchmark)


@pytest.mark.parametrize("live_share", [1.0, 0.37])
def test_policy_loss_of_given_logps(live_share: float, timed: Timed, benchmark: Any) -> None:
    """The coefficients alone: loss, both gradients and the metrics over (B, T) vectors."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    b, t = 256, 2048
    generator = torch.Generator(device).manual_seed(0)
    logps, old = (-2 + 0.1 * torch.randn(2, b, t, generator=generator, device=device)).unbind()
    advantages = torch.randn(b, generator=generator, device=device)
    advantages[: round((1 - live_share) * b)] = 0
    mask = torch.ones(b, t, dtype=torch.bool, device=device)

    def call(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        leaf = logps.to(dtype).requires_grad_()
        out = fastrl.policy_loss(leaf, DAPO, advantages=advantages, mask=mask, old_logps=old.to(dtype))
        return out.loss.detach(), *torch.autograd.grad(out.loss, leaf)

    for ours, truth in zip(call(), call(torch.float64), strict=True):
        assert relative_error(ours, truth) < 1e-6
    timed(call)
    benchmark.extra_info["tokens_per_s"] = b * t / benchmark.stats.stats.median


@pytest.mark.parametrize("live_share", [1.0, 0.37])
def test_linear_policy_loss(
    live_share: float, backend: str, device: torch.device, timed: Timed, benchmark: Any
) -> None:
    """The whole head, small: that a change is seen where `fastrl bench` takes minutes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    b, t, d, v = (8, 512, 2048, 128256) if device.type == "cuda" else (8, 32, 576, 49152)
    problem = make_problem(b, t, d, v, dtype, device, live_share=live_share)

    def call(name: str = backend) -> tuple[Tensor, ...]:
        hidden, weight = problem.leaves()
        out = fastrl.linear_policy_loss(
            hidden, weight, problem.ids, DAPO, advantages=problem.advantages, mask=problem.mask,
            old_logps=problem.old_logps, backend=name,
        )  # fmt: skip
        return out.loss.detach(), *torch.autograd.grad(out.loss, [hidden, weight])

    limit = 0.05 if dtype == torch.bfloat16 else 1e-5
    for ours, plain in zip(call(), call("reference"), strict=True):
        assert relative_error(ours, plain) < limit
    timed(call)
    flops = 6.0 * problem.live_tokens * d * v
    benchmark.extra_info.update(flops=flops, TFLOP_per_s=flops / benchmark.stats.stats.median / 1e12)

"""Every launch configuration that may be chosen for a shape, checked and timed: what the tables are to be judged by."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels import reference
from fastrl_kernels.head import LogitTransform, accumulation_dtype
from fastrl_kernels.triton.divergence_rows import divergence_candidates, divergence_rows
from fastrl_kernels.triton.launch import (
    LinearConfig,
    RowConfig,
    dtype_name,
    row_candidates,
    row_config,
    row_grad_candidates,
    seconds,
)
from fastrl_kernels.triton.linear_stats import candidates as linear_candidates
from fastrl_kernels.triton.linear_stats import linear_row_stats
from fastrl_kernels.triton.row_grad import row_grad
from fastrl_kernels.triton.row_stats import row_stats

OPS = ("row_stats", "row_grad", "linear_row_stats", "divergence_rows")
TILES_MOVED = {"row_stats": 1, "row_grad": 2, "divergence_rows": 7}  # tiles that a row pass reads and writes
CHECKED_ROWS = 8  # compared with fp64


class Timing(NamedTuple):
    """One configuration of one op at one shape."""

    op: str
    shape: str
    config: RowConfig | LinearConfig
    default: bool  # the table's choice
    seconds: float  # median; infinity where the chip can't hold it
    rate: float  # FLOP/s of linear_row_stats, bytes/s of the row passes

    def __str__(self) -> str:
        mark, unit = "*" if self.default else " ", "TFLOP/s" if self.op == "linear_row_stats" else "TB/s"
        return (
            f"{mark} {self.op} {self.shape}: {self.seconds * 1e3:.3f} ms, {self.rate / 1e12:.3f} {unit}, {self.config}"
        )


def linear_flops(n: int, depth: int, vocabulary: int) -> int:
    """FLOPs of the fused forward: one product of (n, D) and (D, V)."""
    return 2 * n * depth * vocabulary


def row_bytes(op: str, n: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes of a row pass: row_stats reads each logit once, row_grad reads it and writes its gradient, divergence_rows
    reads those of both heads three times and writes the student's gradient."""
    return n * vocabulary * dtype.itemsize * TILES_MOVED[op]


def time_candidates(
    op: str,
    n: int,
    depth: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    entropy: bool = True,
    softcap: float | None = None,
) -> list[Timing]:
    """Times all candidates of an op on random operands of a shape, each after its result was compared with fp64.

    Args:
        op: one of OPS.
        n, depth, vocabulary: rows, D (used by linear_row_stats only) and V.
        dtype: of the operands, or of the tiles of logits, which row_grad turns into their gradient in place.
        device: a CUDA device, or the CPU in Triton's interpreter.
        entropy, softcap: as in the ops; divergence_rows has no entropy, and is timed with its gradient.

    Raises:
        ValueError: an unknown op.
        RuntimeError: a configuration gives a wrong result.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    transform = LogitTransform(softcap=softcap)
    ids = torch.randint(vocabulary, (n,), generator=generator, device=device)
    shape = f"n={n} V={vocabulary} {dtype_name(dtype)}"
    checked = slice(0, min(n, CHECKED_ROWS))
    if op == "linear_row_stats":
        shape = f"D={depth} {shape}"
        x, weight = randn(n, depth), randn(vocabulary, depth, scale=depth**-0.5)
        chosen, possible = linear_candidates(x, weight)
        exact = reference.row_stats(x[checked].double() @ weight.double().T, ids[checked], transform, None, entropy)
        return _time(
            op, shape, chosen, possible, linear_flops(n, depth, vocabulary), device, exact.logps,
            lambda config: linear_row_stats(x, weight, ids, transform, None, entropy, config),
            lambda config: linear_row_stats(x, weight, ids, transform, None, entropy, config).logps[checked],
        )  # fmt: skip

    tile, work = randn(n, vocabulary), row_bytes(op, n, vocabulary, dtype)
    if op == "divergence_rows":
        ref_tile, out = randn(n, vocabulary), torch.empty_like(tile)
        weight = torch.ones(n, dtype=accumulation_dtype(dtype), device=device)
        exact_grad = torch.empty(tile[checked].shape, dtype=torch.float64, device=device)
        reference.divergence_rows(
            tile[checked].double(), ref_tile[checked].double(), "jsd", 0.5, transform, transform, None, None,
            weight[checked].double(), exact_grad,
        )  # fmt: skip

        def divergence(config: RowConfig) -> Tensor:
            divergence_rows(tile, ref_tile, "jsd", 0.5, transform, transform, None, None, weight, out, config)
            return out[checked]

        possible_rows = divergence_candidates(vocabulary, dtype)
        return _time(op, shape, possible_rows[0], possible_rows, work, device, exact_grad, divergence, divergence)

    stats = row_stats(tile, ids, transform, None, True, row_config(vocabulary, dtype))
    exact = reference.row_stats(tile[checked].double(), ids[checked], transform, None, True)
    default = row_config(vocabulary, dtype)
    if op == "row_stats":
        return _time(
            op, shape, default, row_candidates(vocabulary, dtype), work, device, exact.logps,
            lambda config: row_stats(tile, ids, transform, None, entropy, config),
            lambda config: row_stats(tile, ids, transform, None, entropy, config).logps[checked],
        )  # fmt: skip

    upstream = torch.randn(n, generator=generator, device=device, dtype=stats.logps.dtype)
    given = (upstream, upstream if entropy else None, None)
    exact_grad = torch.empty(tile[checked].shape, dtype=torch.float64, device=device)
    reference.row_grad(
        tile[checked].double(), exact_grad, ids[checked], transform, None, exact.row_max, exact.log_sum, exact.mean,
        *(None if g is None else g[checked].double() for g in given),
    )  # fmt: skip

    saved = tile[checked].clone()  # the timed runs are in place, over and over

    def grad(tile: Tensor, rows: slice, config: RowConfig) -> Tensor:
        per_row = [None if v is None else v[rows] for v in (stats.row_max, stats.log_sum, stats.mean, *given)]
        arguments: Any = (tile, tile, ids[rows], transform, None, *per_row, None, None, config)
        row_grad(*arguments)
        return tile

    return _time(
        op, shape, default, row_grad_candidates(vocabulary, dtype), work, device, exact_grad,
        lambda config: grad(tile, slice(None), config),
        lambda config: grad(saved.clone(), checked, config),
    )  # fmt: skip


def _time(
    op: str,
    shape: str,
    default: Any,
    possible: tuple[Any, ...],
    work: int,
    device: torch.device,
    exact: Tensor,
    run: Callable[[Any], object],
    result: Callable[[Any], Tensor],
) -> list[Timing]:
    timings = []
    for config in possible:
        time = seconds(functools.partial(run, config), device)
        if time != math.inf:
            error = ((result(config).double() - exact).norm() / exact.norm()).item()
            if not error < 3e-2:  # of bf16 operands; a wrong index is of order one
                raise RuntimeError(f"{op} with {config} at {shape} is wrong: relative error {error:.2e} against fp64")
        timings.append(Timing(op, shape, config, config == default, time, work / time))
    return timings

"""The CUDA kernels beyond what test_rows.py asks of every row pass: clusters of blocks, alignment, half-precision
outputs, advantages, GAE. They run on the stand-in for the CUDA runtime: 4 multiprocessors, busy with 8 blocks each."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_on_cpu.build import cuda_on_cpu
from tolerance import assert_as_accurate, error
from torch import Tensor

from fastrl_kernels import LogitTransform, reference
from fastrl_kernels.head import RowStats
from fastrl_kernels.native import NativeKernels

SOFTCAP = LogitTransform(0.7, 1.3, 5.0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> NativeKernels:
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", "9")
    return cuda_on_cpu()


def assert_stats(stats: RowStats, tile: Tensor, ids: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
    truth, plain = (
        reference.row_stats(tile.to(dtype), ids, transform, None if bias is None else bias.to(dtype), True)
        for dtype in (torch.float64, torch.float32)
    )
    for name, ours, p, t in zip(stats._fields, stats, plain, truth, strict=True):
        assert_as_accurate(ours, p, t, name)


# 32768 columns of fp32 are eight steps of a block: one row takes a cluster of 8, ten rows clusters of 4, forty of 1.
@pytest.mark.parametrize("rows", (1, 10, 40))
@pytest.mark.parametrize("capability", ("8", "9"))
def test_clusters(rows: int, capability: str, kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", capability)
    v = 32768 + 3
    tile, ids, bias = torch.randn(rows, v) * 4, torch.randint(v, (rows,)), torch.randn(v)
    ids[0] = v - 1
    stats = kernels.row_stats(tile, ids, SOFTCAP, bias, True)
    assert_stats(stats, tile, ids, bias, SOFTCAP)
    again = kernels.row_stats(tile, ids, SOFTCAP, bias, True)
    assert all(torch.equal(a, b) for a, b in zip(stats, again, strict=True))


def test_infinities_and_nan_cross_a_cluster(kernels: NativeKernels) -> None:
    v = 8 * 4096
    tile = torch.full((5, v), -math.inf)
    tile[1, 20_000] = 1.0  # one finite logit, in a block in the middle
    tile[2, 5_000:] = torch.randn(v - 5_000)
    tile[3], tile[3, 30_000] = 0.0, math.nan
    tile[4], tile[4, 9_000] = 0.0, math.inf
    stats = kernels.row_stats(tile, torch.full((5,), 20_000), LogitTransform(), None, True)
    assert stats.mean is not None
    truth = torch.log_softmax(tile.double(), -1)
    assert stats.logps[[0, 3, 4]].isnan().all() and stats.mean[[0, 3, 4]].isnan().all()
    assert stats.logps[1] == 0 and stats.mean[1] == 0
    assert error(stats.logps[2], truth[2, 20_000]) < 1e-6


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("shift", (0, 1, 2, 3, 5, 7))
def test_rows_start_anywhere(dtype: torch.dtype, shift: int, kernels: NativeKernels) -> None:
    v, stride = 1111, 1200 + shift  # each row at another offset from 16 bytes
    tile = (torch.randn(5, v) * 3).to(dtype)
    wide, wide_out = (torch.full((5 * stride + 16,), math.nan, dtype=dtype) for _ in range(2))
    view, out = wide.as_strided((5, v), (stride, 1), shift), wide_out.as_strided((5, v), (stride, 1), 3)
    view.copy_(tile)
    ids, g = torch.randint(v, (5,)), torch.randn(5)
    stats, dense = (kernels.row_stats(x, ids, SOFTCAP, None, True) for x in (view, tile))
    # Another alignment is another order of the sums.
    for a, b in zip(stats, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    expected = torch.empty_like(tile)
    for x, y in ((view, out), (tile, expected)):
        kernels.row_grad(x, y, ids, SOFTCAP, None, stats.row_max, stats.log_sum, stats.mean, g, g, g)
    assert torch.equal(out, expected)
    assert wide_out.isnan().sum() == wide_out.numel() - expected.numel(), "wrote outside the rows"


@pytest.mark.parametrize("out_dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_outputs_and_moves(out_dtype: torch.dtype, kernels: NativeKernels) -> None:
    tile, ids, g = torch.randn(5, 507), torch.randint(507, (5,)), torch.randn(5) * 1e-3
    stats = kernels.row_stats(tile, ids, LogitTransform(), None, True)
    whole = torch.empty_like(tile)
    rest = (LogitTransform(), None, stats.row_max, stats.log_sum, stats.mean, g, g, None)
    kernels.row_grad(tile, whole, ids, *rest)
    out = torch.full((3, 507), math.nan, dtype=out_dtype)
    kernels.row_grad(tile, out, ids, *rest, torch.tensor([4, 0]), torch.tensor([0, 2]))
    assert torch.equal(out[[0, 2]], whole[[4, 0]].to(out_dtype)), "rounded otherwise than torch rounds"
    assert out[1].isnan().all()


def test_ids_outside_the_row(kernels: NativeKernels) -> None:
    logps = kernels.row_stats(torch.randn(3, 50), torch.tensor([-1, 50, -2]), LogitTransform(), None, False).logps
    assert logps[0] == -math.inf and logps[1:].isnan().all()


@pytest.mark.parametrize("baseline", ("mean", "leave_one_out"))
@pytest.mark.parametrize("scale", ("group", "batch", "none"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("shift", (0, 1))  # of the vectors, from 16 bytes
def test_group_advantages(baseline: str, scale: str, dtype: torch.dtype, shift: int, kernels: NativeKernels) -> None:
    groups = torch.randint(-4, 9, (101 + shift,))[shift:] * 10**12
    rewards = (torch.randn(101 + shift) * 3 + 100).to(dtype)[shift:]
    rewards[::17] = math.nan
    rewards[groups == 0] = 0.1  # unanimous
    got = kernels.group_advantages(rewards, groups, baseline, scale, 1e-4)
    torch.testing.assert_close(
        got, reference.group_advantages(rewards, groups, baseline, scale, 1e-4), atol=1e-7, rtol=1e-6
    )
    assert (got[(groups == 0) | rewards.isnan()] == 0).all()
    alike = groups == groups[3]
    same = rewards.clone()
    same[alike & ~rewards.isnan()] = torch.arange(int((alike & ~rewards.isnan()).sum())).to(dtype) % 2
    for value in (0.0, 1.0):  # members with equal rewards agree to the bit
        assert (
            kernels.group_advantages(same, groups, baseline, scale, 1e-4)[alike & (same == value)].unique().numel() == 1
        )


# fp32 takes 1024 steps at once: 9000 are nine pieces. Two rows share them in clusters of 8 blocks; 33 have one each.
@pytest.mark.parametrize("rows, steps", ((3, 1), (3, 7), (5, 1023), (2, 9000), (33, 2100)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("through_mask", (False, True))
def test_gae(rows: int, steps: int, dtype: torch.dtype, through_mask: bool, kernels: NativeKernels) -> None:
    rewards, values = (torch.randn(rows, steps, dtype=dtype) for _ in range(2))
    mask = torch.rand(rows, steps) > 0.3
    mask[0], mask[-1, steps // 2 :] = False, False  # nothing to score; padding on the right
    rewards[~mask], values[~mask] = math.nan, math.inf
    for gamma, lam in ((1.0, 0.95), (0.99, 1.0), (1.0, 1.0)):
        ours = kernels.gae(rewards, values, mask, gamma, lam, through_mask)
        plain = reference.gae(rewards, values, mask, gamma, lam, through_mask)
        truth = reference.gae(rewards.double(), values.double(), mask, gamma, lam, through_mask)
        for name, o, p, t in zip(("advantages", "returns"), ours, plain, truth, strict=True):
            assert_as_accurate(o, p, t, f"{name} {gamma=} {lam=}")
        assert all((x[~mask] == 0).all() for x in ours)


def test_same_bits_twice_and_in_other_company(kernels: NativeKernels) -> None:
    tile, ids = torch.randn(40, 3000), torch.randint(3000, (40,))
    whole, part = (kernels.row_stats(tile[k:], ids[k:], LogitTransform(), None, True) for k in (0, 20))
    assert all(torch.equal(a[20:], b) for a, b in zip(whole, part, strict=True))


def test_bad_arguments_are_named(kernels: NativeKernels) -> None:
    tile, ids, row = torch.randn(3, 10), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    for name, kind, call in (
        ("out", ValueError, lambda: kernels.row_grad(
            tile.bfloat16(), tile, ids, LogitTransform(), None, row, row, None, row, None, None)),
        ("out", ValueError, lambda: kernels.row_grad(
            tile, tile[:1].expand(3, -1), ids, LogitTransform(), None, row, row, None, row, None, None)),
        ("mean", ValueError, lambda: kernels.row_grad(
            tile, tile, ids, LogitTransform(), None, row, row, None, row, row, None)),
        ("values", ValueError, lambda: kernels.gae(tile, tile[:2], tile > 0, 1.0, 1.0, False)),
        ("group_ids", TypeError, lambda: kernels.group_advantages(row, row, "mean", "group", 0.0)),
    ):  # fmt: skip
        with pytest.raises(kind, match=name):
            call()


def test_what_a_launch_refuses_is_raised(kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_REFUSES", "1")
    with pytest.raises(RuntimeError, match=r"CUDA kernel row_stats: invalid argument \(cudaErrorInvalidValue\)"):
        kernels.row_stats(torch.randn(1, 10), torch.zeros(1, dtype=torch.int64), LogitTransform(), None, False)

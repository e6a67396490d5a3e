"""group_advantages on every backend that runs here, against fp64 arithmetic written out per group."""

from __future__ import annotations

import math
from statistics import mean, stdev

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl_kernels import ops


def by_hand(rewards: list[float], groups: list[int], baseline: str, scale: str, eps: float) -> Tensor:
    """Plain Python, group by group."""
    out = []
    scored = [r for r in rewards if not math.isnan(r)]
    for r, g in zip(rewards, groups, strict=True):
        mates = [x for x, h in zip(rewards, groups, strict=True) if h == g and not math.isnan(x)]
        if math.isnan(r) or len(mates) < 2 or min(mates) == max(mates):
            out.append(0.0)
            continue
        base = mean(mates) if baseline == "mean" else (sum(mates) - r) / (len(mates) - 1)
        spread = {"group": mates, "batch": scored}.get(scale)
        out.append((r - base) / (1.0 if spread is None else stdev(spread) + eps))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("baseline", ("mean", "leave_one_out"))
@pytest.mark.parametrize("scale", ("group", "batch", "none"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_uneven_interleaved_groups(backend: str, baseline: str, scale: str, dtype: torch.dtype) -> None:
    sizes = [1, 2, 3, 8, 5, 2]  # a lone member, a pair, uneven groups
    groups = torch.repeat_interleave(torch.tensor([7, -3, 10**12, 0, 5, 2]), torch.tensor(sizes))
    rewards = torch.randn(sum(sizes)) * 3 + 100
    rewards[4], rewards[9] = torch.nan, torch.nan
    rewards[-2:] = 0.1  # unanimous
    order = torch.randperm(sum(sizes))
    rewards, groups = rewards[order], groups[order]
    got = fastrl.group_advantages(rewards.to(dtype), groups, baseline=baseline, scale=scale, eps=1e-4, backend=backend)
    want = by_hand(rewards.tolist(), groups.tolist(), baseline, scale, 1e-4)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=1e-12)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("value", (0.1, 1 / 3, 1e6 + 0.1, -7e-5))
@pytest.mark.parametrize("size", (2, 3, 7, 8, 64))
def test_unanimous_groups_are_exactly_zero(backend: str, value: float, size: int) -> None:
    """Not nearly: a tiny advantage would keep the group's rows in the loss."""
    for dtype in (torch.float32, torch.float64):
        for baseline in ("mean", "leave_one_out"):
            rewards = torch.full((size,), value, dtype=dtype)
            got = fastrl.group_advantages(
                rewards, torch.zeros(size, dtype=torch.int64), baseline=baseline, backend=backend
            )
            assert (got == 0).all()


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_edges(backend: str) -> None:
    def call(rewards: list[float], groups: list[int], **options: str) -> list[float]:
        return fastrl.group_advantages(torch.tensor(rewards), torch.tensor(groups), backend=backend, **options).tolist()  # type: ignore[arg-type]

    nan = math.nan
    assert fastrl.group_advantages(torch.empty(0), torch.empty(0, dtype=torch.int64), backend=backend).shape == (0,)
    assert call([3.0], [0]) == [0.0]
    assert call([nan, nan], [0, 0]) == [0.0, 0.0]
    assert call([nan, 5.0], [0, 0]) == [0.0, 0.0]
    assert call([1.0, 3.0], [4, 4], scale="none") == [-1.0, 1.0]
    assert call([1.0, 3.0], [4, 4], scale="none", baseline="leave_one_out") == [-2.0, 2.0]


def test_half_precision_and_compile() -> None:
    rewards, groups = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
    want = fastrl.group_advantages(rewards, groups)
    assert torch.equal(fastrl.group_advantages(rewards.bfloat16(), groups), want.bfloat16())
    compiled = torch.compile(lambda r: fastrl.group_advantages(r * 1.0, groups) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(rewards), want + 1)
    torch.library.opcheck(ops.group_advantages, (rewards, groups, "mean", "group", 1e-4, "cpu"))


def test_bad_arguments_are_named() -> None:
    r, g = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    for bad, match in (
        ({"baseline": "median"}, "baseline: expected one of mean, leave_one_out, best_of_k, got 'median'"),
        ({"scale": True}, "scale: expected"),
        ({"eps": -1.0}, "eps"),
    ):
        with pytest.raises(ValueError, match=match):
            fastrl.group_advantages(r, g, **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rewards: expected shape \(B,\)"):
        fastrl.group_advantages(torch.zeros(3, 2), g)
    with pytest.raises(ValueError, match="group_ids"):
        fastrl.group_advantages(r, g[:2])
    with pytest.raises(TypeError, match="group_ids"):
        fastrl.group_advantages(r, g.float())
    with pytest.raises(TypeError, match="rewards"):
        fastrl.group_advantages(r.long(), g)
    with pytest.raises(ValueError, match=r"weights: expected shape \(2,\)"):
        fastrl.combine_rewards(torch.zeros(3, 2), torch.ones(3), g)
    with pytest.raises(ValueError, match="aggregation: expected"):
        fastrl.combine_rewards(torch.zeros(3, 2), None, g, aggregation="mean")

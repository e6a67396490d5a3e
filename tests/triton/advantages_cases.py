"""Cases for group_advantages in Triton's interpreter, against a plain Python loop over the groups in fp64."""

import math
import statistics
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from fastrl_kernels.triton import group_advantages

OPTIONS = [(b, s) for b in ("mean", "leave_one_out") for s in ("group", "batch", "none")]


def truth(rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, eps: float) -> Tensor:
    values = [float(r) for r in rewards.double()]
    members = defaultdict(list)
    for value, group in zip(values, group_ids.tolist(), strict=True):
        if not math.isnan(value):
            members[group].append(value)
    scorable = [v for v in values if not math.isnan(v)]
    out = []
    for value, group in zip(values, group_ids.tolist(), strict=True):
        mine = members[group]
        if math.isnan(value) or len(mine) < 2 or min(mine) == max(mine):
            out.append(0.0)
            continue
        mean = statistics.fmean(mine)
        advantage = value - mean if baseline == "mean" else (value - mean) * len(mine) / (len(mine) - 1)
        if scale != "none":
            # statistics.stdev works in exact fractions: the most exact standard deviation at hand.
            advantage /= statistics.stdev(mine if scale == "group" else scorable) + eps
        out.append(advantage)
    return torch.tensor(out, dtype=torch.float64)


def random_batch(count: int, groups: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + count)
    rewards = torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    return rewards, torch.randint(0, groups, (count,), generator=generator)


def check(rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, eps: float = 1e-4) -> Tensor:
    before = rewards.clone(), group_ids.clone()
    ours = group_advantages(rewards, group_ids, baseline, scale, eps)
    exact = truth(rewards, group_ids, baseline, scale, eps)
    assert ours.dtype == rewards.dtype and torch.isfinite(ours).all()
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[rewards.dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours == 0, exact == 0)
    assert torch.equal(ours, group_advantages(rewards, group_ids, baseline, scale, eps))
    assert torch.equal(rewards.nan_to_num(7.0), before[0].nan_to_num(7.0)) and torch.equal(group_ids, before[1])
    return ours


# 1 and 2: smallest; 16, 17: one program's rows, and one more; 128, 129: a block of columns, and one more.
@pytest.mark.parametrize("count", [1, 2, 16, 17, 128, 129, 260])
@pytest.mark.parametrize(("baseline", "scale"), OPTIONS)
def test_random_uneven_groups(count: int, baseline: str, scale: str) -> None:
    for dtype in (torch.float32, torch.float64):
        rewards, group_ids = random_batch(count, max(1, count // 5), dtype)
        rewards[::7] = math.nan
        check(rewards, group_ids, baseline, scale)


@pytest.mark.parametrize(("baseline", "scale"), OPTIONS)
def test_unanimous_groups_are_exactly_zero(baseline: str, scale: str) -> None:
    # Three times 0.1 does not have the mean 0.1 in binary: the rule, not the arithmetic, has to make these zero.
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, math.nan, 0.7, 0.3, -2.0, 5.0, 0.1], dtype=torch.float32)
    group_ids = torch.tensor([4, 4, 4, 1, 1, 1, 9, 2, 2, 4])
    ours = check(rewards, group_ids, baseline, scale)
    assert ours[[0, 1, 2, 3, 4, 5, 6, 9]].tolist() == [0.0] * 8 and (ours[7:9] != 0).all()


@pytest.mark.parametrize(("baseline", "scale"), OPTIONS)
def test_nothing_to_score(baseline: str, scale: str) -> None:
    rewards = torch.full((20,), math.nan)
    assert group_advantages(rewards, torch.arange(20) % 3, baseline, scale, 1e-4).tolist() == [0.0] * 20
    empty = group_advantages(rewards[:0], torch.arange(0), baseline, scale, 1e-4)
    assert empty.shape == (0,) and empty.dtype == rewards.dtype


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_small_differences_between_large_rewards(scale: str) -> None:
    # A one-pass variance, or a mean that keeps its rounding error, loses these in fp32.
    rewards, group_ids = random_batch(64, 4, torch.float32)
    check(1e4 + rewards, group_ids, "mean", scale)


def test_ids_of_any_value_in_any_order() -> None:
    rewards, group_ids = random_batch(130, 9, torch.float64)
    names = torch.tensor([0, 2**32, -(2**32), -1, 2**62, -(2**62), 2**62 + 2**32, 7, 7 + 2**32])
    expected = check(rewards, group_ids, "mean", "group")
    assert torch.equal(check(rewards, names[group_ids], "mean", "group"), expected)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(5))
    shuffled = check(rewards[order], names[group_ids][order], "mean", "group")
    torch.testing.assert_close(shuffled, expected[order], rtol=1e-12, atol=1e-12)


def test_eps_of_other_trainers() -> None:
    rewards, group_ids = random_batch(33, 5, torch.float64)
    for eps in (1e-9, 1e-6, 0.5):  # an eps that went through fp32 would show at 1e-8
        check(rewards, group_ids, "mean", "group", eps)


def test_half_precision_rewards_are_computed_in_fp32() -> None:
    rewards, group_ids = random_batch(33, 5, torch.bfloat16)
    ours = group_advantages(rewards, group_ids, "mean", "group", 1e-4)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, group_advantages(rewards.float(), group_ids, "mean", "group", 1e-4).bfloat16())


def test_strided_inputs() -> None:
    rewards, group_ids = torch.randn(40, 2), torch.randint(0, 5, (40, 3))
    check(rewards[:, 1], group_ids[:, 2], "mean", "group")


def test_bad_arguments_are_named() -> None:
    rewards, group_ids = random_batch(8, 2, torch.float32)
    for name, error, call in [
        ("rewards", TypeError, lambda: group_advantages(rewards.long(), group_ids, "mean", "group", 1e-4)),
        ("rewards", ValueError, lambda: group_advantages(rewards[None], group_ids, "mean", "group", 1e-4)),
        ("group_ids", TypeError, lambda: group_advantages(rewards, group_ids.int(), "mean", "group", 1e-4)),
        ("group_ids", ValueError, lambda: group_advantages(rewards, group_ids[1:], "mean", "group", 1e-4)),
        ("baseline", ValueError, lambda: group_advantages(rewards, group_ids, "median", "group", 1e-4)),
        ("scale", ValueError, lambda: group_advantages(rewards, group_ids, "mean", "std", 1e-4)),
    ]:
        with pytest.raises(error, match=name):
            call()

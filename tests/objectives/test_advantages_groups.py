"""Advantages per completion and rewards before them: definitions written out, groups of any order, what is missing."""

from __future__ import annotations

import itertools
import math
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.objectives.advantages import (
    best_of_k_advantages,
    combine_rewards,
    gpg_advantages,
    group_advantages,
    group_statistics,
    opo_advantages,
)
from fastrl.objectives.estimators import compute_advantages
from fastrl.objectives.groups import Groups, running_sum
from fastrl.objectives.reward_shaping import (
    group_length_reward,
    length_penalty,
    overlong_penalty,
    rewards_tensor,
    stop_properly_penalty,
    token_rewards,
)

NAN, INF = math.nan, math.inf


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Uneven interleaved groups: a lone member, ties, NaN, a unanimous group."""
    groups = torch.repeat_interleave(torch.tensor([7, -3, 10**12, 0, 5, 2]), torch.tensor([1, 2, 3, 8, 5, 4]))
    rewards = torch.randn(23, dtype=torch.float64) * 3 + 10
    rewards[7] = rewards[8] = rewards[6:14].max()  # the best twice
    rewards[4], rewards[10] = NAN, NAN
    rewards[-4:] = 0.1
    order = torch.randperm(23)
    return rewards[order].to(dtype), groups[order]


def members(rewards: Tensor, groups: Tensor, i: int) -> list[int]:
    return [j for j in range(len(rewards)) if groups[j] == groups[i] and not math.isnan(rewards[j])]


@pytest.mark.parametrize("scale", ("group", "batch", "none"))
@pytest.mark.parametrize("k", (None, 2, 3, 5, 100))
def test_best_of_k_over_all_sets(k: int | None, scale: str) -> None:
    rewards, groups = batch()
    got = best_of_k_advantages(rewards, groups, k=k, scale=scale, eps=1e-3)
    everything = [r for r in rewards.tolist() if not math.isnan(r)]
    for i in range(len(rewards)):
        mates = members(rewards, groups, i)
        if i not in mates or len(mates) < 2:
            assert got[i] == 0
            continue
        size = len(mates) if k is None else min(k, len(mates))
        others = [rewards[j].item() for j in mates if j != i]
        gains = [max(max(s), rewards[i].item()) - max(s) for s in itertools.combinations(others, size - 1)]
        spread = {"group": [rewards[j].item() for j in mates], "batch": everything}.get(scale)
        want = fmean(gains) / (1.0 if spread is None else stdev(spread) + 1e-3)
        assert got[i].item() == pytest.approx(want, rel=1e-11, abs=1e-12)


def test_best_of_k_is_the_gradient_of_the_expected_maximum() -> None:
    """Its mean over draws, times the score, against the derivative of E[max of k] of a Bernoulli reward."""
    p, k, n = 0.3, 3, 5
    exact = k * (1 - p) ** (k - 1)  # d/dp (1 - (1 - p)^k)
    estimate = 0.0
    for draw in itertools.product((0.0, 1.0), repeat=n):
        probability = math.prod(p if r else 1 - p for r in draw)
        advantages = best_of_k_advantages(
            torch.tensor(draw, dtype=torch.float64), torch.zeros(n, dtype=torch.int64), k=k, scale="none"
        )
        score = torch.tensor([1 / p if r else -1 / (1 - p) for r in draw], dtype=torch.float64)
        estimate += probability * k * (advantages * score).mean().item()
    assert estimate == pytest.approx(exact, rel=1e-12)


def test_best_of_k_is_a_baseline_of_group_advantages() -> None:
    rewards, groups = batch()
    for scale in ("group", "batch", "none"):
        ours = group_advantages(rewards, groups, baseline="best_of_k", scale=scale, eps=1e-6)
        assert torch.equal(ours, best_of_k_advantages(rewards, groups, scale=scale, eps=1e-6))
    for group in groups.unique():
        assert ((ours != 0) & (groups == group)).sum() <= 1
    assert ours[groups == 2].tolist() == [0.0] * 4 and ours[groups == 0].tolist() == [0.0] * 8  # tied best


def test_optimal_baseline_by_hand() -> None:
    rewards, groups = batch()
    lengths = torch.randint(0, 30, rewards.shape)
    got = opo_advantages(rewards, lengths, groups)
    for i in range(len(rewards)):
        mates = members(rewards, groups, i)
        if i not in mates or len(mates) < 2:
            assert got[i] == 0
            continue
        total = sum(lengths[j].item() for j in mates)
        baseline = sum(lengths[j].item() * rewards[j].item() for j in mates) / total
        assert got[i].item() == pytest.approx(rewards[i].item() - baseline, rel=1e-12, abs=1e-12)
    assert not got[groups == 2].any()  # unanimous: exactly
    empty = opo_advantages(torch.tensor([1.0, 3.0]), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert empty.tolist() == [1.0, 3.0]


def test_gpg_counts() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    assert gpg_advantages(rewards, groups).tolist() == [0, 0, -1.5, 1.5, 0, 0]  # 2 of 6 rows have a gradient
    assert gpg_advantages(rewards, groups, count="rewards").tolist() == [0, 0, -1, 1, 0, 0]  # verl: 3 rewards of 1
    assert gpg_advantages(rewards, groups, f_norm=3.0).tolist() == [0, 0, -0.5, 0.5, 0, 0]
    token, _ = compute_advantages("gpg", rewards, torch.ones(6, 1), group_ids=groups)
    assert token[:, 0].tolist() == [0, 0, -1, 1, 0, 0]
    missing = gpg_advantages(torch.cat([rewards, torch.tensor([NAN])]), torch.cat([groups, torch.tensor([1])]))
    assert missing.tolist() == [0, 0, -1.5, 1.5, 0, 0, 0]
    assert not gpg_advantages(torch.ones(4), torch.zeros(4, dtype=torch.int64)).any()


FUNCTIONS = {
    "mean": lambda r, g, **o: group_advantages(r, g, **o),
    "leave_one_out": lambda r, g, **o: group_advantages(r, g, baseline="leave_one_out", **o),
    "best_of_k": lambda r, g, **o: group_advantages(r, g, baseline="best_of_k", **o),
    "opo": lambda r, g, **o: opo_advantages(r, torch.arange(1, len(g) + 1), g, **o),
    "gpg": lambda r, g, **o: gpg_advantages(r, g, **o),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_missing_rewards(name: str) -> None:
    """None, NaN and infinite ones are one thing: out of every statistic, 0 for themselves."""
    function = FUNCTIONS[name]
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    want = function(torch.tensor([1.0, 3.0, NAN, 2.0, 5.0, 9.0]), groups)
    assert want[2] == 0 and want.isfinite().all() and want.any()
    for missing in (None, INF, -INF):
        assert torch.equal(function([1, 3.0, missing, 2, 5, 9], groups), want)
    assert not function([None] * 6, groups).any()
    rewards = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 9.0])
    copy = rewards.clone()
    first = function(rewards.requires_grad_(), groups)
    assert not first.requires_grad and torch.equal(rewards, copy) and torch.equal(first, function(rewards, groups))
    assert function(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("scale", ("group", "batch", "none"))
@pytest.mark.parametrize("baseline", ("mean", "leave_one_out", "best_of_k"))
def test_an_infinite_reward_leaves_the_others_alone(baseline: str, scale: str) -> None:
    rewards, groups = batch()
    mates = groups == 0
    changed = rewards.clone()
    changed[mates.nonzero()[0]] = INF
    without = changed.masked_fill(changed.isinf(), NAN)
    got = group_advantages(changed, groups, baseline=baseline, scale=scale)
    assert got.isfinite().all() and torch.equal(got, group_advantages(without, groups, baseline=baseline, scale=scale))


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"opo"}))  # its lengths go by position here
def test_order_and_names_of_groups_do_not_matter(name: str) -> None:
    rewards, groups = batch()
    order = torch.randperm(len(rewards))
    renamed = groups.neg() * 3 + 1
    torch.testing.assert_close(
        FUNCTIONS[name](rewards[order], renamed[order]), FUNCTIONS[name](rewards, groups)[order], rtol=1e-12, atol=1e-12
    )


def test_lone_rewards() -> None:
    rewards, groups = torch.tensor([4.0, 1.0, 3.0, NAN, 6.0], dtype=torch.float64), torch.tensor([0, 1, 1, 2, 2])
    for baseline in ("mean", "leave_one_out", "best_of_k"):
        zero = group_advantages(rewards, groups, baseline=baseline)
        assert zero[[0, 3, 4]].tolist() == [0, 0, 0] and zero[1:3].any()
        for scale, divisor in (("none", 1.0), ("group", 1.5), ("batch", rewards[~rewards.isnan()].std().item() + 0.5)):
            score = group_advantages(rewards, groups, baseline=baseline, scale=scale, eps=0.5, lone="score")
            others = group_advantages(rewards, groups, baseline=baseline, scale=scale, eps=0.5)
            assert torch.equal(score[1:4], others[1:4])
            assert score[[0, 4]].tolist() == pytest.approx([4 / divisor, 6 / divisor], rel=1e-12)
    assert opo_advantages(rewards, torch.ones(5), groups, lone="score")[[0, 3, 4]].tolist() == [4, 0, 6]
    assert opo_advantages(rewards, torch.ones(5), groups)[[0, 3, 4]].tolist() == [0, 0, 0]


def test_statistics() -> None:
    rewards, groups = batch()
    mean, deviation, count = group_statistics(rewards, groups)
    for i in range(len(rewards)):
        mates = [rewards[j].item() for j in members(rewards, groups, i)]
        assert count[i] == len(mates)
        assert mean[i].item() == pytest.approx(fmean(mates), rel=1e-12)
        if len(mates) > 1:
            assert deviation[i].item() == pytest.approx(stdev(mates), rel=1e-12, abs=1e-12)
        else:
            assert deviation[i].isnan()
    assert not deviation[groups == 2].any()
    assert group_statistics([None, None], torch.zeros(2, dtype=torch.int64))[0].tolist() == [0, 0]


def test_half_precision_keeps_its_dtype() -> None:
    rewards, groups = batch(torch.bfloat16)
    for name, function in FUNCTIONS.items():
        got = function(rewards, groups)
        assert got.dtype == torch.bfloat16, name
        torch.testing.assert_close(got.double(), function(rewards.double(), groups), rtol=1e-2, atol=1e-2)


def test_several_functions() -> None:
    table = [[1.0, None], [0.0, 2.0], [None, None], [1.0, 4.0], [0.0, 0.0], [0.5, -INF]]
    groups, weights = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([1.0, 0.5])
    numbers = torch.tensor([[NAN if x is None or math.isinf(x) else x for x in row] for row in table])
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        advantages, rewards = combine_rewards(table, weights, groups, aggregation=aggregation)
        same = combine_rewards(numbers, weights, groups, aggregation=aggregation)
        assert torch.equal(advantages, same[0]) and advantages[2] == 0 and advantages.isfinite().all()
        torch.testing.assert_close(rewards, torch.tensor([1.0, 1.0, NAN, 3.0, 0.0, 0.5]), equal_nan=True)
    lone, _ = combine_rewards([[2.0]], None, torch.tensor([3]), scale="none", lone="score")
    assert lone.tolist() == [2.0]


def test_groups() -> None:
    ids = torch.tensor([5, -1, 5, 5, -1])
    x = torch.tensor([1.0, NAN, 2.0, 4.0, 3.0])
    groups = Groups(ids)
    torch.testing.assert_close(groups.sum(x), torch.tensor([7.0, NAN, 7.0, 7.0, NAN]), equal_nan=True)
    rows = torch.arange(10.0).view(5, 2)
    assert groups.sum(rows)[0].tolist() == [10, 13] and groups.max(rows)[1].tolist() == [8, 9]
    rank = torch.tensor([0, 0, 1, 2, 3, 4, 0, 1])
    values = torch.tensor([INF, 1.0, 2.0, 3.0, 4.0, 5.0, NAN, 1.0])
    assert running_sum(values, rank)[:6].tolist() == [INF, 1, 3, 6, 10, 15]


def test_overlong_penalty() -> None:
    lengths = torch.tensor([0, 8, 9, 10, 11, 12, 13, 99])
    got = overlong_penalty(lengths, 12, 4, factor=2.0)
    assert got.tolist() == [0, 0, -0.5, -1, -1.5, -2, -2, -2]
    assert overlong_penalty(lengths, 12, 0).tolist() == [0, 0, 0, 0, 0, 0, -1, -1]
    assert overlong_penalty(lengths.double(), 12, 4).dtype == torch.float64


def test_other_penalties() -> None:
    rewards, truncated = torch.tensor([2.0, -2.0, 2.0, NAN]), torch.tensor([1, 1, 0, 1])
    torch.testing.assert_close(
        stop_properly_penalty(rewards, truncated, 0.25), torch.tensor([0.5, -0.5, 2.0, NAN]), equal_nan=True
    )
    torch.testing.assert_close(
        stop_properly_penalty(rewards, truncated, -0.5), torch.tensor([-0.5, -0.5, 2.0, NAN]), equal_nan=True
    )
    lengths = torch.tensor([2, 5, 9])
    assert length_penalty(lengths, 5, coef=0.5).tolist() == [0, 0, -2]
    assert length_penalty(lengths, torch.tensor([5, 5, 5]), coef=0.5, both_sides=True).tolist() == [-1.5, 0, -2]
    groups, correct = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 0, 0, 1, 0])
    assert group_length_reward(torch.tensor([10, 10, 30, 7, 7]), correct, groups).tolist() == [0.5, 0, -0.5, 0, 0]


def test_rewards_tensor() -> None:
    assert rewards_tensor([1, None, True]).tolist()[::2] == [1.0, 1.0] and rewards_tensor([1, None])[1].isnan()
    assert rewards_tensor([[1, 2.5], (None, 3)], dtype=torch.float64).shape == (2, 2)
    given = torch.ones(3)
    assert rewards_tensor(given) is given
    with pytest.raises(TypeError, match="rewards: expected numbers or None, got 'good'"):
        rewards_tensor([1.0, "good"])


def test_token_rewards() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    kl = torch.tensor([[1.0, NAN, 2.0, INF], [NAN, 1.0, 1.0, 4.0], [NAN] * 4])
    got = token_rewards(torch.tensor([3.0, -9.0, 5.0]), mask, kl=kl, kl_coef=0.5, clip_range=(-2, 2))
    assert got.tolist() == [[-0.5, 0, 1, 0], [0, -0.5, -0.5, -4], [0] * 4]
    dense = torch.tensor([[1.0, NAN, 3.0, NAN], [NAN, 0.0, 1.0, 2.0], [NAN] * 4]).requires_grad_()
    got = token_rewards(dense, mask, kl=kl, kl_coef=0.5)
    assert got.tolist() == [[0.5, 0, 2, 0], [0, -0.5, 0.5, 0], [0] * 4] and not got.requires_grad
    lengths = torch.tensor([3, 4, 0])
    inside = torch.arange(4) < lengths[:, None]
    offsets = torch.tensor([0, 3, 7, 7])
    packed = token_rewards(torch.tensor([3.0, INF, 5.0]), mask[inside], kl=kl[inside], kl_coef=0.5, cu_seqlens=offsets)
    assert packed.tolist() == [-0.5, 0, 2, 0, -0.5, -0.5, INF]
    assert token_rewards(torch.ones(2), torch.ones(2, 0)).shape == (2, 0)


R, G = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
WRONG: list[tuple[type[Exception], str, Any]] = [
    (ValueError, "lone: expected 'zero' or 'score', got 'keep'", lambda: group_advantages(R, G, lone="keep")),
    (ValueError, "scale: expected", lambda: group_advantages(R, G, baseline="best_of_k", scale="row")),
    (ValueError, "eps: expected", lambda: best_of_k_advantages(R, G, eps=-1.0)),
    (
        ValueError,
        "k: expected None or a number of completions of at least 2, got 1",
        lambda: best_of_k_advantages(R, G, k=1),
    ),
    (ValueError, r"rewards: expected shape \(B,\)", lambda: best_of_k_advantages(torch.zeros(3, 1), G)),
    (ValueError, "group_ids", lambda: opo_advantages(R, R, G[:2])),
    (TypeError, "group_ids: expected integers", lambda: opo_advantages(R, R, R)),
    (ValueError, "lengths: expected shape", lambda: opo_advantages(R, R[:2], G)),
    (ValueError, "count: expected", lambda: gpg_advantages(R, G, count="groups")),
    (ValueError, "f_norm: expected", lambda: gpg_advantages(R, G, f_norm=0.0)),
    (TypeError, "rewards: expected one of", lambda: group_statistics(G, G)),
    (ValueError, "buffer: expected", lambda: overlong_penalty(R, 4, 5)),
    (ValueError, "factor: expected", lambda: overlong_penalty(R, 4, 2, factor=-1)),
    (ValueError, "coef: expected", lambda: length_penalty(R, coef=-1)),
    (ValueError, "truncated: expected shape", lambda: stop_properly_penalty(R, R[:1], 0.5)),
    (ValueError, "correct: expected shape", lambda: group_length_reward(R, R[:1], G)),
    (ValueError, r"rewards: expected shape \(2,\).*or \(2, 3\)", lambda: token_rewards(R, torch.ones(2, 3))),
    (ValueError, "kl: needed with a kl_coef", lambda: token_rewards(R, torch.ones(3, 2), kl_coef=0.1)),
    (ValueError, "kl: needed with a kl_coef", lambda: token_rewards(R, torch.ones(3, 2), kl=torch.ones(3, 2))),
    (ValueError, "kl: expected shape", lambda: token_rewards(R, torch.ones(3, 2), kl=R, kl_coef=0.1)),
    (ValueError, "kl_coef: expected", lambda: token_rewards(R, torch.ones(3, 2), kl=R, kl_coef=-0.1)),
    (ValueError, "clip_range: expected", lambda: token_rewards(R, torch.ones(3, 2), clip_range=(1, -1))),
]


@pytest.mark.parametrize(("error", "match", "call"), WRONG, ids=[w[1][:24] for w in WRONG])
def test_wrong_arguments_are_named(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()

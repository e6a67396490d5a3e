"""Advantages per token: returns, GAE on packed tokens, ReMax, the optimal token baseline, whitening, the names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.objectives.estimators import ESTIMATORS, compute_advantages
from fastrl.objectives.token_advantages import (
    discounted_returns,
    gae,
    optimal_token_baseline,
    remax_advantages,
    whiten,
)

NAN, INF = math.nan, math.inf
BACKENDS = ("reference", "cpu")


def batch(rows: int = 6, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, mask with holes and an empty row, where the packed tokens are, their offsets."""
    lengths = torch.randint(1, tokens + 1, (rows,))
    lengths[1] = 0
    where = torch.arange(tokens) < lengths[:, None]
    mask = where & (torch.rand(rows, tokens) < 0.7)
    rewards = torch.randn(rows, tokens, dtype=torch.float64).masked_fill(~mask, NAN)
    return rewards, mask, where, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("through", (False, True))
def test_returns_and_packed(through: bool, backend: str) -> None:
    rewards, mask, where, offsets = batch()
    values = torch.randn_like(rewards).masked_fill(~mask, INF)
    options: dict[str, Any] = {"gamma": 0.9, "through_mask": through, "backend": backend}
    returns = discounted_returns(rewards, mask, **options)
    for row, kept in enumerate(mask):
        steps = kept.nonzero().flatten().tolist()
        for i, t in enumerate(steps):
            terms = [0.9 ** ((u - t) if through else j) * rewards[row, u].item() for j, u in enumerate(steps[i:])]
            assert returns[row, t].item() == pytest.approx(math.fsum(terms), rel=1e-12, abs=1e-12)
    assert not returns[~mask].any()
    packed = discounted_returns(rewards[where], mask[where], cu_seqlens=offsets, **options)
    assert torch.equal(packed, returns[where])
    padded_gae = gae(rewards, values, mask, lam=0.8, **options)
    packed_gae = gae(rewards[where], values[where], mask[where], lam=0.8, cu_seqlens=offsets.int(), **options)
    assert all(torch.equal(a, b[where]) and a.any() for a, b in zip(packed_gae, padded_gae, strict=True))


def test_undiscounted_returns_are_the_scan_s() -> None:
    rewards, mask, where, offsets = batch()
    rewards[0, mask[0]] = INF
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)):
        x = rewards.to(dtype)
        got, scan = discounted_returns(x, mask), discounted_returns(x, mask, backend="cpu")
        assert got.dtype == scan.dtype and got[1:].isfinite().all() and not got[~mask].any()
        torch.testing.assert_close(got, scan, rtol=tolerance, atol=tolerance)
        assert torch.equal(discounted_returns(x[where], mask[where].int(), cu_seqlens=offsets), got[where])


def test_remax() -> None:
    rewards, mask, where, offsets = batch()
    baseline = torch.randn(6, dtype=torch.float64)
    baseline[3] = NAN
    advantages, returns = remax_advantages(rewards, baseline, mask)
    want = torch.where(mask & ~baseline.isnan()[:, None], returns - baseline[:, None], 0.0)
    assert torch.equal(advantages, want) and advantages.isfinite().all()
    packed = remax_advantages(rewards[where], baseline, mask[where], cu_seqlens=offsets)
    assert torch.equal(packed[0], advantages[where]) and torch.equal(packed[1], returns[where])


def otb_inputs() -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    rewards, mask, where, offsets = batch(8)
    rewards[rewards.isnan()] = 5.0
    tokens = {
        "rewards": rewards,
        "mask": mask,
        "logps": -torch.rand(8, 9, dtype=torch.float64),
        "sum_pi_squared": torch.rand(8, 9, dtype=torch.float64),
        "importance_weights": torch.rand(8, 9, dtype=torch.float64) + 0.5,
    }
    return torch.tensor([3, 3, 3, 9, 9, 1, 3, 9]), tokens, where, offsets


@pytest.mark.parametrize("zero_tail", (False, True))
def test_optimal_token_baseline_by_hand(zero_tail: bool) -> None:
    groups, tokens, where, offsets = otb_inputs()
    got, returns = optimal_token_baseline(group_ids=groups, zero_tail=zero_tail, eps=1e-6, **tokens)
    mask = tokens["mask"]
    energy = (1 - 2 * tokens["logps"].exp() + tokens["sum_pi_squared"]) * tokens["importance_weights"] ** 2
    for i in range(8):
        mates = [j for j in range(8) if groups[j] == groups[i] and mask[j].any()]
        lengths = sorted(mask[j].sum().item() for j in mates)
        steps = {j: mask[j].nonzero().flatten().tolist() for j in mates}
        for step, t in enumerate(steps.get(i, [])):
            alive = [j for j in mates if len(steps[j]) > step]
            weight = {j: sum(energy[j, u].item() for u in steps[j][: step + 1]) for j in alive}
            total = sum(weight[j] * returns[j, steps[j][step]].item() for j in alive)
            baseline = total / (sum(weight.values()) + 1e-6)
            if len(mates) == 1 or (zero_tail and step >= lengths[-2]):
                baseline = 0.0
            assert got[i, t].item() == pytest.approx(returns[i, t].item() - baseline, rel=1e-10, abs=1e-12)
    assert not got[~mask].any()
    packed = optimal_token_baseline(
        group_ids=groups, zero_tail=zero_tail, eps=1e-6, cu_seqlens=offsets, **{n: x[where] for n, x in tokens.items()}
    )
    torch.testing.assert_close(packed[0], got[where], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("skip_holes", (True, False))
def test_optimal_token_baseline_edges(skip_holes: bool) -> None:
    groups, tokens, *_ = otb_inputs()
    clean = {n: torch.where(tokens["mask"], x, 0) if n != "mask" else x for n, x in tokens.items()}
    poison = {n: torch.where(tokens["mask"], x, NAN) if n != "mask" else x for n, x in tokens.items()}
    options: dict[str, Any] = {"group_ids": groups, "skip_holes": skip_holes}
    want = optimal_token_baseline(**clean, **options)[0]
    assert torch.equal(optimal_token_baseline(**poison, **options)[0], want)
    row = next(i for i in (0, 2, 6) if tokens["mask"][i].any())
    for name, value in (("rewards", NAN), ("rewards", INF), ("logps", INF), ("sum_pi_squared", NAN)):
        spoilt = {n: x.clone() for n, x in tokens.items()}
        spoilt[name][row] = value
        without = {n: x.clone() for n, x in tokens.items()}
        without["mask"][row] = False
        got = optimal_token_baseline(**spoilt, **options)[0]
        assert not got[row].any() and torch.equal(got, optimal_token_baseline(**without, **options)[0])
    alone = {n: x.clone() for n, x in tokens.items()}  # the only one of its group with a token left
    alone["mask"][[0, 1, 2, 6]] = False
    alone["mask"][row, :2] = True
    for zero_tail in (False, True):
        got, returns = optimal_token_baseline(**alone, **options, zero_tail=zero_tail)
        assert torch.equal(got[row], torch.where(alone["mask"][row], returns[row], 0.0)) and got[row].any()
    certain = {**tokens, "logps": torch.full_like(tokens["logps"], -INF)}
    assert optimal_token_baseline(**certain, **options)[0].isfinite().all()
    empty = {n: x[:, :0] for n, x in tokens.items()}
    assert optimal_token_baseline(**empty, **options)[0].shape == (8, 0)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("preset", ("verl", "openrlhf", "trl"))
def test_whiten(preset: str, dtype: torch.dtype) -> None:
    rewards, mask, where, _ = batch()
    x = (rewards * 3 + 100).to(dtype)
    values = x[mask].double()
    centred = values - values.mean()
    deviation = {
        "verl": (centred.square().sum() / (len(values) - 1) + 0.5).sqrt(),
        "openrlhf": centred.square().mean().clamp(min=0.5).sqrt(),
        "trl": values.std() + 0.5,
    }[preset]
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for options, want in (
        ({}, centred / deviation),
        ({"shift_mean": False}, centred / deviation + values.mean()),
        ({"divide_by_std": False}, centred),
    ):
        got = whiten(x.requires_grad_(), mask, preset=preset, eps=0.5, **options)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not got.requires_grad
        torch.testing.assert_close(got[mask].double(), want, **close)
        assert not got[~mask].any()
        packed = whiten(x[where], mask[where], preset=preset, eps=0.5, **options)
        torch.testing.assert_close(packed, got[where], **close)


@pytest.mark.parametrize("preset", ("verl", "openrlhf", "trl"))
def test_whiten_edges(preset: str) -> None:
    ones = torch.ones(5)
    for count, value in ((5, 0.1), (49, 0.1), (7, 1 / 3), (300, 1e6 + 0.1)):  # exactly, whatever the sum rounds to
        for dtype in (torch.float32, torch.float64):
            assert not whiten(torch.full((count,), value, dtype=dtype), torch.ones(count), preset=preset).any()
    assert not whiten(torch.tensor([7.0]), torch.ones(1), preset=preset).any()
    assert not whiten(torch.full((5,), NAN), torch.zeros(5), preset=preset).any()
    assert whiten(torch.zeros(2, 0), torch.zeros(2, 0), preset=preset).shape == (2, 0)
    x = torch.tensor([1.0, INF, 3.0, NAN, 8.0])
    assert torch.equal(whiten(x, ones, preset=preset), whiten(x, x.isfinite(), preset=preset))
    assert not whiten(torch.full((5,), 2.0), ones, preset=preset, eps=0.0).isnan().any()


def test_one_score_per_sequence_or_one_per_token() -> None:
    _, mask, _, _ = batch()
    scores, groups = torch.randn(6, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 0, 1])
    placed = torch.zeros(6, 9, dtype=torch.float64)
    for row, kept in enumerate(mask):
        if kept.any():
            placed[row, kept.nonzero().max()] = scores[row]
    values, logps = torch.randn(6, 9, dtype=torch.float64), -torch.rand(6, 9, dtype=torch.float64)
    extra: dict[str, dict[str, Any]] = {
        "gae": {"values": values},
        "remax": {"baseline_rewards": scores.flip(0)},
        "optimal_token_baseline": {"logps": logps, "sum_pi_squared": logps.exp()},
        "tir_optimal_token_baseline": {"logps": logps, "sum_pi_squared": logps.exp()},
    }
    scored = torch.where(mask.any(-1), scores, 0.0)  # a sequence without a token has no token to carry its score
    for preset, names in ESTIMATORS.items():
        for name in set(names) - {"gdpo"}:
            options = {"preset": preset, "group_ids": groups, **extra.get(name, {})}
            a = compute_advantages(name, scored, mask, **options)
            b = compute_advantages(name, placed, mask, **options)
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
                assert x.any() and not x[~mask].any()


@pytest.mark.parametrize("bad", (NAN, INF, -INF))
@pytest.mark.parametrize(("preset", "name"), [(p, n) for p, names in ESTIMATORS.items() for n in names])
def test_a_sequence_without_a_reward_is_as_if_it_were_not_there(preset: str, name: str, bad: float) -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    groups = torch.tensor([0, 0, 1, 1, 1, 0])
    tokens = {"logps": -torch.rand(6, 3).double(), "sum_pi_squared": torch.rand(6, 3).double()}
    extra: dict[str, dict[str, Tensor]] = {
        "gae": {"values": torch.randn(6, 3).double()},
        "remax": {"baseline_rewards": torch.randn(6).double()},
        "optimal_token_baseline": tokens,
        "tir_optimal_token_baseline": tokens,
    }
    inputs = extra.get(name, {})
    if preset == "openrlhf":
        inputs = {**inputs, "kl": torch.rand(6, 3).double()}
    options: dict[str, Any] = {"preset": preset, **({"kl_coef": 0.1} if preset == "openrlhf" else {})}
    rewards = torch.tensor([1.0, 2.5, bad, 5.0, 3.0, 4.0], dtype=torch.float64)
    rewards = rewards.unsqueeze(-1) if name == "gdpo" else rewards
    rest = torch.tensor([0, 1, 3, 4, 5])
    got, _ = compute_advantages(name, rewards, mask, group_ids=groups, **inputs, **options)
    less = {key: x[rest] for key, x in inputs.items()}
    want, _ = compute_advantages(name, rewards[rest], mask[rest], group_ids=groups[rest], **less, **options)
    torch.testing.assert_close(got[rest], want, rtol=1e-12, atol=1e-12)
    assert not got[2].any() and want.any()


def test_wrong_arguments_are_named() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    ids = torch.zeros(2, dtype=torch.int64)
    wrong: list[tuple[type[Exception], str, Any]] = [
        (
            ValueError,
            "preset: expected one of verl, openrlhf, trl, got 'nemo'",
            lambda: compute_advantages("grpo", x, mask, preset="nemo"),
        ),
        (
            ValueError,
            "estimator: trl has grpo, rloo, got 'opo'",
            lambda: compute_advantages("opo", x, mask, preset="trl"),
        ),
        (ValueError, "group_ids: this estimator compares", lambda: compute_advantages("grpo", x, mask)),
        (ValueError, "gamma: verl's grpo takes", lambda: compute_advantages("grpo", x, mask, group_ids=ids, gamma=0.9)),
        (
            ValueError,
            "kl: verl's reinforce_plus_plus takes",
            lambda: compute_advantages("reinforce_plus_plus", x, mask, kl=x),
        ),
        (TypeError, "values", lambda: compute_advantages("gae", x, mask)),
        (
            ValueError,
            "divide_by_std: this estimator does not normalize",
            lambda: compute_advantages("rloo", x, mask, preset="openrlhf", group_ids=ids, divide_by_std=False),
        ),
        (
            ValueError,
            "scale: without a baseline",
            lambda: compute_advantages("reinforce", x, mask, preset="openrlhf", scale="group"),
        ),
        (
            ValueError,
            "rewards: expected shape",
            lambda: compute_advantages("grpo", torch.zeros(5), mask, group_ids=ids),
        ),
        (ValueError, "mask: expected shape", lambda: compute_advantages("grpo", x, mask[0], group_ids=ids)),
        (
            ValueError,
            "cu_seqlens: expected offsets",
            lambda: discounted_returns(x[0], mask[0], cu_seqlens=torch.tensor([0, 2])),
        ),
        (ValueError, "values: expected shape", lambda: gae(x[0], x, mask[0], cu_seqlens=torch.tensor([0, 3]))),
        (ValueError, "baseline_rewards: expected shape", lambda: remax_advantages(x, torch.zeros(3), mask)),
        (ValueError, "group_ids: expected shape", lambda: optimal_token_baseline(x, mask, x, x, torch.zeros(3))),
        (ValueError, "preset: expected", lambda: whiten(x, mask, preset="mine")),
        (ValueError, "eps: expected", lambda: whiten(x, mask, eps=-1.0)),
        (ValueError, "shift_mean: without it", lambda: whiten(x, mask, shift_mean=False, divide_by_std=False)),
        (ValueError, "mask: expected", lambda: whiten(x, mask[:1])),
        (ValueError, "mask: expected", lambda: whiten(x, None)),  # type: ignore[arg-type]
    ]
    for error, match, call in wrong:
        with pytest.raises(error, match=match):
            call()

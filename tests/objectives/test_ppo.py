"""PPO in one call: the sum of two losses, fused and composed, packing, splits, dead rows, passed-on arguments."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastrl
from fastrl import PolicyObjective
from fastrl.objectives.ppo import linear_ppo_loss, ppo_loss
from fastrl.objectives.value import value_loss
from fastrl_kernels import engine, planner

B, T, D, V = 4, 6, 5, 70
F64 = torch.float64
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0] * 6, [1, 0, 0, 0, 0, 0]])
OBJECTIVES = {
    "clip": PolicyObjective(loss_type="dapo", epsilon=0.2),
    "dual clip": PolicyObjective(loss_type="ppo", epsilon=0.2, entropy_coef=0.01),
    "clip, entropy, kl": PolicyObjective(loss_type="dapo", epsilon=0.1, entropy_coef=0.02, beta=0.05),
}
LEAVES = ("hidden", "weight", "value_weight", "value_bias")


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with planner.forced(tile_bytes=1, min_rows=5, weight_block=50, score_rows=7):
        yield


def data() -> dict[str, Tensor]:
    d = {"hidden": torch.randn(B, T, D), "weight": torch.randn(V, D)}
    d |= {"value_weight": torch.randn(1, D), "value_bias": torch.randn(1)}
    d = {k: v.double() for k, v in d.items()}
    d["ids"] = torch.randint(V, (B, T))
    logps = fastrl.linear_logprobs(d["hidden"], d["weight"], d["ids"]).logps
    values = d["hidden"] @ d["value_weight"][0] + d["value_bias"]
    constants = {"old_logps": logps, "ref_logps": logps, "returns": values, "old_values": values}
    d |= {k: v + 0.2 * torch.randn(B, T) for k, v in constants.items()}
    d["advantages"] = torch.randn(B, T, dtype=F64)
    d["advantages"][0, :3] = 0  # no policy gradient there, but one of the value
    return d | {"mask": MASK}


def run(d: dict[str, Tensor], objective: PolicyObjective, fused: bool, **options: Any) -> list[Any]:
    """Loss, gradients of the leaves, metrics."""
    leaves = {k: d[k].detach().requires_grad_() for k in LEAVES}
    given: dict[str, Any] = {k: v for k, v in d.items() if k not in LEAVES and k != "ids"} | options
    hidden, weight, value_weight, value_bias = leaves.values()
    if fused:
        head = {"value_weight": value_weight, "value_bias": value_bias, "score_dead": True}
        out = linear_ppo_loss(hidden, weight, d["ids"], objective, **head, **given)
    else:
        stats = fastrl.linear_logprobs(hidden, weight, d["ids"], mask=given["mask"], entropy=True)
        values = (hidden @ value_weight.T + value_bias).squeeze(-1)
        out = ppo_loss(stats.logps, values, objective, entropy=stats.entropy, **given)
    return [out.loss.detach(), *torch.autograd.grad(out.loss * 1.3, list(leaves.values())), out]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_the_sum_of_the_two_losses(name: str) -> None:
    d, objective = data(), OBJECTIVES[name]
    stats = fastrl.linear_logprobs(d["hidden"], d["weight"], d["ids"], entropy=True)
    values = torch.randn(B, T, dtype=F64)
    given = {k: d[k] for k in ("advantages", "mask", "old_logps", "ref_logps")} | {"entropy": stats.entropy}
    policy = fastrl.policy_loss(stats.logps, objective, **given)
    value_options = {"old_values": d["old_values"], "cliprange_value": 0.15}
    value = value_loss(values, d["returns"], mask=MASK, aggregation="seq-mean-token-mean", **value_options)
    out = ppo_loss(
        stats.logps, values, objective, returns=d["returns"], vf_coef=0.7, value_aggregation="seq-mean-token-mean",
        **value_options, **given,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, policy.loss + 0.7 * value.loss)
    assert torch.equal(out.logps, policy.logps) and torch.equal(out.values, value.values)
    assert out.metrics.keys() == policy.metrics.keys() | value.metrics.keys()
    assert not policy.metrics.keys() & value.metrics.keys()
    for key, want in {**policy.metrics, **value.metrics}.items():
        torch.testing.assert_close(out.metrics[key], want, equal_nan=True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_equals_composed(name: str) -> None:
    d = data()
    for options in ({}, {"vf_coef": 0.5, "cliprange_value": None}, {"value_mask": MASK * (torch.arange(T) > 0)}):
        got, want = (run(d, OBJECTIVES[name], fused, **options) for fused in (True, False))
        for a, b in zip(got[:-1], want[:-1], strict=True):
            torch.testing.assert_close(a, b)
        assert got[-1].metrics.keys() == want[-1].metrics.keys()
        for key, value in want[-1].metrics.items():
            torch.testing.assert_close(got[-1].metrics[key], value, equal_nan=True, msg=key)
        torch.testing.assert_close(got[-1].values, want[-1].values)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_split_sums_to_the_whole(name: str) -> None:
    d, objective, tokens = data(), OBJECTIVES[name], MASK.sum()
    whole = run(d, objective, True)
    for cuts in ([0, 1, 2, 3, 4], [0, 3, 4]):
        total = [torch.zeros_like(x) for x in whole[:-1]]
        for a, b in itertools.pairwise(cuts):
            part = {k: v[a:b] if v.shape[:2] == (B, T) else v for k, v in d.items()}
            counts = {"normalizer": tokens, "value_normalizer": tokens, "entropy_normalizer": tokens}
            loss, dx, *heads = run(part, objective, True, **counts)[:-1]
            total[0] += loss
            total[1][a:b] = dx
            for sum_, piece in zip(total[2:], heads, strict=True):
                sum_ += piece
        for got, want in zip(total, whole[:-1], strict=True):
            torch.testing.assert_close(got, want)


def test_packed_equals_padded() -> None:
    for form in (fastrl.policy_loss, fastrl.linear_policy_loss):
        assert "cu_seqlens" in inspect.signature(form).parameters
    d, objective = data(), OBJECTIVES["clip, entropy, kl"]
    lengths = torch.tensor([6, 5, 2, 1])
    there = torch.arange(T) < lengths[:, None]
    packed = {k: v[there] if v.shape[:2] == (B, T) else v for k, v in d.items()}
    for fused in (True, False):
        want = run(d, objective, fused)
        got = run(packed, objective, fused, cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)))
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1][there])
        for a, b in zip(got[2:-1], want[2:-1], strict=True):
            torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    d = data()
    given = {k: v for k, v in d.items() if k not in LEAVES and k != "ids"}
    leaves = [d[k].requires_grad_() for k in LEAVES]

    def loss(hidden: Tensor, weight: Tensor, value_weight: Tensor, value_bias: Tensor) -> Tensor:
        head = {"value_weight": value_weight, "value_bias": value_bias}
        return linear_ppo_loss(hidden, weight, d["ids"], OBJECTIVES["clip, entropy, kl"], **head, **given).loss

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


def test_the_vocabulary_sees_live_rows_only_and_the_value_head_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    d = data()
    d["hidden"][MASK == 0] = torch.nan
    projected: list[int] = []
    project = engine.Head.project
    monkeypatch.setattr(
        engine.Head, "project", lambda self, x, *tile: projected.append(x.shape[0]) or project(self, x, *tile)
    )
    leaves = {k: d[k].requires_grad_() for k in LEAVES}
    given = {k: v for k, v in d.items() if k not in LEAVES and k != "ids"}
    heads = {k: leaves[k] for k in ("value_weight", "value_bias")}
    out = linear_ppo_loss(
        leaves["hidden"], leaves["weight"], d["ids"], OBJECTIVES["clip"], cliprange_value=None, **heads, **given
    )
    grad = torch.autograd.grad(out.loss, leaves["hidden"])[0]
    dead = (d["advantages"] == 0) & (MASK == 1)
    assert sum(projected) == 7 and dead.sum() == 3
    assert grad[MASK == 0].eq(0).all() and grad[dead].ne(0).any(-1).all()


def test_a_critic_with_a_body_of_its_own() -> None:
    d = data()
    other = torch.randn(B, T, 3, dtype=F64).requires_grad_()
    value_weight = torch.randn(1, 3, dtype=F64)
    hidden = d["hidden"].requires_grad_()
    given = {k: v for k, v in d.items() if k not in LEAVES and k != "ids"}
    objective = OBJECTIVES["clip"]
    out = linear_ppo_loss(
        hidden, d["weight"], d["ids"], objective, value_hidden=other, value_weight=value_weight, **given
    )
    grads = torch.autograd.grad(out.loss, [hidden, other])
    policy = {k: given[k] for k in ("advantages", "mask", "old_logps", "ref_logps")}
    alone = fastrl.linear_policy_loss(hidden, d["weight"], d["ids"], objective, **policy).loss
    torch.testing.assert_close(grads[0], torch.autograd.grad(alone, hidden)[0])
    assert grads[1][MASK == 0].eq(0).all() and grads[1].any()


def test_an_unknown_argument_is_refused() -> None:
    d, objective = data(), OBJECTIVES["clip"]
    given = {k: d[k] for k in ("advantages", "returns", "mask", "old_values")}
    with pytest.raises(TypeError, match="gamma"):
        ppo_loss(d["old_logps"], d["returns"], objective, gamma=0.9, **given)
    with pytest.raises(ValueError, match="old_values: needed by cliprange_value"):
        ppo_loss(d["old_logps"], d["returns"], objective, **{**given, "old_values": None})

"""PF-PPO's resampling, and the optimal token baseline from hidden states: verl's numbers, definitions, edges."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl.objectives.reward_shaping import PF_PPO_METHODS

CASES = json.loads((Path(__file__).parent.parent / "golden" / "verl_resampling_and_token_baseline.json").read_text())[
    "cases"
]
PF_PPO = [case for case in CASES if case["function"] == "compute_pf_ppo_reweight_data"]
TOKEN_BASELINE = {
    "compute_optimal_token_baseline_advantage": "optimal_token_baseline",
    "compute_multi_turn_optimal_token_baseline_advantage": "tir_optimal_token_baseline",
}
NAN, INF = math.nan, math.inf


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_all_cases_are_there() -> None:
    assert len(PF_PPO) == 8 and {case["config"]["reweight_method"] for case in PF_PPO} == set(PF_PPO_METHODS)
    assert {case["function"] for case in CASES if case not in PF_PPO} == set(TOKEN_BASELINE)


@pytest.mark.parametrize("case", PF_PPO, ids=lambda c: c["name"])
def test_pf_ppo_weights(case: dict[str, Any]) -> None:
    options = {"method": case["config"]["reweight_method"], "weight_pow": case["config"]["weight_pow"]}
    scores, want = tensor(case["inputs"]["scores"]), tensor(case["outputs"]["weights"])
    # verl's weights of max_min and max_random are fp32 whatever the scores are.
    torch.testing.assert_close(fastrl.pf_ppo_weights(scores, **options), want, rtol=1e-7, atol=1e-15)
    indices = fastrl.pf_ppo_resample(scores, generator=torch.Generator().manual_seed(3), **options)
    drawn = torch.multinomial(want, len(want), replacement=True, generator=torch.Generator().manual_seed(3))
    assert torch.equal(indices, drawn)
    torch.manual_seed(3)
    assert torch.equal(fastrl.pf_ppo_resample(scores, **options), drawn)


def test_pf_ppo_draws_what_the_weights_say() -> None:
    scores = torch.tensor([2.0, -4.0, 0.0, 1.0]).repeat(5000)
    indices = fastrl.pf_ppo_resample(scores, generator=torch.Generator().manual_seed(0))
    shares = (indices % 4).bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([4.0, 16.0, 0.0, 1.0]) / 21, rtol=0, atol=0.012)  # 4 deviations


@pytest.mark.parametrize("method", PF_PPO_METHODS)
def test_a_missing_reward_is_never_drawn(method: str) -> None:
    scores = torch.tensor([NAN, 3.0, -1.0, INF, 0.5, -INF], requires_grad=True)
    weights = fastrl.pf_ppo_weights(scores, method=method)
    kept = [1, 2, 4]
    assert torch.equal(weights[kept], fastrl.pf_ppo_weights(scores[kept], method=method)) and (weights[kept] > 0).all()
    assert not weights[[0, 3, 5]].any() and not weights.requires_grad
    indices = fastrl.pf_ppo_resample(scores, method=method)
    assert indices.shape == (6,) and set(indices.tolist()) <= set(kept)
    assert fastrl.pf_ppo_weights(scores[kept].bfloat16(), method=method).dtype == torch.float32


def test_pf_ppo_refuses() -> None:
    scores = torch.randn(4)
    with pytest.raises(ValueError, match="method: expected one of pow, max_min, max_random, got 'bw'"):
        fastrl.pf_ppo_weights(scores, method="bw")
    with pytest.raises(ValueError, match="weight_pow"):
        fastrl.pf_ppo_weights(scores, weight_pow=-1.0)
    with pytest.raises(ValueError, match=r"scores: expected shape \(B,\)"):
        fastrl.pf_ppo_resample(scores[None])
    with pytest.raises(ValueError, match="scores: expected one that is finite"):
        fastrl.pf_ppo_weights(torch.full((3,), NAN))
    with pytest.raises(TypeError, match="scores"):
        fastrl.pf_ppo_weights(torch.arange(4))


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("case", [c for c in CASES if c not in PF_PPO], ids=lambda c: c["name"])
def test_token_baseline_from_hidden_states(case: dict[str, Any], backend: str) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    hidden, weight, mask = tensor(inputs["hidden"]), tensor(inputs["weight"]), tensor(inputs["response_mask"])
    options: dict[str, Any] = {"temperature": case["config"]["temperature"], "mask": mask, "backend": backend}
    stats = fastrl.linear_logprobs(hidden, weight, torch.tensor(inputs["ids"]), **options)
    squares = fastrl.linear_sum_pi_squared(hidden, weight, lse=stats.lse, **options)
    inside = mask.bool()
    torch.testing.assert_close(squares[inside], tensor(outputs["sum_pi_squared"])[inside], rtol=1e-12, atol=0)
    got = fastrl.compute_advantages(
        TOKEN_BASELINE[case["function"]], tensor(inputs["token_level_rewards"]), mask,
        group_ids=torch.tensor(inputs["index"]), logps=stats.logps, sum_pi_squared=squares,
    )  # fmt: skip
    for ours, name in zip(got, ("advantages", "returns"), strict=True):
        torch.testing.assert_close(ours[inside], tensor(outputs[name])[inside], rtol=1e-9, atol=1e-12)
        assert not ours[~inside].any()


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_sum_pi_squared(dtype: torch.dtype, backend: str) -> None:
    hidden, weight, bias = torch.randn(3, 7, 8).to(dtype), torch.randn(50, 8).to(dtype), torch.randn(50).to(dtype)
    mask = torch.rand(3, 7) < 0.7
    hidden[~mask] = NAN
    hidden.requires_grad_()
    head: dict[str, Any] = {"bias": bias, "temperature": 0.6, "logit_scale": 1.7, "softcap": 9.0}
    options: dict[str, Any] = {"mask": mask, "backend": backend, **head}
    got = fastrl.linear_sum_pi_squared(hidden, weight, **options)
    x = hidden.detach()[mask].double()
    z = 9.0 * torch.tanh(1.7 * (x @ weight.double().T + bias.double()) / 9.0) / 0.6
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got[mask].double(), z.softmax(-1).square().sum(-1), rtol=tolerance, atol=0)
    assert not got[~mask].any() and not got.requires_grad
    assert got.shape == (3, 7) and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    ids = torch.randint(50, (3, 7))
    lse = fastrl.linear_logprobs(hidden, weight, ids, **options).lse
    assert torch.equal(fastrl.linear_sum_pi_squared(hidden, weight, lse=lse, **options), got)
    packed = fastrl.linear_sum_pi_squared(hidden[mask], weight, backend=backend, **head)
    torch.testing.assert_close(packed, got[mask], rtol=1e-6, atol=0)


def test_sum_pi_squared_of_a_certain_and_of_a_flat_token() -> None:
    hidden, weight = torch.tensor([[800.0], [0.0]]), torch.tensor([[1.0], [-1.0], [0.5], [0.0]])
    assert fastrl.linear_sum_pi_squared(hidden, weight).tolist() == [1.0, 0.25]
    assert fastrl.linear_sum_pi_squared(hidden[:0], weight).shape == (0,)


def test_sum_pi_squared_refuses() -> None:
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="lse"):
        fastrl.linear_sum_pi_squared(hidden, weight, lse=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="mask"):
        fastrl.linear_sum_pi_squared(hidden, weight, mask=torch.ones(3, 2))
    with pytest.raises(ValueError, match="temperature"):
        fastrl.linear_sum_pi_squared(hidden, weight, temperature=0.0)

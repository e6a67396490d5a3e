"""Estimators of the KL and controllers of its coefficient: numbers of verl and OpenRLHF, gradients, edges, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.objectives.kl import KL_ESTIMATORS, AdaptiveKL, FixedKL, KLClamp, kl_estimate

GOLDEN = Path(__file__).parent.parent / "golden"
VERL = json.loads((GOLDEN / "verl_kl_value_entropy.json").read_text())["cases"]
OPENRLHF = json.loads((GOLDEN / "openrlhf_losses.json").read_text())["cases"]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cases(source: list[dict[str, Any]], function: str) -> list[dict[str, Any]]:
    return [case for case in source if case["function"] == function]


def our_name(verl: str) -> str:
    base = verl.removesuffix("+")
    return {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(base, base) + verl[len(base) :]


def test_all_cases_are_there() -> None:
    counts = [len(cases(VERL, name)) for name in ("kl_penalty", "get_kl_controller(...).update", "apply_kl_penalty")]
    assert counts == [14, 3, 5] and len(cases(OPENRLHF, "compute_approx_kl")) == 9


@pytest.mark.parametrize("case", cases(VERL, "kl_penalty"), ids=lambda c: c["name"])
def test_verl(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    logps, ref = (tensor(inputs[k]).requires_grad_() for k in ("log_probs", "ref_log_probs"))
    kl = kl_estimate(logps, ref, our_name(case["config"]["kl_penalty"]), clamp="verl")
    grads = torch.autograd.grad(kl.sum(), [logps, ref])
    for got, name in zip((kl, *grads), ("kl", "grad_logps", "grad_ref_logps"), strict=True):
        torch.testing.assert_close(got, tensor(outputs[name]), **EXACT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", cases(OPENRLHF, "compute_approx_kl"), ids=lambda c: c["name"])
def test_openrlhf(case: dict[str, Any]) -> None:
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    logps, ref = tensor(inputs["log_probs"]).requires_grad_(), tensor(inputs["log_probs_base"])
    unbiased = config.get("unbiased_gradient", False)
    weight = None
    if "log_probs_old" in inputs:
        weight = (logps - tensor(inputs["log_probs_old"])).exp().clamp(max=10)
    estimator = config["kl_estimator"] + ("+" if unbiased else "")
    kl = kl_estimate(logps, ref, estimator, clamp="openrlhf", gradient_weight=weight)
    close = {"rtol": 1e-5, "atol": 1e-5}  # the origin computes in single precision
    torch.testing.assert_close(kl.detach(), tensor(outputs["kl"]), **close)
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), logps)[0], tensor(outputs["grad_logps"]), **close)


def controller(config: dict[str, Any]) -> FixedKL:
    if config["type"] == "fixed":
        return FixedKL(config["kl_coef"])
    return AdaptiveKL(config["kl_coef"], config["target_kl"], config["horizon"])


@pytest.mark.parametrize("case", cases(VERL, "get_kl_controller(...).update"), ids=lambda c: c["name"])
def test_verl_controller(case: dict[str, Any]) -> None:
    control = controller(case["config"])
    wanted = case["outputs"]["values_after_each_update"]
    for step, want in zip(case["inputs"]["steps"], wanted, strict=True):
        control.update(step["current_kl"], step["n_steps"])
        assert control.coef == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("case", cases(VERL, "apply_kl_penalty"), ids=lambda c: c["name"])
def test_verl_kl_in_the_reward(case: dict[str, Any]) -> None:
    """Estimator and controller together, over several batches."""
    control, estimator = controller(case["config"]), our_name(case["config"]["kl_penalty"])
    for inputs, outputs in zip(case["inputs"]["batches"], case["outputs"]["batches"], strict=True):
        mask = tensor(inputs["response_mask"])
        kl = kl_estimate(*(tensor(inputs[k]) for k in ("old_log_probs", "ref_log_probs")), estimator, clamp="verl")
        kl = kl * mask
        rewards = tensor(inputs["token_level_scores"]) - control.coef * kl
        torch.testing.assert_close(rewards, tensor(outputs["token_level_rewards"]), **EXACT)
        assert control.coef == pytest.approx(outputs["metrics"]["actor/reward_kl_penalty_coeff"], rel=1e-12)
        current = (kl.sum(-1) / (mask.sum(-1) + 1e-8)).mean().item()
        assert current == pytest.approx(outputs["metrics"]["actor/reward_kl_penalty"], rel=1e-9)
        control.update(current, mask.shape[0])
        assert control.coef == pytest.approx(outputs["coefficient_after"], rel=1e-9)


def test_verl_rewards_with_k1() -> None:
    (case,) = cases(VERL, "compute_rewards")
    scores, old, ref = (tensor(case["inputs"][k]) for k in ("token_level_scores", "old_log_probs", "ref_log_probs"))
    rewards = scores - case["config"]["kl_ratio"] * kl_estimate(old, ref, "k1")
    torch.testing.assert_close(rewards, tensor(case["outputs"]["token_level_rewards"]), **EXACT)


def logps() -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("clamp", (None, "verl", "openrlhf"))
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3", "abs", "k2+"))
def test_gradcheck(estimator: str, clamp: str | None) -> None:
    """k2+ is k2; the other straight-through ones are no gradient of their value."""
    inputs = logps()
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, estimator, clamp=clamp), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: kl_estimate(a, b, estimator, clamp=clamp), inputs)


@pytest.mark.parametrize("base", ("k1", "k2", "k3", "abs"))
def test_straight_through(base: str) -> None:
    inputs, weight = logps(), torch.rand(3, 4, dtype=torch.float64)
    straight, plain, k2 = (kl_estimate(*inputs, name) for name in (base + "+", base, "k2"))
    torch.testing.assert_close(straight, plain, rtol=0, atol=1e-15)
    weighted = kl_estimate(*inputs, base + "+", gradient_weight=weight.requires_grad_())
    torch.testing.assert_close(weighted, plain, rtol=0, atol=1e-15)
    wanted = torch.autograd.grad(k2.sum(), inputs, retain_graph=True)
    for got, want in zip(torch.autograd.grad(straight.sum(), inputs), wanted, strict=True):
        assert torch.equal(got, want)
    *got, of_weight = torch.autograd.grad(weighted.sum(), [*inputs, weight], allow_unused=True)
    assert of_weight is None
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b * weight)


def test_k3_is_exact_in_expectation() -> None:
    """Over the whole vocabulary, weighted by the policy, k1 and k3 are the KL, and k2's gradient is the KL's."""
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    policy, ref = logits.log_softmax(-1), torch.randn(7, dtype=torch.float64).log_softmax(-1)
    kl = (policy.exp() * (policy - ref)).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * kl_estimate(policy, ref, name)).sum(), kl)
    gradient = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    surrogate = (policy.exp().detach() * kl_estimate(policy, ref, "k2")).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, logits)[0], gradient)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_infinite_logps(estimator: str) -> None:
    inf = torch.inf
    a = torch.tensor([-inf, -1.0, -inf, -1.0], requires_grad=True)
    b = torch.tensor([-1.0, -inf, -inf, -2.0], requires_grad=True)
    kl = kl_estimate(a, b, estimator)
    far = -inf if estimator.startswith("k1") else inf
    assert kl[:3].tolist() == [far, inf, 0.0] and kl[3].isfinite()
    grads = torch.autograd.grad(kl[2:].sum(), [a, b])
    assert all(g.isfinite().all() and not g[:3].any() for g in grads)
    bounded = kl_estimate(a, b, estimator, clamp=KLClamp(low=-20, high=20, value=10))
    assert bounded[:3].abs().tolist() == [10, 10, 0]
    grads = torch.autograd.grad(bounded.sum(), [a, b])
    assert all(g.isfinite().all() for g in grads)


def test_clamps() -> None:
    a, b = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([3.0, 25.0, -25.0])
    at_bound = (torch.tensor([3.0]).exp() - 4).item()
    assert kl_estimate(a, b, "k3", clamp=KLClamp(value=at_bound))[0].item() == at_bound  # on the bound: kept
    assert kl_estimate(a, b, "k3", clamp="verl").tolist() == [10, 10, 10]
    assert kl_estimate(a, b, "k3", clamp=KLClamp(high=1.0)).tolist()[:2] == pytest.approx([math.e - 2] * 2)
    assert kl_estimate(a, b, "k3", clamp=KLClamp(low=-2.0)).tolist()[2] == pytest.approx(math.exp(-2) + 1)
    for name in ("k1", "k2", "abs"):
        assert torch.equal(kl_estimate(a, b, name, clamp="verl"), kl_estimate(a, b, name))
        assert kl_estimate(a, b, name, clamp="openrlhf").abs().amax() == 10


def test_inputs_untouched() -> None:
    a, b = (torch.randn(5) for _ in range(2))
    before = a.clone(), b.clone()
    for estimator in KL_ESTIMATORS:
        assert kl_estimate(a, b, estimator, clamp="openrlhf").dtype == torch.float32
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_wrong_arguments() -> None:
    a = torch.zeros(2)
    with pytest.raises(ValueError, match=r"kl_estimator: expected one of k1, k2, k3, .*, got 'k4'"):
        kl_estimate(a, a, "k4")
    with pytest.raises(ValueError, match="clamp: expected a KLClamp, None or one of verl, openrlhf, got 'trl'"):
        kl_estimate(a, a, "k3", clamp="trl")
    with pytest.raises(
        ValueError, match=r"gradient_weight: only for a straight-through estimator such as k3\+, not k3"
    ):
        kl_estimate(a, a, "k3", gradient_weight=a)
    with pytest.raises(ValueError, match="low: expected at most high = 1"):
        KLClamp(low=2.0, high=1.0)
    with pytest.raises(ValueError, match="value: expected a number above 0, got 0"):
        KLClamp(value=0.0)


def test_adaptive_coefficient() -> None:
    control = AdaptiveKL(0.1, target=2.0, horizon=100)
    control.update(2.0, 10)
    assert control.coef == 0.1
    control.update(math.inf, 10)
    assert control.coef == pytest.approx(0.1 * 1.02)
    control.update(-math.inf, 10)
    assert control.coef == pytest.approx(0.1 * 1.02 * 0.98)
    with pytest.raises(ValueError, match="kl: expected a number of nats, got NaN"):
        control.update(math.nan, 10)
    other = AdaptiveKL(0.0, target=2.0, horizon=100)
    other.load_state_dict(control.state_dict())
    assert other.coef == control.coef


@pytest.mark.parametrize(
    ("name", "arguments"), (("coef", (-0.1, 1.0, 1.0)), ("target", (0.1, 0.0, 1.0)), ("horizon", (0.1, 1.0, -1.0)))
)
def test_wrong_controller(name: str, arguments: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a number"):
        AdaptiveKL(*arguments)

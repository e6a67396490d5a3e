"""Numbers that TRL 1.16, verl 0.9.1 and OpenRLHF 0.11.2 computed themselves: policy losses, gradients and metrics."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl import PolicyObjective
from fastrl.objectives.rollout_correction import RolloutCorrection, rollout_correction
from fastrl.objectives.surrogates import OWN_OPTIONS, PRESETS
from fastrl.objectives.token_selection import covariance_tokens

GOLDEN = Path(__file__).parent.parent / "golden"


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / name).read_text())["cases"]


def tensor(values: Any) -> Tensor:
    """A float64 tensor; null is NaN."""

    def numbers(x: Any) -> Any:
        return [numbers(y) for y in x] if isinstance(x, list) else math.nan if x is None else float(x)

    return torch.tensor(numbers(values), dtype=torch.float64)


def given(inputs: dict[str, Any], name: str) -> Tensor | None:
    return tensor(inputs[name]) if inputs.get(name) is not None else None


def used(loss_type: str, preset: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the loss type uses: an origin's configuration holds those of all its losses."""
    own = PRESETS[preset].losses[loss_type].options
    return {name: value for name, value in options.items() if name not in OWN_OPTIONS or name in own}


def assert_close(got: Any, want: Any, name: str, rtol: float = 1e-9) -> None:
    got, want = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (got, want))
    torch.testing.assert_close(
        got.detach().double(), want.double(), rtol=rtol, atol=1e-12, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


# TRL -----------------------------------------------------------------------------------------------------------------

TRL = cases("trl_grpo_loss.json")
TRL_OPTIONS = (
    "epsilon", "epsilon_high", "delta", "beta", "importance_sampling_level", "top_entropy_quantile", "vespo_k_pos",
    "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "sapo_temperature_pos", "sapo_temperature_neg",
    "off_policy_mask_threshold", "use_bias_correction_kl", "max_completion_length",
)  # fmt: skip


def test_all_of_trl_is_there() -> None:
    assert Counter(c["config"]["loss_type"] for c in TRL).keys() == {
        "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"
    }  # fmt: skip


@pytest.mark.parametrize("case", TRL, ids=lambda c: c["name"])
def test_trl(case: dict[str, Any]) -> None:
    """Every loss type of GRPOTrainer under preset="trl"; test_golden_trl holds those that need no preset."""
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    state, loss_type = inputs["state"], config["loss_type"]
    train = config["mode"] == "train"
    accumulation = state["current_gradient_accumulation_steps"] if train else 1
    mask = tensor(inputs["completion_mask"])
    if "tool_mask" in inputs:
        mask = mask * tensor(inputs["tool_mask"])
    rows, tokens = mask.shape[0], mask.sum().clamp(min=1).item()
    of_step = max(1, inputs["num_items_in_batch"]) * (accumulation / config["steps_per_generation"] if train else 1)
    normalizer = {
        "bnpo": tokens * accumulation,
        "dr_grpo": rows * config["max_completion_length"] * accumulation,
        **dict.fromkeys(("dapo", "cispo", "vespo"), of_step),
    }.get(loss_type, rows * accumulation)
    coef = config.get("entropy_coef", 0.0)
    if config.get("use_adaptive_entropy"):
        reached = state.get("_last_world_entropy", math.inf) <= config.get("entropy_target", 0.2)
        coef = state.get("entropy_coef", coef) if reached else 0.0
    options = used(loss_type, "trl", {name: config[name] for name in TRL_OPTIONS if name in config})
    objective = PolicyObjective(loss_type=loss_type, preset="trl", entropy_coef=coef, **options)
    corrected = config.get("use_vllm") and config.get("vllm_importance_sampling_correction", True)
    bonus_mask = tensor(outputs["entropy_mask"]) if "entropy_mask" in outputs else mask
    logps, entropy = tensor(inputs["logps"]).requires_grad_(), tensor(inputs["entropies"]).requires_grad_()
    out = fastrl.policy_loss(
        logps,
        objective,
        advantages=tensor(inputs["advantages"]),
        mask=mask,
        old_logps=given(inputs, "old_per_token_logps"),
        ref_logps=given(inputs, "ref_per_token_logps"),
        entropy=entropy,
        importance_ratio=tensor(inputs["importance_sampling_ratio"]) if corrected else None,
        sampling_logps=given(inputs, "sampling_per_token_logps"),
        normalizer=normalizer,
        entropy_normalizer=bonus_mask.sum().clamp(min=1).item() * accumulation,
    )
    grads = torch.autograd.grad(out.loss, [logps, entropy], allow_unused=True)
    assert_close(out.loss, outputs["loss"], "loss", 1e-6)
    assert_close(grads[0], tensor(outputs["grad_logps"]), "gradient of logps", 1e-6)
    of_entropy = torch.zeros_like(entropy) if grads[1] is None else grads[1]
    want = tensor(outputs["grad_entropies"]) if "grad_entropies" in outputs else torch.zeros_like(entropy)
    assert_close(of_entropy, want, "gradient of entropy", 1e-6)
    divided = loss_type in ("dapo", "cispo", "vespo")
    for name, value in outputs["metrics"].items():
        if name != "entropy_coef":  # AdaptiveEntropy's: test_golden_trl
            got = out.metrics[name] * (accumulation if name == "policy_loss" and not divided else 1)
            wanted = torch.tensor(math.nan if value is None else value, dtype=torch.float64)
            torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7, equal_nan=True, msg=name)


@pytest.mark.parametrize("case", cases("trl_gmpo.json"), ids=lambda c: c["name"])
def test_trl_gmpo(case: dict[str, Any]) -> None:
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    train = config["mode"] == "train"
    accumulation = inputs["state"]["current_gradient_accumulation_steps"] if train else 1
    mask = tensor(inputs["completion_mask"])
    if "tool_mask" in inputs:
        mask = mask * tensor(inputs["tool_mask"])
    names = ("epsilon", "epsilon_high", "beta", "top_entropy_quantile")
    objective = PolicyObjective(loss_type="gmpo", preset="trl", **{k: config[k] for k in names if k in config})
    logps = tensor(inputs["logps"]).requires_grad_()
    out = fastrl.policy_loss(
        logps,
        objective,
        advantages=tensor(inputs["advantages"]),
        mask=mask,
        old_logps=given(inputs, "old_per_token_logps"),
        ref_logps=given(inputs, "ref_per_token_logps"),
        entropy=given(inputs, "entropies"),
        normalizer=mask.shape[0] * accumulation,
    )
    assert_close(out.loss, outputs["loss"], "loss", 1e-6)
    assert_close(torch.autograd.grad(out.loss, logps)[0], tensor(outputs["grad_logps"]), "gradient", 1e-6)
    for name, value in outputs["metrics"].items():
        assert_close(out.metrics[name], math.nan if value is None else value, name, 1e-6)


@pytest.mark.parametrize("case", cases("trl_rloo.json"), ids=lambda c: c["name"])
def test_trl_rloo(case: dict[str, Any]) -> None:
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    objective = PolicyObjective(
        loss_type="rloo", preset="trl", epsilon=config["epsilon"], epsilon_high=config["epsilon_high"]
    )
    logps = tensor(inputs["logps"]).requires_grad_()
    out = fastrl.policy_loss(
        logps,
        objective,
        advantages=tensor(inputs["advantages"]),
        mask=tensor(inputs["completion_mask"]),
        old_logps=tensor(inputs["old_per_token_logps"]),
    )
    assert_close(out.loss, outputs["loss"], "loss", 1e-6)
    assert_close(torch.autograd.grad(out.loss, logps)[0], tensor(outputs["grad_logps"]), "gradient", 1e-6)
    assert outputs["metrics"]
    for name, value in outputs["metrics"].items():
        assert_close(out.metrics[name], value, name, 1e-6)


# verl ----------------------------------------------------------------------------------------------------------------

VERL_NAMES = {
    "vanilla": "ppo",
    "geo_mean": "gmpo",
    "reinforce(not registered)": "reinforce",
    **{name: name for name in ("dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "dro", "cispo")},
}
VERL_OPTIONS = {"tau_pos": "sapo_temperature_pos", "tau_neg": "sapo_temperature_neg"}
VERL_OWN = ("clip_ratio_c", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "dro_beta")
VERL = cases("verl_policy_losses.json")


def verl_objective(config: dict[str, Any], loss_type: str) -> PolicyObjective:
    options = {name: config[name] for name in VERL_OWN if name in config}
    options |= {ours: config[name] for name, ours in VERL_OPTIONS.items() if name in config}
    if "clip_ratio" in config:
        low, high = config["clip_ratio_low"], config["clip_ratio_high"]
        options["epsilon"] = config["clip_ratio"] if low is None else low
        options["epsilon_high"] = config["clip_ratio"] if high is None else high
    if loss_type not in ("sapo", "gmpo"):  # verl ignores its loss_agg_mode there; we refuse one
        options["aggregation"] = config["loss_agg_mode"]
    length = config["global_batch_info"].get("loss_scale_factor")
    if length is not None and config["loss_agg_mode"] == "seq-mean-token-sum-norm":
        options["max_completion_length"] = length
    return PolicyObjective(loss_type=loss_type, preset="verl", **used(loss_type, "verl", options))


def verl_normalizer(config: dict[str, Any], objective: PolicyObjective, mask: Tensor) -> float | None:
    """verl's global counts, divided by dp_size, which averages gradients; for -norm times the length."""
    info, aggregation = config["global_batch_info"], config["loss_agg_mode"]
    name = "batch_num_tokens" if aggregation == "token-mean" else "global_batch_size"
    if objective.loss_type == "gmpo" or info.get(name) is None or aggregation == "token-sum":
        return None
    length = objective.max_completion_length or mask.shape[1] if aggregation.endswith("-norm") else 1
    return info[name] / info.get("dp_size", 1) * length


def test_all_of_verl_is_there() -> None:
    assert {c["config"]["loss_mode"] for c in VERL} == {*VERL_NAMES, "bypass_mode"}


@pytest.mark.parametrize("case", [c for c in VERL if c["config"]["loss_mode"] in VERL_NAMES], ids=lambda c: c["name"])
def test_verl(case: dict[str, Any]) -> None:
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    objective = verl_objective(config, VERL_NAMES[config["loss_mode"]])
    mask, logps = tensor(inputs["response_mask"]), tensor(inputs["log_probs"]).requires_grad_()
    constants = {"advantages": tensor(inputs["advantages"]), "mask": mask, "old_logps": tensor(inputs["old_log_probs"])}
    selected = None
    if inputs.get("perm"):
        everyone = dataclasses.replace(objective, clip_cov_ratio=1.0)
        candidates = covariance_tokens(everyone, logps, **constants).flatten().nonzero().squeeze(-1)
        order = candidates[torch.tensor(inputs["perm"])]
        scores = torch.zeros(mask.numel(), dtype=torch.float64)
        scores[order] = torch.arange(len(order), 0, -1, dtype=torch.float64)
        selected = covariance_tokens(objective, logps, **constants, scores=scores.view_as(mask))
    out = fastrl.policy_loss(
        logps,
        objective,
        **constants,
        importance_ratio=given(inputs, "rollout_is_weights"),
        normalizer=verl_normalizer(config, objective, mask),
        selected=selected,
    )
    scale = config["global_batch_info"].get("dp_size", 1) if objective.aggregation == "token-sum" else 1
    assert_close(out.loss * scale, outputs["loss"], "loss")
    assert_close(torch.autograd.grad(out.loss, logps)[0] * scale, tensor(outputs["grad_logps"]), "gradient")
    for name, value in outputs["metrics"].items():
        assert_close(out.metrics[name], value, name, 1e-6)


BYPASS = [c for c in VERL if c["config"]["loss_mode"] == "bypass_mode"]


@pytest.mark.parametrize("case", BYPASS, ids=lambda c: c["name"])
def test_verl_bypass_mode(case: dict[str, Any]) -> None:
    """Rollout correction and loss in one call at verl; here the correction's mask and weights go into the loss."""
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    correction = config["rollout_correction"]
    reinforce = correction["loss_type"] == "reinforce"
    objective = verl_objective(config, "reinforce" if reinforce else "ppo")
    logps, mask = tensor(inputs["log_probs"]).requires_grad_(), tensor(inputs["response_mask"])
    rollout = tensor(inputs["old_log_probs"])
    names = ("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize", "rollout_rs", "rollout_rs_threshold")
    how = RolloutCorrection.verl(**{name: correction[name] for name in names})
    made = rollout_correction(logps.detach(), rollout, how, mask=mask)
    out = fastrl.policy_loss(
        logps,
        objective,
        advantages=tensor(inputs["advantages"]),
        mask=made.mask,
        old_logps=rollout,
        importance_ratio=made.weights if reinforce else None,
    )
    assert_close(out.loss, outputs["loss"], "loss")
    assert_close(torch.autograd.grad(out.loss, logps)[0], tensor(outputs["grad_logps"]), "gradient")
    compared = {**made.metrics, **out.metrics}
    for name, value in outputs["metrics"].items():
        assert_close(compared[name], value, name, 1e-6)


# OpenRLHF ------------------------------------------------------------------------------------------------------------

OPENRLHF = [c for c in cases("openrlhf_losses.json") if c["function"] == "PolicyLoss"]


def test_all_of_openrlhf_is_there() -> None:
    assert Counter(c["config"]["policy_loss_type"] for c in OPENRLHF) == {"ppo": 15, "gspo": 3}


@pytest.mark.parametrize("case", OPENRLHF, ids=lambda c: c["name"])
def test_openrlhf(case: dict[str, Any]) -> None:
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    loss_type, level = config["policy_loss_type"], config["is_correction_level"]
    aggregation = "token-mean" if config["token_level_loss"] and loss_type == "ppo" else "seq-mean-token-mean"
    objective = PolicyObjective(
        loss_type=loss_type,
        preset="openrlhf",
        aggregation=aggregation,
        epsilon=config["clip_eps_low"],
        epsilon_high=config["clip_eps_high"],
        clip_ratio_c=config["dual_clip"],
    )
    total = config["batch_num_tokens" if aggregation == "token-mean" else "global_batch_size"]
    logps, mask = tensor(inputs["log_probs"]).requires_grad_(), tensor(inputs["action_mask"])
    old, rollout = tensor(inputs["old_log_probs"]), given(inputs, "rollout_log_probs")
    ratio, metrics = None, {}
    if level != "off":
        assert rollout is not None
        mode, gating = config["is_correction_mode"], config["is_correction_gating"]
        how = RolloutCorrection.openrlhf(level, mode, gating, tuple(config["is_correction_threshold"]))
        made = rollout_correction(old, rollout, how, mask=mask)
        assert made.weights is not None
        metrics = {"vllm_kl": made.metrics["rollout_corr/kl"]}
        if loss_type == "gspo":
            old = rollout  # OpenRLHF takes the ratio to the policy of the engine then
        elif mode == "mask":
            ratio = made.weights * made.mask
            share = "rollout_rs_masked_fraction" if level == "token" else "rollout_rs_seq_masked_fraction"
            metrics["is_filter_ratio"] = made.metrics[f"rollout_corr/{share}"]
        else:
            ratio = made.weights
            shares = ("rollout_is_ratio_fraction_high", "rollout_is_ratio_fraction_low")
            metrics["is_filter_ratio"] = torch.stack([made.metrics[f"rollout_corr/{name}"] for name in shares]).sum()
    out = fastrl.policy_loss(
        logps,
        objective,
        advantages=tensor(inputs["advantages"]),
        mask=mask,
        old_logps=old,
        importance_ratio=ratio,
        normalizer=None if total is None else total / config["dp_size"],
    )
    assert_close(out.loss, outputs["loss"], "loss")
    assert_close(torch.autograd.grad(out.loss, logps)[0], tensor(outputs["grad_logps"]), "gradient")
    metrics = {**out.metrics, **metrics}
    if loss_type == "gspo" and level != "off":  # its ppo_kl stays relative to the old policy
        metrics["ppo_kl"] = metrics["ppo_kl"] - metrics["vllm_kl"]
    assert {"clip_ratio", "ppo_kl"} <= outputs["metrics"].keys()
    for name, value in outputs["metrics"].items():
        assert_close(metrics[name], value, name, 1e-6)

"""Numbers that TRL 1.16's own code computed: GRPO losses with gradients and metrics, and advantages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl

GOLDEN = Path(__file__).parent.parent / "golden"
RTOL = 1e-6


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / name).read_text())["cases"]


LOSSES = [c for c in cases("trl_grpo_loss.json") if c["config"]["loss_type"] in ("grpo", "bnpo", "dr_grpo", "dapo")]


def tensor(values: Any) -> Tensor | None:
    """A float64 tensor; null is NaN."""
    if values is None:
        return None

    def numbers(x: Any) -> Any:
        return [numbers(y) for y in x] if isinstance(x, list) else math.nan if x is None else float(x)

    return torch.tensor(numbers(values), dtype=torch.float64)


def test_all_cases_are_there() -> None:
    assert len(LOSSES) == 94  # grpo 31, bnpo 14, dr_grpo 17, dapo 32


@pytest.mark.parametrize("case", LOSSES, ids=lambda c: c["name"])
def test_grpo_loss(case: dict[str, Any]) -> None:
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    state = inputs["state"]
    train = config["mode"] == "train"
    accumulation = state["current_gradient_accumulation_steps"] if train else 1
    mask = tensor(inputs["completion_mask"])
    assert mask is not None
    if "tool_mask" in inputs:
        mask = mask * tensor(inputs["tool_mask"])  # type: ignore[operator]
    # TRL's denominators in our terms: what the terms are summed over in the whole optimizer step.
    rows, tokens = mask.shape[0], mask.sum().clamp(min=1).item()
    normalizer = {
        "grpo": rows * accumulation,
        "bnpo": tokens * accumulation,
        "dr_grpo": rows * config["max_completion_length"] * accumulation,
        "dapo": max(1, inputs["num_items_in_batch"]) * (accumulation / config["steps_per_generation"] if train else 1),
    }[config["loss_type"]]

    adaptive = None
    coef = config.get("entropy_coef", 0.0)
    if config.get("use_adaptive_entropy"):
        adaptive = fastrl.AdaptiveEntropy(
            state.get("entropy_coef", coef),
            config.get("entropy_coef_min", 0.0),
            config.get("entropy_coef_max", 1.0),
            config.get("entropy_coef_delta", 0.005),
            config.get("entropy_target", 0.2),
            state.get("_last_world_entropy", math.inf),
        )
        coef = adaptive.apply_coef()
    names = [
        "loss_type",
        "epsilon",
        "epsilon_high",
        "delta",
        "beta",
        "importance_sampling_level",
        "top_entropy_quantile",
    ]
    names += ["off_policy_mask_threshold", "use_bias_correction_kl", "max_completion_length"]
    objective = fastrl.PolicyObjective(entropy_coef=coef, **{k: config[k] for k in names if k in config})

    logps, entropy = tensor(inputs["logps"]), tensor(inputs["entropies"])
    assert logps is not None and entropy is not None
    logps.requires_grad_()
    entropy.requires_grad_()
    corrected = config.get("use_vllm") and config.get("vllm_importance_sampling_correction", True)
    bonus_mask = mask if "entropy_mask" not in outputs else tensor(outputs["entropy_mask"])
    assert bonus_mask is not None
    out = fastrl.policy_loss(
        logps,
        objective,
        advantages=tensor(inputs["advantages"]),  # type: ignore[arg-type]
        mask=mask,
        old_logps=tensor(inputs.get("old_per_token_logps")),
        ref_logps=tensor(inputs.get("ref_per_token_logps")),
        entropy=entropy,
        importance_ratio=tensor(inputs["importance_sampling_ratio"]) if corrected else None,
        sampling_logps=tensor(inputs.get("sampling_per_token_logps")),
        normalizer=normalizer,
        entropy_normalizer=bonus_mask.sum().clamp(min=1).item() * accumulation,
    )
    grads = torch.autograd.grad(out.loss, [logps, entropy], allow_unused=True)
    close = {"rtol": RTOL, "atol": 1e-12}
    torch.testing.assert_close(out.loss.detach(), tensor(outputs["loss"]), **close)  # type: ignore[arg-type]
    torch.testing.assert_close(grads[0], tensor(outputs["grad_logps"]), **close)  # type: ignore[arg-type]
    if "grad_entropies" in outputs:
        got = torch.zeros_like(entropy) if grads[1] is None else grads[1]
        torch.testing.assert_close(got, tensor(outputs["grad_entropies"]), **close)  # type: ignore[arg-type]
    else:
        assert grads[1] is None or not grads[1].any()

    compared = set()
    for name, want in outputs["metrics"].items():
        if name == "entropy_coef":
            continue
        got = out.metrics[name]
        if name == "policy_loss" and config["loss_type"] != "dapo":
            got = got * accumulation
        wanted = torch.tensor(math.nan if want is None else want, dtype=torch.float64)
        torch.testing.assert_close(got.double(), wanted, rtol=RTOL, atol=1e-7, equal_nan=True)
        compared.add(name)
    assert {"entropy", "clip_ratio/region_mean"} <= compared

    if adaptive is not None and train:
        window = state.get("entropy_window_stats", [0.0, 0.0])
        window = [window[0] + (entropy.detach() * bonus_mask).sum().item(), window[1] + bonus_mask.sum().item()]
        after = outputs["state_after"]
        if state.get("sync_gradients", True):
            adaptive.update(*window)
            assert adaptive.last_entropy == pytest.approx(after["last_world_entropy"], rel=RTOL)
        assert adaptive.coef == pytest.approx(after["entropy_coef"], rel=RTOL)
        if "entropy_coef" in outputs["metrics"]:
            assert adaptive.coef == pytest.approx(outputs["metrics"]["entropy_coef"], rel=RTOL)


SCORING = cases("trl_grpo_scoring.json")


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("case", SCORING, ids=lambda c: c["name"])
def test_grpo_advantages(case: dict[str, Any], backend: str) -> None:
    config, outputs = case["config"], case["outputs"]
    rewards = tensor(case["inputs"]["rewards_per_func"])
    assert rewards is not None
    group = config["num_generations_eval"] if config["mode"] == "eval" else config["num_generations"]
    scale = {True: "group", False: "none"}.get(config["scale_rewards"], config["scale_rewards"])
    advantages, total = fastrl.combine_rewards(
        rewards,
        tensor(config["reward_weights"]),
        torch.arange(rewards.shape[0]) // group,
        aggregation=config["multi_objective_aggregation"],
        scale=scale,
        backend=backend,
    )
    torch.testing.assert_close(advantages, tensor(outputs["advantages"]), rtol=RTOL, atol=1e-9)  # type: ignore[arg-type]
    metrics = outputs["metrics"]
    assert total.nanmean().item() == pytest.approx(metrics["reward"], rel=RTOL, abs=1e-9)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("case", cases("trl_rloo.json"), ids=lambda c: c["name"])
def test_leave_one_out(case: dict[str, Any], backend: str) -> None:
    """RLOO's advantages: our leave-one-out baseline on its shaped rewards, then its batch normalisation."""
    config, inputs = case["config"], case["inputs"]
    per_func, weights = tensor(inputs["rewards_per_func"]), tensor(config.get("reward_weights"))
    assert per_func is not None
    rewards = (
        (per_func * (1.0 if weights is None else weights)).nansum(-1).masked_fill(per_func.isnan().all(-1), torch.nan)
    )
    if config.get("reward_clip_range"):
        rewards = rewards.clamp(*config["reward_clip_range"])
    if config.get("beta", 0.0) != 0.0:
        gap = tensor(inputs["old_per_token_logps"]) - tensor(inputs["ref_per_token_logps"])  # type: ignore[operator]
        rewards = rewards - config["beta"] * (gap * tensor(inputs["completion_mask"])).sum(-1)
    groups = torch.arange(rewards.shape[0]) // config["num_generations"]
    advantages = fastrl.group_advantages(rewards, groups, baseline="leave_one_out", scale="none", backend=backend)
    if config.get("normalize_advantages"):
        # TRL leaves a reward that is alone in its group out of the batch statistics (its advantage is 0/0 there).
        partners = torch.stack([(~rewards[groups == g].isnan()).sum() for g in groups])
        scored = advantages.masked_fill(rewards.isnan() | (partners < 2), torch.nan)
        advantages = fastrl.group_advantages(scored, torch.zeros_like(groups), backend=backend)
    torch.testing.assert_close(advantages, tensor(case["outputs"]["advantages"]), rtol=RTOL, atol=1e-9)  # type: ignore[arg-type]

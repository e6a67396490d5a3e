"""Advantages against numbers that verl's, OpenRLHF's and TRL's own code computed: every case of their files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.objectives.advantages import group_statistics
from fastrl.objectives.estimators import ESTIMATORS, compute_advantages
from fastrl.objectives.kl import AdaptiveKL
from fastrl.objectives.reward_shaping import overlong_penalty, stop_properly_penalty, token_rewards

GOLDEN = Path(__file__).parent.parent / "golden"
BACKENDS = ("reference", "cpu")


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / name).read_text())["cases"]


def tensor(values: Any) -> Tensor:
    """A float64 tensor; null is NaN."""

    def numbers(x: Any) -> Any:
        return [numbers(y) for y in x] if isinstance(x, list) else math.nan if x is None else float(x)

    return torch.tensor(numbers(values), dtype=torch.float64)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the packed tokens are in the padded batch (a row's tail after its mask is left out), and their offsets."""
    lengths = torch.where(mask.any(-1), mask.shape[1] - mask.flip(-1).int().argmax(-1), 0)
    return torch.arange(mask.shape[1]) < lengths[:, None], torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


VERL = cases("verl_advantages.json")
VERL_NAMES = {
    "compute_gae_advantage_return": "gae",
    "compute_grpo_outcome_advantage": "grpo",
    "compute_grpo_vectorized_outcome_advantage": "grpo_vectorized",
    "compute_grpo_passk_outcome_advantage": "grpo_passk",
    "compute_reinforce_plus_plus_baseline_outcome_advantage": "reinforce_plus_plus_baseline",
    "compute_rloo_outcome_advantage": "rloo",
    "compute_rloo_vectorized_outcome_advantage": "rloo_vectorized",
    "compute_opo_outcome_advantage": "opo",
    "compute_gpg_outcome_advantage": "gpg",
    "compute_gdpo_outcome_advantage": "gdpo",
    "compute_reinforce_plus_plus_outcome_advantage": "reinforce_plus_plus",
    "compute_remax_outcome_advantage": "remax",
    "compute_optimal_token_baseline_advantage": "optimal_token_baseline",
    "compute_multi_turn_optimal_token_baseline_advantage": "tir_optimal_token_baseline",
}
OUTCOME = {
    "grpo",
    "grpo_vectorized",
    "grpo_passk",
    "reinforce_plus_plus_baseline",
    "rloo",
    "rloo_vectorized",
    "opo",
    "gpg",
}
WHITENED = ("gae", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo")


def test_every_case_and_name_is_there() -> None:
    assert len(VERL) == 53 and {c["function"] for c in VERL} == set(VERL_NAMES)
    assert set(VERL_NAMES.values()) == set(ESTIMATORS["verl"])
    assert {c["config"]["estimator"] for c in OPENRLHF} == set(ESTIMATORS["openrlhf"])
    assert len(OPENRLHF) == 21 and len(CONTROLLERS) == 2


def verl_call(case: dict[str, Any]) -> tuple[str, Tensor, dict[str, Tensor], dict[str, Any]]:
    """Name, rewards, per-token inputs, options."""
    name, config, inputs = VERL_NAMES[case["function"]], case["config"], case["inputs"]
    rewards = tensor(inputs["token_level_rewards"])
    tokens: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    if name in OUTCOME:
        rewards = rewards.sum(-1)  # verl's score counts what stands outside the mask too, ours does not
    if name == "gdpo":
        keys = config["gdpo_reward_keys"]
        columns = [tensor(inputs["reward_components"][key]) for key in keys] if keys else [rewards.sum(-1)]
        rewards = torch.stack(columns, -1)
        if config["gdpo_reward_weights"]:
            options["weights"] = tensor(config["gdpo_reward_weights"])
    if "index" in inputs:
        options["group_ids"] = torch.tensor(inputs["index"])
    if "norm_adv_by_std_in_grpo" in config:
        options["scale"] = "group" if config["norm_adv_by_std_in_grpo"] else "none"
    for theirs, ours in (("epsilon", "eps"), ("handle_zero_tail", "zero_tail")):
        if theirs in config:
            options[ours] = config[theirs]
    for key in ("gamma", "lam", "f_norm"):
        if key in config:
            options[key] = config[key]
    if "reward_baselines" in inputs:
        options["baseline_rewards"] = tensor(inputs["reward_baselines"])
    for theirs, ours in (
        ("values", "values"),
        ("old_log_probs", "logps"),
        ("sum_pi_squared", "sum_pi_squared"),
        ("rollout_is_weights", "importance_weights"),
    ):
        if inputs.get(theirs) is not None and name in ("gae", "optimal_token_baseline", "tir_optimal_token_baseline"):
            tokens[ours] = tensor(inputs[theirs])
    return name, rewards, tokens, options


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", VERL, ids=lambda c: c["name"])
def test_verl(case: dict[str, Any], backend: str) -> None:
    name, rewards, tokens, options = verl_call(case)
    mask = tensor(case["inputs"]["response_mask"])
    inside = mask.bool()
    # Inside the mask: outside it verl reports returns, raw values or whitened zeros, which nothing may use; ours are 0.
    # verl's whitening adds 1e-8 to the number of tokens, ours does not, so that equal returns give exactly 0.
    tolerance = 1e-5 if case["precision"] == "float32" else 1e-8 if name in WHITENED else 1e-9
    want = [tensor(case["outputs"][key])[inside] for key in ("advantages", "returns")]
    padded = compute_advantages(name, rewards, mask, backend=backend, **tokens, **options)
    for got, expected in zip(padded, want, strict=True):
        close(got[inside], expected, tolerance)
        assert not got[~inside].any() and not got.requires_grad

    where, offsets = pack(inside)
    per_token = rewards.shape == mask.shape and name != "gdpo"
    packed = compute_advantages(
        name, rewards[where] if per_token else rewards, mask[where], cu_seqlens=offsets, backend=backend,
        **{key: x[where] for key, x in tokens.items()}, **options,
    )  # fmt: skip
    for got, expected in zip(packed, padded, strict=True):
        close(got, expected[where], 1e-12)


def test_dense_rewards_outside_the_mask_are_not_ours() -> None:
    """The one place where verl's outcome estimators read what the mask leaves out."""
    case = next(c for c in VERL if c["name"] == "rloo_even_multiturn_dense")
    rewards, mask = tensor(case["inputs"]["token_level_rewards"]), tensor(case["inputs"]["response_mask"])
    groups = torch.tensor(case["inputs"]["index"])
    assert rewards[mask == 0].any()
    ours, _ = compute_advantages("rloo", rewards, mask, group_ids=groups)
    clean, _ = compute_advantages("rloo", (rewards * mask).sum(-1), mask, group_ids=groups)
    close(ours, clean, 1e-12)
    assert (ours - tensor(case["outputs"]["advantages"]))[mask == 1].abs().max() > 0.1
    poisoned, _ = compute_advantages("rloo", rewards.masked_fill(mask == 0, math.nan), mask, group_ids=groups)
    assert torch.equal(poisoned, ours)


OPENRLHF = [c for c in cases("openrlhf_advantages.json") if "estimator" in c["config"]]
CONTROLLERS = [c for c in cases("openrlhf_advantages.json") if "estimator" not in c["config"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", OPENRLHF, ids=lambda c: c["name"])
def test_openrlhf(case: dict[str, Any], backend: str) -> None:
    """All micro-batches as one packed batch: baselines and whitening are over the whole."""
    config, experiences = case["config"], case["inputs"]["experiences"]
    outputs = case["outputs"]["experiences"]

    def sequence(key: str) -> Tensor:
        return torch.cat([tensor(e[key]) for e in experiences])

    def token(key: str, source: list[dict[str, Any]] = experiences) -> Tensor:
        return torch.cat([tensor(e[key]).flatten() for e in source])

    rewards = sequence("rewards")
    widths = torch.tensor([len(row) for e in experiences for row in e["action_mask"]])
    offsets = torch.cat([widths.new_zeros(1), widths.cumsum(0)])
    mask, kl = token("action_mask"), token("kl")
    if config.get("overlong_buffer_len"):
        lengths, buffer = sequence("response_length"), config["overlong_buffer_len"]
        penalty = overlong_penalty(lengths, config["max_new_tokens"], buffer, factor=config["overlong_penalty_factor"])
        rewards = rewards + penalty
    if config.get("stop_properly_penalty_coef") is not None:
        rewards = stop_properly_penalty(rewards, sequence("truncated"), config["stop_properly_penalty_coef"])
    if "rewards_after_penalty" in outputs[0]:
        close(rewards, torch.cat([tensor(o["rewards_after_penalty"]) for o in outputs]), 1e-12)

    estimator = config["estimator"]
    options: dict[str, Any] = {"kl_coef": config["kl_coef"], "clip_range": config["reward_clip_range"]}
    if config["kl_coef"]:
        options["kl"] = kl
    groups = sequence("index").long() // config["n_samples_per_prompt"]
    if estimator == "gae":
        options |= {"values": token("values"), "lam": config["lambd"]}
    if estimator in ("gae", "reinforce"):
        options["gamma"] = config["gamma"]  # OpenRLHF forces 1 for the others
    if config["no_std_norm"]:
        options["divide_by_std"] = False
    got = compute_advantages(
        estimator, rewards, mask, preset="openrlhf", group_ids=groups, cu_seqlens=offsets, backend=backend, **options
    )
    inside = mask.bool()
    tolerance = 1e-5 if case["precision"] == "float32" else 1e-9
    for ours, key in zip(got, ("advantages", "returns"), strict=True):
        close(ours[inside], token(key, outputs)[inside], tolerance)
        assert not ours[~inside].any()

    if "group_reward_std" in outputs[0]:
        want = torch.cat([tensor(o["group_reward_std"]) for o in outputs])
        close(group_statistics(rewards, groups)[1], want, 1e-9)
    if estimator in ("gae", "reinforce"):  # no baseline: the shaped return is the penalised reward's
        shaped = token_rewards(rewards, torch.ones_like(mask), cu_seqlens=offsets, **options_of_shaping(options))
        sums = torch.stack([x.sum() for x in shaped.split(widths.tolist())])
        close(sums, torch.cat([tensor(o["shaped_return_sum"]) for o in outputs]), tolerance)


def options_of_shaping(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in ("kl", "kl_coef", "clip_range") if key in options}


@pytest.mark.parametrize("case", CONTROLLERS, ids=lambda c: c["name"])
def test_kl_controller(case: dict[str, Any]) -> None:
    config = case["config"]
    controller = AdaptiveKL(coef=config["init_kl_coef"], target=config["target"], horizon=config["horizon"])
    for step, want in zip(case["inputs"]["steps"], case["outputs"]["values_after_each_update"], strict=True):
        controller.update(step["current"], step["n_steps"])
        assert controller.coef == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("case", cases("trl_rloo.json"), ids=lambda c: c["name"])
def test_trl_rloo(case: dict[str, Any]) -> None:
    """From raw rewards: weigh, clip, take the KL off, leave one out, normalise."""
    config, inputs = case["config"], case["inputs"]
    per_function, mask = tensor(inputs["rewards_per_func"]), tensor(inputs["completion_mask"])
    weights = tensor(config["reward_weights"]) if config.get("reward_weights") else torch.ones(per_function.shape[1])
    scores = (per_function * weights).nansum(-1).masked_fill(per_function.isnan().all(-1), math.nan)
    shaping: dict[str, Any] = {"clip_range": config.get("reward_clip_range"), "kl_coef": config.get("beta", 0.0)}
    if shaping["kl_coef"]:
        shaping["kl"] = tensor(inputs["old_per_token_logps"]) - tensor(inputs["ref_per_token_logps"])
    shaped = token_rewards(scores, mask, **shaping)
    groups = torch.arange(len(scores)) // config["num_generations"]
    advantages, _ = compute_advantages(
        "rloo", shaped, mask, preset="trl", group_ids=groups, normalize=bool(config.get("normalize_advantages"))
    )
    want = torch.where(mask != 0, tensor(case["outputs"]["advantages"])[:, None], 0.0)
    close(advantages, want, 1e-9)

"""Numbers of verl's and OpenRLHF's functions on tokens: log-probabilities, shaped rewards, whitening."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl.objectives.reward_shaping import token_rewards
from fastrl.objectives.token_advantages import whiten

GOLDEN = Path(__file__).parent.parent / "golden"
VERL = json.loads((GOLDEN / "verl_kl_value_entropy.json").read_text())["cases"]
OPENRLHF = json.loads((GOLDEN / "openrlhf_losses.json").read_text())["cases"]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cases(*functions: str) -> list[dict[str, Any]]:
    return [case for case in VERL + OPENRLHF if case["function"] in functions]


def test_all_cases_are_there() -> None:
    assert len(cases("logprobs_from_logits", "log_probs_from_logits")) == 3
    assert [len(cases(name)) for name in ("compute_reward", "masked_normalize", "masked_whiten")] == [3, 2, 2]


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("case", cases("logprobs_from_logits", "log_probs_from_logits"), ids=lambda c: c["name"])
def test_log_probabilities(case: dict[str, Any], backend: str) -> None:
    logits, labels = tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["labels"])
    temperature = case["config"].get("temperature", 1.0)
    stats = fastrl.logprobs_from_logits(logits, labels, temperature=temperature, entropy=True, backend=backend)
    torch.testing.assert_close(stats.logps, tensor(case["outputs"]["log_probs"]), **EXACT)
    if "entropy" in case["outputs"]:  # OpenRLHF's leaves the temperature out
        plain = fastrl.logprobs_from_logits(logits, labels, entropy=True, backend=backend)
        torch.testing.assert_close(plain.entropy, tensor(case["outputs"]["entropy"]), **EXACT)
        assert (temperature == 1) == torch.allclose(stats.entropy, plain.entropy)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", cases("compute_reward"), ids=lambda c: c["name"])
def test_rewards_with_kl(case: dict[str, Any]) -> None:
    """OpenRLHF takes the KL off outside the mask too, and rewards the last position of a sequence without a token."""
    config, inputs = case["config"], case["inputs"]
    mask, coef = tensor(inputs["action_mask"]) != 0, max(config["kl_coef"], 0.0)
    clip = config["reward_clip_range"]
    got = token_rewards(
        tensor(inputs["rewards"]),
        mask,
        kl=tensor(inputs["kl"]) if coef > 0 else None,
        kl_coef=coef,
        clip_range=None if clip is None else tuple(clip),
    )
    wanted = tensor(case["outputs"]["token_rewards"])
    torch.testing.assert_close(got[mask], wanted[mask], **EXACT)
    assert not got[~mask].any()


@pytest.mark.parametrize("case", cases("masked_normalize"), ids=lambda c: c["name"])
def test_masked_normalize(case: dict[str, Any]) -> None:
    """OpenRLHF normalises along a dimension; `whiten` over all it is given, here one row or column."""
    dim, eps = case["config"]["dim"], case["config"]["eps"]
    values, mask = tensor(case["inputs"]["values"]), tensor(case["inputs"]["mask"])
    other = 1 - dim
    pairs = zip(values.unbind(other), mask.unbind(other), strict=True)
    got = torch.stack([whiten(x, m, preset="openrlhf", eps=eps) for x, m in pairs], other)
    torch.testing.assert_close(got, tensor(case["outputs"]["normalized"]), **EXACT)


@pytest.mark.parametrize("case", cases("masked_whiten"), ids=lambda c: c["name"])
def test_masked_whiten(case: dict[str, Any]) -> None:
    values, mask = tensor(case["inputs"]["values"]), tensor(case["inputs"]["mask"]) != 0
    got = whiten(values, mask, preset="verl", shift_mean=case["config"]["shift_mean"])
    wanted = tensor(case["outputs"]["whitened"])
    # verl adds 1e-8 to the count in the mean too.
    torch.testing.assert_close(got[mask], wanted[mask], rtol=1e-6, atol=1e-8)
    assert not got[~mask].any()

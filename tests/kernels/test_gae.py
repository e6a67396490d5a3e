"""fastrl.gae on every backend that runs here: numbers of verl's and OpenRLHF's own code, masks, edges, operator."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl_kernels import ops, reference

GOLDEN = Path(__file__).parent.parent / "golden"
BACKENDS = ("reference", "cpu")


def cases(name: str) -> list[dict[str, Any]]:
    return [c for c in json.loads((GOLDEN / name).read_text())["cases"] if c["name"].startswith("gae")]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_hand(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, through: bool) -> Tensor:
    """The definition as a sum, without a recurrence: A_t = sum over later steps of (gamma lam)^k delta."""
    out = torch.zeros_like(rewards)
    for row in range(rewards.shape[0]):
        counts = [t for t in range(rewards.shape[1]) if mask[row, t] or through]
        r = [rewards[row, t].item() if mask[row, t] else 0.0 for t in counts]
        v = [values[row, t].item() if mask[row, t] else 0.0 for t in counts] + [0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(counts))]
        for i, t in enumerate(counts):
            out[row, t] = math.fsum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:])) if mask[row, t] else 0.0
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases("verl_advantages.json"), ids=lambda c: c["name"])
def test_verl(case: dict[str, Any], backend: str) -> None:
    """verl skips masked steps; it whitens the advantages over the mask."""
    inputs, mask = case["inputs"], tensor(case["inputs"]["response_mask"])
    rewards, values = tensor(inputs["token_level_rewards"]), tensor(inputs["values"])
    advantages, returns = fastrl.gae(rewards, values, mask, **case["config"], backend=backend)
    count, inside = mask.sum(), mask.bool()
    mean = (advantages * mask).sum() / (count + 1e-8)
    variance = ((advantages - mean).square() * mask).sum() / (count + 1e-8) * count / (count - 1)
    whitened = (advantages - mean) / (variance + 1e-8).sqrt()
    for got, want in ((whitened, case["outputs"]["advantages"]), (returns, case["outputs"]["returns"])):
        torch.testing.assert_close(got[inside], tensor(want)[inside], rtol=1e-9, atol=1e-9)
    assert not advantages[~inside].any() and not returns[~inside].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases("openrlhf_advantages.json"), ids=lambda c: c["name"])
def test_openrlhf(case: dict[str, Any], backend: str) -> None:
    """OpenRLHF discounts through masked steps; the reward goes on the last token, the KL on all, then it whitens."""
    config, made = case["config"], []
    for experience, outputs in zip(case["inputs"]["experiences"], case["outputs"]["experiences"], strict=True):
        mask = tensor(experience["action_mask"])
        final = tensor(outputs.get("rewards_after_penalty", experience["rewards"]))
        if config["reward_clip_range"]:
            final = final.clamp(*config["reward_clip_range"])
        length = mask.shape[1]
        last = torch.where(mask.any(-1), length - 1 - mask.flip(-1).argmax(-1), length - 1)
        rewards = -config["kl_coef"] * tensor(experience["kl"])
        rewards[torch.arange(len(last)), last] += final
        advantages, returns = fastrl.gae(
            rewards, tensor(experience["values"]), mask, gamma=config["gamma"], lam=config["lambd"], through_mask=True,
            backend=backend,
        )  # fmt: skip
        inside = mask.bool()
        torch.testing.assert_close(returns[inside], tensor(outputs["returns"])[inside], rtol=1e-5, atol=1e-5)
        made.append((advantages[inside], tensor(outputs["advantages"])[inside]))
    ours, theirs = (torch.cat(x) for x in zip(*made, strict=True))
    ours = ours - ours.mean()
    if not config["no_std_norm"]:
        ours = ours / ours.square().mean().clamp(min=1e-8).sqrt()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_all_golden_cases_are_there() -> None:
    assert len(cases("verl_advantages.json")) == 7 and len(cases("openrlhf_advantages.json")) >= 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("through", (False, True))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.9), (0.9, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("tokens", (1, 2, 37, 300))
def test_padding_and_holes(tokens: int, gamma: float, lam: float, through: bool, backend: str) -> None:
    rewards, values = torch.randn(2, 6, tokens, dtype=torch.float64)
    mask = torch.rand(6, tokens) < torch.tensor([1.0, 0.5, 0.02, 0.0, 0.9, 0.9])[:, None]
    mask[4, tokens // 2 :] = False  # padding on the right
    mask[5, : tokens // 2] = False  # and on the left
    rewards[~mask], values[~mask] = math.nan, math.inf
    want = by_hand(rewards, values, mask, gamma, lam, through)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        advantages, returns = fastrl.gae(
            rewards.to(dtype), values.to(dtype), mask.int(), gamma=gamma, lam=lam, through_mask=through, backend=backend
        )
        assert advantages.dtype == returns.dtype == dtype
        scale = max(1.0, want.abs().max().item())
        assert (advantages.double() - want).abs().max().item() <= tolerance * scale
        assert (returns.double() - torch.where(mask, want + values, 0.0)).abs().max().item() <= 2 * tolerance * scale
        assert not advantages[~mask].any() and not returns[~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges(backend: str) -> None:
    for shape in ((0, 3), (3, 0)):
        x = torch.zeros(shape)
        assert [y.shape for y in fastrl.gae(x, x, x, backend=backend)] == [shape, shape]
    rewards, values = torch.randn(3, 40), torch.randn(3, 40)
    rewards[1, 20] = math.nan  # stays in its row, and reaches the earlier tokens only
    advantages, _ = fastrl.gae(rewards, values, torch.ones(3, 40), gamma=0.9, backend=backend)
    assert advantages[1, :21].isnan().all() and advantages[1, 21:].isfinite().all()
    assert advantages[[0, 2]].isfinite().all()


def test_strides_dtypes_gradients_and_inputs() -> None:
    rewards, values, mask = torch.randn(8, 5).t(), torch.randn(5, 16)[:, ::2], (torch.rand(8, 5) < 0.8).t()
    copies = [x.clone() for x in (rewards, values, mask)]
    want = fastrl.gae(*(x.contiguous() for x in (rewards, values, mask)))
    got = fastrl.gae(rewards, values.requires_grad_(), mask)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((rewards, values, mask), copies, strict=True))
    half = fastrl.gae(rewards.bfloat16(), values.detach().half(), mask)
    same = fastrl.gae(rewards.bfloat16().float(), values.detach().half().float(), mask)
    assert half[0].dtype == torch.float32 and all(torch.equal(a, b) for a, b in zip(half, same, strict=True))
    assert fastrl.gae(rewards.double(), values, mask)[1].dtype == torch.float64


def test_any_number_of_threads_gives_the_same_bits() -> None:
    rewards, values, mask = torch.randn(64, 700), torch.randn(64, 700), torch.rand(64, 700) < 0.9
    threads = torch.get_num_threads()
    made = []
    try:
        for count in (1, 3, 1):
            torch.set_num_threads(count)
            made.append(torch.stack(fastrl.gae(rewards, values, mask, backend="cpu")))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_operator_and_compile() -> None:
    rewards, values, mask = torch.randn(3, 7), torch.randn(3, 7), torch.rand(3, 7) < 0.7
    torch.library.opcheck(ops.gae, (rewards, values, mask, 0.9, 0.8, False, "cpu"))
    compiled = torch.compile(lambda r: fastrl.gae(r * 1.0, values, mask)[0] + 1, fullgraph=True)
    torch.testing.assert_close(compiled(rewards), reference.gae(rewards, values, mask, 1.0, 0.95, False)[0] + 1)


def test_bad_arguments_are_named() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for error, match, call in [
        (ValueError, r"gamma: expected a number in \[0, 1\], got 1.5", lambda: fastrl.gae(x, x, mask, gamma=1.5)),
        (ValueError, "lam: expected", lambda: fastrl.gae(x, x, mask, lam=-0.1)),
        (ValueError, r"rewards: expected shape \(B, T\), got \(3,\)", lambda: fastrl.gae(x[0], x, mask)),
        (ValueError, r"values: expected shape \(2, 3\).*got \(2, 2\)", lambda: fastrl.gae(x, x[:, :2], mask)),
        (ValueError, "mask: expected shape", lambda: fastrl.gae(x, x, mask[:1])),
        (ValueError, r"mask: expected a \(B, T\) tensor, got None", lambda: fastrl.gae(x, x, None)),  # type: ignore[arg-type]
        (TypeError, "rewards: expected one of", lambda: fastrl.gae(x.long(), x, mask)),
        (TypeError, "values: expected one of", lambda: fastrl.gae(x, x.long(), mask)),
        (ValueError, "values: expected on cpu", lambda: fastrl.gae(x, x.to("meta"), mask)),
        (ValueError, "backend must be", lambda: fastrl.gae(x, x, mask, backend="gpu")),
    ]:
        with pytest.raises(error, match=match):
            call()

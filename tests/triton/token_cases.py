"""policy_terms and gae in Triton's interpreter: the definition under autograd, and a loop over the tokens."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl import PolicyObjective
from fastrl_kernels import TokenBatch, reference
from fastrl_kernels.objective import coefficients
from fastrl_kernels.triton import gae, policy_terms

OPTIONS = [
    {},
    {"beta": 0.3, "kl_estimator": "k1", "delta": 1.1, "loss_type": "grpo"},
    {"beta": 0.3, "kl_estimator": "k2", "entropy_coef": 0.07, "epsilon_high": 0.4},
    {"beta": 0.3, "kl_estimator": "k3", "entropy_coef": -0.02, "epsilon": 0.0},
    {"beta": 0.3, "kl_estimator": "k3", "use_bias_correction_kl": False, "top_entropy_quantile": 0.5},
    {"beta": 0.3, "kl_estimator": "k2", "use_bias_correction_kl": False, "off_policy_mask_threshold": 0.05},
]


def batch(b: int, t: int, dtype: torch.dtype, per_token: bool = False) -> dict[str, Any]:
    """Uneven lengths, a hole, a masked row; NaN and inf outside the mask."""
    generator = torch.Generator().manual_seed(b + t)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(t) < torch.tensor([t, t // 2, 0, 1])[torch.arange(b) % 4, None]
    mask[0, t // 3] = False
    logps, wrong = -3 * rand(b, t), ~mask

    def near(spread: float) -> Tensor:
        return (logps + spread * (rand(b, t) - 0.5)).masked_fill(wrong, math.nan).to(dtype)

    return {
        "logps": logps.masked_fill(wrong, -math.inf).to(dtype),
        "entropy": rand(b, t).masked_fill(wrong, math.nan).to(dtype),
        "advantages": (rand(b, t) if per_token else rand(b)).sub(0.4).to(dtype),
        "mask": mask,
        "old_logps": near(1.5),
        "ref_logps": near(2.0),
        "importance_ratio": (rand(b, t if per_token else 1) + 0.5).to(dtype),
    }


def run(objective: PolicyObjective, inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    arguments = dict(inputs)
    leaves = [
        None if x is None else x.clone().requires_grad_() for x in (arguments.pop("logps"), arguments.pop("entropy"))
    ]
    out = fastrl.policy_loss(leaves[0], objective, entropy=leaves[1], backend=backend, **arguments)
    given = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(out.loss * 1.7, given, allow_unused=True)
    made = {str(i): torch.zeros(()) if g is None else g for i, g in enumerate(grads)}
    return {"loss": out.loss.detach(), **made, **out.metrics}


def agree(objective: PolicyObjective, inputs: dict[str, Any], tolerance: float) -> None:
    ours, again, truth = (run(objective, inputs, backend) for backend in ("triton", "triton", "reference"))
    assert list(ours) == list(truth)
    for name, value in truth.items():
        assert ours[name].dtype == value.dtype, name
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
        torch.testing.assert_close(ours[name], again[name], rtol=0, atol=0, equal_nan=True)


# 5: less than a block; 128 and 129: a block, and one token more.
@pytest.mark.parametrize("shape", [(5, 5), (2, 128), (4, 129)], ids=str)
@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_policy_terms(options: dict[str, Any], level: str, shape: tuple[int, int]) -> None:
    objective = PolicyObjective(importance_sampling_level=level, **options)
    for per_token in (False, True):
        inputs = batch(*shape, torch.float64, per_token)
        agree(objective, inputs, 1e-11)
        agree(objective, inputs | {"old_logps": None, "importance_ratio": None}, 1e-11)


@pytest.mark.parametrize("level", ("token", "sequence"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_several_blocks(level: str, dtype: torch.dtype) -> None:
    objective = PolicyObjective(beta=0.1, entropy_coef=0.1, delta=1.2, importance_sampling_level=level)
    agree(objective, batch(3, 1100, dtype), 1e-11 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"epsilon": 0.0, "delta": 1.0}], ids=str)
def test_ties_at_a_clip_bound(options: dict[str, float]) -> None:
    inputs = batch(4, 6, torch.float64) | {"mask": torch.ones(4, 6), "importance_ratio": None, "entropy": None}
    inputs["logps"] = -torch.ones(4, 6, dtype=torch.float64)
    inputs["old_logps"] = inputs["ref_logps"] = inputs["logps"].clone()
    inputs["old_logps"][:, 0] = -2.0
    agree(PolicyObjective(**options), inputs, 1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_infinities_and_nan_inside_the_mask(options: dict[str, Any]) -> None:
    inf, nan = math.inf, math.nan
    rows = [
        ([-inf, -1.0], [-1.0, -1.0]),
        ([-1.0, -1.0], [-inf, -1.0]),
        ([-inf, -1.0], [-inf, -1.0]),
        ([nan, -1.0], [-1.0, -1.0]),
    ]
    options = {k: v for k, v in options.items() if k not in ("entropy_coef", "top_entropy_quantile")}
    for (logps, old), advantage in itertools.product(rows, (1.0, -1.0, 0.0)):
        given = {"logps": torch.tensor([logps], dtype=torch.float64), "old_logps": torch.tensor([old]), "entropy": None}
        given |= {"mask": torch.ones(1, 2), "advantages": torch.tensor([advantage]), "ref_logps": torch.zeros(1, 2)}
        agree(PolicyObjective(**options), given, 1e-11)


def test_a_chunks_coefficients() -> None:
    for dtype, n in itertools.product((torch.float32, torch.float64), (1, 100, 1300)):
        vectors = torch.rand(7, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
        logps, entropy, advantages, old, ref, gate, weight = vectors
        tokens = TokenBatch(-logps, entropy, advantages - 0.5, -old, -ref, gate)
        objective = PolicyObjective(beta=0.2)
        for bonus in (None, gate * 0.1):
            ours = coefficients(objective, tokens, weight, bonus, policy_terms)
            for a, b in zip(ours, coefficients(objective, tokens, weight, bonus), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11 if dtype == torch.float64 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 1)], ids=str)
def test_empty_and_tiny(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape, dtype=torch.float64)
    inputs = {
        "logps": x,
        "entropy": x,
        "old_logps": x,
        "ref_logps": x,
        "mask": x == 0,
        "advantages": x[:, :1].sum(-1) + 1,
    }
    agree(PolicyObjective(beta=0.1, entropy_coef=0.1), inputs, 0.0)
    assert [y.shape for y in gae(x, x, x == 0, 1.0, 0.95, False)] == [shape, shape]


# 128, 129: a block of tokens, and one more; 1100: three blocks of 512 (fp32) or five of 256 (fp64).
@pytest.mark.parametrize(
    ("gamma", "lam", "tokens"),
    [
        *itertools.product([0.97], [0.9], [1, 2, 37, 128, 129, 1100]),
        *itertools.product([1.0], [0.95, 1.0], [37, 129]),
        *[(0.9, 0.0, 37), (0.0, 1.0, 37)],
    ],
)
@pytest.mark.parametrize("through_mask", (False, True))
def test_gae(gamma: float, lam: float, through_mask: bool, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    rewards, values = torch.randn(2, 5, tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, tokens, generator=generator) < torch.tensor([1.0, 0.5, 0.01, 0.0, 0.9])[:, None]
    mask[4, tokens // 2 :] = False  # right padding, which spans whole blocks
    rewards[~mask], values[~mask] = math.nan, math.inf
    truth = reference.gae(rewards, values, mask, gamma, lam, through_mask)
    for dtype in (torch.float64, torch.float32):
        ours = gae(rewards.to(dtype), values.to(dtype), mask, gamma, lam, through_mask)
        again = gae(rewards.to(dtype), values.to(dtype), mask, gamma, lam, through_mask)
        for a, b, c in zip(ours, truth, again, strict=True):
            assert a.dtype == dtype and torch.equal(a, c)
            scale = max(1.0, b.abs().max().item())
            assert (a.double() - b).abs().max().item() <= scale * (1e-12 if dtype == torch.float64 else 2e-6)


def test_gae_keeps_nan_in_its_row_and_to_the_left() -> None:
    rewards, values = torch.randn(3, 40), torch.randn(3, 40)
    mask = torch.ones(3, 40, dtype=torch.bool)
    rewards[1, 20] = math.nan
    advantages, _ = gae(rewards, values, mask, 0.9, 0.9, False)
    assert advantages[1, :21].isnan().all() and advantages[1, 21:].isfinite().all()
    assert advantages[[0, 2]].isfinite().all()


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    mask, spec = x == 0, PolicyObjective(beta=0.1).kernel_spec
    assert spec is not None
    tokens = TokenBatch(x, None, x, ref_logps=x)
    for name, error, call in [
        ("rewards", TypeError, lambda: gae(x.bfloat16(), x, mask, 1.0, 1.0, False)),
        ("rewards", ValueError, lambda: gae(x[0], x, mask, 1.0, 1.0, False)),
        ("values", ValueError, lambda: gae(x, x[:1], mask, 1.0, 1.0, False)),
        ("mask", TypeError, lambda: gae(x, x, x, 1.0, 1.0, False)),
        ("logps", TypeError, lambda: policy_terms(spec, TokenBatch(x.half(), None, x, ref_logps=x), x, None)),
        ("logps", ValueError, lambda: policy_terms(spec, TokenBatch(x[0], None, x, ref_logps=x), x, None)),
        ("ref_logps", ValueError, lambda: policy_terms(spec, TokenBatch(x, None, x), x, None)),
        ("token_weight", ValueError, lambda: policy_terms(spec, tokens, x[:, :1], None)),
    ]:
        with pytest.raises(error, match=name):
            call()

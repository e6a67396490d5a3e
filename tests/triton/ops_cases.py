"""The public functions on backend triton in Triton's interpreter, against backend reference on the same fp64 inputs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastrl
import fastrl_kernels.triton as kernels
from fastrl_kernels.head import LogitTransform

B, T, D, V = 3, 7, 5, 507


def head(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.randint(0, V, (B, T), generator=generator)
    return {"hidden": randn(B, T, D), "weight": randn(V, D), "bias": randn(V), "ids": ids}


def gradients(
    call: Callable[[str, dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], backend: str
) -> list[Tensor]:
    leaves = {k: x.clone().requires_grad_() if x.dtype.is_floating_point else x for k, x in inputs.items()}
    total = call(backend, leaves)
    wanted = [x for x in leaves.values() if x.requires_grad]
    return [total.detach(), *torch.autograd.grad(total, wanted)]


def agree(
    call: Callable[[str, dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], tolerance: float = 1e-11
) -> None:
    for ours, expected in zip(gradients(call, inputs, "triton"), gradients(call, inputs, "reference"), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "logit_scale": 1.3}, {"softcap": 3.0, "temperature": 1.5}],
    ids=["plain", "scaled", "softcap"],
)
def test_linear_logprobs(options: dict[str, float], dtype: torch.dtype) -> None:
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.7
    upstream = torch.randn(3, B, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)

    def call(backend: str, x: dict[str, Tensor]) -> Tensor:
        stats = fastrl.linear_logprobs(**x, mask=mask, entropy=True, backend=backend, **options)
        return sum((g * y).sum() for g, y in zip(upstream, stats, strict=True))

    agree(call, head(dtype), 1e-11 if dtype == torch.float64 else 2e-4)


def test_logprobs_from_logits() -> None:
    upstream = torch.randn(3, B, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = head()
    logits = {"logits": x["hidden"] @ x["weight"].T, "ids": x["ids"]}
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3:] = False

    def call(backend: str, x: dict[str, Tensor]) -> Tensor:
        stats = fastrl.logprobs_from_logits(**x, mask=mask, entropy=True, temperature=0.7, backend=backend)
        return sum((g * y).sum() for g, y in zip(upstream, stats, strict=True))

    agree(call, logits)


@pytest.mark.parametrize(
    "objective",
    [
        fastrl.PolicyObjective(loss_type="dapo"),
        fastrl.PolicyObjective(loss_type="grpo", beta=0.04, entropy_coef=0.01),
        fastrl.PolicyObjective(loss_type="grpo", importance_sampling_level="sequence"),
    ],
    ids=["single-pass", "kl-and-entropy", "two-pass"],
)
def test_linear_policy_loss(objective: fastrl.PolicyObjective) -> None:
    generator = torch.Generator().manual_seed(4)
    advantages = torch.tensor([0.7, 0.0, -1.2], dtype=torch.float64)  # the middle sequence is dead without a KL term
    mask = torch.rand(B, T, generator=generator) < 0.8
    x = head()
    logps = fastrl.linear_logprobs(**x, backend="reference").logps
    noise = [0.3 * torch.randn(B, T, generator=generator, dtype=torch.float64) for _ in range(2)]

    def call(backend: str, x: dict[str, Tensor]) -> Tensor:
        return fastrl.linear_policy_loss(
            x["hidden"], x["weight"], x["ids"], objective, advantages=advantages, mask=mask,
            old_logps=logps + noise[0], ref_logps=logps + noise[1], bias=x["bias"], backend=backend,
        ).loss  # fmt: skip

    agree(call, x)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale: str) -> None:
    rewards = torch.randn(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = kernels.group_advantages(rewards, torch.arange(20) // 4, "mean", scale, 1e-4)
    public = fastrl.group_advantages(rewards, torch.arange(20) // 4, scale=scale, backend="reference")
    torch.testing.assert_close(ours, public, rtol=1e-11, atol=1e-11)


def test_gradcheck() -> None:
    x = head()
    inputs = (x["hidden"][0, :3].clone().requires_grad_(), x["weight"][:6].clone().requires_grad_())
    ids = x["ids"][0, :3] % 6

    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        return fastrl.linear_logprobs(hidden, weight, ids, softcap=2.0, entropy=True, backend="triton")

    assert torch.autograd.gradcheck(call, inputs)


def test_transform_is_the_public_one() -> None:
    tile, ids = torch.randn(2, 9, dtype=torch.float64), torch.tensor([3, 8])
    logps = kernels.row_stats(tile, ids, LogitTransform(temperature=0.5), None, entropy=False).logps
    torch.testing.assert_close(logps, (2 * tile).log_softmax(-1)[[0, 1], ids])

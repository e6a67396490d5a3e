"""divergence_rows in Triton's interpreter against the definition under autograd in fp64; the public functions on it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import (
    linear_divergence,
    linear_divergence_sum,
    linear_topk_divergence_sum,
    linear_topk_logprobs,
    reference,
)
from fastrl_kernels.head import LogitTransform, accumulation_dtype
from fastrl_kernels.triton import divergence_rows
from fastrl_kernels.triton.divergence_rows import divergence_candidates

PLAIN = (LogitTransform(), LogitTransform())
EVERYTHING = (LogitTransform(0.7, 1.3, 5.0), LogitTransform(0.7, -0.6, 9.0))
KINDS = [("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.5), ("jsd", 0.1)]
ROWS = 3


def tiles(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    tile, ref_tile = (
        (3 * torch.randn(ROWS, vocabulary, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)
    )
    weight = torch.randn(ROWS, generator=generator, dtype=torch.float64).to(accumulation_dtype(dtype))
    return tile - 7.0, ref_tile, weight  # all of one sign: a counted padding column would win


def assert_as_good_as_eager(ours: Tensor, eager: Tensor, exact: Tensor, name: str) -> None:
    assert torch.isfinite(ours).all(), name
    floor = 16 * torch.finfo(ours.dtype).eps * max(1.0, exact.abs().max().item())
    error, allowed = (ours.double() - exact).abs().max().item(), (eager.double() - exact).abs().max().item()
    assert error <= 4 * allowed + floor, f"{name}: error {error:.2e}, eager {allowed:.2e}, floor {floor:.2e}"


def check(
    tile: Tensor,
    ref_tile: Tensor,
    weight: Tensor,
    kind: str,
    beta: float,
    transforms: tuple[LogitTransform, LogitTransform],
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    **options: Any,
) -> None:
    x = tile.double().requires_grad_()
    wide = [None if b is None else b.double() for b in biases]
    log_p = reference.transform_logits(x, transforms[0], wide[0]).log_softmax(-1)
    log_q = reference.transform_logits(ref_tile.double(), transforms[1], wide[1]).log_softmax(-1)
    exact = reference.divergence(log_p, log_q, kind, beta)
    (exact_grad,) = torch.autograd.grad((exact * weight.double()).sum(), x)
    eager_grad, out = torch.empty_like(tile), torch.empty_like(tile)
    eager = reference.divergence_rows(tile, ref_tile, kind, beta, *transforms, *biases, weight, eager_grad)

    copies = [y.clone() for y in (tile, ref_tile, weight)]
    ours = divergence_rows(tile, ref_tile, kind, beta, *transforms, *biases, weight, out, **options)
    assert ours.dtype == accumulation_dtype(tile.dtype)
    assert all(torch.equal(a, b) for a, b in zip(copies, (tile, ref_tile, weight), strict=True))
    assert_as_good_as_eager(ours, eager, exact.detach(), "divergence")
    assert_as_good_as_eager(out, eager_grad, exact_grad, "gradient")
    assert torch.equal(divergence_rows(tile, ref_tile, kind, beta, *transforms, *biases, **options), ours)
    again = divergence_rows(tile, ref_tile, kind, beta, *transforms, *biases, weight, tile, **options)
    assert torch.equal(again, ours) and torch.equal(tile, out), "in place differs from out of place"


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 129, 507, 5000])
@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("transforms", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_divergence_and_gradient(
    vocabulary: int, kind: str, beta: float, transforms: tuple[LogitTransform, LogitTransform]
) -> None:
    biases = (None, None) if transforms == PLAIN else (torch.randn(vocabulary), torch.randn(vocabulary))
    check(*tiles(vocabulary, torch.float32), kind, beta, transforms, biases)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind, beta", KINDS)
def test_dtypes(dtype: torch.dtype, kind: str, beta: float) -> None:
    check(*tiles(2500, dtype), kind, beta, EVERYTHING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_configuration(dtype: torch.dtype) -> None:
    for vocabulary in (200, 5000):
        for config in divergence_candidates(vocabulary, dtype):
            check(*tiles(vocabulary, dtype), "jsd", 0.3, PLAIN, config=config)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_tokens_of_probability_zero(kind: str, beta: float) -> None:
    tile, ref_tile, weight = tiles(4500, torch.float32)
    none = torch.zeros(4500)
    none[:2100] = -torch.inf
    out = torch.empty_like(tile)
    ours = divergence_rows(tile, ref_tile, kind, beta, *PLAIN, none, none, weight, out)
    cut = torch.empty(ROWS, 2400)
    want = divergence_rows(tile[:, 2100:], ref_tile[:, 2100:], kind, beta, *PLAIN, None, None, weight, cut)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[:, 2100:], cut, rtol=1e-4, atol=1e-6)
    assert (out[:, :2100] == 0).all()
    student = divergence_rows(tile, ref_tile, kind, beta, *PLAIN, none, None)
    teacher = divergence_rows(tile, ref_tile, kind, beta, *PLAIN, None, none)
    assert not student.isnan().any() and student.isinf().all() == (kind == "forward_kl")
    assert not teacher.isnan().any() and teacher.isinf().all() == (kind == "reverse_kl")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_stays_alone(bad: float) -> None:
    for kind, beta in KINDS:
        tile, ref_tile, _ = tiles(3000, torch.float32)
        good = divergence_rows(tile, ref_tile, kind, beta, *PLAIN, None, None)
        for x in (tile, ref_tile):
            kept = x[1, 2500].clone()
            x[1, 2500] = bad
            ours = divergence_rows(tile, ref_tile, kind, beta, *PLAIN, None, None)
            x[1, 2500] = kept
            assert ours[1].isnan() and torch.equal(ours[[0, 2]], good[[0, 2]])


def test_rows_with_strides_and_none_at_all() -> None:
    wide = torch.randn(4, 90)
    tile, ref_tile = wide[:, 7:57], torch.randn(4, 100)[:, ::2].contiguous()
    rest, weight = wide.clone(), torch.randn(4)
    want = torch.empty(4, 50)
    divergence_rows(tile.contiguous(), ref_tile, "jsd", 0.5, *PLAIN, None, None, weight, want)
    divergence_rows(tile, ref_tile, "jsd", 0.5, *PLAIN, None, None, weight, tile)
    rest[:, 7:57] = want
    assert torch.equal(wide, rest), "wrote outside its rows"
    assert divergence_rows(tile[:0], ref_tile[:0], "jsd", 0.5, *PLAIN, None, None).shape == (0,)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_public_functions(kind: str) -> None:
    x = [torch.randn(7, 5), torch.randn(507, 5), torch.randn(7, 3), torch.randn(507, 3)]
    x = [y.double() for y in x]
    leaves, mask, ids = [y.requires_grad_() for y in x[:2]], torch.rand(7) > 0.3, torch.randint(507, (7, 4))
    weights, upstream = torch.randn(7).double() * mask, 3 + torch.rand(7, 4).double()

    def outputs(backend: str) -> list[Tensor]:
        each = linear_divergence(*x, kind=kind, mask=mask, temperature=0.7, backend=backend)
        total, _ = linear_divergence_sum(*x, weights, kind=kind, softcap=5.0, backend=backend)
        taken = linear_topk_logprobs(*x[:2], ids, mask=mask, softcap=5.0, backend=backend)
        few, *_ = linear_topk_divergence_sum(
            *x[:2], ids, -upstream.abs(), weights, kind=kind, tail="bucket", backend=backend
        )
        losses = ((each * weights).sum(), total, (taken * upstream).sum(), few)
        return [*losses, *(g for loss in losses for g in torch.autograd.grad(loss, leaves))]

    for ours, want in zip(outputs("triton"), outputs("reference"), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)


def test_wrong_arguments_are_named() -> None:
    tile = torch.randn(3, 10)
    with pytest.raises(ValueError, match="ref_tile"):
        divergence_rows(tile, tile[:2], "jsd", 0.5, *PLAIN, None, None)
    with pytest.raises(TypeError, match="ref_tile"):
        divergence_rows(tile, tile.double(), "jsd", 0.5, *PLAIN, None, None)
    with pytest.raises(ValueError, match="together"):
        divergence_rows(tile, tile, "jsd", 0.5, *PLAIN, None, None, None, tile)
    with pytest.raises(ValueError, match="token_weight"):
        divergence_rows(tile, tile, "jsd", 0.5, *PLAIN, None, None, torch.ones(2), tile)

"""linear_divergence, its weighted sum and linear_topk_logprobs against fp64: values, gradients, masks, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate, error
from torch import Tensor

from fastrl_kernels import (
    LogitTransform,
    cpu,
    divergence,
    linear_divergence,
    linear_divergence_sum,
    linear_topk_divergence_sum,
    linear_topk_logprobs,
    planner,
    reference,
    topk,
)

from fastrl_kernels import _C  # type: ignore[attr-defined]  # isort: skip

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NOTHING = 1e-15  # what rounding leaves of a divergence that is 0: the heads agree, or there is one column
KINDS: tuple[tuple[str, float | None], ...] = (("forward_kl", None), ("reverse_kl", None), ("jsd", 0.5), ("jsd", 0.1))
EVERYTHING = {"temperature": 0.7, "logit_scale": 1.3, "softcap": 5.0, "ref_logit_scale": 0.6, "ref_softcap": 9.0}


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Chunks of three rows and blocks of 100 columns, so that small inputs cross every border."""
    with planner.forced(tile_bytes=1, min_rows=3, weight_block=100):
        yield


def heads(n: int, d: int, d2: int, v: int, dtype: torch.dtype, bias: bool = False) -> dict[str, Tensor]:
    x = {
        "hidden": torch.randn(n, d), "weight": torch.randn(v, d) / d**0.5,
        "ref_hidden": torch.randn(n, d2), "ref_weight": torch.randn(v, d2) / d2**0.5,
    }  # fmt: skip
    if bias:
        x |= {"bias": torch.randn(v), "ref_bias": torch.randn(v)}
    return {name: value.to(dtype) for name, value in x.items()}


def check(ours: Tensor, plain: Tensor, truth: Tensor, what: str) -> None:
    if truth.abs().max() > NOTHING:
        assert_as_accurate(ours, plain, truth, what)
    else:
        assert ours.abs().max() <= plain.abs().max() + 1e-6, what


def run(x: dict[str, Tensor], upstream: Tensor, at: torch.dtype | None = None, **options: Any) -> dict[str, Tensor]:
    """Divergence and the student's gradients, with a random upstream gradient per token."""
    given = {name: value.detach().to(at or value.dtype) for name, value in x.items()}
    leaves = {name: given[name].requires_grad_() for name in ("hidden", "weight", "bias") if name in given}
    out = linear_divergence(**given, **options)
    grads = torch.autograd.grad((out * upstream.to(out.dtype)).sum(), list(leaves.values()))
    return {"divergence": out.detach(), **{f"d {name}": g for name, g in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, beta", KINDS)
def test_matches_fp64(kind: str, beta: float | None, dtype: torch.dtype, small_tiles: None) -> None:
    # one column; around a vector; odd; more than a block of 1,024 columns
    for n, d, d2, v in ((1, 1, 2, 1), (7, 8, 3, 128), (13, 16, 24, 507), (5, 8, 8, 2051)):
        for options in ({}, EVERYTHING):
            x = heads(n, d, d2, v, dtype, bias=bool(options))
            upstream, mask = torch.randn(n), torch.rand(n) > 0.3
            call = {"kind": kind, "beta": beta, "mask": mask, **options}
            truth = run(x, upstream, torch.float64, backend="reference", **call)
            plain = run(x, upstream, backend="reference", **call)
            ours = run(x, upstream, backend="cpu", **call)
            for name in ours:
                assert ours[name].dtype == plain[name].dtype
                check(ours[name], plain[name], truth[name], f"{name} of {kind} V={v} {options}")
            assert (ours["divergence"][~mask] == 0).all() and (ours["d hidden"][~mask] == 0).all()


def eager(x: dict[str, Tensor], kind: str, beta: float | None) -> Tensor:
    """Written down from the formulas alone, with probabilities."""
    p = (x["hidden"] @ x["weight"].T).softmax(-1)
    q = (x["ref_hidden"] @ x["ref_weight"].T).softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    if kind == "forward_kl":
        return kl(q, p)
    if kind == "reverse_kl":
        return kl(p, q)
    assert beta is not None
    m = (1 - beta) * p + beta * q
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("kind, beta", KINDS)
def test_the_formulas(kind: str, beta: float | None, backend: str, small_tiles: None) -> None:
    x = heads(7, 4, 6, 130, torch.float64)
    for name in ("hidden", "weight"):
        x[name].requires_grad_()
    want = eager(x, kind, beta)
    got = linear_divergence(**x, kind=kind, beta=beta, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    upstream = torch.randn(7, dtype=torch.float64)
    leaves = [x["hidden"], x["weight"]]
    for a, b in zip(*(torch.autograd.grad((y * upstream).sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_limits_of_beta_are_the_kls() -> None:
    x = heads(4, 3, 3, 40, torch.float64)
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl"), (0, "forward_kl"), (1, "reverse_kl")):
        assert torch.equal(linear_divergence(**x, kind="jsd", beta=beta), linear_divergence(**x, kind=kind))
    assert torch.equal(linear_divergence(**x, kind="jsd"), linear_divergence(**x, kind="jsd", beta=0.5))


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("kind, beta", KINDS)
def test_gradcheck(kind: str, beta: float | None, backend: str, small_tiles: None) -> None:
    x = heads(5, 3, 2, 11, torch.float64, bias=True)
    mask = torch.tensor([1, 0, 1, 1, 1])
    leaves = [x.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]

    def per_token(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = {"hidden": hidden, "weight": weight, "bias": bias}
        return linear_divergence(**student, **x, kind=kind, beta=beta, mask=mask, backend=backend, **EVERYTHING)

    def in_one(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = {"hidden": hidden, "weight": weight, "bias": bias}
        weights = torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
        return linear_divergence_sum(
            **student, **x, token_weight=weights, kind=kind, beta=beta, backend=backend, **EVERYTHING
        )[0]

    assert torch.autograd.gradcheck(per_token, leaves)
    assert torch.autograd.gradcheck(in_one, leaves)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_sum_is_the_per_token_form(dtype: torch.dtype, small_tiles: None) -> None:
    x = heads(11, 6, 9, 300, dtype, bias=True)
    weights = torch.randn(11) * (torch.rand(11) > 0.3)
    assert (weights == 0).any()
    leaves = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    for kind, beta in KINDS:
        total, rows = linear_divergence_sum(**x, token_weight=weights, kind=kind, beta=beta, **EVERYTHING)
        each = linear_divergence(**x, kind=kind, beta=beta, mask=weights != 0, **EVERYTHING)
        assert torch.equal(rows, each) and not rows.requires_grad
        want = (each * weights).sum()
        torch.testing.assert_close(total, want)
        first = torch.autograd.grad(total * 3, leaves, retain_graph=True)
        again = torch.autograd.grad(total * 3, leaves)  # made again: the first call gave its gradients away
        for a, b, c in zip(first, again, torch.autograd.grad(want * 3, leaves), strict=True):
            assert torch.equal(a, b)
            assert error(a, c) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_rows_outside_the_mask_are_never_read(backend: str, small_tiles: None) -> None:
    x, mask = heads(6, 4, 5, 20, torch.float32), torch.tensor([1, 0, 1, 0, 1, 1])
    clean = {name: value.clone() for name, value in x.items()}
    x["hidden"][1], x["ref_hidden"][1], x["ref_hidden"][3] = torch.nan, torch.inf, torch.nan
    upstream = torch.randn(6)
    ours = run(x, upstream, kind="jsd", mask=mask, backend=backend)
    kept = {k: v[mask == 1] if k.endswith("hidden") else v for k, v in clean.items()}
    want = run(kept, upstream[mask == 1], kind="jsd", backend=backend)
    torch.testing.assert_close(ours["divergence"][mask == 1], want["divergence"])
    torch.testing.assert_close(ours["d weight"], want["d weight"])
    for name in ("divergence", "d hidden"):
        assert (ours[name][mask == 0] == 0).all()
    weights = torch.where(mask == 1, upstream, 0.0)
    total, rows = linear_divergence_sum(**x, token_weight=weights, kind="jsd", backend=backend)
    assert total.isfinite() and torch.equal(rows, ours["divergence"])


def test_nan_stays_in_its_row(small_tiles: None) -> None:
    for where in ("hidden", "ref_hidden"):
        for kind, beta in KINDS:
            x = heads(9, 4, 4, 350, torch.float32)
            good = linear_divergence(**x, kind=kind, beta=beta)
            x[where][4, 1] = torch.nan
            bad = linear_divergence(**x, kind=kind, beta=beta)
            rest = torch.arange(9) != 4
            assert torch.equal(good[rest], bad[rest]) and bad[4].isnan()


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_tokens_of_probability_zero(backend: str, dtype: torch.dtype) -> None:
    """Padding of the vocabulary (-inf under both) adds nothing; what only one of them excludes is inf in one KL."""
    x = heads(4, 3, 3, 1100, dtype)
    both = torch.zeros(1100, dtype=dtype)
    both[1000:] = -torch.inf
    cut = {k: v[:1000] if k.endswith("weight") else v for k, v in x.items()}
    upstream = torch.randn(4)
    for kind, beta in KINDS:
        padded = run(x | {"bias": both, "ref_bias": both}, upstream, kind=kind, beta=beta, backend=backend)
        want = run(cut, upstream, kind=kind, beta=beta, backend=backend)
        for name in ("divergence", "d hidden"):
            torch.testing.assert_close(padded[name], want[name], rtol=1e-5, atol=1e-6)
        assert (padded["d weight"][1000:] == 0).all()
        student = linear_divergence(**x, bias=both, kind=kind, beta=beta, backend=backend)
        teacher = linear_divergence(**x, ref_bias=both, kind=kind, beta=beta, backend=backend)
        assert student.isfinite().all() == (kind != "forward_kl") and not student.isnan().any()
        assert teacher.isfinite().all() == (kind != "reverse_kl") and not teacher.isnan().any()


@pytest.mark.parametrize("offset", (1e2, 1e4, 1e6))
def test_large_common_offset(offset: float) -> None:
    hidden, ref = torch.randint(-8, 8, (5, 4)).float(), torch.randint(-8, 8, (5, 4)).float()
    weight = torch.randint(-4, 4, (300, 4)).float() / 8
    for kind, beta in KINDS:
        plain = linear_divergence(hidden, weight, ref, weight, kind=kind, beta=beta)
        bias = torch.full((300,), offset)
        shifted = linear_divergence(hidden, weight, ref, weight, bias=bias, ref_bias=-bias, kind=kind, beta=beta)
        torch.testing.assert_close(shifted, plain, rtol=1e-6, atol=1e-6)


def test_equal_heads_have_no_divergence() -> None:
    x = heads(6, 8, 8, 3000, torch.float32)
    for kind, beta in KINDS:
        same = {"hidden": x["hidden"], "weight": x["weight"], "ref_hidden": x["hidden"], "ref_weight": x["weight"]}
        out = run(same, torch.ones(6), kind=kind, beta=beta)
        assert out["divergence"].abs().max() < 1e-6 and out["d hidden"].abs().max() < 1e-6


def test_chunks_change_rounding_only_and_the_same_call_gives_the_same_bits() -> None:
    x, upstream = heads(50, 16, 8, 1300, torch.float32, bias=True), torch.randn(50)
    truth = run(x, upstream, torch.float64, kind="jsd", backend="reference")
    errors = []
    for rows, block in ((50, 1024), (7, 64), (1, 1024)):
        with planner.forced(tile_bytes=1, min_rows=rows, weight_block=block):
            a, b = (run(x, upstream, kind="jsd") for _ in range(2))
        assert all(torch.equal(a[k], b[k]) for k in a)
        errors.append(max(error(a[k], truth[k]) for k in a))
    assert max(errors) < 3e-6, errors


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 5), (2, 3, 4)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    hidden, weight = torch.randn(*shape, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    ref_hidden, ref_weight = torch.randn(*shape, 3), torch.randn(10, 3)
    out = linear_divergence(hidden, weight, ref_hidden, ref_weight, kind="jsd")
    assert out.shape == shape
    out.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert weight.grad is not None and weight.grad.isfinite().all()
    total, rows = linear_divergence_sum(hidden, weight, ref_hidden, ref_weight, torch.ones(shape), kind="jsd")
    assert rows.shape == shape and torch.equal(rows, out)
    total.backward()


def test_all_masked_and_strided_inputs() -> None:
    x = heads(6, 4, 5, 20, torch.float32)
    hidden = x["hidden"].t().contiguous().t().requires_grad_()
    weight = x["weight"].repeat(1, 2)[:, ::2].detach().requires_grad_()
    total, rows = linear_divergence_sum(
        hidden, weight, x["ref_hidden"], x["ref_weight"], torch.zeros(6), kind="forward_kl"
    )
    total.backward()
    assert total == 0 and (rows == 0).all() and hidden.grad is not None and (hidden.grad == 0).all()
    ref_hidden = x["ref_hidden"][:1].expand(6, 5)
    got = linear_divergence(hidden, weight, ref_hidden, x["ref_weight"], kind="forward_kl")
    want = linear_divergence(
        hidden.contiguous(), weight.contiguous(), ref_hidden.contiguous(), x["ref_weight"], kind="forward_kl"
    )
    torch.testing.assert_close(got, want)


def test_teachers_of_other_dtypes_and_autocast() -> None:
    x = heads(6, 4, 5, 200, torch.float64)
    student = {"hidden": x["hidden"].float().requires_grad_(), "weight": x["weight"].float()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        teacher = {k: x[k].to(dtype) for k in ("ref_hidden", "ref_weight")}
        got = linear_divergence(**student, **teacher, kind="reverse_kl")
        wide = {k: v.double() for k, v in (student | teacher).items()}
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), linear_divergence(**wide, kind="reverse_kl"), rtol=1e-5, atol=1e-6)
    narrow = {k: x[k].bfloat16() for k in ("ref_hidden", "ref_weight")}
    wide_student = {k: v.double() for k, v in student.items()}
    assert linear_divergence(**wide_student, **narrow, kind="jsd").dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_divergence(**student, **narrow, kind="reverse_kl")
    half = {k: v.bfloat16() for k, v in student.items()}
    assert torch.equal(got, linear_divergence(**half, **narrow, kind="reverse_kl"))


# Memory and cost ----------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all that is allocated from Python on the way, products included."""
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def watch(owner: Any, name: str) -> None:
        make = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            out = make(*args, **kwargs)
            if isinstance(out, Tensor):
                shapes.append((name, tuple(out.shape)))
            return out

        monkeypatch.setattr(owner, name, call)

    for name in ("new_empty", "new_zeros", "to", "exp", "log_softmax", "index_select", "masked_fill"):
        watch(torch.Tensor, name)
    for name in ("mm", "empty", "zeros", "empty_like", "zeros_like"):
        watch(torch, name)
    return shapes


def test_no_more_logits_than_the_budget(made: list[tuple[str, tuple[int, ...]]]) -> None:
    n, v = 40, 700
    x = heads(n, 8, 12, v, torch.float32)
    leaves = [x[name].requires_grad_() for name in ("hidden", "weight")]
    budget = 2 * 6 * v * 4  # two tiles of six rows
    calls: list[Callable[[], Tensor]] = [
        lambda: linear_divergence(**x, kind="jsd", memory_budget=budget).sum(),
        lambda: linear_divergence_sum(**x, token_weight=torch.rand(n), kind="jsd", memory_budget=budget)[0],
        lambda: linear_topk_logprobs(
            x["hidden"], x["weight"], torch.randint(v, (n, 3)), memory_budget=budget // 2
        ).sum(),
    ]
    for call in calls:
        made.clear()
        torch.autograd.grad(call(), leaves)
        rows = [shape[0] for _, shape in made if len(shape) == 2 and shape[1] == v]
        assert rows and max(rows) <= 6, rows


def test_a_frozen_weight_has_no_gradient_made(made: list[tuple[str, tuple[int, ...]]]) -> None:
    x = heads(6, 8, 12, 600, torch.float32)
    for needed in (False, True):
        hidden, weight = x["hidden"].detach().requires_grad_(), x["weight"].detach().requires_grad_(needed)
        rest = {k: v for k, v in x.items() if k.startswith("ref")}
        made.clear()
        linear_divergence_sum(hidden, weight, **rest, token_weight=torch.ones(6), kind="jsd")[0].backward()
        linear_divergence(hidden, weight, **rest, kind="jsd").sum().backward()
        assert any(shape == (600, 8) for name, shape in made if name != "to") == needed


def test_dead_rows_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = heads(20, 4, 4, 50, torch.float32), torch.zeros(20)
    weights[[3, 7, 8]] = 1.0
    projected = []
    project = divergence.Head.project
    monkeypatch.setattr(
        divergence.Head, "project", lambda self, rows, *rest: projected.append(len(rows)) or project(self, rows, *rest)
    )
    linear_divergence_sum(**x, token_weight=weights, kind="forward_kl")
    assert projected == [3, 3]
    projected.clear()
    x["hidden"].requires_grad_()
    out = linear_divergence(**x, kind="forward_kl", mask=weights)
    (out[3] * 2).backward()
    assert projected == [3, 3, 1, 1]


# Row passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("instructions", _C.instruction_sets())
def test_row_pass_matches_fp64(instructions: str, dtype: torch.dtype) -> None:
    before = _C.instruction_set()
    _C.use_instruction_set(instructions)
    try:
        for v in (1, 2, 127, 129, 1023, 1024, 1025, 5000):
            for transforms in (
                (LogitTransform(), LogitTransform()),
                (LogitTransform(0.7, 1.3, 30.0), LogitTransform(0.7)),
            ):
                for bias in (None, torch.randn(v, dtype=dtype)):
                    for kind, beta in KINDS:
                        check_rows(v, dtype, kind, beta or 0.0, transforms, bias)
    finally:
        _C.use_instruction_set(before)


def check_rows(
    v: int,
    dtype: torch.dtype,
    kind: str,
    beta: float,
    transforms: tuple[LogitTransform, LogitTransform],
    bias: Tensor | None,
) -> None:
    n = 12
    wide = (torch.randn(n, v + 9) * 2 - 20).to(dtype)
    tile, ref_tile, weight = wide[:, 5 : 5 + v], (torch.randn(n, v) * 2).to(dtype), torch.randn(n, dtype=dtype)
    wide_before, ref_before = wide.clone(), ref_tile.clone()

    def reference_rows(at: torch.dtype) -> tuple[Tensor, Tensor]:
        out = torch.empty(n, v, dtype=at)
        biases = (None if bias is None else bias.to(at), None)
        rows = reference.divergence_rows(
            tile.to(at), ref_tile.to(at), kind, beta, *transforms, *biases, weight.to(at), out
        )
        return rows, out

    truth, plain = reference_rows(torch.float64), reference_rows(dtype)
    out = torch.empty(n, v, dtype=dtype)
    ours = cpu.divergence_rows(tile, ref_tile, kind, beta, *transforms, bias, None, weight, out)
    where = f"{kind} V={v} {transforms[0]}"
    check(ours, plain[0], truth[0], f"divergence of {where}")
    check(out, plain[1], truth[1], f"gradient of {where}")
    assert torch.equal(wide, wide_before) and torch.equal(ref_tile, ref_before)
    assert torch.equal(cpu.divergence_rows(tile, ref_tile, kind, beta, *transforms, bias, None), ours)
    again = cpu.divergence_rows(tile, ref_tile, kind, beta, *transforms, bias, None, weight, tile)
    assert torch.equal(again, ours) and torch.equal(tile, out), "in place differs from out of place"
    wide_before[:, 5 : 5 + v] = out
    assert torch.equal(wide, wide_before), "wrote outside its rows"


def test_reference_row_pass_is_the_gradient_of_the_definition() -> None:
    tile, ref_tile = (torch.randn(20, 40, dtype=torch.float64) * 3 for _ in range(2))
    bias, weight = torch.randn(40, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    transforms = (LogitTransform(0.8, 1.2, 4.0), LogitTransform(0.8, -1.1, 3.0))
    for kind, beta in KINDS:
        x, out = tile.clone().requires_grad_(), torch.empty_like(tile)
        log_p = reference.transform_logits(x, transforms[0], bias).log_softmax(-1)
        log_q = reference.transform_logits(ref_tile, transforms[1], -bias).log_softmax(-1)
        want = reference.divergence(log_p, log_q, kind, beta or 0.0)
        got = reference.divergence_rows(tile, ref_tile, kind, beta or 0.0, *transforms, bias, -bias, weight, out)
        torch.testing.assert_close(got, want.detach())
        torch.testing.assert_close(out, torch.autograd.grad((want * weight).sum(), x)[0])


def test_same_bits_for_any_number_of_threads() -> None:
    tile, ref_tile, weight = torch.randn(7, 3000), torch.randn(7, 3000), torch.randn(7)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out = torch.empty_like(tile)
            plain = (LogitTransform(), LogitTransform(), None, None)
            results.append([cpu.divergence_rows(tile, ref_tile, "jsd", 0.3, *plain, weight, out), out])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_row_pass_names_wrong_arguments() -> None:
    tile, plain = torch.randn(3, 10), (LogitTransform(), LogitTransform(), None, None)
    with pytest.raises(ValueError, match=r"ref_tile.*\(3, 10\)"):
        cpu.divergence_rows(tile, tile[:2], "jsd", 0.5, *plain)
    with pytest.raises(ValueError, match=r"tile: expected fp32 or fp64.*bfloat16"):
        cpu.divergence_rows(tile.bfloat16(), tile.bfloat16(), "jsd", 0.5, *plain)
    with pytest.raises(ValueError, match="go together"):
        cpu.divergence_rows(tile, tile, "jsd", 0.5, *plain, None, tile)
    with pytest.raises(ValueError, match="token_weight"):
        cpu.divergence_rows(tile, tile, "jsd", 0.5, *plain, torch.ones(2), tile)


# Operators and arguments --------------------------------------------------------------------------------------------


def test_operators_compile_and_are_well_registered() -> None:
    x = heads(6, 4, 3, 20, torch.float32, bias=True)
    order = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
    end, mask = ("jsd", 0.5, 0.9, 1.0, 5.0, 1.0, None, "cpu", None), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    ids = torch.randint(20, (6, 3))
    for grad in (False, True):
        given = [x[name].detach().requires_grad_(grad and i < 3) for i, name in enumerate(order)]
        torch.library.opcheck(divergence.linear_divergence_op, (*given, mask, *end))
        needs = (grad, grad, grad)
        torch.library.opcheck(divergence.linear_divergence_sum_op, (*given, torch.rand(6), *needs, *end))
        settings = (0.9, 1.0, 5.0, "cpu", None)
        torch.library.opcheck(topk.linear_topk_logprobs_op, (*given[:3], ids, mask, *settings))
        sums = (*given[:3], ids, -torch.rand(6, 3), torch.rand(6), *needs, "forward_kl", 0.0, "drop", *settings)
        torch.library.opcheck(topk.linear_topk_divergence_sum_op, sums)
    leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        rest = (x["ref_hidden"], x["ref_weight"])
        each = linear_divergence(hidden, weight, *rest, kind="reverse_kl", mask=mask)
        total, rows = linear_divergence_sum(hidden, weight, *rest, torch.ones(6), kind="jsd")
        few, *_ = linear_topk_divergence_sum(hidden, weight, ids, -torch.ones(6, 3), torch.ones(6))
        return (each**2).sum() + total * 2 + rows.sum() + linear_topk_logprobs(hidden, weight, ids).sum() + few

    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_bad_input_is_named(backend: str) -> None:
    x = heads(6, 4, 5, 20, torch.float32)

    def call(match: str, error: type[Exception] = ValueError, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            linear_divergence(**({"kind": "jsd", "backend": backend} | x | changes))

    call(r"^kind: expected one of forward_kl, reverse_kl, jsd, got 'kl'", kind="kl")
    call(r"^beta: only kind 'jsd'", kind="forward_kl", beta=0.5)
    call(r"^beta: expected a number in \[0, 1\]", beta=1.5)
    call(r"^ref_weight: expected the vocabulary of weight, 20 rows, got 19", ref_weight=x["ref_weight"][:19])
    call(r"^ref_weight: expected shape \(V, 5\)", ref_weight=x["weight"])
    call(r"^ref_hidden: expected shape \(6, 'D2'\).*\(5, 5\)", ref_hidden=x["ref_hidden"][:5])
    call(r"^ref_hidden: ", TypeError, ref_hidden=x["ref_hidden"].int())
    call(r"^ref_bias: expected shape \(20,\)", ref_bias=torch.zeros(19))
    call(r"^mask: expected shape \(6,\)", mask=torch.ones(5))
    call("temperature", temperature=0.0)
    call("logit_scale", ref_logit_scale=float("nan"))
    call("softcap", ref_softcap=-1.0)
    call("memory_budget", memory_budget=0)
    with pytest.raises(ValueError, match=r"^token_weight: expected shape \(6,\)"):
        linear_divergence_sum(**x, token_weight=torch.ones(5), kind="jsd", backend=backend)
    ids = torch.randint(20, (6, 3))
    ids[2, 1] = 20
    with pytest.raises(ValueError, match=r"^topk_ids: 1 rows .*\[0, 20\).*row 2"):
        linear_topk_logprobs(x["hidden"], x["weight"], ids, backend=backend)
    with pytest.raises(ValueError, match=r"^topk_ids: expected shape \(6, 'K'\)"):
        linear_topk_logprobs(x["hidden"], x["weight"], ids[:5], backend=backend)
    with pytest.raises(TypeError, match=r"^topk_ids"):
        linear_topk_logprobs(x["hidden"], x["weight"], ids.float(), backend=backend)


def test_the_reference_refuses_a_budget() -> None:
    x = heads(3, 4, 4, 20, torch.float32)
    with pytest.raises(ValueError, match="memory_budget: the reference builds all the logits"):
        linear_divergence(**x, kind="jsd", backend="reference", memory_budget=1000)


def test_the_plan_counts_both_tiles() -> None:
    work = planner.Work(
        "single pass", 512, 512, 64, 1000, torch.float32, torch.device("cpu"), True, True,
        memory_budget=2 * 64 * 1000 * 4, tiles=2, second_hidden_size=128,
    )  # fmt: skip
    plan = planner.make_plan(work)
    assert plan.chunk_rows == 64 and plan.columns == 1000 and plan.tile_bytes == 2 * 64 * 1000 * 4
    assert "second head, D 128" in plan.explain()
    assert f"{(3 * 64 + 128) * 2 * 512 * 1000 / 1e9:,.1f} GFLOP" in plan.explain()


# Top-k --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_logprobs_match_fp64(dtype: torch.dtype, small_tiles: None) -> None:
    for v, k, options in (
        (1, 1, {}),
        (129, 5, {}),
        (507, 40, {"temperature": 0.7, "logit_scale": 1.3, "softcap": 5.0}),
    ):
        x = heads(8, 6, 1, v, dtype, bias=bool(options))
        ids, mask = torch.randint(v, (8, k)), torch.tensor([1, 1, 0, 1, 1, 0, 1, 1])
        ids[2] = -7  # outside the mask an id may be anything
        upstream = torch.randn(8, k)

        def call(backend: str, at: torch.dtype) -> list[Tensor]:
            leaves = [x[name].to(at).detach().requires_grad_() for name in ("hidden", "weight", "bias") if name in x]
            bias = leaves[2] if len(leaves) > 2 else None
            out = linear_topk_logprobs(*leaves[:2], ids, bias=bias, mask=mask, backend=backend, **options)
            return [out.detach(), *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), leaves)]

        truth, plain, ours = call("reference", torch.float64), call("reference", dtype), call("cpu", dtype)
        for name, o, p, t in zip(("logps", "dX", "dW", "db"), ours, plain, truth, strict=False):
            assert o.dtype == p.dtype
            assert_as_accurate(o, p, t, f"{name} V={v}")
        assert (ours[0][mask == 0] == 0).all() and (ours[1][mask == 0] == 0).all()


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_topk_gradcheck_with_a_repeated_id(backend: str, small_tiles: None) -> None:
    x = heads(4, 3, 1, 11, torch.float64, bias=True)
    leaves = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    ids = torch.tensor([[0, 3], [5, 5], [10, 1], [2, 4]])
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_topk_logprobs(
            h, w, ids, bias=b, temperature=0.8, logit_scale=1.4, softcap=3.0, backend=backend
        ),
        leaves,
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("tail", topk.TAILS)
def test_topk_sum_is_the_definition_on_logprobs(tail: str, dtype: torch.dtype, small_tiles: None) -> None:
    x = heads(11, 6, 1, 300, dtype, bias=True)
    leaves = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    call = {"bias": x["bias"], "temperature": 0.7, "softcap": 9.0}
    ids, weights = torch.randint(300, (11, 5)), torch.randn(11) * (torch.rand(11) > 0.3)
    ref = torch.randn(11, 300).log_softmax(-1).gather(-1, ids)
    ref[3, 4:], ref[weights == 0] = -torch.inf, torch.nan
    x["hidden"].data[weights == 0], ids[weights == 0] = torch.nan, -1
    for kind, beta in KINDS[:1] if tail == "drop" else KINDS:
        total, rows, logps = linear_topk_divergence_sum(
            *leaves[:2], ids, ref, weights, kind=kind, beta=beta, tail=tail, **call
        )
        each = linear_topk_logprobs(*leaves[:2], ids, mask=weights != 0, **call)
        assert torch.equal(logps, each) and not rows.requires_grad and not logps.requires_grad
        live = weights != 0
        want_rows = reference.topk_divergence(each[live], ref[live], kind, beta or 0.0, tail)
        torch.testing.assert_close(rows[live], want_rows.detach(), rtol=1e-5, atol=1e-7)
        assert (rows[~live] == 0).all()
        want = (want_rows * weights[live]).sum()
        torch.testing.assert_close(total, want)
        first = torch.autograd.grad(total * 3, leaves, retain_graph=True)
        again = torch.autograd.grad(total * 3, leaves)
        for a, b, c in zip(first, again, torch.autograd.grad(want * 3, leaves), strict=True):
            assert torch.equal(a, b)
            assert error(a, c) < (1e-2 if dtype == torch.bfloat16 else 2e-6)


def test_topk_sum_costs_one_pass_over_live_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = heads(20, 4, 1, 50, torch.float32), torch.zeros(20)
    weights[[3, 7, 8]] = 1.0
    projected = []
    project = divergence.Head.project
    monkeypatch.setattr(
        divergence.Head, "project", lambda self, rows, *rest: projected.append(len(rows)) or project(self, rows, *rest)
    )
    x["hidden"].requires_grad_()
    ids = torch.randint(50, (20, 3))
    linear_topk_divergence_sum(x["hidden"], x["weight"], ids, -torch.rand(20, 3), weights)[0].backward()
    assert projected == [3]

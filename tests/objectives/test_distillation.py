"""Distillation losses: every case of TRL's generalised JSD, fused forms against those on logits, top-k, arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.objectives.distillation import (
    distillation_loss,
    linear_distillation_loss,
    linear_topk_distillation_loss,
    topk_distillation_loss,
)
from fastrl_kernels import linear_divergence, linear_logprobs, linear_topk_logprobs, planner

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl_gkd_jsd.json").read_text())["cases"]
KINDS: tuple[tuple[str, float | None], ...] = (("forward_kl", None), ("reverse_kl", None), ("jsd", 0.3))
AGGREGATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"normalizer": 17.0},
    {"aggregation": "token-sum"},
    {"aggregation": "seq-mean-token-mean"},
    {"aggregation": "seq-mean-token-sum", "normalizer": 5.0},
    {"aggregation": "seq-mean-token-sum-norm", "length": 9.0},
)


def as_trl(case: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits of a golden case, and the arguments that mean what TRL's do."""
    config, inputs = case["config"], case["inputs"]
    student, teacher = (torch.tensor(inputs[k], dtype=torch.float64) for k in ("student_logits", "teacher_logits"))
    labels = inputs.get("labels")
    mask = None if labels is None else torch.tensor(labels) != -100
    kept = student[..., 0].numel() if mask is None else int(mask.sum())
    options: dict[str, Any] = {"beta": config["beta"], "temperature": config["temperature"], "mask": mask}
    if config["num_items_in_batch"] is not None:
        options["normalizer"] = config["num_items_in_batch"]
    elif config["reduction"] == "sum":
        options["aggregation"] = "token-sum"
    elif config["reduction"] == "mean":
        options["normalizer"] = kept * student.shape[-1]
    elif mask is None:
        options["aggregation"] = "seq-mean-token-sum"
    return student, teacher, options


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_trl_generalized_jsd(case: dict[str, Any]) -> None:
    student, teacher, options = as_trl(case)
    student.requires_grad_()
    out = distillation_loss(student, teacher, **options)
    (grad,) = torch.autograd.grad(out.loss, student)
    want = torch.tensor(case["outputs"]["grad_student_logits"], dtype=torch.float64)
    torch.testing.assert_close(out.loss.item(), case["outputs"]["loss"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12)

    # Fused: the logits are the product of a head that is the identity.
    eye = torch.eye(student.shape[-1], dtype=torch.float64)
    for backend in ("cpu", "reference"):
        hidden = student.detach().requires_grad_()
        fused = linear_distillation_loss(hidden, eye, teacher, eye, backend=backend, **options)
        (grad,) = torch.autograd.grad(fused.loss, hidden)
        torch.testing.assert_close(fused.loss.item(), case["outputs"]["loss"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fused.divergence, out.divergence)


def test_the_golden_file_is_whole() -> None:
    assert len(GOLDEN) == 15 and {case["config"]["beta"] for case in GOLDEN} >= {0, 0.1, 0.5, 0.9, 1}


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Padded (3, 5) tokens, a hole in the mask, an empty sequence's neighbour of one token; NaN outside the mask."""
    x = {
        "hidden": torch.randn(3, 5, 4), "weight": torch.randn(23, 4), "teacher_hidden": torch.randn(3, 5, 7),
        "teacher_weight": torch.randn(23, 7),
    }  # fmt: skip
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    for name in ("hidden", "teacher_hidden"):
        x[name][~mask] = torch.nan
    return {name: value.to(dtype) for name, value in x.items()} | {"mask": mask}


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, torch.autograd.grad(loss, leaves), strict=True)
    ]


@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("options", AGGREGATIONS, ids=str)
def test_fused_is_the_form_on_logits(kind: str, beta: float | None, options: dict[str, Any]) -> None:
    x = batch()
    mask = x.pop("mask")
    ids = torch.randint(23, mask.shape)
    leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
    call = {"kind": kind, "beta": beta, "mask": mask, "temperature": 0.8, "ids": ids, "nll_coef": 0.3, **options}
    inside = mask.unsqueeze(-1)
    logits, teacher = (
        torch.where(inside, torch.where(inside, h, 0.0) @ w.T, torch.nan)
        for h, w in ((x["hidden"], x["weight"]), (x["teacher_hidden"], x["teacher_weight"]))
    )
    want = distillation_loss(logits, teacher, **call)
    with planner.forced(tile_bytes=1, min_rows=2):
        got = linear_distillation_loss(**x, **call)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.divergence, want.divergence)
    torch.testing.assert_close(got.metrics, want.metrics)
    assert set(got.metrics) == {"divergence", "nll"} and not got.divergence.requires_grad
    for a, b in zip(gradients(got.loss, *leaves), gradients(want.loss, *leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_divergence_and_metrics_are_those_of_the_kernel() -> None:
    x = batch()
    mask = x.pop("mask")
    out = linear_distillation_loss(**x, mask=mask, ids=torch.zeros(3, 5, dtype=torch.int64), nll_coef=1.0)
    each = linear_divergence(*x.values(), kind="jsd", mask=mask)
    torch.testing.assert_close(out.divergence, each)
    torch.testing.assert_close(out.metrics["divergence"], each.sum() / mask.sum())
    nll = -linear_logprobs(x["hidden"], x["weight"], torch.zeros(3, 5, dtype=torch.int64), mask=mask).logps
    torch.testing.assert_close(out.metrics["nll"], nll.sum() / mask.sum())
    torch.testing.assert_close(out.loss, (each + nll).sum() / mask.sum())


@pytest.mark.parametrize("options", AGGREGATIONS, ids=str)
def test_padded_is_packed_and_any_split_is_the_whole(options: dict[str, Any]) -> None:
    x = batch()
    mask = x.pop("mask")
    weight, teacher_weight = x["weight"].requires_grad_(), x["teacher_weight"]
    lengths = torch.tensor([5, 2, 3])
    inside = torch.arange(5) < lengths[:, None]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    hidden, teacher = x["hidden"], x["teacher_hidden"]
    padded = linear_distillation_loss(hidden, weight, teacher, teacher_weight, mask=mask, **options)
    packed = linear_distillation_loss(
        hidden[inside], weight, teacher[inside], teacher_weight, mask=mask[inside], cu_seqlens=cu_seqlens, **options
    )
    torch.testing.assert_close(packed.loss, padded.loss)
    torch.testing.assert_close(packed.divergence, padded.divergence[inside])
    torch.testing.assert_close(gradients(packed.loss, weight), gradients(padded.loss, weight))

    whole = dict(options)
    if whole.get("aggregation") != "token-sum":
        whole.setdefault("normalizer", 5.0 if "aggregation" not in options else 2.0)  # tokens, or sequences with one
    parts = [
        linear_distillation_loss(hidden[i], weight, teacher[i], teacher_weight, mask=mask[i], **whole).loss
        for i in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), padded.loss)


def test_gradcheck() -> None:
    logits, teacher = (torch.randn(2, 3, 6, dtype=torch.float64) for _ in range(2))
    mask, ids = torch.tensor([[1, 0, 1], [1, 1, 1]]), torch.randint(6, (2, 3))
    hidden, weight = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    for x in (logits, hidden, weight):
        x.requires_grad_()
    for kind, beta in KINDS:
        options: dict[str, Any] = {"kind": kind, "beta": beta, "mask": mask, "ids": ids, "nll_coef": 0.5}
        assert torch.autograd.gradcheck(lambda z, o=options: distillation_loss(z, teacher, **o).loss, (logits,))
        assert torch.autograd.gradcheck(
            lambda h, w, o=options: linear_distillation_loss(h, w, teacher, torch.eye(6).double(), **o).loss,
            (hidden, weight),
        )


def test_all_masked_is_zero_with_a_graph() -> None:
    x = batch(torch.float32)
    nothing = torch.zeros_like(x.pop("mask"))
    leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
    ids = torch.zeros(3, 5, 2, dtype=torch.int64)
    for out in (
        linear_distillation_loss(**x, mask=nothing),
        linear_topk_distillation_loss(leaves[0], leaves[1], ids, torch.full((3, 5, 2), torch.nan), mask=nothing),
    ):
        assert out.loss == 0 and (out.divergence == 0).all() and all(v == 0 for v in out.metrics.values())
        assert all((g == 0).all() for g in gradients(out.loss, *leaves))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_narrow_inputs(dtype: torch.dtype) -> None:
    x = batch(dtype)
    mask = x.pop("mask")
    wide = {name: value.double().requires_grad_(name in ("hidden", "weight")) for name, value in x.items()}
    leaves = [x["hidden"].requires_grad_(), x["weight"].requires_grad_()]
    got, want = linear_distillation_loss(**x, mask=mask), linear_distillation_loss(**wide, mask=mask)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-6)
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(gradients(got.loss, *leaves), gradients(want.loss, wide["hidden"], wide["weight"]), strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() <= rtol * b.norm()


# Top-k --------------------------------------------------------------------------------------------------------------


def topk_case(k: int, v: int = 23) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of a student and a teacher over the vocabulary, (2, 4, V), and the teacher's top k."""
    log_p, log_q = (torch.randn(2, 4, v, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    top = log_q.topk(k, -1)
    return log_p, log_q, top.indices, top.values


def test_topk_drop_is_verls_forward_kl_topk() -> None:
    log_p, _, ids, teacher = topk_case(5)
    student = log_p.gather(-1, ids)
    out = topk_distillation_loss(student, teacher)
    torch.testing.assert_close(out.divergence, (teacher.exp() * (teacher - student)).sum(-1))
    torch.testing.assert_close(out.metrics["student_mass"], student.exp().sum(-1).mean())
    torch.testing.assert_close(out.metrics["teacher_mass"], teacher.exp().sum(-1).mean())


@pytest.mark.parametrize("kind, beta", KINDS)
def test_topk_renormalize_and_bucket(kind: str, beta: float | None) -> None:
    log_p, log_q, ids, teacher = topk_case(5)
    student = log_p.gather(-1, ids)
    got = topk_distillation_loss(student, teacher, tail="renormalize", kind=kind, beta=beta, aggregation="token-sum")
    want = distillation_loss(student, teacher, kind=kind, beta=beta, aggregation="token-sum")
    torch.testing.assert_close(got.loss, want.loss)
    rest = (torch.stack([student, teacher]).exp().sum(-1, keepdim=True).neg() + 1).log()
    six = (torch.cat([x, r], -1) for x, r in zip((student, teacher), rest, strict=True))
    got = topk_distillation_loss(student, teacher, tail="bucket", kind=kind, beta=beta)
    torch.testing.assert_close(got.divergence, distillation_loss(*six, kind=kind, beta=beta).divergence)
    # A coarser view of two distributions: never more than the divergence over the vocabulary, and all of it for K = V.
    full = distillation_loss(log_p, log_q, kind=kind, beta=beta).divergence
    assert (got.divergence <= full).all() and (got.divergence >= 0).all()
    all_of_it = topk_distillation_loss(log_p, log_q, tail="bucket", kind=kind, beta=beta).divergence
    torch.testing.assert_close(all_of_it, full)


@pytest.mark.parametrize("tail", ("drop", "renormalize", "bucket"))
def test_fewer_than_k_tokens(tail: str) -> None:
    log_p, _, ids, teacher = topk_case(5)
    student = log_p.gather(-1, ids).requires_grad_()
    short = teacher.clone()
    short[..., 3:] = -torch.inf
    got = topk_distillation_loss(student, short, tail=tail)
    want = topk_distillation_loss(student[..., :3], teacher[..., :3], tail=tail)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got.loss, student)
    torch.testing.assert_close(grad, torch.autograd.grad(want.loss, student)[0])
    assert (grad[..., 3:] == 0).all()


@pytest.mark.parametrize("tail", ("drop", "renormalize", "bucket"))
def test_linear_topk_is_the_form_on_logps(tail: str) -> None:
    x = batch()
    mask, weight, hidden = x["mask"], x["weight"].requires_grad_(), x["hidden"].requires_grad_()
    top = torch.randn(3, 5, 23, dtype=torch.float64).log_softmax(-1).topk(4, -1)
    teacher = torch.where(mask.unsqueeze(-1), top.values, torch.nan)
    options: dict[str, Any] = {"tail": tail, "mask": mask, "aggregation": "seq-mean-token-mean"}
    with planner.forced(tile_bytes=1, min_rows=2):
        got = linear_topk_distillation_loss(hidden, weight, top.indices, teacher, temperature=0.7, **options)
    logps = linear_topk_logprobs(hidden, weight, top.indices, mask=mask, temperature=0.7, backend="reference")
    want = topk_distillation_loss(logps, teacher, **options)
    torch.testing.assert_close(got.loss, want.loss)
    assert got.loss.isfinite()
    for a, b in zip(gradients(got.loss, hidden, weight), gradients(want.loss, hidden, weight), strict=True):
        torch.testing.assert_close(a, b)
    clean = torch.where(mask.unsqueeze(-1), hidden, 0.0).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_topk_distillation_loss(h, w, top.indices, teacher, temperature=0.7, **options).loss,
        (clean, weight),
    )


# Arguments ----------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    x = batch()
    mask = x.pop("mask")
    logits = torch.randn(2, 3, 5)

    def linear(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            linear_distillation_loss(**(x | {"mask": mask} | options))

    linear("^kind", kind="kl")
    linear("^beta: only kind 'jsd'", kind="reverse_kl", beta=0.5)
    linear("^beta: expected a number in", beta=-0.1)
    linear("^aggregation", aggregation="mean")
    linear("^length", length=3.0)
    linear("^normalizer", normalizer=0.0)
    linear("^ids and nll_coef go together", ids=torch.zeros(3, 5, dtype=torch.int64))
    linear("^ids and nll_coef go together", nll_coef=0.1)
    linear("^mask", mask=torch.ones(3, 4))
    linear("^ref_weight", teacher_weight=x["teacher_weight"][:20])
    with pytest.raises(ValueError, match=r"^teacher_logits"):
        distillation_loss(logits, logits[..., :4])
    with pytest.raises(ValueError, match=r"^temperature"):
        distillation_loss(logits, logits, temperature=0.0)
    with pytest.raises(ValueError, match=r"^tail: expected one of drop, renormalize, bucket"):
        topk_distillation_loss(logits, logits, tail="none")
    with pytest.raises(ValueError, match=r"^tail: 'drop' goes with kind 'forward_kl' only"):
        topk_distillation_loss(logits, logits, kind="reverse_kl")
    with pytest.raises(ValueError, match=r"^topk_logprobs"):
        ids = torch.zeros(2, 3, 5, dtype=torch.int64)
        linear_topk_distillation_loss(torch.randn(2, 3, 4), torch.randn(9, 4), ids, logits[..., :4])

"""The SFT loss: OpenRLHF's numbers, the single pass against its logps form, packing, splits, edges."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate
from torch import Tensor

import fastrl
from fastrl.objectives.supervised import linear_sft_loss, sft_loss
from fastrl_kernels import engine, planner

GOLDEN = Path(__file__).parent.parent / "golden"
B, T, D, V = 4, 6, 5, 70
F64 = torch.float64
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0] * 6, [1, 0, 0, 0, 0, 0]])
AGGREGATIONS = {"token-mean": 10, "seq-mean-token-mean": 3, "seq-mean-token-sum": 3, "token-sum": None}


def cases(function: str) -> list[dict[str, Any]]:
    return [c for c in json.loads((GOLDEN / "openrlhf_losses.json").read_text())["cases"] if c["function"] == function]


SFT, GPTLM = cases("SFTLoss"), cases("GPTLMLoss")


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def close(got: Tensor, want: Any, rtol: float = 1e-9) -> None:
    want = want if isinstance(want, Tensor) else double(want)
    torch.testing.assert_close(got.detach().to(F64), want.detach().to(F64), rtol=rtol, atol=1e-13)


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with planner.forced(tile_bytes=1, min_rows=5, weight_block=50, score_rows=7):
        yield


def test_all_cases_are_there() -> None:
    assert len(SFT) == 4 and len(GPTLM) == 2


@pytest.mark.parametrize("case", SFT, ids=lambda c: c["name"])
def test_openrlhf_sft(case: dict[str, Any]) -> None:
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    by_token = config["token_level_loss"]
    count = config.get("batch_num_tokens" if by_token else "global_batch_size")
    logps = double(inputs["per_token_logps"]).requires_grad_()
    out = sft_loss(
        logps,
        mask=double(inputs["loss_mask"]),
        aggregation="token-mean" if by_token else "seq-mean-token-mean",
        normalizer=None if count is None else count / config["dp_size"],
        eps=1e-8,
    )
    close(out.loss, outputs["loss"])
    close(torch.autograd.grad(out.loss, logps)[0], outputs["grad_logps"])


@pytest.mark.parametrize("form", ("logps", "fused"))
@pytest.mark.parametrize("case", GPTLM, ids=lambda c: c["name"])
def test_openrlhf_gptlm(case: dict[str, Any], form: str) -> None:
    logits, labels = double(case["inputs"]["logits"]).requires_grad_(), torch.tensor(case["inputs"]["labels"])
    states, ids = logits[:, :-1], labels[:, 1:]
    mask = ids != -100
    if form == "logps":
        out = sft_loss(fastrl.logprobs_from_logits(states, ids, mask=mask).logps, mask=mask)
    else:
        out = linear_sft_loss(states, torch.eye(logits.shape[-1], dtype=F64), ids, mask=mask)
    close(out.loss, case["outputs"]["loss"])
    close(torch.autograd.grad(out.loss, logits)[0], case["outputs"]["grad_logits"])


def data(dtype: torch.dtype = F64) -> dict[str, Tensor]:
    shapes = {"hidden": (B, T, D), "weight": (V, D), "bias": (V,)}
    return {k: torch.randn(*s).to(dtype) for k, s in shapes.items()} | {"ids": torch.randint(V, (B, T))}


def results(d: dict[str, Tensor], fused: bool, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    leaves = [d[k].detach().to(dtype or d[k].dtype).requires_grad_() for k in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    options = {"mask": MASK, **options}
    head = {k: options.pop(k) for k in ("temperature", "softcap", "backend") if k in options}
    if fused:
        out = linear_sft_loss(hidden, weight, d["ids"], bias=bias, **head, **options)
    else:
        stats = fastrl.linear_logprobs(hidden, weight, d["ids"], bias=bias, mask=options["mask"], **head)
        out = sft_loss(stats.logps, **options)
    return [out.loss.detach(), *torch.autograd.grad(out.loss * 1.3, leaves), out.logps, out.metrics["nll"]]


@pytest.mark.parametrize("dtype", (F64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_fused_equals_composed(aggregation: str, dtype: torch.dtype) -> None:
    d = data(dtype)
    for options in ({}, {"temperature": 0.7, "softcap": 4.0}):
        given = {"aggregation": aggregation, **options}
        truth = results(d, False, F64, backend="reference", **given)
        plain = results(d, False, backend="reference", **given)
        for ours in (results(d, True, **given), results(d, True, backend="reference", **given)):
            for what, o, p, t in zip(["loss", "dX", "dW", "db", "logps", "nll"], ours, plain, truth, strict=True):
                assert_as_accurate(o, p, t, f"{what} of {aggregation}, {options}")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_entropy_is_a_metric_without_a_part_in_the_loss(backend: str) -> None:
    hidden, weight = torch.randn(B, T, D, dtype=F64, requires_grad=True), torch.randn(V, D, dtype=F64)
    ids, mask = torch.randint(V, (B, T)), MASK.bool()
    plain = linear_sft_loss(hidden, weight, ids, mask=mask, backend=backend)
    out = linear_sft_loss(hidden, weight, ids, mask=mask, backend=backend, entropy=True)
    assert "entropy" not in plain.metrics and torch.equal(out.loss, plain.loss)
    logps = F.linear(hidden, weight).log_softmax(-1)
    close(out.metrics["entropy"], -(logps.exp() * logps).sum(-1)[mask].mean())
    (grad,), (want,) = (torch.autograd.grad(o.loss, [hidden]) for o in (out, plain))
    assert torch.equal(grad, want)
    nothing = linear_sft_loss(hidden, weight, ids, mask=torch.zeros_like(mask), backend=backend, entropy=True)
    assert nothing.metrics["entropy"] == 0


def test_one_pass_over_the_rows_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    d = data()
    want = results(d, False)
    projected: list[int] = []
    project = engine.Head.project
    monkeypatch.setattr(
        engine.Head, "project", lambda self, x, *tile: projected.append(x.shape[0]) or project(self, x, *tile)
    )
    outside = MASK == 0
    d["hidden"][outside] = torch.nan
    d["ids"][outside] = -100
    got = results(d, True)
    assert sum(projected) == 10  # once: the backward does not project again
    assert got[1][outside].eq(0).all()
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_packed_equals_padded() -> None:
    d = data()
    lengths = torch.tensor([6, 5, 2, 1])
    there = torch.arange(T) < lengths[:, None]
    packed = {k: v[there] if v.shape[:2] == (B, T) else v for k, v in d.items()}
    for aggregation in AGGREGATIONS:
        want = results(d, True, aggregation=aggregation)
        for fused in (True, False):
            options = {"mask": MASK[there], "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)), "aggregation": aggregation}
            got = results(packed, fused, **options)
            close(got[0], want[0])
            close(got[1], want[1][there])
            close(got[2], want[2])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_split_sums_to_the_whole(aggregation: str) -> None:
    d = data()
    whole = results(d, True, aggregation=aggregation)
    for cuts in ([0, 1, 2, 3, 4], [0, 3, 4]):
        loss, dw = torch.zeros((), dtype=F64), torch.zeros(V, D, dtype=F64)
        for a, b in itertools.pairwise(cuts):
            part = {k: v[a:b] if v.shape[:2] == (B, T) else v for k, v in d.items()}
            options = {"mask": MASK[a:b], "aggregation": aggregation, "normalizer": AGGREGATIONS[aggregation]}
            got = results(part, True, **options)
            loss, dw = loss + got[0], dw + got[2]
            close(got[1], whole[1][a:b])
        close(loss, whole[0])
        close(dw, whole[2])


def test_gradcheck() -> None:
    d = data()
    leaves = [d[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    logps = -torch.rand(B, T, dtype=F64).requires_grad_()
    for aggregation in AGGREGATIONS:
        options = {"mask": MASK, "aggregation": aggregation}
        assert torch.autograd.gradcheck(
            lambda h, w, b: linear_sft_loss(h, w, d["ids"], bias=b, **options).loss, leaves, fast_mode=True
        )
        assert torch.autograd.gradcheck(lambda x: sft_loss(x, **options).loss, [logps], fast_mode=True)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_dynamic_fine_tuning(aggregation: str, backend: str) -> None:
    """TRL 1.16's lines: `-log_probs * log_probs.exp().detach()`; the gradient is the nll's times p."""
    d = data()
    given = {"loss_type": "dft", "aggregation": aggregation}
    logps = fastrl.linear_logprobs(d["hidden"], d["weight"], d["ids"], bias=d["bias"]).logps.requires_grad_()
    per_token = -logps * logps.exp().detach()
    kept = MASK.double()
    share = kept / kept.sum(1, keepdim=True).clamp(min=1)
    weights = {"token-mean": kept / 10, "seq-mean-token-mean": share / 3, "seq-mean-token-sum": kept / 3}
    want = (per_token * weights.get(aggregation, kept)).sum()
    out = sft_loss(logps, mask=MASK, **given)
    close(out.loss, want)
    close(*(torch.autograd.grad(x, logps)[0] for x in (out.loss, want)))
    close(out.metrics["nll"], -logps[MASK == 1].mean())
    for ours, composed in zip(results(d, True, backend=backend, **given), results(d, False, **given), strict=True):
        close(ours, composed)
    there = torch.arange(T) < torch.tensor([6, 5, 2, 1])[:, None]
    packed = {k: v[there] if v.shape[:2] == (B, T) else v for k, v in d.items()}
    got = results(packed, True, mask=MASK[there], cu_seqlens=torch.tensor([0, 6, 11, 13, 14]), backend=backend, **given)
    close(got[0], 1.0 * want)
    halves = [{k: v[part] if v.shape[:2] == (B, T) else v for k, v in d.items()} for part in (slice(1), slice(1, 4))]
    options = {**given, "normalizer": AGGREGATIONS[aggregation], "backend": backend}
    losses = [
        results(half, True, mask=mask, **options)[0] for half, mask in zip(halves, (MASK[:1], MASK[1:]), strict=True)
    ]
    close(sum(losses), want)


def test_dynamic_fine_tuning_edges() -> None:
    logps = double([[-1.0, -math.inf, -800.0, math.nan]]).requires_grad_()
    out = sft_loss(logps, mask=torch.tensor([[1, 1, 1, 0]]), loss_type="dft", aggregation="token-sum")
    close(out.loss, math.exp(-1.0))
    assert torch.autograd.grad(out.loss, logps)[0].tolist() == [[-math.exp(-1.0), 0.0, 0.0, 0.0]]
    for call in (sft_loss, lambda x, **k: linear_sft_loss(x[..., None], x.T[:, :1], x.long(), **k)):
        with pytest.raises(ValueError, match="loss_type: expected one of nll, dft, got 'DFT'"):
            call(torch.zeros(1, 4), mask=torch.ones(1, 4), loss_type="DFT")


def test_edges() -> None:
    logps = torch.full((B, T), torch.nan, requires_grad=True)
    nothing = sft_loss(logps, mask=torch.zeros(B, T))
    assert nothing.loss.item() == 0 and torch.autograd.grad(nothing.loss, logps)[0].eq(0).all()
    h, w = torch.full((B, T, D), torch.nan, requires_grad=True), torch.randn(V, D, requires_grad=True)
    fused = linear_sft_loss(h, w, torch.full((B, T), -100), mask=torch.zeros(B, T))
    assert fused.loss.item() == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(fused.loss, [h, w]))
    impossible = double([[-1.0, -math.inf]]).requires_grad_()
    out = sft_loss(impossible, mask=torch.ones(1, 2))
    assert out.loss == math.inf
    assert torch.autograd.grad(out.loss, impossible)[0].tolist() == [[-0.5, -0.5]]
    with torch.no_grad():
        score = linear_sft_loss(torch.zeros(1, 1, D), w, torch.zeros(1, 1, dtype=torch.int64), mask=torch.ones(1, 1))
    close(score.loss, math.log(V), rtol=1e-6)
    assert not score.loss.requires_grad


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    h, w, ids = torch.zeros(2, 3, D), torch.zeros(V, D), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="aggregation: expected one of"):
        sft_loss(x, mask=x, aggregation="mean")
    with pytest.raises(ValueError, match="mask: expected shape"):
        linear_sft_loss(h, w, ids, mask=x[:1])
    with pytest.raises(TypeError, match="ids: expected integers"):
        linear_sft_loss(h, w, ids.float(), mask=x)
    with pytest.raises(ValueError, match=r"ids: 6 of 6 scored ids are outside the vocabulary"):
        linear_sft_loss(h, w, ids + V, mask=x + 1)
    with pytest.raises(ValueError, match="normalizer: expected a number above 0"):
        linear_sft_loss(h, w, ids, mask=x, normalizer=0)

"""The value loss: origins' numbers, ties and edges, aggregations, the fused form, packing, splits, wrong arguments."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate
from torch import Tensor

from fastrl.objectives import score_head
from fastrl.objectives.aggregation import AGGREGATIONS
from fastrl.objectives.value import explained_variance, linear_value_loss, value_loss

GOLDEN = Path(__file__).parent.parent / "golden"
B, T, D = 4, 6, 5
F64 = torch.float64
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0] * 6, [1, 0, 0, 0, 0, 0]])
NORMALIZERS = {"token-mean": 10, "token-sum": None, "seq-mean-token-sum": 3, "seq-mean-token-mean": 3}
NORMALIZERS["seq-mean-token-sum-norm"] = 3


def cases(name: str, function: str) -> list[dict[str, Any]]:
    return [c for c in json.loads((GOLDEN / name).read_text())["cases"] if c["function"] == function]


VERL = cases("verl_kl_value_entropy.json", "compute_value_loss")
OPENRLHF = cases("openrlhf_losses.json", "ValueLoss")


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def close(got: Tensor, want: Any, rtol: float = 1e-9) -> None:
    want = want if isinstance(want, Tensor) else double(want)
    torch.testing.assert_close(got.detach().to(F64), want.detach().to(F64), rtol=rtol, atol=1e-13)


def how(aggregation: str) -> dict[str, Any]:
    return {"aggregation": aggregation, "length": 9 if aggregation.endswith("norm") else None}


def test_all_cases_are_there() -> None:
    assert len(VERL) == 9 and len(OPENRLHF) == 5


@pytest.mark.parametrize("case", VERL, ids=lambda c: c["name"])
def test_verl(case: dict[str, Any]) -> None:
    config, outputs = case["config"], case["outputs"]
    inputs = {k: double(v) for k, v in case["inputs"].items()}
    aggregation = config["loss_agg_mode"]
    values = inputs["vpreds"].requires_grad_()
    count = config.get("batch_num_tokens" if aggregation == "token-mean" else "global_batch_size")
    norm = aggregation.endswith("norm")
    out = value_loss(
        values,
        inputs["returns"],
        old_values=inputs["values"],
        mask=inputs["response_mask"],
        cliprange_value=config["cliprange_value"],
        aggregation=aggregation,
        normalizer=None if count is None else count / config["dp_size"],
        length=config.get("loss_scale_factor", values.shape[1]) if norm else None,
        eps=1e-8,
    )
    close(out.loss, outputs["loss"])
    close(torch.autograd.grad(out.loss, values)[0], outputs["grad_vpreds"])
    close(out.metrics["vf_clipfrac"], outputs["metrics"]["vf_clipfrac"], rtol=1e-6)
    assert out.metrics["vf_loss"] == out.loss


@pytest.mark.parametrize("case", OPENRLHF, ids=lambda c: c["name"])
def test_openrlhf(case: dict[str, Any]) -> None:
    config, outputs = case["config"], case["outputs"]
    inputs = {k: double(v) for k, v in case["inputs"].items()}
    values = inputs["values"].requires_grad_()
    by_token = config["token_level_loss"]
    count = config.get("batch_num_tokens" if by_token else "global_batch_size")
    out = value_loss(
        values,
        inputs["returns"],
        old_values=inputs.get("old_values"),
        mask=inputs["action_mask"],
        cliprange_value=config["clip_eps"],
        aggregation="token-mean" if by_token else "seq-mean-token-mean",
        normalizer=None if count is None else count / config["dp_size"],
        eps=1e-8,
    )
    close(out.loss, outputs["loss"])
    close(torch.autograd.grad(out.loss, values)[0], outputs["grad_values"])


def test_gradient_at_the_bound_and_where_the_squares_tie() -> None:
    """At the bound the gradient is the unclipped one; where the clip only mirrors the error, the mean of both."""
    old, values = double([[0.0, 0.0, 0.0, 0.0, 0.0]]), double([[0.25, -0.25, 0.25, 0.1, 1.0]]).requires_grad_()
    returns = double([[1.0, 1.0, -1.0, 1.0, 0.625]])
    out = value_loss(values, returns, old_values=old, mask=torch.ones(1, 5), cliprange_value=0.25)
    grad = torch.autograd.grad(out.loss, values)[0]
    error = values.detach() - returns
    close(grad[0, :4], error[0, :4] / 5)
    close(grad[0, 4], error[0, 4] / 5 / 2)  # |1 - 0.625| = |0.25 - 0.625|: the clipped half has no gradient
    assert out.metrics["vf_clipfrac"] == 0


def test_the_clip_holds_back_values_that_moved_too_far() -> None:
    values, old = double([[1.0, 1.0]]).requires_grad_(), double([[0.0, 0.0]])
    out = value_loss(values, double([[0.9, 3.0]]), old_values=old, mask=torch.ones(1, 2))
    close(out.loss, 0.5 * ((0.2 - 0.9) ** 2 + (0.2 - 3.0) ** 2) / 2)
    assert torch.autograd.grad(out.loss, values)[0].tolist() == [[0.0, 0.0]]
    assert out.metrics["vf_clipfrac"] == 1
    free = value_loss(values, double([[0.9, 3.0]]), mask=torch.ones(1, 2), cliprange_value=None)
    close(free.loss, 0.5 * (0.1**2 + 2**2) / 2)
    assert free.metrics["vf_clipfrac"] == 0


def data(dtype: torch.dtype = F64) -> dict[str, Tensor]:
    hidden, weight, bias = (torch.randn(*s).to(dtype) for s in ((B, T, D), (1, D), (1,)))
    values = (hidden.double() @ weight[0].double() + bias.double()).float()
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "returns": values + torch.randn(B, T),
        "old_values": values + 0.3 * torch.randn(B, T),
    }


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_outside_the_mask_is_read(aggregation: str) -> None:
    d = {k: v.double() for k, v in data().items()}
    values = torch.randn(B, T, dtype=F64)
    outside = MASK == 0
    outs = []
    for poison in (0.0, torch.nan, torch.inf):
        given = [x.masked_fill(outside, poison) for x in (values, d["returns"], d["old_values"])]
        given[0].requires_grad_()
        out = value_loss(given[0], given[1], old_values=given[2], mask=MASK, **how(aggregation))
        grad = torch.autograd.grad(out.loss, given[0])[0]
        assert grad[outside].eq(0).all() and out.values[outside].eq(0).all()
        outs.append([out.loss, grad, *out.metrics.values()])
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_all_masked_is_zero(aggregation: str) -> None:
    d = data(torch.float32)
    h, w = d["hidden"].fill_(torch.nan).requires_grad_(), d["weight"].requires_grad_()
    out = linear_value_loss(h, w, d["returns"], mask=torch.zeros(B, T), cliprange_value=None, **how(aggregation))
    assert out.loss.item() == 0 and out.metrics["vf_explained_var"].isnan()
    assert all(g.eq(0).all() for g in torch.autograd.grad(out.loss, [h, w]))


def test_an_infinite_return_keeps_to_its_token() -> None:
    values = torch.randn(2, 3, dtype=F64).requires_grad_()
    returns = torch.zeros(2, 3, dtype=F64)
    want = torch.autograd.grad(value_loss(values, returns, mask=torch.ones(2, 3), cliprange_value=None).loss, values)[0]
    returns[0, 1] = math.inf
    out = value_loss(values, returns, mask=torch.ones(2, 3), cliprange_value=None)
    grad = torch.autograd.grad(out.loss, values)[0]
    others = returns.isfinite()
    assert out.loss == math.inf and torch.equal(grad[others], want[others]) and grad[0, 1] == -math.inf


def test_one_token() -> None:
    values = double([[0.5]]).requires_grad_()
    out = value_loss(values, double([[2.0]]), old_values=double([[0.4]]), mask=torch.ones(1, 1))
    close(out.loss, 0.5 * 1.5**2)
    assert out.metrics["vf_explained_var"].isnan()


# The fused form -----------------------------------------------------------------------------------------------------


def results(d: dict[str, Tensor], fused: bool, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    leaves = [d[k].detach().to(dtype or d[k].dtype).requires_grad_() for k in ("hidden", "weight", "bias")]
    options = {"old_values": d["old_values"], "mask": MASK, **options}
    if fused:
        out = linear_value_loss(*leaves[:2], d["returns"], bias=leaves[2], **options)
    else:
        out = value_loss((leaves[0] @ leaves[1].T + leaves[2]).squeeze(-1), d["returns"], **options)
    return [out.loss.detach(), *torch.autograd.grad(out.loss * 1.3, leaves), out.values]


@pytest.mark.parametrize("dtype", (F64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_fused_equals_composed(aggregation: str, dtype: torch.dtype) -> None:
    d, options = data(dtype), how(aggregation)
    truth = results(d, False, F64, **options)
    plain = results(d, False, **options)
    ours = results(d, True, **options)
    for what, o, p, t in zip(["loss", "dX", "dW", "db", "values"], ours, plain, truth, strict=True):
        assert_as_accurate(o, p, t, f"{what} of {aggregation}")


def test_only_the_rows_of_the_mask_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    d = data()
    want = results(d, True)
    multiplied = []
    linear = F.linear
    monkeypatch.setattr(score_head.F, "linear", lambda x, *args: multiplied.append(x.shape[0]) or linear(x, *args))
    d["hidden"][MASK == 0] = torch.nan
    got = results(d, True)
    assert multiplied == [10] and got[1][MASK == 0].eq(0).all()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_equals_padded(aggregation: str) -> None:
    d, options = data(), how(aggregation)
    lengths = torch.tensor([6, 5, 2, 1])
    there = torch.arange(T) < lengths[:, None]
    packed = {k: d[k][there] if d[k].shape[:2] == (B, T) else d[k] for k in d}
    cu = F.pad(lengths.cumsum(0), (1, 0))
    want = results(d, True, **options)
    for fused in (True, False):
        got = results(packed, fused, cu_seqlens=cu, mask=MASK[there], **options)
        close(got[0], want[0])
        close(got[1], want[1][there])
        close(got[2], want[2])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_split_sums_to_the_whole(aggregation: str) -> None:
    d, options = data(), how(aggregation)
    whole = results(d, True, **options)
    for cuts in ([0, 1, 2, 3, 4], [0, 3, 4]):
        loss, dw = torch.zeros((), dtype=F64), torch.zeros(1, D, dtype=F64)
        for a, b in itertools.pairwise(cuts):
            part = {k: v[a:b] if v.shape[:2] == (B, T) else v for k, v in d.items()}
            got = results(part, True, mask=MASK[a:b], normalizer=NORMALIZERS[aggregation], **options)
            loss, dw = loss + got[0], dw + got[2]
            close(got[1], whole[1][a:b])
        close(loss, whole[0])
        close(dw, whole[2])


@pytest.mark.parametrize("clip", (None, 0.2))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck(aggregation: str, clip: float | None) -> None:
    d = data()
    options = {"old_values": d["old_values"].double(), "mask": MASK, "cliprange_value": clip, **how(aggregation)}
    returns = d["returns"].double()
    values = torch.randn(B, T, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, returns, **options).loss, [values])
    leaves = [d[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_value_loss(h, w, returns, bias=b, **options).loss, leaves, fast_mode=True
    )


def test_explained_variance() -> None:
    values, returns = torch.randn(B, T, dtype=F64), torch.randn(B, T, dtype=F64)
    inside = MASK.bool()
    want = 1 - (returns - values)[inside].var() / (returns[inside].var() + 1e-5)
    close(explained_variance(values.masked_fill(~inside, torch.nan), returns, mask=MASK), want)
    close(value_loss(values, returns, mask=MASK, cliprange_value=None).metrics["vf_explained_var"], want)
    assert explained_variance(returns, returns, mask=MASK) == 1
    assert explained_variance(returns + 7.0, returns, mask=MASK) == pytest.approx(1.0)  # a constant offset is free
    assert explained_variance(-returns, returns, mask=MASK) < 0


v, h, w1 = torch.zeros(2, 3), torch.zeros(2, 3, D), torch.zeros(1, D)
WRONG: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    (r"old_values: needed by cliprange_value", ValueError, lambda: value_loss(v, v, mask=v)),
    (
        r"cliprange_value: expected None or a number of at least 0, got -0.1",
        ValueError,
        lambda: value_loss(v, v, old_values=v, mask=v, cliprange_value=-0.1),
    ),
    (r"returns: expected shape \(2, 3\)", ValueError, lambda: value_loss(v, v[:, :2], mask=v, cliprange_value=None)),
    (r"old_values: expected shape \(2, 3\)", ValueError, lambda: value_loss(v, v, mask=v, old_values=v[0])),
    (r"mask: expected shape \(2, 3\)", ValueError, lambda: value_loss(v, v, mask=v[0], cliprange_value=None)),
    (r"mask: expected a tensor", ValueError, lambda: value_loss(v, v, mask=None, cliprange_value=None)),
    (r"values: expected one of", TypeError, lambda: value_loss(v.int(), v, mask=v, cliprange_value=None)),
    (r"expected shape \(B, T\)", ValueError, lambda: value_loss(v[0], v[0], mask=v[0], cliprange_value=None)),
    (
        r"length: only seq-mean-token-sum-norm",
        ValueError,
        lambda: value_loss(v, v, mask=v, cliprange_value=None, length=3),
    ),
    (
        r"aggregation: expected one of",
        ValueError,
        lambda: value_loss(v, v, mask=v, cliprange_value=None, aggregation="mean"),
    ),
    (
        r"weight: expected a value head of shape \(1, D\)",
        ValueError,
        lambda: linear_value_loss(h, w1.repeat(2, 1), v, mask=v, cliprange_value=None),
    ),
    (
        r"weight: expected shape \(V, 5\)",
        ValueError,
        lambda: linear_value_loss(h, w1[:, :3], v, mask=v, cliprange_value=None),
    ),
]


@pytest.mark.parametrize("message, error, call", WRONG, ids=[m[:50] for m, *_ in WRONG])
def test_wrong_arguments_are_named(message: str, error: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()

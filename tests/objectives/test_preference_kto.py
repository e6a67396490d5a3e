"""KTO: fused against given logps, packed against padded, splits with the batch's KL, masks, edges, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastrl
from fastrl.objectives.kto import KTOObjective, kto_kl, kto_loss, linear_kto_loss
from fastrl.objectives.preference import PreferenceOutput

B, T, D, V = 5, 6, 4, 19
OBJECTIVES = {
    "kto": KTOObjective(beta=0.3, desirable_weight=1.3, undesirable_weight=0.6),
    "apo": KTOObjective(loss_type="apo_zero_unpaired", beta=0.5),
}


def batch(objective: KTOObjective) -> dict[str, Any]:
    mask = (torch.arange(T) >= torch.randint(2, (B, 1))) & (torch.arange(T) < torch.randint(3, T + 1, (B, 1)))
    mask[1, 2] = False
    return {
        "hidden": torch.randn(B, T, D, dtype=torch.float64),
        "weight": torch.randn(V, D, dtype=torch.float64),
        "ids": torch.randint(V, (B, T)),
        "mask": mask,
        "labels": torch.tensor([1, 0, 0, 1, 1]),
        "ref_logps": (torch.randn(B, T, dtype=torch.float64) - 3).masked_fill(~mask, torch.nan),
        "kl": 0.7 if objective.needs_kl else None,
    }


def fused(objective: KTOObjective, data: dict[str, Any], **options: Any) -> PreferenceOutput:
    data = {**data, **options}
    return linear_kto_loss(data.pop("hidden"), data.pop("weight"), data.pop("ids"), objective, **data)


def given(data: dict[str, Any]) -> dict[str, Any]:
    return {k: x for k, x in data.items() if k not in ("hidden", "weight", "ids")}


def same(a: PreferenceOutput, b: PreferenceOutput) -> None:
    assert a.metrics.keys() == b.metrics.keys()
    for x, y in zip((*a[:3], *a.metrics.values()), (*b[:3], *(b.metrics[k] for k in a.metrics)), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_equals_composition(name: str) -> None:
    data = batch(OBJECTIVES[name])
    leaves = [data[k].requires_grad_() for k in ("hidden", "weight")]
    stats = fastrl.linear_logprobs(*leaves, data["ids"], mask=data["mask"], entropy=True)
    composed = kto_loss(stats.logps, OBJECTIVES[name], entropy=stats.entropy, **given(data))
    joint = fused(OBJECTIVES[name], data, entropy=True)
    same(joint, composed)
    for a, b in zip(*(torch.autograd.grad(x.loss * 1.7, leaves) for x in (joint, composed)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_equals_padded(name: str) -> None:
    data = batch(OBJECTIVES[name])
    lengths = torch.where(data["mask"], torch.arange(1, T + 1), 0).amax(-1)
    kept, offsets = torch.arange(T) < lengths[:, None], F.pad(lengths.cumsum(0), (1, 0))
    packed = {k: x[kept] if k in ("hidden", "ids", "mask", "ref_logps") else x for k, x in data.items()}
    same(fused(OBJECTIVES[name], data, entropy=True), fused(OBJECTIVES[name], packed, entropy=True, cu_seqlens=offsets))
    logps = torch.randn(B, T, dtype=torch.float64)
    kl = kto_kl(logps, data["ref_logps"], mask=data["mask"])
    torch.testing.assert_close(kto_kl(logps[kept], packed["ref_logps"], mask=packed["mask"], cu_seqlens=offsets), kl)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up_under_the_batch_kl(name: str) -> None:
    data = batch(OBJECTIVES[name])
    leaves = [data[k].requires_grad_() for k in ("hidden", "weight")]
    whole, total = fused(OBJECTIVES[name], data).loss, torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 2), slice(2, 5)):
        part = {k: x[rows] if isinstance(x, Tensor) and k != "weight" else x for k, x in data.items()}
        total = total + fused(OBJECTIVES[name], part, normalizer=B).loss
    torch.testing.assert_close(total, whole)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (total, whole)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name: str) -> None:
    data = given(batch(OBJECTIVES[name]))
    logps = (torch.randn(B, T, dtype=torch.float64) - 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, OBJECTIVES[name], **data).loss, logps)
    assert torch.autograd.gradgradcheck(lambda x: kto_loss(x, OBJECTIVES[name], **data).loss, logps)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_values_may_be_anything_and_empty_answers_are_none(name: str) -> None:
    data = given(batch(OBJECTIVES[name]))
    logps = torch.randn(B, T, dtype=torch.float64) - 3
    clean = kto_loss(logps, OBJECTIVES[name], **data)
    x = torch.cat([logps.masked_fill(~data["mask"], torch.nan), torch.full((1, T), torch.nan)]).requires_grad_()
    more = {
        **data,
        "mask": torch.cat([data["mask"], torch.zeros(1, T, dtype=torch.bool)]),
        "ref_logps": torch.cat([data["ref_logps"], torch.full((1, T), torch.inf)]),
        "labels": torch.cat([data["labels"], torch.ones(1)]),
    }
    out = kto_loss(x, OBJECTIVES[name], **more)
    torch.testing.assert_close(out.loss, clean.loss)
    for key, value in clean.metrics.items():
        torch.testing.assert_close(out.metrics[key], value)
    grad = torch.autograd.grad(out.loss, x)[0]
    assert grad.isfinite().all() and not grad[~more["mask"]].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_masked_is_zero_with_a_graph(name: str) -> None:
    data = batch(OBJECTIVES[name])
    data["mask"] = torch.zeros_like(data["mask"])
    hidden = data["hidden"].fill_(torch.nan).requires_grad_()
    out = fused(OBJECTIVES[name], data)
    out.loss.backward()
    assert out.loss.item() == 0.0 and hidden.grad is not None and not hidden.grad.any()


def test_infinite_logps_give_the_limit() -> None:
    data = {"labels": torch.tensor([1, 0]), "mask": torch.ones(2, 1), "ref_logps": torch.zeros(2, 1), "kl": 0.0}
    logps = torch.full((2, 1), -torch.inf, dtype=torch.float64, requires_grad=True)
    out = kto_loss(logps, KTOObjective(), **data)
    assert out.loss.item() == 0.5  # 1 for the desirable answer, 0 for the other
    assert not torch.autograd.grad(out.loss, logps)[0].any()


def test_the_kl_is_clamped_after_averaging() -> None:
    data = given(batch(OBJECTIVES["kto"]))
    logps = torch.randn(B, T, dtype=torch.float64)
    below, zero = (kto_loss(logps, OBJECTIVES["kto"], **(data | {"kl": kl})) for kl in (-3.0, 0.0))
    same(below, zero)
    mask = torch.ones(2, 2)
    estimate = kto_kl(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [0.0, -1.0]]), mask=mask)
    assert estimate.item() == pytest.approx(-1.0)
    summed = kto_kl(torch.zeros(2, 2), torch.tensor([3.0, -1.0]), mask=mask)
    assert summed.item() == pytest.approx(-1.0)


def test_a_class_that_does_not_occur_has_no_metrics() -> None:
    data = given(batch(OBJECTIVES["apo"])) | {"labels": torch.ones(B)}
    metrics = kto_loss(torch.zeros(B, T), OBJECTIVES["apo"], **data).metrics
    assert math.isnan(metrics["rewards/rejected"]) and math.isnan(metrics["rewards/margins"])
    assert metrics["rewards/chosen"].isfinite()


def test_wrong_arguments_are_named() -> None:
    for arguments, message in (
        ({"loss_type": "kto_pair"}, "loss_type: expected one of kto, apo_zero_unpaired, got 'kto_pair'"),
        ({"beta": 0.0}, "beta"),
        ({"desirable_weight": -1.0}, "desirable_weight"),
        ({"undesirable_weight": -1.0}, "undesirable_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            KTOObjective(**arguments)  # type: ignore[arg-type]
    x, mask, labels = torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="kl: kto expects the batch's KL"):
        kto_loss(x, KTOObjective(), labels=labels, mask=mask, ref_logps=x)
    with pytest.raises(ValueError, match="kl: apo_zero_unpaired expects None"):
        kto_loss(x, OBJECTIVES["apo"], labels=labels, mask=mask, ref_logps=x, kl=0.1)
    with pytest.raises(ValueError, match=r"kl: expected one number for the whole batch, got shape \(2,\)"):
        kto_loss(x, KTOObjective(), labels=labels, mask=mask, ref_logps=x, kl=labels)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2,\)"):
        kto_loss(x, KTOObjective(), labels=mask, mask=mask, ref_logps=x, kl=0.0)
    with pytest.raises(ValueError, match=r"ref_logps: expected shape \(2, 3\)"):
        kto_loss(x, KTOObjective(), labels=labels, mask=mask, ref_logps=x[:1], kl=0.0)
    with pytest.raises(ValueError, match="normalizer: expected None or a number above 0"):
        kto_loss(x, KTOObjective(), labels=labels, mask=mask, ref_logps=x, kl=0.0, normalizer=-1)

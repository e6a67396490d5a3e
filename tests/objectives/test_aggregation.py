"""Aggregation of token losses: verl's numbers, packed against padded, splits of a batch, edges, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl.objectives.aggregation import AGGREGATIONS, aggregate_loss, aggregation_weights
from fastrl.objectives.sequences import Sequences

VERL = json.loads((Path(__file__).parent.parent / "golden" / "verl_kl_value_entropy.json").read_text())["cases"]
EXACT = {"rtol": 1e-9, "atol": 1e-14}


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cases(function: str) -> list[dict[str, Any]]:
    return [case for case in VERL if case["function"] == function]


def in_our_terms(config: dict[str, Any], mask: Tensor) -> tuple[dict[str, Any], float]:
    """verl's configuration as our arguments, and the factor of its data-parallel size."""
    name, data_parallel = config["loss_agg_mode"], config.get("dp_size", 1)
    arguments: dict[str, Any] = {"aggregation": name, "mask": mask, "eps": 1e-8}
    count = config.get("batch_num_tokens" if name == "token-mean" else "global_batch_size")
    if name != "token-sum":
        arguments["normalizer"] = count
    if name == "seq-mean-token-sum-norm":
        arguments["length"] = config.get("loss_scale_factor") or mask.shape[-1]
    return arguments, data_parallel


def test_all_cases_are_there() -> None:
    assert len(cases("agg_loss")) == 10 and len(cases("compute_entropy_loss")) == 5


@pytest.mark.parametrize("case", cases("agg_loss"), ids=lambda c: c["name"])
def test_verl_agg_loss(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    losses, mask = tensor(inputs["loss_mat"]).requires_grad_(), tensor(inputs["loss_mask"])
    arguments, factor = in_our_terms(case["config"], mask)
    loss = aggregate_loss(losses, **arguments) * factor
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensor(outputs["loss"]), **EXACT)
    torch.testing.assert_close(losses.grad, tensor(outputs["grad_loss_mat"]), **EXACT)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("case", cases("compute_entropy_loss"), ids=lambda c: c["name"])
def test_verl_entropy_loss(case: dict[str, Any], backend: str) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    logits, mask = tensor(inputs["logits"]).requires_grad_(), tensor(inputs["response_mask"])
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    entropy = fastrl.logprobs_from_logits(logits, ids, entropy=True, backend=backend).entropy
    assert entropy is not None
    torch.testing.assert_close(entropy.detach(), tensor(outputs["token_entropy"]), **EXACT)
    arguments, factor = in_our_terms(case["config"], mask)
    loss = aggregate_loss(entropy, **arguments) * factor
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensor(outputs["loss"]), **EXACT)
    torch.testing.assert_close(logits.grad, tensor(outputs["grad_logits"]), **EXACT)


LENGTHS = [4, 1, 6, 0, 3]
WIDTH = 6


def batch() -> tuple[Tensor, Tensor]:
    """Losses and a mask with a hole, an empty row, a row of one token, and NaN wherever it is not set."""
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    mask[2, 1] = mask[0, 3] = False
    return torch.where(mask, torch.randn(mask.shape, dtype=torch.float64), torch.nan), mask


def arguments_of(name: str) -> dict[str, Any]:
    return {"length": 10} if name == "seq-mean-token-sum-norm" else {}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_definition(name: str) -> None:
    losses, mask = batch()
    rows = [row[kept] for row, kept in zip(losses, mask, strict=True) if kept.any()]
    sums = torch.stack([row.sum() for row in rows])
    want = {
        "token-mean": sums.sum() / mask.sum(),
        "token-sum": sums.sum(),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-mean": torch.stack([row.mean() for row in rows]).mean(),
        "seq-mean-token-sum-norm": sums.mean() / 10,
    }[name]
    torch.testing.assert_close(aggregate_loss(losses, name, mask=mask, **arguments_of(name)), want)
    losses.requires_grad_()
    aggregate_loss(losses, name, mask=mask.to(torch.int64), **arguments_of(name)).backward()
    weights = aggregation_weights(name, mask, Sequences.padded(5), dtype=torch.float64, **arguments_of(name))
    assert torch.equal(losses.grad, weights) and not weights[~mask].any()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_packed_equals_padded(name: str) -> None:
    losses, mask = batch()
    inside = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    results = []
    for x, m, cu in ((losses, mask, None), (losses[inside], mask[inside], cu_seqlens)):
        x = x.detach().requires_grad_()
        loss = aggregate_loss(x, name, mask=m, cu_seqlens=cu, eps=1e-8, **arguments_of(name))
        results.append((loss, *torch.autograd.grad(loss, x)))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1][inside], results[1][1])


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_any_split_equals_the_whole(name: str) -> None:
    losses, mask = batch()
    whole = aggregate_loss(losses, name, mask=mask, **arguments_of(name))
    normalizer = {"token-mean": mask.sum(), "token-sum": None}.get(name, mask.any(-1).sum())
    for sizes in ([1, 4], [2, 1, 2], [1] * 5):
        parts = zip(losses.split(sizes), mask.split(sizes), strict=True)
        terms = [aggregate_loss(x, name, mask=m, normalizer=normalizer, **arguments_of(name)) for x, m in parts]
        torch.testing.assert_close(torch.stack(terms).sum(), whole)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_nothing_to_aggregate(name: str) -> None:
    for shape, cu_seqlens in (((3, 4), None), ((0, 4), None), ((0,), torch.tensor([0])), ((4,), torch.tensor([0, 4]))):
        losses = torch.full(shape, torch.nan, requires_grad=True)
        mask = torch.zeros(shape, dtype=torch.bool)
        loss = aggregate_loss(losses, name, mask=mask, cu_seqlens=cu_seqlens, eps=1e-8, **arguments_of(name))
        loss.backward()
        assert loss.item() == 0 and losses.grad is not None and not losses.grad.any()


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_gradcheck(name: str) -> None:
    mask = batch()[1]
    losses = torch.randn(mask.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: aggregate_loss(x, name, mask=mask, **arguments_of(name)), (losses,))


def test_one_infinite_loss() -> None:
    """An infinite loss outside the mask is not there; inside it makes the loss infinite, not NaN."""
    losses, mask = torch.tensor([[torch.inf, 1.0]]), torch.tensor([[False, True]])
    assert aggregate_loss(losses, "token-mean", mask=mask) == 1
    assert aggregate_loss(losses, "token-mean", mask=torch.ones(1, 2)) == torch.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"aggregation": "mean"}, "aggregation: expected one of token-mean, .*, got 'mean'"),
        ({"aggregation": "token-sum", "normalizer": 3}, "normalizer: token-sum divides by nothing"),
        ({"aggregation": "token-mean", "normalizer": 0}, "normalizer: expected a number above 0, got 0"),
        ({"aggregation": "token-mean", "normalizer": float("nan")}, "normalizer: expected a number above 0"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "length: seq-mean-token-sum-norm needs"),
        ({"aggregation": "seq-mean-token-sum-norm", "length": 0}, "length: .* above 0, got 0"),
        ({"aggregation": "token-mean", "length": 5}, "length: only seq-mean-token-sum-norm divides by it"),
        ({"aggregation": "token-mean", "mask": torch.ones(2, 3)}, r"mask: expected shape \(2, 2\)"),
        ({"aggregation": "token-mean", "cu_seqlens": torch.tensor([0, 4])}, "token_loss: expected packed tokens"),
    ),
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate_loss(torch.zeros(2, 2), **{"mask": torch.ones(2, 2), **arguments})


def test_integer_losses() -> None:
    with pytest.raises(TypeError, match="token_loss: expected one of"):
        aggregate_loss(torch.zeros(2, 2, dtype=torch.int64), "token-mean", mask=torch.ones(2, 2))

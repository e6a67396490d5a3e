"""Losses of reward models: origins' numbers, formulas by hand, fused forms, packing, splits, edges, wrong arguments."""

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

from fastrl.objectives import reward_model, score_head
from fastrl.objectives.reward_model import (
    linear_outcome_reward_loss,
    linear_process_reward_loss,
    linear_reward_model_loss,
    outcome_reward_loss,
    process_reward_loss,
    ranking_loss,
    reward_model_loss,
)

GOLDEN = Path(__file__).parent.parent / "golden"
B, T, D = 4, 7, 5
F64 = torch.float64


def cases(name: str, *functions: str) -> list[dict[str, Any]]:
    found = json.loads((GOLDEN / name).read_text())["cases"]
    return [c for c in found if not functions or c.get("function") in functions]


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def close(got: Tensor, want: Any, rtol: float = 1e-9) -> None:
    want = want if isinstance(want, Tensor) else double(want)
    torch.testing.assert_close(got.detach().to(F64), want.detach().to(F64), rtol=rtol, atol=1e-13, equal_nan=True)


# The origins' numbers -----------------------------------------------------------------------------------------------

TRL = cases("trl_reward.json")
OPENRLHF = cases("openrlhf_losses.json", "PairWiseLoss", "LogExpLoss")


def test_all_cases_are_there() -> None:
    assert len(TRL) == 6 and len(OPENRLHF) == 4


@pytest.mark.parametrize("case", TRL, ids=lambda c: c["name"])
def test_trl_reward(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    chosen, rejected = (double(inputs[k]).requires_grad_() for k in ("chosen_rewards", "rejected_rewards"))
    margin = double(inputs["margin"]) if "margin" in inputs else None
    out = reward_model_loss(chosen, rejected, margin=margin, **case["config"])
    grads = torch.autograd.grad(out.loss, [chosen, rejected])
    close(out.loss, outputs["loss"])
    close(grads[0], outputs["grad_chosen_rewards"])
    close(grads[1], outputs["grad_rejected_rewards"])
    assert out.metrics.keys() == outputs["metrics"].keys()
    for name, want in outputs["metrics"].items():
        close(out.metrics[name], want, rtol=1e-6)


@pytest.mark.parametrize("case", OPENRLHF, ids=lambda c: c["name"])
def test_openrlhf_pairs(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    chosen, rejected = (double(inputs[k]).requires_grad_() for k in ("chosen_reward", "reject_reward"))
    margin = double(inputs["margin"]) if "margin" in inputs else None
    kind = "sigmoid"
    if case["function"] == "LogExpLoss":
        kind = "log_exp"
        if margin is not None:  # the original ignores it; here it is refused
            with pytest.raises(ValueError, match="margin: OpenRLHF's LogExpLoss ignores it"):
                reward_model_loss(chosen, rejected, margin=margin, kind=kind)
            margin = None
    out = reward_model_loss(chosen, rejected, margin=margin, kind=kind)
    grads = torch.autograd.grad(out.loss, [chosen, rejected])
    close(out.loss, outputs["loss"])
    close(grads[0], outputs["grad_chosen"])
    close(grads[1], outputs["grad_reject"])


# Pairs and rankings -------------------------------------------------------------------------------------------------


def test_far_pairs_stay_finite_in_fp32() -> None:
    """OpenRLHF's `log(1 + exp(r_l - r_w))` is inf from a difference of 89 on, and so is its gradient NaN."""
    chosen = torch.tensor([-200.0, 200.0], requires_grad=True)
    out = reward_model_loss(chosen, torch.tensor([200.0, -200.0]), kind="log_exp")
    assert out.loss.item() == 200.0
    assert torch.autograd.grad(out.loss, chosen)[0].tolist() == [-0.5, 0.0]


def test_infinite_scores_keep_to_their_pair() -> None:
    inf = math.inf
    chosen = double([inf, -inf, inf, 0.3, 1.0]).requires_grad_()
    rejected = double([0.0, 0.0, inf, -inf, 0.5])
    losses = [reward_model_loss(chosen[i : i + 1], rejected[i : i + 1]).loss.item() for i in range(5)]
    assert losses[:2] == [0.0, inf] and math.isnan(losses[2]) and losses[3] == 0.0
    grad = torch.autograd.grad(reward_model_loss(chosen, rejected).loss, chosen)[0]
    assert grad[[0, 1, 3]].tolist() == [0.0, -0.2, 0.0]
    close(grad[4], -torch.sigmoid(double(-0.5)) / 5)


def test_masked_pairs_are_not_there() -> None:
    chosen, rejected, margin = torch.randn(3, 6, dtype=F64)
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    keep = mask.bool()
    options = {"center_rewards_coefficient": 0.1}
    want_in = chosen[keep].requires_grad_()
    want = reward_model_loss(want_in, rejected[keep], margin=margin[keep], **options)
    for x in (chosen, rejected, margin):
        x[~keep] = torch.nan
    chosen.requires_grad_()
    got = reward_model_loss(chosen, rejected, margin=margin, mask=mask, **options)
    close(got.loss, want.loss)
    for name, value in want.metrics.items():
        close(got.metrics[name], value)
    grad = torch.autograd.grad(got.loss, chosen)[0]
    close(grad[keep], torch.autograd.grad(want.loss, want_in)[0])
    assert grad[~keep].eq(0).all()


@pytest.mark.parametrize("size", (0, 3))
def test_no_pair_counts(size: int) -> None:
    chosen = torch.full((size,), torch.nan, requires_grad=True)
    out = reward_model_loss(chosen, torch.full((size,), torch.nan), mask=torch.zeros(size))
    assert out.loss.item() == 0 and torch.autograd.grad(out.loss, chosen)[0].eq(0).all()
    assert all(x.isnan() for x in out.metrics.values())


def pairwise_by_hand(scores: list[float], ranks: list[float]) -> tuple[float, int]:
    total, k = 0.0, len(scores)
    for i, j in itertools.permutations(range(k), 2):
        if ranks[i] < ranks[j]:
            total += math.log1p(math.exp(scores[j] - scores[i]))
    return total / math.comb(k, 2), k


def plackett_luce_by_hand(scores: list[float], ranks: list[float]) -> float:
    """-log of the product of choices, each among the answers not ranked before it."""
    total = 0.0
    for i, rank in enumerate(ranks):
        rest = [s for s, r in zip(scores, ranks, strict=True) if r >= rank]
        total += math.log(sum(math.exp(s) for s in rest)) - scores[i]
    return total


RANKINGS = [
    ("a whole ranking, not in order", [3, 1, 2, 4], [1, 1, 1, 1]),
    ("ties at the top and in the middle", [0.5, 0.5, 7, 7], [1, 1, 1, 1]),
    ("a missing answer", [2, 1, 9, 3], [1, 1, 0, 1]),
    ("two answers left", [2, 1, 9, 3], [0, 1, 0, 1]),
]


@pytest.mark.parametrize("kind", reward_model.RANKING_KINDS)
@pytest.mark.parametrize("what, ranks, mask", RANKINGS, ids=[r[0] for r in RANKINGS])
def test_rankings_by_hand(kind: str, what: str, ranks: list[float], mask: list[int]) -> None:
    scores = torch.randn(4, dtype=F64)
    keep = [i for i in range(4) if mask[i]]
    few = [scores[i].item() for i in keep], [ranks[i] for i in keep]
    want = pairwise_by_hand(*few)[0] if kind == "pairwise" else plackett_luce_by_hand(*few)
    scores[~torch.tensor(mask).bool()] = torch.nan
    given = scores[None].clone().requires_grad_()
    out = ranking_loss(given, torch.tensor([ranks]), kind=kind, mask=torch.tensor([mask]))
    close(out.loss, want)
    grad = torch.autograd.grad(out.loss, given)[0]
    assert grad.isfinite().all() and grad[0, ~torch.tensor(mask).bool()].eq(0).all()
    close(grad.sum(), 0.0)  # only differences of scores count


@pytest.mark.parametrize("kind", reward_model.RANKING_KINDS)
def test_two_answers_are_a_pair(kind: str) -> None:
    scores = torch.randn(6, 2, dtype=F64)
    ranks = torch.tensor([[1, 2], [2, 1], [5, 9], [9, 5], [1, 2], [1, 2]])
    best, worst = (scores.gather(1, i).squeeze(1) for i in (ranks.argmin(1, True), ranks.argmax(1, True)))
    want, got = reward_model_loss(best, worst), ranking_loss(scores, ranks, kind=kind)
    close(got.loss, want.loss)
    assert got.metrics.keys() == want.metrics.keys()
    for name, value in want.metrics.items():
        close(got.metrics[name], value)


@pytest.mark.parametrize("kind", reward_model.RANKING_KINDS)
def test_prompts_without_a_comparison_do_not_count(kind: str) -> None:
    scores = torch.randn(4, 3, dtype=F64)
    ranks = torch.tensor([[1, 2, 3], [1, 1, 1], [1, 2, 3], [1, 2, 3]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0]])
    want = ranking_loss(scores[:1], ranks[:1], kind=kind).loss
    scores[2] = torch.nan
    scores.requires_grad_()
    out = ranking_loss(scores, ranks, kind=kind, mask=mask)
    close(out.loss, want)
    assert torch.autograd.grad(out.loss, scores)[0][1:].eq(0).all()
    nothing = ranking_loss(scores[2:], ranks[2:], kind=kind, mask=mask[2:])
    assert nothing.loss.item() == 0 and nothing.metrics["accuracy"].isnan()


@pytest.mark.parametrize("kind", reward_model.RANKING_KINDS)
def test_an_infinite_score_keeps_to_its_prompt(kind: str) -> None:
    scores = torch.randn(2, 3, dtype=F64)
    scores[0, 1] = math.inf
    scores.requires_grad_()
    ranks = torch.tensor([[1, 2, 3], [2, 1, 3]])
    grad = torch.autograd.grad(ranking_loss(scores, ranks, kind=kind).loss, scores)[0]
    alone = scores.detach()[1:].requires_grad_()
    close(grad[1:], torch.autograd.grad(ranking_loss(alone, ranks[1:], kind=kind).loss, alone)[0] / 2)


# Labels of tokens ---------------------------------------------------------------------------------------------------

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 0], [0] * 7, [0, 0, 0, 1, 0, 0, 0]])
STEP_ENDS = torch.tensor([[0, 0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0, 0], [0] * 7, [0, 0, 0, 1, 0, 0, 0]]).bool()


def step_labels(classes: int) -> Tensor:
    return torch.where(STEP_ENDS, torch.randint(classes, (B, T)), -100)


def test_outcome_is_the_binary_cross_entropy_of_every_token() -> None:
    logits, outcome = torch.randn(B, T, dtype=F64), torch.tensor([1, 0, 1, 1])
    every = outcome[:, None].expand(B, T)
    inside = MASK.bool()
    want = F.binary_cross_entropy_with_logits(logits[inside], every[inside].double())
    logits[~inside] = torch.nan
    for labels, given in ((outcome, logits), (every, logits[..., None]), (outcome.bool(), logits)):
        out = outcome_reward_loss(given, labels, mask=MASK)
        close(out.loss, want)
        assert out.metrics["num_labels"] == 9
        close(out.metrics["accuracy"], ((logits > 0) == every.bool())[inside].double().mean())
    ignored = torch.where(inside, every, -100)
    close(outcome_reward_loss(logits, ignored).loss, want)
    sequence_mean = outcome_reward_loss(logits, outcome, mask=MASK, aggregation="seq-mean-token-mean").loss
    rows = [F.binary_cross_entropy_with_logits(logits[i][inside[i]], every[i][inside[i]].double()) for i in (0, 1, 3)]
    close(sequence_mean, sum(rows) / 3)


def test_two_classes_equal_one_logit() -> None:
    z, labels = torch.randn(B, T, dtype=F64), torch.tensor([1, 0, 1, 0])
    two = torch.stack([torch.zeros_like(z), z], -1)
    a, b = (outcome_reward_loss(x, labels, mask=MASK) for x in (z, two))
    close(a.loss, b.loss)
    assert a.scores.shape == (9, 1) and b.scores.shape == (9, 2)


@pytest.mark.parametrize("classes", (2, 3))
def test_process_is_the_cross_entropy_at_step_ends(classes: int) -> None:
    """What transformers' token classification loss, and so TRL's former PRMTrainer, computes."""
    logits, labels = torch.randn(B, T, classes, dtype=F64), step_labels(classes)
    want_in = logits.clone().requires_grad_()
    want = F.cross_entropy(want_in.view(-1, classes), labels.view(-1), ignore_index=-100)
    logits[~STEP_ENDS] = torch.nan
    logits.requires_grad_()
    out = process_reward_loss(logits, labels)
    close(out.loss, want)
    close(torch.autograd.grad(out.loss, logits)[0], torch.autograd.grad(want, want_in)[0])
    close(out.metrics["accuracy"], (logits.argmax(-1) == labels)[STEP_ENDS].double().mean())


def test_soft_step_labels() -> None:
    logits = torch.randn(B, T, dtype=F64)
    labels = torch.where(STEP_ENDS, torch.rand(B, T, dtype=F64), -100.0)
    labels[0, 3], labels[1, 1] = 0.0, 1.0
    z, y = logits[STEP_ENDS], labels[STEP_ENDS]
    close(process_reward_loss(logits, labels).loss, -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).mean())


def test_label_tokens_are_a_softmax_over_those_tokens_only() -> None:
    v, chosen = 11, [7, 2, 9]
    hidden, weight, bias = (torch.randn(*s, dtype=F64) for s in ((B, T, D), (v, D), (v,)))
    classes = step_labels(3)
    tokens = torch.where(STEP_ENDS, torch.tensor(chosen)[classes.clamp(min=0)], -100)
    logits = 5 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 5)
    want = process_reward_loss(logits[..., chosen], classes)
    close(process_reward_loss(logits, tokens, label_ids=chosen).loss, want.loss)
    w = weight.clone().requires_grad_()
    out = linear_process_reward_loss(
        hidden, w, tokens, bias=bias, label_ids=torch.tensor(chosen), logit_scale=0.5, softcap=5.0
    )
    close(out.loss, want.loss)
    close(out.metrics["accuracy"], want.metrics["accuracy"])
    grad = torch.autograd.grad(out.loss, w)[0]
    others = torch.ones(v, dtype=torch.bool).index_fill(0, torch.tensor(chosen), False)
    assert grad[chosen].ne(0).any() and grad[others].eq(0).all()
    outcome = linear_outcome_reward_loss(hidden, w, torch.tensor([7, 2, 9, 7]), mask=MASK, label_ids=chosen)
    again = outcome_reward_loss((hidden @ weight.T)[..., chosen], torch.tensor([0, 1, 2, 0]), mask=MASK)
    close(outcome.loss, again.loss)


def test_all_tokens_masked() -> None:
    hidden = torch.full((B, T, D), torch.nan, requires_grad=True)
    weight = torch.randn(3, D, requires_grad=True)
    out = linear_process_reward_loss(hidden, weight, torch.full((B, T), -100))
    assert out.loss.item() == 0 and out.metrics["accuracy"].isnan()
    assert all(g.eq(0).all() for g in torch.autograd.grad(out.loss, [hidden, weight]))


# Fused forms, packing, splits, gradients ----------------------------------------------------------------------------

Run = Callable[[dict[str, Any]], Any]


def data(dtype: torch.dtype = F64) -> dict[str, Any]:
    """Hidden states and heads for every loss; `mask` has holes, padding on both sides and an empty sequence."""
    return {
        "hidden": torch.randn(B, T, D).to(dtype),
        "weight": torch.randn(3, D).to(dtype),
        "bias": torch.randn(3).to(dtype),
        "mask": MASK,
        "steps": step_labels(3),
        "outcome": torch.tensor([1, 0, 1, 1]),
        "margin": torch.rand(2),
    }


def one(d: dict[str, Any]) -> dict[str, Any]:
    return {"weight": d["weight"][:1], "bias": d["bias"][:1]}


def several(d: dict[str, Any]) -> dict[str, Any]:
    return {"weight": d["weight"], "bias": d["bias"]}


FUSED: dict[str, Run] = {
    "pairs": lambda d: linear_reward_model_loss(
        d["hidden"], **one(d), mask=d["mask"], margin=d["margin"], center_rewards_coefficient=0.1, **d.get("more", {})
    ),
    "outcome": lambda d: linear_outcome_reward_loss(
        d["hidden"], labels=d["outcome"], **one(d), mask=d["mask"], **d.get("more", {})
    ),
    "process": lambda d: linear_process_reward_loss(d["hidden"], labels=d["steps"], **several(d), **d.get("more", {})),
    "process by sequence": lambda d: linear_process_reward_loss(
        d["hidden"], labels=d["steps"], **several(d), aggregation="seq-mean-token-mean", **d.get("more", {})
    ),
}


def last(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores (B, T) at the last token of the mask; NaN for an empty row."""
    return torch.stack([s[m.bool()][-1] if m.any() else s.new_tensor(torch.nan) for s, m in zip(scores, mask)])  # noqa: B905


def composed(name: str, d: dict[str, Any]) -> Any:
    if name == "pairs":
        scores = last((d["hidden"] @ d["weight"][0] + d["bias"][0]), d["mask"])
        there = d["mask"].any(-1)
        return reward_model_loss(
            *scores.chunk(2), mask=there[:2] & there[2:], margin=d["margin"], center_rewards_coefficient=0.1
        )
    if name == "outcome":
        return outcome_reward_loss(d["hidden"] @ d["weight"][0] + d["bias"][0], d["outcome"], mask=d["mask"])
    how = {"aggregation": "seq-mean-token-mean"} if "sequence" in name else {}
    return process_reward_loss(d["hidden"] @ d["weight"].T + d["bias"], d["steps"], **how)


def results(run: Run, d: dict[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Loss and gradients of hidden, weight and bias."""
    leaves = {k: d[k].detach().to(dtype or d[k].dtype).requires_grad_() for k in ("hidden", "weight", "bias")}
    out = run({**d, **leaves})
    return [out.loss.detach(), *torch.autograd.grad(out.loss * 1.3, list(leaves.values()))]


@pytest.mark.parametrize("dtype", (F64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fused_equals_composed(name: str, dtype: torch.dtype) -> None:
    d = data(dtype)
    truth = results(lambda x: composed(name, x), d, F64)
    plain = results(lambda x: composed(name, x), d)
    for what, o, p, t in zip(["loss", "dX", "dW", "db"], results(FUSED[name], d), plain, truth, strict=True):
        assert_as_accurate(o, p, t, f"{what} of {name}")


@pytest.mark.parametrize("name", FUSED)
def test_only_the_rows_of_the_loss_are_multiplied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    d = data()
    used = {
        "pairs": torch.zeros(B, T, dtype=torch.bool).index_put(
            (torch.tensor([0, 1, 3]), torch.tensor([6, 4, 3])), torch.tensor(True)
        ),
        "outcome": MASK.bool(),
    }.get(name, STEP_ENDS)
    want = results(FUSED[name], d)
    multiplied = []
    linear = F.linear
    monkeypatch.setattr(score_head.F, "linear", lambda x, *args: multiplied.append(x.shape[0]) or linear(x, *args))
    d["hidden"][~used] = torch.nan
    got = results(FUSED[name], d)
    for a, b in zip(got, want, strict=True):
        close(a, b)
    assert got[1][~used].eq(0).all() and got[2].ne(0).any()
    assert multiplied == [B if name == "pairs" else int(used.sum())]


@pytest.mark.parametrize("name", FUSED)
def test_packed_equals_padded(name: str) -> None:
    """Sequences without their padding, one behind the other; the third has tokens but none in the mask."""
    d = data()
    want = results(FUSED[name], d)
    there = torch.arange(T) < torch.tensor([7, 5, 2, 4])[:, None]
    lengths = there.sum(-1)
    packed = {**d, **{k: d[k][there] for k in ("hidden", "mask", "steps")}}
    cu = F.pad(lengths.cumsum(0), (1, 0))
    packed["more"] = {"cu_seqlens": cu}
    got = results(FUSED[name], packed)
    close(got[0], want[0])
    close(got[1], want[1][there])
    for a, b in zip(got[2:], want[2:], strict=True):
        close(a, b)


def test_packed_logits_forms() -> None:
    lengths = torch.tensor([7, 5, 2, 4])
    there = torch.arange(T) < lengths[:, None]
    cu = F.pad(lengths.cumsum(0), (1, 0)).int()
    logits, steps, outcome = torch.randn(B, T, 3, dtype=F64), step_labels(3), torch.tensor([1, 0, 1, 1])
    for aggregation in ("token-mean", "seq-mean-token-mean", "token-sum"):
        how = {"aggregation": aggregation}
        want = outcome_reward_loss(logits[..., 0], outcome, mask=MASK, **how)
        got = outcome_reward_loss(logits[there][:, 0], outcome, mask=MASK[there], cu_seqlens=cu, **how)
        close(got.loss, want.loss)
        want = process_reward_loss(logits, steps, **how)
        close(process_reward_loss(logits[there], steps[there], cu_seqlens=cu, **how).loss, want.loss)


def test_gathered_last_tokens() -> None:
    last_hidden, weight = torch.randn(2 * B, D, dtype=F64), torch.randn(1, D, dtype=F64)
    scores = (last_hidden @ weight.T).squeeze(-1)
    close(linear_reward_model_loss(last_hidden, weight).loss, reward_model_loss(scores[:B], scores[B:]).loss)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1])
    last_hidden[2] = torch.nan
    out = linear_reward_model_loss(last_hidden, weight, mask=mask)
    close(out.loss, reward_model_loss(scores[:B], scores[B:], mask=mask[:B]).loss)
    assert out.scores.shape == (2 * B,)


def test_sequences_without_a_token() -> None:
    for hidden, more in (
        (torch.randn(2, 0, D, requires_grad=True), {}),
        (torch.randn(0, D, requires_grad=True), {"cu_seqlens": torch.zeros(3, dtype=torch.int64)}),
        (torch.full((2, 3, D), torch.nan, requires_grad=True), {"mask": torch.zeros(2, 3)}),
    ):
        weight = torch.randn(1, D, requires_grad=True)
        out = linear_reward_model_loss(hidden, weight, **more)
        assert out.loss.item() == 0
        for x, g in zip((hidden, weight), torch.autograd.grad(out.loss, [hidden, weight]), strict=True):
            assert g.shape == x.shape and g.eq(0).all()


def test_any_split_sums_to_the_whole() -> None:
    d = data()
    scores, ranks = torch.randn(5, 3, dtype=F64), torch.tensor([[1, 2, 3]]).expand(5, 3)
    chosen, rejected = torch.randn(2, 5, dtype=F64)
    logits = torch.randn(B, T, 3, dtype=F64)
    steps, outcome = d["steps"], d["outcome"]
    runs: dict[str, tuple[int, Any, float]] = {
        "pairs": (5, lambda s, n: reward_model_loss(chosen[s], rejected[s], normalizer=n), 5),
        "ranking": (5, lambda s, n: ranking_loss(scores[s], ranks[s], normalizer=n), 5),
        "outcome": (4, lambda s, n: outcome_reward_loss(logits[s, :, 0], outcome[s], mask=MASK[s], normalizer=n), 9),
        "process": (4, lambda s, n: process_reward_loss(logits[s], steps[s], normalizer=n), 5),
        "process by sequence": (
            4,
            lambda s, n: process_reward_loss(logits[s], steps[s], normalizer=n, aggregation="seq-mean-token-mean"),
            3,
        ),
        "fused": (
            4,
            lambda s, n: linear_outcome_reward_loss(
                d["hidden"][s], d["weight"][:1], outcome[s], mask=MASK[s], normalizer=n
            ),
            9,
        ),
    }
    for name, (size, run, normalizer) in runs.items():
        whole = run(slice(0, size), None).loss
        for cuts in ([0, 1, 2, size], [0, 3, size]):
            parts = [run(slice(a, b), normalizer).loss for a, b in itertools.pairwise(cuts)]
            torch.testing.assert_close(sum(parts), whole, msg=name)


@pytest.mark.parametrize("name", FUSED)
def test_gradcheck_of_fused_forms(name: str) -> None:
    d = data()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return FUSED[name]({**d, "hidden": hidden, "weight": weight, "bias": bias}).loss

    leaves = [d[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


def test_gradcheck_of_scores() -> None:
    chosen, rejected, margin = torch.randn(3, 4, dtype=F64)
    leaves = [chosen.requires_grad_(), rejected.requires_grad_()]
    for options in ({}, {"margin": margin, "center_rewards_coefficient": 0.2}, {"kind": "log_exp"}):
        assert torch.autograd.gradcheck(lambda a, b: reward_model_loss(a, b, **options).loss, leaves)
    scores = torch.randn(3, 4, dtype=F64, requires_grad=True)
    ranks, mask = torch.tensor([[1, 2, 3, 4], [2, 2, 1, 3], [4, 2, 9, 1]]), torch.ones(3, 4)
    mask[2, 1] = 0
    for kind in reward_model.RANKING_KINDS:
        assert torch.autograd.gradcheck(lambda s: ranking_loss(s, ranks, kind=kind, mask=mask).loss, [scores])
    logits = torch.randn(B, T, 3, dtype=F64, requires_grad=True)
    steps, soft = step_labels(3), torch.where(STEP_ENDS, torch.rand(B, T, dtype=F64), -100.0)
    assert torch.autograd.gradcheck(lambda z: process_reward_loss(z, steps).loss, [logits], fast_mode=True)
    assert torch.autograd.gradcheck(lambda z: process_reward_loss(z[..., 0], soft).loss, [logits], fast_mode=True)


def test_inputs_are_not_modified_and_calls_repeat_bitwise() -> None:
    d = data(torch.float32)
    before = {k: v.clone() for k, v in d.items()}
    for run in FUSED.values():
        first, second = results(run, d), results(run, d)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(d[k], v) for k, v in before.items())


def test_head_is_reduced_in_fp32_under_autocast() -> None:
    hidden, weight = torch.randn(2, 3, 64), torch.randn(1, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_reward_model_loss(hidden, weight)
    want = linear_reward_model_loss(hidden.bfloat16(), weight.bfloat16())
    assert out.scores.dtype == torch.float32
    assert torch.equal(out.scores, want.scores)


# Wrong arguments ----------------------------------------------------------------------------------------------------

x, h, w1, w3 = torch.zeros(4), torch.zeros(4, 3, 5), torch.zeros(1, 5), torch.zeros(3, 5)
steps_ok = torch.full((4, 3), -100)
WRONG: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    (r"kind: expected one of sigmoid, log_exp, got 'hinge'", ValueError, lambda: reward_model_loss(x, x, kind="hinge")),
    (r"rejected_scores: expected shape \(4,\)", ValueError, lambda: reward_model_loss(x, x[:3])),
    (r"chosen_scores: expected shape \(B,\), got \(4, 1\)", ValueError, lambda: reward_model_loss(x[:, None], x)),
    (r"margin: expected shape \(4,\)", ValueError, lambda: reward_model_loss(x, x, margin=x[:1])),
    (r"chosen_scores: expected one of", TypeError, lambda: reward_model_loss(x.int(), x)),
    (r"mask: expected shape \(4,\)", ValueError, lambda: reward_model_loss(x, x, mask=x[:2])),
    (r"normalizer: expected a number above 0", ValueError, lambda: reward_model_loss(x, x, normalizer=0)),
    (r"scores: expected shape \(P, K\)", ValueError, lambda: ranking_loss(x, x)),
    (r"ranks: expected shape \(4, 3\)", ValueError, lambda: ranking_loss(h[..., 0], x)),
    (r"kind: expected one of pairwise", ValueError, lambda: ranking_loss(h[..., 0], h[..., 0], kind="listnet")),
    (r"weight: expected a reward head of shape \(1, D\)", ValueError, lambda: linear_reward_model_loss(h, w3)),
    (r"chosen, then as many rejected sequences, got 3", ValueError, lambda: linear_reward_model_loss(h[:3], w1)),
    (r"weight: expected shape \(V, 5\)", ValueError, lambda: linear_reward_model_loss(h, w1[:, :4])),
    (
        r"cu_seqlens: expected offsets from 0 to 12",
        ValueError,
        lambda: linear_reward_model_loss(h.view(12, 5), w1, cu_seqlens=torch.tensor([0, 4, 11])),
    ),
    (r"labels: expected shape \(4,\), one per sequence", ValueError, lambda: outcome_reward_loss(h[..., 0], x[:3])),
    (r"labels: expected numbers in \[0, 1\]", ValueError, lambda: outcome_reward_loss(h[..., 0], x + 2)),
    (r"labels: expected integers for 5 logits", TypeError, lambda: outcome_reward_loss(h, x)),
    (r"labels: expected classes in \[0, 5\), or -100", ValueError, lambda: outcome_reward_loss(h, x.long() + 5)),
    (r"labels: expected shape \(4, 3\)", ValueError, lambda: process_reward_loss(h, x.long())),
    (r"logits: expected one or C logits per token", ValueError, lambda: process_reward_loss(x, x)),
    (r"label_ids: expected at least two", ValueError, lambda: process_reward_loss(h, steps_ok, label_ids=[1, 1])),
    (r"label_ids: expected token ids in the", ValueError, lambda: process_reward_loss(h, steps_ok, label_ids=[1, 5])),
    (
        r"labels: expected token ids among label_ids \[1, 3\]",
        ValueError,
        lambda: linear_process_reward_loss(h, w3.repeat(2, 1), steps_ok + 102, label_ids=[1, 3]),
    ),
    (r"aggregation: expected one of", ValueError, lambda: process_reward_loss(h, steps_ok, aggregation="mean")),
    (r"labels: expected shape \(4, 3\)", ValueError, lambda: linear_process_reward_loss(h, w3, steps_ok[:2])),
]  # fmt: skip


@pytest.mark.parametrize("message, error, call", WRONG, ids=[m[:50] for m, *_ in WRONG])
def test_wrong_arguments_are_named(message: str, error: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()

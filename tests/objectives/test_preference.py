"""Preference losses on pairs: fused against given logps, packed against padded, splits, masks, edges, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastrl
from fastrl.objectives.dpo import LOSS_TYPES, PreferenceObjective, RunningMean
from fastrl.objectives.pairs import Answers, PairObjective
from fastrl.objectives.preference import PreferenceOutput, linear_preference_loss, preference_loss
from fastrl.objectives.reference_free import CPOObjective, ORPOObjective, TPOObjective

B, T, D, V = 4, 6, 5, 23
SMOOTHING = {"exo_pair": 0.1, "robust": 0.2, "aot": 0.1, "aot_unpaired": 0.1}

OBJECTIVES: dict[str, PairObjective] = {
    **{t: PreferenceObjective(loss_type=t, beta=0.3, label_smoothing=SMOOTHING.get(t, 0.0)) for t in LOSS_TYPES},
    "forward_kl": PreferenceObjective(f_divergence_type="forward_kl"),
    "js": PreferenceObjective(f_divergence_type="js_divergence", loss_type="ipo"),
    "alpha": PreferenceObjective(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
    "ld": PreferenceObjective(ld_alpha=0.4, loss_type=["sigmoid", "sft"], loss_weights=[0.7, 0.2]),
    "ld 0": PreferenceObjective(ld_alpha=0.0),
    "wpo": PreferenceObjective(use_weighting=True, loss_type=["hinge", "apo_zero"]),
    "reference free": PreferenceObjective(reference_free=True),
    "rpo": PreferenceObjective(rpo_alpha=0.5),
    "dpop": PreferenceObjective(dpop_lambda=5.0),
    "openrlhf": PreferenceObjective(preset="openrlhf", label_smoothing=0.1),
    "cpo": CPOObjective(),
    "cpo hinge": CPOObjective(loss_type="hinge"),
    "cpo ipo": CPOObjective(loss_type="ipo"),
    "simpo": CPOObjective(loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=0.1, cpo_alpha=0.0),
    "alphapo": CPOObjective(loss_type="alphapo", beta=2.0, alpha=0.2),
    "tpo": TPOObjective(beta=0.2),
    "tpo hinge": TPOObjective(loss_type="hinge", beta=0.2),
    "tpo ipo": TPOObjective(loss_type="ipo", tpo_alpha=0.3),
    "tpo-l": TPOObjective(loss_type="tpo-l", beta=2.0, tpo_alpha=0.0),
    "orpo": ORPOObjective(beta=0.4),
}
REFERENCE = [name for name, o in OBJECTIVES.items() if not o.refuses_reference]
SPLITTABLE = [name for name, o in OBJECTIVES.items() if not o.sorts_batch]


def parts(objective: PairObjective) -> int:
    return 3 if objective.nll_on_gold else 2


def batch(objective: PairObjective, b: int = B) -> dict[str, Any]:
    """A joint batch of hidden states with prompts, holes, uneven lengths, and a reference of NaN outside the mask."""
    n = parts(objective) * b
    hidden, weight = torch.randn(n, T, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    ids = torch.randint(V, (n, T))
    mask = (torch.arange(T) >= torch.randint(2, (n, 1))) & (torch.arange(T) < torch.randint(3, T + 1, (n, 1)))
    mask[0, 2] = False
    data = {"hidden": hidden, "weight": weight, "ids": ids, "mask": mask}
    if not objective.refuses_reference:
        data["ref_logps"] = (-2.5 + 0.5 * torch.randn(n, T, dtype=torch.float64)).masked_fill(~mask, torch.nan)
    return data


def fused(objective: PairObjective, data: dict[str, Any], **options: Any) -> PreferenceOutput:
    data = {**data, **options}
    return linear_preference_loss(data.pop("hidden"), data.pop("weight"), data.pop("ids"), objective, **data)


def separate(objective: PairObjective, data: dict[str, Any], logps: Tensor, entropy: Tensor | None) -> dict[str, Any]:
    """The arguments of preference_loss for log-probabilities of a joint batch."""
    n = parts(objective)
    given: dict[str, Any] = {}
    for name, x in (("logps", logps), ("mask", data["mask"]), ("entropy", entropy)):
        if x is not None:
            given[f"chosen_{name}"], given[f"rejected_{name}"], *gold = x.chunk(n)
            if gold and name != "entropy":
                given[f"nll_{name}"] = gold[0]
    if "ref_logps" in data:
        given["ref_chosen_logps"], given["ref_rejected_logps"] = data["ref_logps"].chunk(2)
    if objective.weighs_pairs:
        p = (data["hidden"] @ data["weight"].T).softmax(-1)
        given["chosen_log_sum_sq_probs"], given["rejected_log_sum_sq_probs"] = p.square().sum(-1).log().chunk(2)
    return given | {k: data[k] for k in ("normalizer", "nll_normalizer") if k in data}


def on_logps(objective: PairObjective, given: dict[str, Any]) -> PreferenceOutput:
    given = dict(given)
    return preference_loss(given.pop("chosen_logps"), given.pop("rejected_logps"), objective, **given)


def same(a: PreferenceOutput, b: PreferenceOutput) -> None:
    assert a.metrics.keys() == b.metrics.keys()
    for x, y in zip((*a[:3], *a.metrics.values()), (*b[:3], *(b.metrics[k] for k in a.metrics)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_equals_composition(name: str, backend: str) -> None:
    objective = OBJECTIVES[name]
    data = batch(objective)
    leaves = [data[k].requires_grad_() for k in ("hidden", "weight")]
    stats = fastrl.linear_logprobs(*leaves, data["ids"], mask=data["mask"], entropy=True, backend="reference")
    composed = on_logps(objective, separate(objective, data, stats.logps, stats.entropy))
    joint = fused(objective, data, entropy=True, backend=backend)
    same(joint, composed)
    for a, b in zip(*(torch.autograd.grad(x.loss * 1.7, leaves) for x in (joint, composed)), strict=True):
        torch.testing.assert_close(a, b)
        assert a.any()


def test_orpo_counts_the_prompt_where_asked() -> None:
    objective = OBJECTIVES["orpo"]
    data = batch(objective)
    nll_mask = data["mask"] | (torch.arange(T) < 2)
    out = fused(objective, data, nll_mask=nll_mask)
    logps = fastrl.linear_logprobs(data["hidden"], data["weight"], data["ids"]).logps
    given = separate(objective, data, logps, None) | {"nll_mask": nll_mask[:B]}
    same(out, on_logps(objective, given))
    assert out.metrics["nll_loss"].item() == pytest.approx(-logps[:B][nll_mask[:B]].mean().item())


def pack(data: dict[str, Any], lengths: Tensor) -> dict[str, Any]:
    """The first `lengths` tokens of each row, packed."""
    kept = torch.arange(T) < lengths[:, None]
    rows = {k: x[kept] if k in ("hidden", "ids", "mask", "ref_logps") else x for k, x in data.items()}
    return rows | {"cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_equals_padded(name: str) -> None:
    objective = OBJECTIVES[name]
    data = batch(objective)
    lengths = torch.where(data["mask"], torch.arange(1, T + 1), 0).amax(-1)
    packed = pack(data, lengths)
    same(fused(objective, packed, entropy=True), fused(objective, data, entropy=True))

    n, offsets = parts(objective), packed["cu_seqlens"]
    logps = torch.randn(data["ids"].shape, dtype=torch.float64) - 2
    rows = logps[torch.arange(T) < lengths[:, None]]
    entries = {k: packed[k] for k in ("mask", "ref_logps") if k in packed} | {"logps": rows}
    splits = [int(offsets[i * B]) for i in range(1, n)]
    given: dict[str, Any] = {}
    for key, x in entries.items():
        sides = x.tensor_split(splits)
        prefix = "ref_" if key == "ref_logps" else ""
        short = key.removeprefix("ref_")
        given[f"{prefix}chosen_{short}"], given[f"{prefix}rejected_{short}"] = sides[:2]
        if n == 3:
            given[f"nll_{short}"] = sides[2]
    given["cu_seqlens"] = tuple(offsets[i * B : (i + 1) * B + 1] - offsets[i * B] for i in range(2))
    wanted = separate(objective, data, logps, None)
    if objective.weighs_pairs:
        for side, i in (("chosen", 0), ("rejected", 1)):
            key = f"{side}_log_sum_sq_probs"
            given[key] = wanted[key][(torch.arange(T) < lengths[:, None])[i * B : (i + 1) * B]]
    same(on_logps(objective, given), on_logps(objective, wanted))


@pytest.mark.parametrize("name", SPLITTABLE)
def test_micro_batches_add_up(name: str) -> None:
    objective = OBJECTIVES[name]
    data = batch(objective)
    nll = data["mask"].view(-1, B, T)[2 if objective.nll_on_gold else 0].sum().item()
    shared: dict[str, Any] = {"normalizer": B} | ({"nll_normalizer": nll} if objective.nll_weight else {})
    leaves = [data[k].requires_grad_() for k in ("hidden", "weight")]
    whole = fused(objective, data).loss
    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, 4)):
        part = {k: x if k == "weight" else x.unflatten(0, (-1, B))[:, rows].flatten(0, 1) for k, x in data.items()}
        total = total + fused(objective, part, **shared).loss
    torch.testing.assert_close(total, whole)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (total, whole)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ("aot", "aot_unpaired"))
def test_ranking_refuses_a_part_of_a_batch(name: str) -> None:
    data = batch(OBJECTIVES[name])
    with pytest.raises(ValueError, match="normalizer: the objective ranks the pairs"):
        fused(OBJECTIVES[name], data, normalizer=8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name: str) -> None:
    objective = OBJECTIVES[name]
    data = batch(objective)
    mask = data["mask"]
    logps = (-2.5 + torch.randn(mask.shape, dtype=torch.float64)).clamp(max=-0.1).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        given = separate(objective, data, x, None)
        if objective.weighs_pairs:  # the weights are constants: here they do not change with x
            for side in ("chosen", "rejected"):
                given[f"{side}_log_sum_sq_probs"] = given[f"{side}_logps"].detach() + 0.2
        return on_logps(objective, given).loss

    assert torch.autograd.gradcheck(loss, logps)
    if name != "sft":
        assert torch.autograd.gradgradcheck(loss, logps)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_values_may_be_anything(name: str) -> None:
    objective = OBJECTIVES[name]
    data = batch(objective)
    mask = data["mask"]
    logps = (torch.randn(mask.shape, dtype=torch.float64) - 3).clamp(max=-0.1)
    clean = on_logps(objective, separate(objective, data, logps, None))
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = logps.masked_fill(~mask, bad).requires_grad_()
        before = x.detach().clone()
        given = separate(objective, data, x, torch.zeros_like(logps).masked_fill(~mask, bad))
        for key in ("chosen_log_sum_sq_probs", "rejected_log_sum_sq_probs"):
            if key in given:
                given[key] = given[key].masked_fill(~given[key.split("_")[0] + "_mask"], bad)
        out = on_logps(objective, given)
        torch.testing.assert_close(out.loss, clean.loss)
        grad = torch.autograd.grad(out.loss, x)[0]
        assert grad.isfinite().all() and not grad[~mask].any() and grad[mask].any()
        assert all(value.isfinite() for value in out.metrics.values())
        assert torch.equal(x, before) or (bad != bad and torch.equal(x.isnan(), before.isnan()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_masked_is_zero_with_a_graph(name: str) -> None:
    objective = OBJECTIVES[name]
    data = batch(objective)
    data["mask"] = torch.zeros_like(data["mask"])
    data["hidden"][:] = torch.nan
    leaves = [data[k].requires_grad_() for k in ("hidden", "weight")]
    out = fused(objective, data, entropy=True)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert all(x.grad is not None and not x.grad.any() for x in leaves)
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_pair_without_tokens_is_none(name: str) -> None:
    objective = OBJECTIVES[name]
    data = batch(objective)
    padded = {k: x if k == "weight" else x.unflatten(0, (-1, B)) for k, x in data.items()}
    extra = {k: x if k == "weight" else torch.cat([x[:, :2], x[:, :1], x[:, 2:]], 1) for k, x in padded.items()}
    extra["mask"][:, 2] = False
    extra = {k: x if k == "weight" else x.flatten(0, 1) for k, x in extra.items()}
    a, b = fused(objective, data), fused(objective, extra)
    torch.testing.assert_close(a.loss, b.loss)
    for key, value in a.metrics.items():
        torch.testing.assert_close(b.metrics[key], value)


@pytest.mark.parametrize("name", [n for n in SPLITTABLE if n != "sft"])
@pytest.mark.parametrize("side", (0, 1))
def test_infinite_logps_stay_in_their_pair(name: str, side: int) -> None:
    objective = OBJECTIVES[name]
    data = batch(objective)
    logps = (torch.randn(data["mask"].shape, dtype=torch.float64) - 3).clamp(max=-0.1)
    grads = []
    for value in (-1.0, -torch.inf):
        x = logps.clone()
        x[side * B + 1, 1] = value
        data["mask"][side * B + 1, 1] = True
        if "ref_logps" in data:
            data["ref_logps"][side * B + 1, 1] = -2.0
        x.requires_grad_()
        grads.append(torch.autograd.grad(on_logps(objective, separate(objective, data, x, None)).loss, x)[0])
    others = torch.ones(grads[0].shape[0], dtype=torch.bool)
    others[[1, B + 1]] = False
    torch.testing.assert_close(grads[0][others], grads[1][others])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_pair_of_one_token(name: str) -> None:
    objective = OBJECTIVES[name]
    data = batch(objective, b=1)
    one = {k: x if k == "weight" else x[:, 1:2] for k, x in data.items()}
    one["mask"] = torch.ones_like(one["mask"])
    if "ref_logps" in one:
        one["ref_logps"] = torch.full_like(one["ref_logps"], -1.5)
    out = fused(objective, one)
    z = one["hidden"] @ one["weight"].T
    logps = z.log_softmax(-1).gather(-1, one["ids"][..., None])[..., 0]
    assert out.loss.isfinite()
    torch.testing.assert_close(out.logps, logps[:2, 0])


def test_no_pairs() -> None:
    objective = PreferenceObjective(ld_alpha=0.5)
    empty = torch.zeros(0, 3, requires_grad=True)
    mask = torch.zeros(0, 3)
    out = preference_loss(empty, empty, objective, chosen_mask=mask, rejected_mask=mask, ref_chosen_logps=empty,
                          ref_rejected_logps=empty)  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == 0.0
    hidden, ids = torch.zeros(0, 3, D, requires_grad=True), torch.zeros(0, 3, dtype=torch.int64)
    joint = linear_preference_loss(hidden, torch.ones(V, D), ids, objective, mask=mask, ref_logps=mask)
    assert joint.loss.item() == 0.0 and joint.logps.shape == (0,)


# Definitions ---------------------------------------------------------------------------------------------------------


def test_length_desensitization_by_hand() -> None:
    """LD-DPO, token by token: the first min(n_c, n_r) tokens of the mask count fully."""
    objective = PreferenceObjective(ld_alpha=0.3)
    data = batch(objective)
    logps = -torch.rand(data["mask"].shape, dtype=torch.float64)
    out = on_logps(objective, separate(objective, data, logps, None))
    for i in range(B):
        shared = min(int(data["mask"][row].sum()) for row in (i, B + i))
        for row in (i, B + i):
            kept = logps[row][data["mask"][row]]
            assert out.logps[row].item() == pytest.approx((kept[:shared].sum() + 0.3 * kept[shared:].sum()).item())


def test_aot_matches_ranks_by_hand() -> None:
    objective = PreferenceObjective(loss_type="aot_unpaired", beta=0.4, label_smoothing=0.1)
    c, r = torch.tensor([0.5, -2.0, 1.0]).double(), torch.tensor([1.5, 0.2, -3.0]).double()
    ones = torch.ones(3, 1)
    out = preference_loss(c[:, None], r[:, None], objective, chosen_mask=ones, rejected_mask=ones,
                          ref_chosen_logps=torch.zeros(3, 1), ref_rejected_logps=torch.zeros(3, 1))  # fmt: skip
    gaps = [-2.0 - -3.0, 0.5 - 0.2, 1.0 - 1.5]
    losses = [-0.9 * math.log(1 / (1 + math.exp(-0.4 * g))) - 0.1 * math.log(1 / (1 + math.exp(0.4 * g))) for g in gaps]
    assert out.loss.item() == pytest.approx(sum(losses) / 3)


def test_the_nll_remedy_is_the_sft_loss_type() -> None:
    data = batch(OBJECTIVES["rpo"])
    mixture = PreferenceObjective(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    same(fused(OBJECTIVES["rpo"], data), fused(mixture, data))


def test_the_positive_penalty_by_hand() -> None:
    objective = PreferenceObjective(beta=0.2, dpop_lambda=5.0)
    c, r = torch.tensor([[0.5], [-0.4]]).double(), torch.tensor([[0.1], [-1.5]]).double()
    ones, zeros = torch.ones(2, 1), torch.zeros(2, 1)
    out = preference_loss(c, r, objective, chosen_mask=ones, rejected_mask=ones, ref_chosen_logps=zeros,
                          ref_rejected_logps=zeros)  # fmt: skip
    margins = torch.tensor([0.4, 1.1 - 5.0 * 0.4]).double()
    torch.testing.assert_close(out.loss, -F.logsigmoid(0.2 * margins).mean())
    assert out.metrics["rewards/displaced"].item() == 0.5  # the second: margin 1.1, chosen 0.4 nats below the reference


def test_bco_with_its_running_shift() -> None:
    objective = PreferenceObjective(loss_type="bco_pair")
    data = batch(objective)
    shift = RunningMean()
    rewards = [fused(objective, batch(objective)).rewards for _ in range(3)]
    for x in rewards:
        shift.update(x)
    assert shift.mean == pytest.approx(torch.cat(rewards).mean().item())
    again = RunningMean()
    again.load_state_dict(shift.state_dict())
    out = fused(objective, data, reward_shift=again.mean)
    upper, lower = out.rewards.chunk(2)
    want = (-F.logsigmoid(upper - shift.mean) - F.logsigmoid(shift.mean - lower)).mean()
    torch.testing.assert_close(out.loss, want)
    with pytest.raises(ValueError, match="reward_shift: the objective has no use for it"):
        fused(OBJECTIVES["sigmoid"], data, reward_shift=0.1)


@dataclass(frozen=True, kw_only=True)
class Bounded(PairObjective):
    """An objective of a user's own: one minus the sigmoid of the margin of log-probabilities per token."""

    @property
    def average_log_prob(self) -> bool:
        return True

    def pair_losses(self, chosen: Answers, rejected: Answers, reward_shift: Tensor | float) -> Tensor:
        return 1 - torch.sigmoid(self.beta * (chosen.logps - rejected.logps))


def test_an_objective_of_ones_own_works_fused() -> None:
    data = batch(Bounded())
    logps = fastrl.linear_logprobs(data["hidden"], data["weight"], data["ids"], mask=data["mask"]).logps
    means = logps.sum(-1) / data["mask"].sum(-1)
    out = fused(Bounded(beta=2.0), data)
    torch.testing.assert_close(out.loss, (1 - torch.sigmoid(2.0 * (means[:B] - means[B:]))).mean())


# Numbers at the edge of what can be computed -------------------------------------------------------------------------


def pair(objective: PairObjective, c: float, r: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Loss and gradients for one pair of one token each, the reference at 0."""
    x = torch.tensor([[c], [r]], dtype=dtype, requires_grad=True)
    ones = torch.ones(1, 1)
    reference = {} if objective.refuses_reference else {"ref_chosen_logps": 0 * ones, "ref_rejected_logps": 0 * ones}
    out = preference_loss(x[:1], x[1:], objective, chosen_mask=ones, rejected_mask=ones, **reference)
    return out.loss.detach(), torch.autograd.grad(out.loss, x)[0].flatten()


def test_large_margins_do_not_overflow() -> None:
    loss, grads = pair(PreferenceObjective(loss_type="discopop", beta=1.0), -200.0, 0.0)  # exp(200) is inf in fp32
    assert loss.item() == pytest.approx(200.0) and grads.tolist() == pytest.approx([-1.0, 1.0])
    alphapo = CPOObjective(alpha=0.1, cpo_alpha=0.0)  # the probability of 200 nats is 0 in fp32: its power inf
    loss, grads = pair(alphapo, -10.0, -200.0)
    wanted = [(1 - math.exp(0.1 * x)) / 0.1 for x in (10.0, 200.0)]
    margin = 0.1 * (wanted[0] - wanted[1])
    assert loss.item() == pytest.approx(math.exp(-margin), abs=1e-30) and grads.isfinite().all()


def test_certain_answers_have_finite_odds() -> None:
    loss, grads = pair(ORPOObjective(), 0.0, -1.0)
    assert loss.isfinite() and grads.isfinite().all()
    loss, grads = pair(ORPOObjective(), -1.0, 0.0)
    assert loss.isfinite() and grads.isfinite().all() and loss > 1


def test_hinge_at_its_corner_and_drops_satisfied_pairs() -> None:
    objective = PreferenceObjective(loss_type="hinge", beta=0.5)
    loss, grads = pair(objective, 1.0, -1.0)  # margin exactly 1
    assert loss.item() == 0.0 and grads.tolist() == [0.0, 0.0]
    loss, grads = pair(objective, -1.0, 1.0)
    assert loss.item() == 2.0 and grads.tolist() == [-0.5, 0.5]


def test_half_precision_is_summed_in_single() -> None:
    logps = -torch.rand(2, 300).bfloat16() * 4
    mask = torch.ones(2, 300)
    out = preference_loss(logps, logps * 1.5, PreferenceObjective(reference_free=True), chosen_mask=mask,
                          rejected_mask=mask)  # fmt: skip
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.logps[:2], logps.float().sum(-1))


def test_same_bits_twice_and_inputs_untouched() -> None:
    objective = OBJECTIVES["ld"]
    data = batch(objective)
    leaves = [data[k].requires_grad_() for k in ("hidden", "weight")]
    before = [x.detach().clone() for x in leaves]
    first, second = (torch.autograd.grad(fused(objective, data).loss, leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))


def test_compiles_as_one_graph() -> None:
    objective = OBJECTIVES["ld"]
    data = batch(objective)
    packed = pack(data, torch.where(data["mask"], torch.arange(1, T + 1), 0).amax(-1))
    leaves = [packed[k].requires_grad_() for k in ("hidden", "weight")]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused(objective, {**packed, "hidden": hidden, "weight": weight}).loss

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


# Wrong arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "sigmoyd"}, "loss_type: expected one or more of .*, got 'sigmoyd'"),
        ({"loss_type": []}, "loss_type"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights: expected None or 2 weights"),
        ({"beta": 0.0}, "beta: expected a number above 0, got 0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"loss_type": "exo_pair"}, "label_smoothing: exo_pair needs it above 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing: robust needs it in"),
        ({"f_divergence_type": "kl"}, "f_divergence_type: expected one of"),
        ({"f_divergence_type": "forward_kl", "loss_type": "apo_zero"}, "f_divergence_type: .* apo_zero"),
        ({"ld_alpha": 1.5}, "ld_alpha"),
        ({"use_weighting": True, "loss_type": "aot"}, "use_weighting: .* aot"),
        ({"use_weighting": True, "loss_type": ["sigmoid", "sft"]}, "use_weighting: .* sft"),
        ({"discopop_tau": 0.0}, "discopop_tau"),
        ({"rpo_alpha": -1.0}, "rpo_alpha"),
        ({"dpop_lambda": 1.0, "loss_type": "nca_pair"}, "dpop_lambda: .* nca_pair"),
        ({"dpop_lambda": 1.0, "reference_free": True}, "dpop_lambda: it needs a reference"),
        ({"preset": "verl"}, "preset"),
        ({"preset": "openrlhf", "loss_type": "hinge"}, "preset: .* hinge"),
    ],
)
def test_wrong_options_of_dpo_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceObjective(**arguments)


def test_wrong_options_of_the_others_are_named() -> None:
    with pytest.raises(ValueError, match=r"loss_type: expected one of .*, got 'sim'"):
        CPOObjective(loss_type="sim")
    with pytest.raises(ValueError, match="label_smoothing: loss_type 'hinge' has none"):
        CPOObjective(loss_type="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="cpo_alpha: alphapo has no NLL term"):
        CPOObjective(loss_type="alphapo", cpo_alpha=1.0)
    with pytest.raises(ValueError, match=r"loss_type: expected one of .*, got 'simpo'"):
        TPOObjective(loss_type="simpo")
    with pytest.raises(ValueError, match="tpo_alpha"):
        TPOObjective(tpo_alpha=-0.1)
    with pytest.raises(ValueError, match="beta: expected a number above 0"):
        ORPOObjective(beta=-1.0)


def test_label_smoothing_without_effect_warns() -> None:
    with pytest.warns(UserWarning, match="label_smoothing=0.1 has no effect on loss_type sigmoid"):
        PreferenceObjective(label_smoothing=0.1)


def test_wrong_inputs_are_named() -> None:
    objective = PreferenceObjective()
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)

    def call(*args: Any, **given: Any) -> None:
        usual = {"chosen_mask": mask, "rejected_mask": mask, "ref_chosen_logps": x, "ref_rejected_logps": x}
        preference_loss(*(args or (x, x, objective)), **{**usual, **given})

    call()
    for given, message in (
        ({"ref_chosen_logps": None, "ref_rejected_logps": None}, "ref_chosen_logps: needed by the objective"),
        ({"ref_rejected_logps": None}, "ref_rejected_logps: expected together with ref_chosen_logps"),
        ({"ref_chosen_logps": x[:, :2]}, r"ref_chosen_logps: expected shape \(2, 3\)"),
        ({"chosen_mask": mask[:, :2]}, r"chosen_mask: expected shape \(2, 3\)"),
        ({"nll_logps": x, "nll_mask": mask}, "nll_logps: the objective has no use for it"),
        ({"chosen_log_sum_sq_probs": x, "rejected_log_sum_sq_probs": x}, "chosen_log_sum_sq_probs: the objective has"),
        ({"nll_normalizer": 3.0}, "nll_normalizer: the objective has no NLL term"),
        ({"normalizer": 0}, "normalizer: expected None or a number above 0"),
        ({"cu_seqlens": (mask,)}, "cu_seqlens: expected a pair"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**given)
    with pytest.raises(ValueError, match="rejected_logps: expected 2 answers, as chosen_logps, got 1"):
        call(x, x[:1], objective, rejected_mask=mask[:1], ref_rejected_logps=x[:1])
    with pytest.raises(ValueError, match="ref_chosen_logps: the objective has no use for it"):
        call(x, x, CPOObjective())
    with pytest.raises(ValueError, match="nll_normalizer: expected together with normalizer"):
        call(x, x, PreferenceObjective(rpo_alpha=1.0), normalizer=4)
    with pytest.raises(ValueError, match="nll_logps: needed by the objective"):
        preference_loss(x, x, TPOObjective(), chosen_mask=mask, rejected_mask=mask)
    with pytest.raises(ValueError, match="chosen_log_sum_sq_probs: needed by the objective"):
        call(x, x, PreferenceObjective(use_weighting=True))

    hidden, weight, ids = torch.zeros(3, 2, D), torch.zeros(V, D), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="hidden: expected 2B answers, chosen and rejected, got 3"):
        linear_preference_loss(hidden, weight, ids, objective, mask=torch.ones(3, 2), ref_logps=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"hidden: expected shape \(2B, T, D\), got \(2, 5\)"):
        linear_preference_loss(hidden[0], weight, ids[0], objective, mask=torch.ones(2), ref_logps=torch.zeros(2))
    with pytest.raises(ValueError, match="ref_logps: needed by the objective"):
        linear_preference_loss(hidden[:2], weight, ids[:2], objective, mask=torch.ones(2, 2))

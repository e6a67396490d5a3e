"""Every loss type in every form: gradients, fused against composed, padded against packed, splits, edges, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl import PolicyObjective
from fastrl.objectives.surrogates import LOSSES, OWN_OPTIONS, PRESETS
from fastrl.objectives.token_selection import covariance_tokens, entropy_threshold
from fastrl_kernels import planner

B, T, D, V = 4, 6, 8, 60

# Bounds that some of the tokens below cross. clip_cov takes all of its candidates, so that nothing is drawn.
OPTIONS: dict[str, dict[str, Any]] = {
    "dr_grpo": {"max_completion_length": 9},
    "grpo": {"delta": 1.4},
    "gspo": {"epsilon": 0.03, "epsilon_high": 0.05},
    "luspo": {"importance_sampling_level": "sequence", "epsilon": 0.05},
    "gmpo": {"epsilon": 0.2, "epsilon_high": 0.3},
    "cispo": {"epsilon_high": 1.2},
    "ppo": {"clip_ratio_c": 1.3, "epsilon_high": 0.1},
    "clip_cov": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 5.0},
    "kl_cov": {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.5},
    "dppo_tv": {"epsilon": 0.003, "epsilon_high": 0.001, "clip_ratio_c": 1.2},
    "dppo_kl": {"epsilon": 3e-4, "epsilon_high": 1e-4, "clip_ratio_c": 1.2},
    "dro": {"dro_beta": 0.5},
}
EVERYTHING = {"beta": 0.1, "entropy_coef": 0.03, "nll_coef": 0.2}
NAMES = [(name, preset) for preset, origin in PRESETS.items() for name in origin.losses]
# Their loss holds a factor of the policy as a constant: a finite difference is not their gradient.
CONSTANT_FACTOR = ("cispo", "vespo", "dppo_tv", "dppo_kl")


def objective_of(name: str, preset: str | None = None, **more: Any) -> PolicyObjective:
    own = PRESETS[preset].losses[name].options
    options = {k: v for k, v in OPTIONS.get(name, {}).items() if k in own or k not in OWN_OPTIONS}
    return PolicyObjective(loss_type=name, preset=preset, **{**options, **more})


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with planner.forced(tile_bytes=1, min_rows=5, weight_block=50, score_rows=7):
        yield


def batch(seed: int = 3) -> dict[str, Any]:
    """Uneven lengths, a hole, a fully masked row, a dead row, an advantage per token where asked for."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(B, T, D).double(), (torch.randn(V, D) / D**0.5).double()
    ids = torch.randint(V, (B, T))
    mask = torch.arange(T) < torch.tensor([6, 3, 0, 5])[:, None]
    mask[0, 2] = False
    stats = fastrl.linear_logprobs(hidden, weight, ids, entropy=True, backend="reference")
    old = stats.logps + torch.randn(B, T) * 0.3
    constants = {
        "mask": mask,
        "advantages": torch.tensor([1.3, -0.7, 0.4, 0.0]).double(),
        "old_logps": old,
        "ref_logps": old + torch.randn(B, T) * 0.2,
        "importance_ratio": (torch.rand(B, T) + 0.5).double(),
    }
    return {"hidden": hidden, "weight": weight, "ids": ids, "logps": stats.logps, "entropy": stats.entropy} | {
        "constants": constants
    }


def run(objective: PolicyObjective, data: dict[str, Any], **changed: Any) -> list[Tensor]:
    """Loss, gradients of logps and entropy, and metrics in the order of their names."""
    leaves = [data["logps"].detach().requires_grad_(), data["entropy"].detach().requires_grad_()]
    out = fastrl.policy_loss(leaves[0], objective, entropy=leaves[1], **{**data["constants"], **changed})
    grads = torch.autograd.grad(out.loss * 1.7, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return [out.loss.detach(), *grads, torch.stack([out.metrics[k].double() for k in sorted(out.metrics)])]


def packed(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(x, lengths.tolist(), strict=True)])


def assert_equal(ours: list[Tensor], want: list[Tensor], what: Any) -> None:
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=1e-9, atol=1e-11, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )


def test_every_loss_type_of_the_issue_is_there() -> None:
    assert set(LOSSES) == {
        "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gspo", "gmpo", "rloo", "reinforce",
        "ppo", "gpg", "clip_cov", "kl_cov", "dppo_tv", "dppo_kl", "dro",
    }  # fmt: skip
    for preset, origin in PRESETS.items():
        assert set(origin.losses) <= set(LOSSES), preset


@pytest.mark.parametrize(("name", "preset"), NAMES)
def test_gradcheck(name: str, preset: str | None) -> None:
    data = batch()
    constants, inside = data["constants"], data["constants"]["mask"]
    objective = objective_of(name, preset, **EVERYTHING)
    selected = None
    if objective.surrogate.covariance:
        selected = covariance_tokens(
            objective, data["logps"], **{k: constants[k] for k in ("advantages", "mask", "old_logps")}
        )

    def loss(x: Tensor, h: Tensor) -> Tensor:
        full = torch.full_like(data["logps"], math.nan).masked_scatter(inside, x)
        entropy = torch.full_like(full, math.nan).masked_scatter(inside, h)
        return fastrl.policy_loss(full, objective, entropy=entropy, selected=selected, **constants).loss

    leaves = [data[k][inside].requires_grad_() for k in ("logps", "entropy")]
    if name not in CONSTANT_FACTOR and (name, preset) != ("gspo", "verl"):
        assert torch.autograd.gradcheck(loss, leaves)
    grads = torch.autograd.grad(loss(*leaves), leaves)
    assert all(g.isfinite().all() and g.any() for g in grads)


@pytest.mark.parametrize("name", CONSTANT_FACTOR)
@pytest.mark.parametrize("preset", (None, "trl", "verl"))
def test_gradients_with_a_constant_factor(name: str, preset: str | None) -> None:
    """The gradient in a token's logp is minus factor, advantage and weight; the loss is that times the logp."""
    if name not in PRESETS[preset].losses:
        return
    data, objective = batch(), objective_of(name, preset)
    constants = {**data["constants"], "importance_ratio": None}
    mask, a = constants["mask"], constants["advantages"][:, None]
    new, o = data["logps"], constants["old_logps"]
    c = (new - o).exp()
    if name == "cispo":
        factor = c.clamp(0.8, 2.2) if preset == "verl" else c.clamp(max=1.2)
    elif name == "vespo":
        u = ((new - o) * mask).sum(-1, keepdim=True)
        k, lam = (torch.where(a >= 0, *pair) for pair in ((2.0, 3.0), (3.0, 2.0)))
        factor = (lam + k * u - lam * u.exp()).exp()
    elif name == "dppo_tv":
        keep = torch.where(a > 0, new.exp() - o.exp() <= 0.001, new.exp() - o.exp() >= -0.003)
        factor = c.clamp(max=1.2) * keep
    else:
        p, q = new.exp(), o.exp()
        kl = q * (o - new) + (1 - q) * ((1 - q) / (1 - p)).log()
        keep = torch.where(a > 0, (kl <= 1e-4) | (p <= q), (kl <= 3e-4) | (p >= q))
        factor = c.clamp(max=1.2) * keep
    if name.startswith("dppo"):
        assert 0 < (~keep & mask).sum() < mask.sum()
    want = -factor * a * mask / mask.sum()
    got = run(objective, data, importance_ratio=None)
    torch.testing.assert_close(got[1], want * 1.7, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got[0], (want * new).sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("everything", (False, True), ids=("", "everything"))
@pytest.mark.parametrize(("name", "preset"), NAMES)
def test_fused_equals_composition(name: str, preset: str | None, everything: bool) -> None:
    """linear_policy_loss = policy_loss of linear_logprobs, padded and packed: losses, gradients, logps and metrics."""
    data, objective = batch(), objective_of(name, preset, **(EVERYTHING if everything else {}))
    constants, ids, lengths = data["constants"], data["ids"], torch.tensor([6, 4, 2, 6])
    if objective.surrogate.reads_padding:  # a packed batch has none
        constants["importance_ratio"] = constants["importance_ratio"].masked_fill(~constants["mask"], 1.0)
    h, w = data["hidden"].requires_grad_(), data["weight"].requires_grad_()
    stats = fastrl.linear_logprobs(h, w, ids, mask=constants["mask"], entropy=True)
    composed = fastrl.policy_loss(stats.logps, objective, entropy=stats.entropy, **constants)
    want = torch.autograd.grad(composed.loss, [h, w])
    runs = [packed(x, lengths) if x.shape == (B, T) else x for x in constants.values()]
    tokens = dict(zip(constants, runs, strict=True))
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    forms = {
        "padded": lambda: fastrl.linear_policy_loss(h, w, ids, objective, score_dead=True, **constants),
        "packed": lambda: fastrl.linear_policy_loss(
            packed(h, lengths), w, packed(ids, lengths), objective, score_dead=True, cu_seqlens=cu, **tokens
        ),
    }
    for form, call in forms.items():
        out = call()
        torch.testing.assert_close(out.loss, composed.loss)
        logps = packed(composed.logps, lengths) if form == "packed" else composed.logps
        torch.testing.assert_close(out.logps, logps)
        assert out.metrics.keys() == composed.metrics.keys()
        for key, value in composed.metrics.items():
            torch.testing.assert_close(out.metrics[key], value, equal_nan=True, msg=f"{form} {key}")
        for a, b in zip(torch.autograd.grad(out.loss, [h, w]), want, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, form=form: f"{form}: {m}")
    out = fastrl.linear_policy_loss(h, w, ids, objective, **constants)  # dead tokens are not scored
    for a, b in zip(torch.autograd.grad(out.loss, [h, w]), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("per_token", (False, True), ids=("", "advantage per token"))
@pytest.mark.parametrize(("name", "preset"), NAMES)
def test_padded_equals_packed(name: str, preset: str | None, per_token: bool) -> None:
    """Also with a top-entropy quantile, an off-policy mask, a ratio per sequence, and a sequence without tokens."""
    data = batch()
    constants, lengths = data["constants"], torch.tensor([6, 4, 0, 6])
    if per_token:
        constants["advantages"] = torch.randn(B, T).double()
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    variants: list[dict[str, Any]] = [{}, EVERYTHING]
    if name != "gmpo":
        variants.append({"top_entropy_quantile": 0.6, "off_policy_mask_threshold": 0.01})
    padded_ratios = (constants.pop("importance_ratio"), torch.tensor([[0.7], [1.2], [1.0], [1.1]]).double())
    for options, ratio in itertools.product(variants, padded_ratios):
        objective = objective_of(name, preset, **options)
        if objective.surrogate.reads_padding and ratio.shape == (B, T):  # a packed batch has none
            ratio = ratio.masked_fill(~constants["mask"], 1.0)
        want = run(objective, data, importance_ratio=ratio)
        tokens = {k: packed(x, lengths) if x.shape == (B, T) else x for k, x in constants.items()}
        small = {k: packed(data[k], lengths) for k in ("logps", "entropy")} | {"constants": tokens}
        ratio = packed(ratio, lengths) if ratio.shape == (B, T) else ratio
        got = run(objective, small, importance_ratio=ratio, cu_seqlens=cu)
        want[1:3] = (packed(x, lengths) for x in want[1:3])
        assert_equal(got, want, options)


@pytest.mark.parametrize("quantile", (1.0, 0.5))
@pytest.mark.parametrize(("name", "preset"), NAMES)
def test_any_split_adds_up(name: str, preset: str | None, quantile: float) -> None:
    data = batch()
    constants = data["constants"]
    constants["advantages"] = torch.tensor([1.3, -0.7, 0.4, -0.2]).double()
    mask, logps = constants["mask"], data["logps"]
    more = {"beta": 0.1, "entropy_coef": 0.03, "nll_coef": 0.1}
    objective = objective_of(name, preset, top_entropy_quantile=quantile, **more)
    whole = run(objective, data)
    aggregation = objective.surrogate.aggregation
    sequences = B if PRESETS[preset].counts_empty or name == "gmpo" else int(mask.any(-1).sum())
    length = objective.max_completion_length or T
    counts = {"token-mean": int(mask.sum()), "seq-mean-token-sum-norm": sequences * length}
    normalizer = counts.get(aggregation, sequences)
    shared: dict[str, Any] = {}
    bonus = mask
    if quantile < 1:
        shared["entropy_threshold"] = entropy_threshold(data["entropy"], mask, quantile)
        bonus = mask & (data["entropy"] >= shared["entropy_threshold"])
    if not PRESETS[preset].entropy_as_policy:
        shared["entropy_normalizer"] = int(bonus.sum())
    per_row = dict(constants)
    if objective.surrogate.covariance:
        known = {k: constants[k] for k in ("advantages", "mask", "old_logps")}
        per_row["selected"] = covariance_tokens(objective, logps, **known)
    for parts in ([0, 1, 2, 3, 4], [0, 3, 4]):
        total = [torch.zeros(()), torch.zeros(B, T).double(), torch.zeros(B, T).double()]
        for start, end in itertools.pairwise(parts):
            piece = {k: data[k][start:end] for k in ("logps", "entropy")}
            piece["constants"] = {k: x[start:end] for k, x in per_row.items()}
            loss, *grads, _ = run(objective, piece, normalizer=normalizer, **shared)
            total[0] = total[0] + loss
            total[1][start:end], total[2][start:end] = grads
        assert_equal(total, whole[:3], parts)


@pytest.mark.parametrize("everything", (False, True), ids=("", "everything"))
@pytest.mark.parametrize(("name", "preset"), NAMES)
def test_edges(name: str, preset: str | None, everything: bool) -> None:
    objective = objective_of(name, preset, **(EVERYTHING if everything else {}))
    data = batch()
    constants, mask = data["constants"], data["constants"]["mask"]
    if PRESETS[preset].losses[name].reads_padding:
        constants["importance_ratio"] = torch.ones(B, T).double()
    # What is masked is never used.
    clean = run(objective, data)
    dirty = {k: data[k].masked_fill(~mask, math.nan) for k in ("logps", "entropy")}
    dirty["constants"] = {
        k: x.masked_fill(~mask, math.inf) if x.shape == mask.shape and k not in ("mask", "importance_ratio") else x
        for k, x in constants.items()
    }
    assert_equal(run(objective, dirty), clean, "NaN and inf outside the mask")
    # Nothing counts: 0, with a graph and a gradient of 0. TRL's gmpo and rloo add their constant.
    nothing = run(objective, data, mask=torch.zeros(B, T))
    assert objective.surrogate.empty_loss or nothing[0] == 0
    assert not nothing[1].any() and not nothing[2].any()
    # One token, one sequence; on the policy that sampled.
    one = {k: data[k][:1, :1] for k in ("logps", "entropy")}
    one["constants"] = {k: x[:1, :1] if x.ndim == 2 else x[:1] for k, x in constants.items()}
    assert all(x.isfinite().all() for x in run(objective, one)[:3])
    on_policy = {k: x for k, x in constants.items() if k != "old_logps"}
    assert all(x.isfinite().all() for x in run(objective, data, **on_policy, old_logps=data["logps"])[:3])
    # Shapes without tokens or sequences.
    for shape in ((0, 3), (2, 0)):
        x = torch.zeros(shape).double()
        empty = {"logps": x, "entropy": x}
        empty["constants"] = {"advantages": torch.ones(shape[0]).double(), "mask": x, "ref_logps": x}
        out = run(objective, empty)
        assert out[0] == 0 or objective.surrogate.empty_loss


@pytest.mark.parametrize(("name", "preset"), NAMES)
def test_a_logp_of_minus_infinity_stays_in_its_sequence(name: str, preset: str | None) -> None:
    """Its own loss may be infinite where logps are a factor; its gradient is finite, the other rows' is unchanged."""
    objective, data = objective_of(name, preset), batch()
    data["constants"] |= {"advantages": torch.tensor([1.3, -0.7, 0.4, 0.6]).double()}
    selected = torch.zeros(B, T, dtype=torch.bool) if objective.surrogate.covariance else None
    clean = run(objective, data, selected=selected)
    data["logps"] = data["logps"].clone()
    data["logps"][1, 1] = -math.inf
    hit = run(objective, data, selected=selected)
    others = [0, 2, 3]
    torch.testing.assert_close(hit[1][others], clean[1][others])
    assert hit[1].isfinite().all() or name in ("dro",)
    assert not hit[0].isnan()
    if objective.surrogate.covariance:  # its own covariance is not known: it is not selected, nor does it move the mean
        known = {k: data["constants"][k] for k in ("advantages", "mask", "old_logps")}
        assert not covariance_tokens(objective, data["logps"], **known)[1, 1]


@pytest.mark.parametrize("preset", (None, "verl"))
def test_a_ratio_exactly_at_a_bound(preset: str | None) -> None:
    """exp(log 2) is exactly 2: not beyond a bound of 2, and its gradient passes as inside."""
    two, a = math.log(2), torch.tensor([1.0]).double()
    for name, options in (
        ("ppo", {"epsilon": 0.5, "epsilon_high": 1.0, "clip_ratio_c": 2.0}),
        ("cispo", {"epsilon_high": 2.0 if preset is None else 1.0}),
        ("dppo_tv", {"epsilon": 0.25, "epsilon_high": 0.25, "clip_ratio_c": 2.0}),
    ):
        objective = PolicyObjective(loss_type=name, preset=preset, **options)  # type: ignore[arg-type]
        for sign in (1.0, -1.0):
            logps = torch.tensor([[math.log(0.5)]]).double().requires_grad_()
            old = logps.detach() - two
            mask = torch.ones(1, 1)
            out = fastrl.policy_loss(logps, objective, advantages=sign * a, mask=mask, old_logps=old)
            (grad,) = torch.autograd.grad(out.loss, logps)
            share = 0.5 if (name, sign) == ("ppo", -1.0) else 1.0  # a tie of the minimum with the dual clip is shared
            assert grad.item() == pytest.approx(-sign * 2.0 * share)
            clipped = [v for k, v in out.metrics.items() if "clip" in k and "low" not in k]
            assert clipped and not any(bool(v) for v in clipped), (name, out.metrics)


@pytest.mark.parametrize("form", ("padded", "packed"))
@pytest.mark.parametrize(
    ("name", "preset"), [("ppo", "verl"), ("cispo", None), ("vespo", None), ("gmpo", None), ("kl_cov", None)]
)
def test_compiles_as_one_graph(name: str, preset: str | None, form: str) -> None:
    data, objective = batch(), objective_of(name, preset)
    constants = dict(data["constants"])
    logps = data["logps"]
    if form == "packed":
        constants = {k: x.flatten() if x.shape == (B, T) else x for k, x in constants.items()}
        constants["cu_seqlens"], logps = torch.arange(B + 1) * T, logps.flatten()

    def loss(x: Tensor) -> Tensor:
        return fastrl.policy_loss(x, objective, **constants).loss

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [logps.detach().clone().requires_grad_() for _ in range(2)]
    grads = [torch.autograd.grad(f(x), x)[0] for f, x in zip((loss, compiled), leaves, strict=True)]
    torch.testing.assert_close(*grads)


def test_likelihood_of_positive_examples() -> None:
    data, mask = batch(), batch()["constants"]["mask"]
    data["constants"]["importance_ratio"][0, 0] = 0.0  # a gate of the policy term alone
    plain = run(PolicyObjective(), data)
    mixed = run(PolicyObjective(nll_coef=0.3), data)
    positive = mask & (data["constants"]["advantages"] > 0)[:, None]
    weights = positive / mask.sum()
    torch.testing.assert_close(mixed[0], plain[0] - 0.3 * (weights * data["logps"]).sum())
    torch.testing.assert_close(mixed[1], plain[1] - 1.7 * 0.3 * weights)
    live = PolicyObjective(nll_coef=0.3).live_tokens(
        advantages=data["constants"]["advantages"],
        mask=mask,
        importance_ratio=data["constants"]["importance_ratio"],
    )
    assert live[0, 0] and not live[3].any()


@pytest.mark.parametrize("estimator", ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"))
@pytest.mark.parametrize("corrected", (False, True))
def test_kl_estimators(estimator: str, corrected: bool) -> None:
    """In the loss with and without the ratio; the fused form takes all of them in a single pass."""
    data = batch()
    constants = {**data["constants"], "advantages": torch.zeros(B).double()}
    objective = PolicyObjective(beta=0.5, kl_estimator=estimator, use_bias_correction_kl=corrected)
    assert objective.token_local
    x = data["logps"].detach().requires_grad_()
    kl = fastrl.kl_estimate(x, constants["ref_logps"], estimator)
    kl = kl * (x - constants["old_logps"]).exp() if corrected else kl
    want = torch.where(constants["mask"], kl, 0.0).sum() / constants["mask"].sum()
    out = fastrl.policy_loss(x, objective, **constants)
    torch.testing.assert_close(out.loss, 0.5 * want)
    torch.testing.assert_close(out.metrics["kl"], want.detach())
    grads = [torch.autograd.grad(loss, x)[0] for loss in (out.loss, 0.5 * want)]
    torch.testing.assert_close(*grads)
    h, w = data["hidden"].requires_grad_(), data["weight"].requires_grad_()
    fused = fastrl.linear_policy_loss(h, w, data["ids"], objective, **constants)
    stats = fastrl.linear_logprobs(h, w, data["ids"], mask=constants["mask"])
    composed = fastrl.policy_loss(stats.logps, objective, **constants)
    for a, b in zip(*(torch.autograd.grad(x.loss, [h, w]) for x in (fused, composed)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ("dapo", "gspo", "grpo"))
@pytest.mark.parametrize("form", ("padded", "packed"))
def test_exact_kl_to_a_reference_head(name: str, form: str) -> None:
    """kl_estimator "full": the KL over the vocabulary, aggregated as the policy term, from a head of another size."""
    data, objective = batch(), objective_of(name, beta=0.7, kl_estimator="full")
    torch.manual_seed(11)
    constants = {k: x for k, x in data["constants"].items() if k != "ref_logps"}
    ids, ref_hidden, ref_weight = data["ids"], torch.randn(B, T, 5).double(), torch.randn(V, 5).double() / 2
    bias, ref_bias = torch.randn(V).double().requires_grad_(), torch.randn(V).double()
    h, w = data["hidden"].requires_grad_(), data["weight"].requires_grad_()
    p, q = (((x @ y.T + b) / 0.8).log_softmax(-1) for x, y, b in ((h, w, bias), (ref_hidden, ref_weight, ref_bias)))
    kl = (p.exp() * (p - q)).sum(-1)
    stats = fastrl.linear_logprobs(h, w, ids, bias=bias, temperature=0.8, mask=constants["mask"], entropy=True)
    plain = fastrl.policy_loss(stats.logps, objective_of(name), entropy=stats.entropy, **constants)
    weights = objective.token_weights(constants["mask"], None, torch.float64)
    want = plain.loss + 0.7 * (weights * kl).sum()
    composed = fastrl.policy_loss(stats.logps, objective, entropy=stats.entropy, kl=kl, **constants)
    reference: dict[str, Any] = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    cu = None
    if form == "packed":
        lengths = torch.full((B,), T)
        cu = torch.arange(B + 1) * T
        constants = {k: packed(x, lengths) if x.shape == (B, T) else x for k, x in constants.items()}
        reference["ref_hidden"], ids = packed(ref_hidden, lengths), packed(ids, lengths)
    states = h.reshape(-1, D) if form == "packed" else h
    fused = fastrl.linear_policy_loss(
        states, w, ids, objective, bias=bias, temperature=0.8, cu_seqlens=cu, **reference, **constants
    )
    for out in (composed, fused):
        torch.testing.assert_close(out.loss, want)
        torch.testing.assert_close(out.metrics["kl"], kl[data["constants"]["mask"]].mean().detach())
        torch.testing.assert_close(out.metrics["policy_loss"], want.detach())
        grads = torch.autograd.grad(out.loss, [h, w, bias], retain_graph=True)
        for a, b in zip(grads, torch.autograd.grad(want, [h, w, bias], retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)


def test_selections_are_those_of_the_papers() -> None:
    data = batch()
    known = {k: data["constants"][k] for k in ("mask", "old_logps")}
    a, logps, mask = torch.randn(B, T).double(), data["logps"], known["mask"]
    n = int(mask.sum())
    covariance = (a - a[mask].mean()) * (logps - logps[mask].mean())
    got = covariance_tokens(PolicyObjective(loss_type="kl_cov", kl_cov_ratio=0.25), logps, advantages=a, **known)
    best = covariance[mask].topk(int(0.25 * n)).values.min()
    assert torch.equal(got, mask & (covariance >= best))
    few = covariance_tokens(PolicyObjective(loss_type="kl_cov"), logps, advantages=a, **known)
    assert few.sum() == 1 and few.flatten()[covariance.masked_fill(~mask, -math.inf).argmax()]
    c = (logps - known["old_logps"]).exp()
    candidates = mask & (covariance > 0.05) & (covariance < 9) & ~((c > 1.2) & (a > 0)) & ~((c < 0.8) & (a < 0))
    assert candidates.sum() > 3
    objective = PolicyObjective(loss_type="clip_cov", clip_cov_lb=0.05, clip_cov_ub=9.0, clip_cov_ratio=1.0)
    assert torch.equal(covariance_tokens(objective, logps, advantages=a, **known), candidates)
    drawn = dataclasses.replace(objective, clip_cov_ratio=2.5 / n)
    picks = [covariance_tokens(drawn, logps, advantages=a, **known) for _ in range(20)]
    assert all(pick.sum() == 2 and not (pick & ~candidates).any() for pick in picks)
    assert len({tuple(pick.flatten().nonzero().flatten().tolist()) for pick in picks}) > 1
    out = fastrl.policy_loss(logps, objective, advantages=a, **known)
    assert out.metrics["clip_cov/selected_mean"] == pytest.approx(candidates.sum().item() / n)


def test_the_fused_kernel_stands_in_for_nothing_else() -> None:
    served = {name for name in LOSSES if objective_of(name).kernel_spec is not None}
    assert served == {"grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo"}
    assert all(objective_of(name, p).kernel_spec is None for name, p in NAMES if p in ("verl", "openrlhf"))
    for option in ({"nll_coef": 0.1}, {"beta": 0.1, "kl_estimator": "k3+"}, {"beta": 0.1, "kl_estimator": "abs"}):
        assert PolicyObjective(**option).kernel_spec is None  # type: ignore[arg-type]


def test_unused_options_are_refused() -> None:
    values = {
        "epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0, "importance_sampling_level": "sequence", "clip_ratio_c": 2.0,
        "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 2.0, "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0,
        "vespo_k_neg": 1.0, "vespo_lambda_neg": 1.0, "clip_cov_ratio": 0.1, "clip_cov_lb": 0.5, "clip_cov_ub": 4.0,
        "kl_cov_ratio": 0.1, "ppo_kl_coef": 0.2, "dro_beta": 0.3,
    }  # fmt: skip
    assert set(values) == set(OWN_OPTIONS)
    for name, preset in NAMES:
        entry = PRESETS[preset].losses[name]
        for option, value in values.items():
            if option in entry.options or (option == "importance_sampling_level" and entry.level == "sequence"):
                PolicyObjective(loss_type=name, preset=preset, **{option: value})  # type: ignore[arg-type]
                continue
            with pytest.raises(ValueError, match=f"{option}: loss_type '{name}'.* has no use for it"):
                PolicyObjective(loss_type=name, preset=preset, **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "trll"}, "preset: expected None, 'trl', 'verl' or 'openrlhf', got 'trll'"),
        ({"loss_type": "ppo", "preset": "trl"}, "loss_type: expected with preset 'trl' one of grpo"),
        ({"loss_type": "vespo", "preset": "verl"}, "loss_type: expected with preset 'verl'"),
        ({"aggregation": "mean"}, "aggregation: expected None or one of token-mean"),
        ({"loss_type": "gmpo", "aggregation": "token-mean"}, "aggregation: loss_type 'gmpo' always has"),
        ({"loss_type": "sapo", "preset": "verl", "aggregation": "token-mean"}, "aggregation: loss_type 'sapo' with"),
        ({"loss_type": "gmpo", "off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold: loss_type 'gmpo'"),
        ({"loss_type": "gmpo", "use_bias_correction_kl": True}, "use_bias_correction_kl: loss_type 'gmpo'"),
        ({"kl_estimator": "full", "use_bias_correction_kl": True}, "use_bias_correction_kl: an exact KL"),
        ({"loss_type": "ppo", "clip_ratio_c": 1.0}, "clip_ratio_c: expected None or a number above 1"),
        ({"nll_coef": -0.1}, "nll_coef: expected a number of at least 0"),
        ({"loss_type": "dro", "dro_beta": 0.0}, "dro_beta: expected a number above 0"),
        ({"loss_type": "clip_cov", "clip_cov_lb": 6.0}, "clip_cov_lb: expected at most clip_cov_ub"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_bad_options_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyObjective(**arguments)


def test_bad_inputs_are_named() -> None:
    data = batch()
    constants, x = data["constants"], data["logps"]
    flags = torch.zeros(B, T, dtype=torch.bool)
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("entropy_threshold: only a top_entropy_quantile", {}, {"entropy_threshold": 0.5}),
        ("selected: only clip_cov and kl_cov", {}, {"selected": flags}),
        ("selected: expected shape", {"loss_type": "kl_cov"}, {"selected": flags[:1]}),
        ("entropy_normalizer: preset 'verl'", {"preset": "verl", "entropy_coef": 0.1}, {"entropy_normalizer": 3.0}),
        ("kl: needed by kl_estimator 'full'", {"beta": 0.1, "kl_estimator": "full"}, {}),
        ("kl: only beta with kl_estimator 'full'", {"beta": 0.1}, {"kl": x}),
        ("normalizer: token-sum divides by nothing", {"aggregation": "token-sum"}, {"normalizer": 3.0}),
        ("entropy: expected shape", {}, {"entropy": x[:1]}),
        ("sampling_logps: expected shape", {}, {"sampling_logps": x[:1]}),
        (r"logps: expected shape \(N,\) with cu_seqlens", {}, {"cu_seqlens": torch.tensor([0, 3])}),
    ]
    for message, options, changed in cases:
        with pytest.raises(ValueError, match=message):
            fastrl.policy_loss(x, PolicyObjective(**options), **{**constants, **changed})
    head = (data["hidden"], data["weight"].requires_grad_(), data["ids"])
    full = PolicyObjective(beta=0.1, kl_estimator="full")
    reference = {"ref_hidden": data["hidden"].detach(), "ref_weight": data["weight"].detach()}
    for message, objective, changed in (
        ("ref_hidden, ref_weight: needed by", full, {}),
        ("ref_hidden, ref_weight, ref_bias: only beta", PolicyObjective(), reference),
        ("weight_grad: only a token-local", full, {**reference, "weight_grad": torch.zeros(V, D).double()}),
        (r"hidden: expected shape \(N, D\) with cu_seqlens", PolicyObjective(), {"cu_seqlens": torch.tensor([0, 4])}),
    ):
        with pytest.raises(ValueError, match=message):
            fastrl.linear_policy_loss(*head, objective, **{**constants, **changed})  # type: ignore[arg-type]
    flat = {k: v.flatten() if v.shape == (B, T) else v for k, v in constants.items()}
    with pytest.raises(ValueError, match="max_completion_length: dr_grpo needs it"):
        cu = torch.arange(B + 1) * T
        fastrl.policy_loss(x.flatten(), PolicyObjective(loss_type="dr_grpo", preset="verl"), **flat, cu_seqlens=cu)
    with pytest.raises(ValueError, match="objective: expected loss_type clip_cov or kl_cov"):
        covariance_tokens(PolicyObjective(), x, advantages=constants["advantages"], mask=constants["mask"])
    with pytest.raises(ValueError, match="scores: kl_cov"):
        covariance_tokens(
            PolicyObjective(loss_type="kl_cov"), x, advantages=constants["advantages"], mask=constants["mask"], scores=x
        )

"""The policy loss: its fused form against its logps form and fp64, dead rows, splits, memory, operators, errors."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate
from torch import Tensor

import fastrl
from fastrl import PolicyObjective
from fastrl_kernels import TokenBatch, engine, ops, planner
from fastrl_kernels.engine import pack

B, T, D, V = 4, 6, 8, 130

OBJECTIVES = {
    "dapo": PolicyObjective(),
    "grpo with everything": PolicyObjective(
        loss_type="grpo", beta=0.1, entropy_coef=0.02, delta=1.4, epsilon=0.1, epsilon_high=0.3
    ),
    "dr_grpo": PolicyObjective(loss_type="dr_grpo", max_completion_length=10),
    "bnpo, k1, no correction": PolicyObjective(
        loss_type="bnpo", beta=0.2, kl_estimator="k1", use_bias_correction_kl=False
    ),
    "k2": PolicyObjective(beta=0.2, kl_estimator="k2"),
    "entropy penalty": PolicyObjective(entropy_coef=-0.05),
    "gspo": PolicyObjective(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-2, beta=0.1),
    "top entropy": PolicyObjective(top_entropy_quantile=0.4, entropy_coef=0.01),
    "off-policy mask": PolicyObjective(off_policy_mask_threshold=0.01),
}


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with planner.forced(tile_bytes=1, min_rows=5, weight_block=50, score_rows=7):
        yield


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """A batch with uneven lengths, a hole, a fully masked row, a dead row, and ratios on both sides of the clip."""
    hidden, weight = torch.randn(B, T, D).to(dtype), (torch.randn(V, D) / D**0.5).to(dtype)
    ids = torch.randint(V, (B, T))
    mask = torch.arange(T) < torch.tensor([6, 3, 0, 5])[:, None]
    mask[0, 2] = False
    logps = fastrl.linear_logprobs(hidden.double(), weight.double(), ids, backend="reference").logps
    old = (logps + torch.randn(B, T) * 0.3).float()
    return {
        "hidden": hidden,
        "weight": weight,
        "ids": ids,
        "constants": {
            "mask": mask,
            "advantages": torch.tensor([1.3, -0.7, 0.4, 0.0]),
            "old_logps": old,
            "ref_logps": old + torch.randn(B, T) * 0.2,
            "importance_ratio": torch.rand(B, T) + 0.5,
        },
    }


def fused(data: dict[str, Any], objective: PolicyObjective, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Loss, gradients of hidden and weight, and metrics of the fused form."""
    h, w = (data[k].detach().to(dtype).requires_grad_() for k in ("hidden", "weight"))
    out = fastrl.linear_policy_loss(h, w, data["ids"], objective, **{**data["constants"], **options})
    grads = torch.autograd.grad(out.loss * 1.7, [h, w])
    return [out.loss.detach(), *grads, out.metrics["clip_ratio/region_mean"]]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_matches_fp64(name: str, dtype: torch.dtype) -> None:
    data, objective = batch(dtype), OBJECTIVES[name]
    for options in ({}, {"temperature": 0.7, "softcap": 10.0}, {"score_dead": True}):
        truth = fused(data, objective, torch.float64, backend="reference", **options)
        plain = fused(data, objective, dtype, backend="reference", **options)
        ours = fused(data, objective, dtype, **options)
        for what, o, p, t in zip(("dX", "dW", "clip ratio"), ours[1:], plain[1:], truth[1:], strict=True):
            assert_as_accurate(o, p, t, f"{what} of {name}, {options}")
        # The loss is a sum of terms of both signs and of order 1: its error is that of its terms.
        gap, plain_gap = (abs(x[0].double() - truth[0]).item() for x in (ours, plain))
        assert gap <= 4 * plain_gap + (1e-13 if dtype == torch.float64 else 5e-7), f"loss of {name}, {options}: {gap}"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_equals_composition(name: str) -> None:
    """linear_policy_loss = policy_loss of linear_logprobs: losses, gradients and metrics, all tokens scored."""
    data, objective, constants = batch(), OBJECTIVES[name], batch()["constants"]
    data["constants"] = constants
    h, w = data["hidden"].requires_grad_(), data["weight"].requires_grad_()
    stats = fastrl.linear_logprobs(h, w, data["ids"], mask=constants["mask"], entropy=True)
    composed = fastrl.policy_loss(stats.logps, objective, entropy=stats.entropy, **constants)
    single = fastrl.linear_policy_loss(h, w, data["ids"], objective, score_dead=True, **constants)
    torch.testing.assert_close(single.loss, composed.loss)
    torch.testing.assert_close(single.logps, composed.logps)
    assert single.metrics.keys() == composed.metrics.keys()
    for key, value in composed.metrics.items():
        torch.testing.assert_close(single.metrics[key], value, equal_nan=True, msg=key)
    for a, b in zip(*(torch.autograd.grad(x.loss, [h, w]) for x in (single, composed)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name: str, backend: str) -> None:
    torch.manual_seed(1)  # no entropy within a finite difference of the quantile, no ratio within one of the clip
    data = batch()
    bias = torch.randn(V, dtype=torch.float64)
    constants = data["constants"]

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fastrl.linear_policy_loss(h, w, data["ids"], OBJECTIVES[name], bias=b, backend=backend, **constants).loss

    leaves = [x.requires_grad_() for x in (data["hidden"], data["weight"], bias)]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


def test_dead_rows_are_dropped_exactly_and_before_the_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    data, objective = batch(), PolicyObjective()
    constants = data["constants"]
    mask, advantages = constants["mask"], constants["advantages"]
    live = mask & (advantages != 0)[:, None]
    assert torch.equal(objective.live_tokens(advantages=advantages, mask=mask), live)
    projected: list[int] = []
    project = engine.Head.project
    monkeypatch.setattr(
        engine.Head, "project", lambda self, x, *tile: projected.append(x.shape[0]) or project(self, x, *tile)
    )
    added: list[int] = []
    add = engine._Accumulator.add
    monkeypatch.setattr(
        engine._Accumulator, "add", lambda self, d, x, rows: added.append(x.shape[0]) or add(self, d, x, rows)
    )
    h, w = data["hidden"].requires_grad_(), data["weight"].requires_grad_()
    h.data[~live] = torch.nan  # whatever is read of a dead row would show
    out = fastrl.linear_policy_loss(h, w, data["ids"], objective, **constants)
    grads = torch.autograd.grad(out.loss, [h, w])
    assert sum(projected) == int(live.sum())
    clipped = out.metrics["clip_ratio/region_mean"] * mask.sum()
    assert (
        sum(added) == int(live.sum()) - round(clipped.item()) < int(live.sum())
    )  # clipped rows skip the last two GEMMs
    assert out.logps[~live].eq(0).all() and out.metrics["live_fraction"] == live.sum() / mask.sum()
    assert grads[0][~live].eq(0).all() and all(g.isfinite().all() for g in grads)


def test_score_dead_fills_logps_and_changes_no_gradient() -> None:
    data = batch()
    h, w = data["hidden"].requires_grad_(), data["weight"].requires_grad_()
    outs = [
        fastrl.linear_policy_loss(h, w, data["ids"], PolicyObjective(), score_dead=s, **data["constants"])
        for s in (False, True)
    ]
    mask = data["constants"]["mask"]
    want = fastrl.linear_logprobs(h, w, data["ids"], mask=mask).logps
    torch.testing.assert_close(outs[1].logps, want.detach())
    assert (outs[0].logps[3] == 0).all() and (outs[1].logps[3][mask[3]] != 0).all()
    for a, b in zip(*(torch.autograd.grad(o.loss, [h, w]) for o in outs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("k", range(7))
def test_pack_moves_each_alive_row_once(k: int) -> None:
    for _ in range(20):
        alive = torch.zeros(6, dtype=torch.bool)
        alive[torch.randperm(6)[:k]] = True
        source, target = pack(alive, k)
        assert source.sort().values.equal(alive.nonzero().squeeze(-1)) and target.equal(torch.arange(k))
        moved = source != target
        assert not alive[target[moved]].any() and (source[moved] >= k).all()


@pytest.mark.parametrize("loss_type", ("grpo", "dapo", "dr_grpo", "bnpo"))
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_any_split_gives_the_whole_batchs_gradient(loss_type: str, level: str) -> None:
    objective = PolicyObjective(
        loss_type=loss_type, beta=0.1, entropy_coef=0.03, max_completion_length=9, importance_sampling_level=level
    )
    data = batch()
    constants = data["constants"]
    mask = constants["mask"]
    whole = fused(data, objective, torch.float64)
    normalizer = {"grpo": B, "dr_grpo": B * 9}.get(loss_type, mask.sum())
    for parts in ([0, 1, 2, 3, 4], [0, 3, 4], [0, 2, 4]):
        total = [torch.zeros(()), torch.zeros(B, T, D), torch.zeros(V, D)]
        for start, end in itertools.pairwise(parts):
            piece = {k: data[k][start:end] if k != "weight" else data[k] for k in ("hidden", "weight", "ids")}
            piece["constants"] = {k: v[start:end] for k, v in constants.items()}
            loss, dx, dw, _ = fused(
                piece, objective, torch.float64, normalizer=normalizer, entropy_normalizer=mask.sum()
            )
            total[0] = total[0] + loss
            total[1][start:end] = dx
            total[2] = total[2] + dw
        for a, b in zip(total, whole, strict=False):
            torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)


def test_users_own_objective_runs_in_a_single_pass() -> None:
    class Reinforce(PolicyObjective):
        """-A logp - 0.1 H: zero advantage does not mean zero gradient here."""

        def token_loss(self, tokens: TokenBatch) -> Tensor:
            assert tokens.entropy is not None
            return -tokens.advantages * tokens.logps - 0.1 * tokens.entropy * tokens.logps

    data, objective = batch(), Reinforce()
    constants = data["constants"]
    h, w = data["hidden"].requires_grad_(), data["weight"].requires_grad_()
    out = fastrl.linear_policy_loss(h, w, data["ids"], objective, **constants)
    stats = fastrl.linear_logprobs(h, w, data["ids"], mask=constants["mask"], entropy=True, backend="reference")
    assert stats.entropy is not None
    terms = -constants["advantages"][:, None] * stats.logps - 0.1 * stats.entropy * stats.logps
    want = (terms * constants["mask"]).sum() / constants["mask"].sum()
    torch.testing.assert_close(out.loss, want)
    for a, b in zip(*(torch.autograd.grad(x, [h, w]) for x in (out.loss, want)), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(
        objective.live_tokens(advantages=constants["advantages"], mask=constants["mask"]), constants["mask"]
    )


def test_backward_twice_same_bits_inputs_untouched() -> None:
    data = batch(torch.float32)
    leaves = [data["hidden"].requires_grad_(), data["weight"].requires_grad_()]
    copies, versions = [x.detach().clone() for x in leaves], [x._version for x in leaves]

    def loss() -> Tensor:
        return fastrl.linear_policy_loss(leaves[0], leaves[1], data["ids"], PolicyObjective(), **data["constants"]).loss

    value = loss()
    first = torch.autograd.grad(value * 0.3, leaves, retain_graph=True)
    second = torch.autograd.grad(value * 0.3, leaves, retain_graph=True)
    third = torch.autograd.grad(loss() * 0.3, leaves)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert all(torch.equal(x, c) for x, c in zip(leaves, copies, strict=True))
    assert [x._version for x in leaves] == versions
    value.backward()
    total = [x.grad.clone() for x in leaves]  # type: ignore[union-attr]
    loss().backward()  # accumulates
    for x, t in zip(leaves, total, strict=True):
        assert torch.equal(x.grad, 2 * t)  # type: ignore[arg-type]


def test_large_chunks_and_small_ones_agree() -> None:
    data, objective = batch(torch.float32), OBJECTIVES["grpo with everything"]
    small = fused(data, objective, torch.float32)
    with planner.forced(min_rows=1000):
        large = fused(data, objective, torch.float32)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_frozen_weight_makes_no_weight_gradient() -> None:
    data = batch()
    h, w = data["hidden"].requires_grad_(), data["weight"]
    loss = fastrl.linear_policy_loss(h, w, data["ids"], PolicyObjective(), **data["constants"]).loss
    assert loss.grad_fn is not None
    made = loss.grad_fn.grads  # type: ignore[attr-defined]
    assert made.weight.numel() == 0 and made.hidden.shape == (B * T, D)
    want = fused(data, PolicyObjective(), torch.float64)[1]
    torch.testing.assert_close(torch.autograd.grad(loss * 1.7, h)[0], want)
    with torch.no_grad():
        assert not fastrl.linear_policy_loss(
            h, w, data["ids"], PolicyObjective(), **data["constants"]
        ).loss.requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_all_masked_is_zero_with_a_graph(name: str, backend: str) -> None:
    data = batch()
    data["constants"]["mask"] = torch.zeros(B, T)
    data["hidden"][:] = torch.nan
    h, w = data["hidden"].requires_grad_(), data["weight"].requires_grad_()
    out = fastrl.linear_policy_loss(h, w, data["ids"], OBJECTIVES[name], backend=backend, **data["constants"])
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert h.grad is not None and not h.grad.any() and w.grad is not None and not w.grad.any()


def test_masked_values_may_be_anything() -> None:
    data = batch()
    clean = fused(data, OBJECTIVES["grpo with everything"], torch.float64)
    mask = data["constants"]["mask"]
    data["hidden"][~mask] = torch.inf
    data["ids"][~mask] = -100
    for name in ("old_logps", "ref_logps", "importance_ratio"):
        data["constants"][name] = data["constants"][name].masked_fill(~mask, torch.nan)
    for a, b in zip(clean, fused(data, OBJECTIVES["grpo with everything"], torch.float64), strict=True):
        torch.testing.assert_close(a, b)
    logps = torch.randn(B, T, dtype=torch.float64).masked_fill(~mask, torch.inf).requires_grad_()
    out = fastrl.policy_loss(logps, PolicyObjective(beta=0.1), **data["constants"])
    out.loss.backward()
    assert (
        out.loss.isfinite() and logps.grad is not None and logps.grad.isfinite().all() and not logps.grad[~mask].any()
    )


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)], ids=str)
def test_small_shapes(shape: tuple[int, int]) -> None:
    h, w = torch.randn(*shape, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    out = fastrl.linear_policy_loss(
        h,
        w,
        torch.zeros(shape, dtype=torch.int64),
        PolicyObjective(),
        advantages=torch.ones(shape[0]),
        mask=torch.ones(shape),
    )
    out.loss.backward()
    assert out.logps.shape == shape and w.grad is not None and w.grad.isfinite().all()


def test_strided_inputs() -> None:
    data = batch()
    plain = fused(data, OBJECTIVES["grpo with everything"], torch.float64)
    data["hidden"] = data["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    data["weight"] = torch.stack([data["weight"]] * 2, -1)[..., 0]
    wide = {k: torch.stack([v, v], -1)[..., 1] for k, v in data["constants"].items()}
    data["constants"] = wide
    for a, b in zip(plain, fused(data, OBJECTIVES["grpo with everything"], torch.float64), strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_as_one_graph() -> None:
    data = batch(torch.float32)
    leaves = [data["hidden"].requires_grad_(), data["weight"].requires_grad_()]
    for name in ("grpo with everything", "gspo", "off-policy mask"):

        def loss(h: Tensor, w: Tensor) -> Tensor:
            out = fastrl.linear_policy_loss(h * 1.1, w, data["ids"], OBJECTIVES[name], **data["constants"])
            return out.loss * 2 + out.metrics["entropy"] * 0

        eager = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(a, b)


def test_operator_is_well_registered() -> None:
    data, objective = batch(torch.float32), OBJECTIVES["grpo with everything"]
    c = data["constants"]
    flat = [c["advantages"][:, None].expand(B, T).reshape(-1)] + [c[k].reshape(-1) for k in ("old_logps", "ref_logps")]
    mask = c["mask"].reshape(-1)
    weight = objective.token_weights(mask.view(B, T), None, torch.float32).reshape(-1)
    for grad in (True, False):
        h = data["hidden"].reshape(-1, D).detach().requires_grad_(grad)
        w = data["weight"].detach().requires_grad_(grad)
        args = (h, w, None, data["ids"].reshape(-1), mask, ~mask, weight, weight * 0.1, *flat, None)
        run = (0.0, 0.9, 1.0, None, "cpu", "", None, False, False)
        settings = (objective.handle, True, grad, grad, False, *run)  # type: ignore[attr-defined]
        torch.library.opcheck(ops.linear_policy_loss, (*args, *settings))
    into = (*args, torch.zeros(V, D), *settings)
    with torch.no_grad():
        torch.library.opcheck(ops.linear_policy_loss_into, into)


def test_objectives_copy_and_pickle() -> None:
    objective = OBJECTIVES["grpo with everything"]
    for other in (copy.copy(objective), copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert other == objective and other.handle != objective.handle  # type: ignore[attr-defined]
        data = batch()
        assert torch.equal(fused(data, objective, torch.float64)[0], fused(data, other, torch.float64)[0])


def test_bad_arguments_are_named() -> None:
    cases = {
        "loss_type": "grppo", "epsilon": -0.1, "epsilon_high": -1.0, "delta": 0.0, "kl_estimator": "k4",
        "importance_sampling_level": "word", "top_entropy_quantile": 1.5, "max_completion_length": 0,
    }  # fmt: skip
    for name, value in cases.items():
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value!r}"):
            PolicyObjective(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="epsilom"):
        PolicyObjective(epsilom=0.2)  # type: ignore[call-arg]

    data = batch()
    c = data["constants"]

    def call(objective: PolicyObjective = OBJECTIVES["dapo"], **changed: Any) -> None:
        arguments = {"hidden": data["hidden"], "weight": data["weight"], "ids": data["ids"], **c, **changed}
        fastrl.linear_policy_loss(
            arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("ids"), objective, **arguments
        )

    with pytest.raises(ValueError, match=r"hidden: expected shape \(B, T, D\), got \(24, 8\)"):
        call(hidden=data["hidden"].reshape(-1, D))
    with pytest.raises(ValueError, match=r"advantages: expected shape \(4,\) or \(4, 6\), got \(3,\)"):
        call(advantages=torch.ones(3))
    with pytest.raises(ValueError, match=r"old_logps: expected shape \(4, 6\)"):
        call(old_logps=torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"ref_logps: needed with beta = 0\.2"):
        call(OBJECTIVES["k2"], ref_logps=None)
    with pytest.raises(ValueError, match="max_completion_length: dr_grpo needs it"):
        call(PolicyObjective(loss_type="dr_grpo"))
    with pytest.raises(ValueError, match="importance_ratio"):
        call(importance_ratio=torch.ones(4))
    bad = data["ids"].clone()
    bad[0, 1] = V
    with pytest.raises(ValueError, match=rf"ids: 1 of \d+ scored ids are outside the vocabulary \[0, {V}\)"):
        call(ids=bad)
    with pytest.raises(ValueError, match="entropy: needed by entropy_coef"):
        fastrl.policy_loss(torch.zeros(B, T), OBJECTIVES["entropy penalty"], **c)
    with pytest.raises(ValueError, match="entropy: needed by top_entropy_quantile"):
        fastrl.policy_loss(torch.zeros(B, T), PolicyObjective(top_entropy_quantile=0.5), **c)

"""The planner's choices, and that every schedule it can choose gives the same results as any other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl import PolicyObjective
from fastrl_kernels import engine, ops, planner, reference, tuning
from fastrl_kernels.head import LogitTransform, RowStats
from fastrl_kernels.planner import MIB, Work, make_plan

B, T, D, V = 4, 6, 8, 130
CPU = torch.device("cpu")
H200 = {"device": torch.device("cuda"), "sharded": True}  # sharded: free memory, which is not there, is not asked for


@pytest.fixture(autouse=True)
def nothing_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTRL_CACHE", str(tmp_path))
    planner._costs_of.cache_clear()
    yield
    planner._costs_of.cache_clear()


def work(kind: str = "single pass", rows: int = 2048, **changes: Any) -> Work:
    sizes = {"total": rows, "hidden_size": 576, "vocabulary": 49152, "dtype": torch.float32, "device": CPU}
    wants = {"hidden_grad": kind != "score", "weight_grad": kind != "score"}
    return Work(kind, rows, **{**sizes, **wants, **changes})  # type: ignore[arg-type]


# Choices ------------------------------------------------------------------------------------------------------------


def test_a_chunk_fills_the_budget_in_even_parts() -> None:
    plan = make_plan(work(rows=2048))
    assert (plan.schedule, plan.chunk_rows, plan.columns, plan.lanes) == ("single pass", 256, 49152, 1)
    assert plan.tile_bytes == 48 * MIB
    assert make_plan(work(rows=300)).chunk_rows == 150  # not 256 and a remainder of 44
    assert make_plan(work(rows=0)).chunk_rows == 0
    few = make_plan(work(rows=2048, memory_budget=10 * 49152 * 4))
    assert few.chunk_rows == 10 and few.tile_bytes <= 10 * 49152 * 4
    wide = make_plan(work(rows=2048, vocabulary=10**6))
    assert wide.chunk_rows == 128  # the fewest rows worth a pass over dW, whatever the budget


def test_scoring_streams_on_the_cpu() -> None:
    plan = make_plan(work("score"))
    assert (plan.schedule, plan.chunk_rows, plan.columns) == ("forward only", 2048, 1024)
    assert plan.tile_bytes == 8 * MIB


def test_little_free_memory_makes_chunks_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "free_memory", lambda device: 20 * MIB)
    plan = make_plan(work())
    assert plan.chunk_rows == 53 and plan.tile_bytes <= 10 * MIB  # 39 even chunks of at most 53 rows
    assert any("free memory" in reason for reason in plan.reasons)
    sharded = make_plan(work(sharded=True))
    assert sharded.chunk_rows == 256  # ranks with different free memory must cut the same chunks


def test_free_memory_is_measured() -> None:
    free = planner.free_memory(CPU)
    assert free is not None and 2**26 < free < 2**46


@pytest.fixture
def measured_gpu() -> None:
    """The rates of a GPU as `calibrate` would leave them."""
    rates = planner.Costs(7e14, 3e12, 6e-5, 0.6, "measured")
    tuning.store("costs", planner._key(H200["device"], torch.bfloat16, 0), asdict(rates))  # type: ignore[arg-type]


def test_nothing_unmeasured_is_chosen_on_a_gpu() -> None:
    half = {"dtype": torch.bfloat16, "fused_forward": True, "vocabulary": 151936, **H200}
    assert make_plan(work("score", hidden_size=576, **half)).schedule == "forward only"
    assert make_plan(work(hidden_size=576, **half)).lanes == 1


def test_fused_forward_where_the_tile_costs_most(measured_gpu: None) -> None:
    half = {"dtype": torch.bfloat16, "fused_forward": True, "vocabulary": 151936, **H200}
    assert make_plan(work("score", hidden_size=576, **half)).schedule == "fused forward"
    assert make_plan(work("score", hidden_size=8192, **half)).schedule == "forward only"
    half["fused_forward"] = False
    assert make_plan(work("score", hidden_size=576, **half)).schedule == "forward only"


def test_two_lanes_where_row_passes_show(measured_gpu: None) -> None:
    half = {"dtype": torch.bfloat16, "rows": 16384, "vocabulary": 128256, **H200}
    plan = make_plan(work(hidden_size=2048, **half))
    assert plan.lanes == 2 and plan.tile_bytes <= 512 * MIB
    assert make_plan(work(hidden_size=10**6, **half)).lanes == 1
    assert make_plan(work(hidden_size=2048, hidden_grad=False, weight_grad=False, **half)).lanes == 1
    assert make_plan(work("score", hidden_size=2048, **half)).lanes == 1


def test_estimates_follow_the_work() -> None:
    whole, live = make_plan(work(rows=2048)), make_plan(work(rows=758, total=2048))
    assert live.seconds == pytest.approx(whole.seconds * 758 / 2048, rel=0.05)
    frozen = make_plan(work(weight_grad=False))
    assert frozen.seconds == pytest.approx(whole.seconds * 2 / 3, rel=0.05)
    scored = make_plan(work(rows=758, total=2048, scored=1290))
    assert scored.seconds == pytest.approx(whole.seconds * (2 + 4 * 0.37) / 6, rel=0.05)
    kept = make_plan(work("backward", kept=True, memory_budget=2**40))
    assert kept.seconds == pytest.approx(make_plan(work("backward")).seconds * 2 / 3, rel=0.05)


def test_calibration_is_measured_kept_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planner.costs_of(CPU, torch.float32).origin == "assumed"
    costs = planner.calibrate(CPU, torch.float32)
    assert costs.origin == "measured" and 1e8 < costs.gemm < 1e14 and 1e7 < costs.bandwidth < 1e13
    assert planner.costs_of(CPU, torch.float32) == costs
    tuning._tables.clear()  # another process
    planner._costs_of.cache_clear()
    assert planner.costs_of(CPU, torch.float32) == costs
    assert f"{costs.gemm / 1e9:,.0f} GFLOP/s" in make_plan(work()).explain()
    assert planner.costs_of(CPU, torch.float64).origin == "assumed"


def test_explain_prints_why(capsys: pytest.CaptureFixture[str]) -> None:
    data = batch()
    h = data["hidden"].requires_grad_()
    fastrl.linear_policy_loss(h, data["weight"], data["ids"], PolicyObjective(), **data["constants"], explain=True)
    text = capsys.readouterr().out
    live = int((data["constants"]["mask"] & (data["constants"]["advantages"] != 0)[:, None]).sum())
    assert "fastrl plan: single pass" in text and f"{live} of {B * T} rows carry a gradient" in text
    assert "no dW wanted" in text and "GFLOP" in text
    gspo = PolicyObjective(importance_sampling_level="sequence")
    out = fastrl.linear_policy_loss(
        h, data["weight"], data["ids"], gspo, **data["constants"], explain=True, memory_budget=100
    )
    out.loss.backward()
    text = capsys.readouterr().out
    assert "forward only" in text and "two pass" in text and "makes the logits again" in text
    fastrl.linear_policy_loss(h, data["weight"], data["ids"], PolicyObjective(), **data["constants"])
    assert capsys.readouterr().out == ""


def test_forced_limits_end_with_their_block() -> None:
    before = planner.limits_of(CPU)
    with pytest.raises(RuntimeError), planner.forced(min_rows=7):
        with planner.forced(lanes=2):
            assert planner.limits_of(CPU).lanes == 2 and planner.limits_of(CPU).min_rows == 7
        assert planner.limits_of(CPU).lanes == 1
        raise RuntimeError
    assert planner.limits_of(CPU) == before


# Every schedule, the same result ------------------------------------------------------------------------------------


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    mask = torch.arange(T) < torch.tensor([6, 3, 0, 5])[:, None]
    mask[0, 2] = False
    ids = torch.randint(V, (B, T))
    hidden, weight = torch.randn(B, T, D).to(dtype), (torch.randn(V, D) / D**0.5).to(dtype)
    logps = fastrl.linear_logprobs(hidden.double(), weight.double(), ids, backend="reference").logps
    constants = {
        "mask": mask,
        "advantages": torch.tensor([1.3, -0.7, 0.4, 0.0]),
        "old_logps": (logps + torch.randn(B, T) * 0.3).float(),
    }
    return {"hidden": hidden, "weight": weight, "ids": ids, "constants": constants}


def gradients(data: dict[str, Any], objective: PolicyObjective, **options: Any) -> list[Tensor]:
    h, w = (data[k].detach().requires_grad_() for k in ("hidden", "weight"))
    out = fastrl.linear_policy_loss(h, w, data["ids"], objective, **data["constants"], **options)
    return [out.loss.detach(), out.logps, *torch.autograd.grad(out.loss * 1.7, [h, w])]


TOKEN = PolicyObjective(entropy_coef=0.02)
SEQUENCE = PolicyObjective(importance_sampling_level="sequence", entropy_coef=0.02)


@pytest.mark.parametrize("objective", (TOKEN, PolicyObjective()), ids=("entropy", "plain"))
def test_two_lanes_give_the_same_bits(objective: PolicyObjective) -> None:
    data = batch(torch.float32)
    with planner.forced(tile_bytes=1, min_rows=3, lanes=1):
        one = gradients(data, objective)
    with planner.forced(tile_bytes=1, min_rows=3, lanes=2):
        two = gradients(data, objective)
        assert make_plan(work(rows=14, hidden_size=D, vocabulary=V)).lanes == 2
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("masked", (False, True))
def test_kept_logits_give_the_gradients_of_recomputed_ones(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, ids = torch.randn(23, D), torch.randn(V, D), torch.randint(V, (23,))
    mask = torch.rand(23) > 0.3 if masked else None
    upstream = torch.randn(23) * (torch.arange(23) % 4 != 1)  # some rows have no gradient
    projected: list[int] = []
    project = engine.Head.project
    monkeypatch.setattr(
        engine.Head, "project", lambda self, x, *rest: projected.append(x.shape[0]) or project(self, x, *rest)
    )

    def results(budget: int) -> tuple[list[Tensor], int]:
        projected.clear()
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        with planner.forced(min_rows=4):
            stats = fastrl.linear_logprobs(h, w, ids, mask=mask, entropy=True, memory_budget=budget)
            assert stats.entropy is not None
            total = (stats.logps * upstream).sum() + (stats.entropy * upstream**2).sum()
            first = torch.autograd.grad(total, [h, w], retain_graph=True)
            again = torch.autograd.grad(total, [h, w])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        return [stats.logps.detach(), *first], sum(projected)

    kept, once = results(10**9)
    fresh, more = results(9 * V * 4)
    scored = 23 if mask is None else int(mask.sum())
    assert once == scored, "the logits of the forward serve the backwards"
    assert more > 0  # two backwards made them again
    for a, b in zip(kept, fresh, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("objective", (TOKEN, SEQUENCE, PolicyObjective()), ids=("token", "sequence", "plain"))
@pytest.mark.parametrize("score_dead", (False, True))
def test_capturable_reads_no_value_and_gives_the_same(
    objective: PolicyObjective, score_dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph rules out, a value on the host or a shape that hangs on one, is refused here as well."""
    data = batch(torch.float32)
    want = gradients(data, objective, score_dead=score_dead)
    dead = ~data["constants"]["mask"]
    if not score_dead and objective.token_local and objective.entropy_coef == 0:
        dead |= (data["constants"]["advantages"] == 0)[:, None]
    data["hidden"][dead] = torch.nan
    data["ids"] = torch.where(dead, -5, data["ids"])
    data["constants"]["old_logps"][dead] = torch.inf
    h, w = (data[k].detach().requires_grad_() for k in ("hidden", "weight"))
    # On the CPU ids are checked; there is no queue to stall.
    monkeypatch.setattr(
        ops, "_select", lambda mask, ids, vocabulary, capturable=False: refuse() if not capturable else None
    )

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a value was read on the host")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(Tensor, name, refuse)
        out = fastrl.linear_policy_loss(
            h, w, data["ids"], objective, **data["constants"], score_dead=score_dead, capturable=True
        )
    got = [out.loss.detach(), out.logps, *torch.autograd.grad(out.loss * 1.7, [h, w])]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_tile_is_as_good_as_eager_bf16() -> None:
    data = batch(torch.bfloat16)
    truth = gradients({**data, "hidden": data["hidden"].double(), "weight": data["weight"].double()}, TOKEN)
    eager = []
    h, w = (data[k].detach().requires_grad_() for k in ("hidden", "weight"))
    stats = fastrl.logprobs_from_logits(
        h @ w.T, data["ids"], mask=data["constants"]["mask"], entropy=True, backend="reference"
    )
    loss = fastrl.policy_loss(stats.logps, TOKEN, entropy=stats.entropy, **data["constants"]).loss
    eager = [loss.detach(), stats.logps.detach(), *torch.autograd.grad(loss * 1.7, [h, w])]
    with planner.forced(tile_dtype=torch.bfloat16):
        ours = gradients(data, TOKEN)
    for o, e, t in zip(ours, eager, truth, strict=True):
        error, allowed = ((x.double() - t.double()).norm().item() for x in (o, e))
        assert error <= 2 * allowed + 1e-3


# dW into a buffer ---------------------------------------------------------------------------------------------------


def test_weight_gradient_goes_into_a_buffer() -> None:
    data = batch(torch.float32)
    h, w = (data[k].detach().requires_grad_() for k in ("hidden", "weight"))
    bias = torch.randn(V, requires_grad=True)
    loss = fastrl.linear_policy_loss(h, w, data["ids"], TOKEN, bias=bias, **data["constants"]).loss
    want = torch.autograd.grad(loss, [h, w, bias])
    start = torch.randn(V, D)
    buffer = start.clone()
    with planner.forced(tile_bytes=1, min_rows=3):
        for times in (1, 2):  # two micro-batches
            loss = fastrl.linear_policy_loss(
                h, w, data["ids"], TOKEN, bias=bias, weight_grad=buffer, **data["constants"]
            ).loss
            got = torch.autograd.grad(loss, [h, bias])
            torch.testing.assert_close(buffer, start + times * want[1], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(got, (want[0], want[2]), rtol=1e-5, atol=1e-7)
    only = fastrl.linear_policy_loss(
        data["hidden"], w, data["ids"], TOKEN, bias=bias.detach(), weight_grad=buffer, **data["constants"]
    ).loss
    only.backward()  # a head alone can be trained, too
    assert w.grad is None
    torch.testing.assert_close(buffer, start + 3 * want[1], rtol=1e-5, atol=1e-6)


def test_weight_gradient_buffer_refuses_what_it_cannot_do() -> None:
    data = batch(torch.float32)
    h, w = (data[k].detach().requires_grad_() for k in ("hidden", "weight"))

    def call(objective: PolicyObjective = TOKEN, **options: Any) -> Tensor:
        return fastrl.linear_policy_loss(h, w, data["ids"], objective, **data["constants"], **options).loss

    with pytest.raises(ValueError, match=r"weight_grad.*scaled before backward"):
        (call(weight_grad=torch.zeros(V, D)) * 2).backward()
    with pytest.raises(TypeError, match=r"weight_grad.*float32.*bfloat16"):
        call(weight_grad=torch.zeros(V, D, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"weight_grad.*\(130, 8\)"):
        call(weight_grad=torch.zeros(V, D + 1))
    with pytest.raises(ValueError, match="where no gradient of weight is wanted"), torch.no_grad():
        call(weight_grad=torch.zeros(V, D))
    with pytest.raises(ValueError, match=r"weight_grad.*token-local"):
        call(SEQUENCE, weight_grad=torch.zeros(V, D))


# Bounded-error row skipping -----------------------------------------------------------------------------------------


def dlogits(stats: RowStats, logits: Tensor, ids: Tensor, c: Tensor, c_entropy: Tensor | None) -> Tensor:
    out = torch.empty_like(logits)
    reference.row_grad(
        logits, out, ids, LogitTransform(), None, stats.row_max, stats.log_sum, stats.mean, c, c_entropy, None
    )
    return out


def test_norms_are_known_before_the_gradient() -> None:
    logits, ids = 3 * torch.randn(40, 50, dtype=torch.float64), torch.randint(50, (40,))
    c, c_entropy = torch.randn(2, 40, dtype=torch.float64)
    stats = reference.row_stats(logits, ids, LogitTransform(), None, True)
    exact = dlogits(stats, logits, ids, c, None).abs().sum(-1)
    torch.testing.assert_close(engine.gradient_norms(c, None, stats), exact)
    with_bonus = dlogits(stats, logits, ids, c, c_entropy).abs().sum(-1)
    assert (engine.gradient_norms(c, c_entropy, stats) >= with_bonus * (1 - 1e-12)).all()


def test_negligible_rows_are_the_smallest_within_the_tolerance() -> None:
    norms = torch.tensor([5.0, 0.1, 3.0, 0.2, 1.7, 0.0])
    assert engine.negligible(norms, 0.031).tolist() == [False, True, False, True, False, True]
    assert engine.negligible(norms, 0.02).tolist() == [False, True, False, False, False, True]
    assert not engine.negligible(norms, 0.0)[:5].any()
    assert not engine.negligible(torch.tensor([1.0, torch.nan, 0.0]), 0.5).any()  # a broken row stays loud


@pytest.mark.parametrize("objective", (PolicyObjective(), TOKEN, SEQUENCE), ids=("plain", "entropy", "sequence"))
def test_error_of_skipping_is_within_its_bound(objective: PolicyObjective) -> None:
    """Every entry of dW moves by at most the dropped norm x the largest hidden state: that is what the bound means."""
    torch.manual_seed(3)
    n, tolerance = 256, 0.05
    hidden = torch.randn(16, 16, D, dtype=torch.float64) * torch.logspace(-1, 1.2, n, dtype=torch.float64).view(
        16, 16, 1
    )
    weight = torch.randn(V, D, dtype=torch.float64)
    ids = (hidden @ weight.T + torch.randn(16, 16, V)).argmax(-1)  # a model that is sure of most tokens
    data = {"hidden": hidden, "weight": weight, "ids": ids}
    constants = {"mask": torch.ones(16, 16), "advantages": torch.randn(16)}
    h, w = (x.requires_grad_() for x in (hidden, weight))

    def results(**options: Any) -> tuple[fastrl.LossOutput, tuple[Tensor, ...]]:
        out = fastrl.linear_policy_loss(h, w, data["ids"], objective, **constants, **options)
        return out, torch.autograd.grad(out.loss, [h, w])

    with planner.forced(tile_bytes=1, min_rows=64):
        exact, want = results()
        out, got = results(grad_tolerance=tolerance)
    assert torch.equal(out.loss, exact.loss) and torch.equal(out.logps, exact.logps)
    dropped = (got[0] == 0).all(-1) & (want[0] != 0).any(-1)
    assert n // 10 < int(dropped.sum()) < n
    # The norms again, from autograd on the logps alone.
    stats = fastrl.linear_logprobs(hidden.detach(), weight.detach(), ids, entropy=True)
    logps, entropy = stats.logps.requires_grad_(), stats.entropy.requires_grad_()  # type: ignore[union-attr]
    loss = fastrl.policy_loss(logps, objective, entropy=entropy, **constants).loss
    c, c_entropy = torch.autograd.grad(loss, [logps, entropy], allow_unused=True)
    norms = 2 * c.abs() * -torch.expm1(logps.detach())
    if c_entropy is not None and objective.entropy_coef:
        norms += 2 * c_entropy.abs() * entropy.detach()
    assert norms[dropped].sum() <= tolerance * norms.sum() * (1 + 1e-9)
    assert (got[1] - want[1]).abs().max() <= norms[dropped].sum() * hidden.detach().abs().max()
    assert torch.equal(got[0][~dropped], want[0][~dropped]) or torch.allclose(got[0][~dropped], want[0][~dropped])
    if objective.token_local:
        assert out.metrics["grad_skipped/rows"] == dropped.sum() / n
        torch.testing.assert_close(out.metrics["grad_skipped/norm"], norms[dropped].sum() / norms.sum())
        assert "grad_skipped/rows" not in exact.metrics


def test_no_tolerance_is_exact_and_bad_ones_are_refused() -> None:
    data = batch(torch.float32)
    for a, b in zip(gradients(data, TOKEN), gradients(data, TOKEN, grad_tolerance=0.0), strict=True):
        assert torch.equal(a, b)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"grad_tolerance": -0.1}, "grad_tolerance.*-0.1"),
        ({"grad_tolerance": 1.0}, "grad_tolerance.*1.0"),
        ({"grad_tolerance": 0.1, "capturable": True}, "grad_tolerance.*capturable"),
        ({"memory_budget": 0}, "memory_budget.*0"),
    ]
    for options, message in bad:
        for call in (lambda **o: gradients(data, TOKEN, **o), lambda **o: score(data, **o)):
            with pytest.raises(ValueError, match=message):
                call(**options)


@pytest.mark.parametrize("option", ({"memory_budget": 10**6}, {"grad_tolerance": 0.1}, {"capturable": True}))
def test_the_reference_refuses_what_it_cannot_do(option: dict[str, Any]) -> None:
    data = batch(torch.float32)
    for call in (lambda **o: gradients(data, TOKEN, **o), lambda **o: score(data, **o)):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: the reference builds all the logits"):
            call(backend="reference", **option)


def score(data: dict[str, Any], **options: Any) -> fastrl.TokenStats:
    return fastrl.linear_logprobs(data["hidden"], data["weight"], data["ids"], **options)

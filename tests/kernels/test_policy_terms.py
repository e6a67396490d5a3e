"""The fused kernel of the policy objectives against their one definition: values, gradients, metrics, dtypes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate
from torch import Tensor

import fastrl
from fastrl import PolicyObjective
from fastrl_kernels import TokenBatch, backends, ops
from fastrl_kernels.objective import TermSums, coefficients

KL = [
    {},
    *({"beta": 0.3, "kl_estimator": k, "use_bias_correction_kl": c} for k in ("k1", "k2", "k3") for c in (True, False)),
]
OTHERS = [
    {},
    {"delta": 1.15, "entropy_coef": 0.07, "epsilon_high": 0.35},
    {"epsilon": 0.0, "loss_type": "grpo", "entropy_coef": -0.02},
    {"delta": 0.9, "loss_type": "dr_grpo", "max_completion_length": 50},
    {"top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    {"off_policy_mask_threshold": 0.05},
]
LEVELS = ("token", "sequence")


def random_batch(b: int = 5, t: int = 9, dtype: torch.dtype = torch.float64, per_token: bool = False) -> dict[str, Any]:
    """Uneven lengths, a hole, a masked row, ratios on both sides of every clip; NaN and inf outside the mask."""
    mask = torch.arange(t) < torch.tensor([t, t // 2, 0, t - 1, 1])[torch.arange(b) % 5, None]
    mask[0, t // 3] = False
    logps = -3 * torch.rand(b, t, dtype=torch.float64)

    def near(spread: float) -> Tensor:
        return (logps + spread * torch.randn(b, t)).masked_fill(~mask, math.nan).to(dtype)

    shape = (b, t) if per_token else (b,)
    return {
        "logps": logps.masked_fill(~mask, -math.inf).to(dtype),
        "entropy": (2 * torch.rand(b, t, dtype=torch.float64)).masked_fill(~mask, math.nan).to(dtype),
        "advantages": torch.randn(shape, dtype=torch.float64).to(dtype),
        "mask": mask,
        "old_logps": near(0.4),
        "ref_logps": near(0.7),
        "importance_ratio": (torch.rand(b, t) + 0.5).masked_fill(~mask, math.inf).to(dtype),
    }


def run(objective: PolicyObjective, batch: dict[str, Any], backend: str | None, **changed: Any) -> dict[str, Tensor]:
    """Loss, gradients and metrics; a gradient that does not exist is 0."""
    arguments = {**batch, **changed}
    logps, entropy = (
        None if x is None else x.clone().requires_grad_() for x in (arguments.pop("logps"), arguments.pop("entropy"))
    )
    out = fastrl.policy_loss(logps, objective, entropy=entropy, backend=backend, **arguments)
    leaves = [x for x in (logps, entropy) if x is not None]
    grads = torch.autograd.grad(out.loss * 1.7, leaves, allow_unused=True)
    made = {
        f"grad {i}": torch.zeros_like(x) if g is None else g for i, (g, x) in enumerate(zip(grads, leaves, strict=True))
    }
    return {"loss": out.loss.detach(), "logps": out.logps, **made, **out.metrics}


def assert_equal(ours: dict[str, Tensor], truth: dict[str, Tensor], what: Any, tolerance: float = 1e-12) -> None:
    assert list(ours) == list(truth), what
    for name, value in truth.items():
        assert ours[name].dtype == value.dtype, (name, what)
        torch.testing.assert_close(
            ours[name],
            value,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: f"{n} of {what}: {m}",
        )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("kl", KL, ids=lambda kl: "-".join(map(str, kl.values())) or "no KL")
def test_equals_the_definition(kl: dict[str, Any], other: dict[str, Any], level: str) -> None:
    objective = PolicyObjective(**kl, **other, importance_sampling_level=level)
    assert objective.kernel_spec is not None
    for per_token in (False, True):
        batch = random_batch(per_token=per_token)
        gates = (None, batch["importance_ratio"], torch.rand(5, 1, dtype=torch.float64))
        for gate, old in itertools.product(gates, (batch["old_logps"], None)):
            changed = {"importance_ratio": gate, "old_logps": old, "normalizer": 7.0 if gate is None else None}
            assert_equal(
                run(objective, batch, "cpu", **changed), run(objective, batch, "reference", **changed), changed
            )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.0},
        {"epsilon": 0.0, "delta": 1.0},
        {"epsilon": 0.5, "epsilon_high": 1.0, "delta": 2.0},
        {"delta": 1.2},
    ],
    ids=str,
)
def test_ties_at_a_clip_bound(options: dict[str, float], level: str) -> None:
    """Ratios of exactly 0.5, 1 and 2: at a bound autograd passes the gradient, and a tie of the minimum is shared."""
    batch = random_batch(b=4, t=3)
    batch["mask"] = torch.ones(4, 3, dtype=torch.bool)
    batch["logps"] = torch.zeros(4, 3, dtype=torch.float64)
    log2 = math.log(2)
    batch["old_logps"] = torch.tensor([-log2, 0.0, log2], dtype=torch.float64).repeat(4, 1)
    if level == "sequence":
        batch["old_logps"] = batch["logps"].clone()
    assert set((batch["logps"] - batch["old_logps"]).exp().unique().tolist()) <= {0.5, 1.0, 2.0}
    batch |= {"importance_ratio": None, "entropy": None, "advantages": torch.tensor([1.5, -0.5, 0.0, -2.0])}
    objective = PolicyObjective(importance_sampling_level=level, **options)  # type: ignore[arg-type]
    truth = run(objective, batch, "reference")
    assert truth["grad 0"].any()
    assert_equal(run(objective, batch, "cpu"), truth, options)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kl", KL, ids=lambda kl: "-".join(map(str, kl.values())) or "no KL")
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_infinities_and_nan_inside_the_mask(kl: dict[str, Any], level: str, dtype: torch.dtype) -> None:
    """A token of probability 0 under either policy, ratios that overflow, NaN: what autograd makes of them."""
    inf, nan = math.inf, math.nan
    objective = PolicyObjective(**kl, delta=3.0, importance_sampling_level=level)
    rows = [
        ([-inf, -1.0, -2.0], [-1.0, -1.0, -2.0]),
        ([-1.0, -1.0, -2.0], [-inf, -1.0, -2.0]),
        ([-inf, -1.0, -2.0], [-inf, -1.0, -2.0]),
        ([nan, -1.0, -2.0], [-1.0, -1.0, -2.0]),
        ([-1.0, -1.0, -2.0], [-1000.0, -95.0, -90.5]),
        ([-1000.0, -120.0, -2.0], [-1.0, -1.0, -2.0]),
    ]
    logps, old = (torch.tensor([r[i] for r in rows], dtype=dtype).repeat(3, 1) for i in (0, 1))
    mask = torch.ones_like(logps, dtype=torch.bool)
    advantages = torch.tensor([1.0, -1.0, 0.0], dtype=dtype).repeat_interleave(len(rows))
    for old_logps, ref in ((old, old.flip(-1)), (None, old), (old, logps)):
        batch = {"entropy": None, "advantages": advantages, "mask": mask, "old_logps": old_logps, "ref_logps": ref}
        for row in range(len(mask)):  # one sequence at a time: a NaN loss would hide the others
            one = {k: x if x is None else x[row : row + 1] for k, x in {**batch, "logps": logps}.items()}
            tolerance = 1e-11 if dtype == torch.float64 else 1e-5
            assert_equal(run(objective, one, "cpu"), run(objective, one, "reference"), (row, old_logps), tolerance)


@pytest.mark.parametrize("name", ("generic", "avx2", "avx512"))
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_and_long_rows_in_fp32(name: str, level: str) -> None:
    extension = pytest.importorskip("fastrl_kernels._C")
    if name not in extension.instruction_sets():
        pytest.skip(f"this processor has no {name}")
    objective = PolicyObjective(beta=0.1, entropy_coef=0.05, delta=1.5, importance_sampling_level=level, epsilon=0.05)
    batch = random_batch(6, 1500, torch.float32)
    wide = {k: x.double() if x.dtype.is_floating_point else x for k, x in batch.items()}
    truth, plain = run(objective, wide, "reference"), run(objective, batch, "reference")
    before = extension.instruction_set()
    extension.use_instruction_set(name)
    try:
        ours = run(objective, batch, "cpu")
    finally:
        extension.use_instruction_set(before)
    for key in truth:
        if key != "logps":
            assert_as_accurate(ours[key], plain[key], truth[key], key)


def test_small_and_strided() -> None:
    objective = PolicyObjective(beta=0.1, entropy_coef=0.1)
    for level, shape in itertools.product(LEVELS, [(0, 3), (3, 0), (1, 1), (4, 1)]):
        objective = PolicyObjective(beta=0.1, entropy_coef=0.1, importance_sampling_level=level)
        x = torch.randn(shape, dtype=torch.float64)
        batch = {"logps": x, "entropy": x, "old_logps": x - 0.3, "ref_logps": x + 0.1}
        batch |= {"mask": torch.arange(shape[0])[:, None].expand(shape) != 1, "advantages": torch.ones(shape[0])}
        assert_equal(run(objective, batch, "cpu"), run(objective, batch, "reference"), shape)
    batch = random_batch(5, 40)
    wide = {k: x.t().contiguous().t() if x.ndim == 2 else x for k, x in batch.items()}
    assert_equal(run(objective, wide, "cpu"), run(objective, batch, "cpu"), "transposed", 0.0)


def test_same_bits_twice_and_for_any_number_of_threads() -> None:
    batch = random_batch(40, 2000, torch.float32)
    objective = PolicyObjective(beta=0.1, entropy_coef=0.1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, again = run(objective, batch, None), run(objective, batch, None)
        torch.set_num_threads(3)
        third = run(objective, batch, None)
    finally:
        torch.set_num_threads(threads)
    for name, value in first.items():
        for other in (again[name], third[name]):
            torch.testing.assert_close(other, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kl", KL, ids=lambda kl: "-".join(map(str, kl.values())) or "no KL")
@pytest.mark.parametrize("bonus", (False, True), ids=("", "bonus"))
def test_a_chunks_coefficients(kl: dict[str, Any], bonus: bool) -> None:
    """The form that the fused loss calls: vectors of live tokens, no mask, terms and gradients and no sums."""
    objective, n = PolicyObjective(**kl, delta=1.3), 300
    for dtype in (torch.float64, torch.float32):
        logps, entropy, weight, extra = torch.rand(4, n, dtype=torch.float64).to(dtype)
        constants = torch.randn(4, n, dtype=torch.float64).to(dtype)
        tokens = TokenBatch(-logps, entropy, constants[0], *(-logps + 0.3 * constants[1:3]), gate=constants[3])
        entropy_weight = extra if bonus else None
        ours = coefficients(objective, tokens, weight, entropy_weight, backends.load("cpu").policy_terms)
        truth = coefficients(objective, tokens, weight, entropy_weight)
        assert (ours[2] is None) == (truth[2] is None) == (not bonus)
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=1e-6)


def test_second_derivatives_are_the_definitions() -> None:
    batch = random_batch()
    objective = PolicyObjective(beta=0.2, entropy_coef=0.1, delta=1.4)
    constants = {k: batch[k] for k in ("advantages", "mask", "old_logps", "ref_logps")}
    inside = batch["mask"]

    def loss(x: Tensor, h: Tensor, backend: str | None = None) -> Tensor:
        full = torch.zeros_like(batch["logps"]).masked_scatter(inside, x)
        entropy = torch.zeros_like(full).masked_scatter(inside, h)
        return fastrl.policy_loss(full, objective, entropy=entropy, backend=backend, **constants).loss

    x, h = (batch[k][inside].requires_grad_() for k in ("logps", "entropy"))
    assert torch.autograd.gradcheck(loss, (x, h)) and torch.autograd.gradgradcheck(loss, (x, h))
    hessians = []
    for backend in (None, "reference"):
        (grad,) = torch.autograd.grad(loss(x, h, backend) * 3, x, create_graph=True)
        hessians.append(torch.autograd.grad(grad.square().sum(), x)[0])
    assert hessians[1].any()
    torch.testing.assert_close(*hessians)


def test_functional_transforms_take_the_definition() -> None:
    batch = random_batch()
    objective = PolicyObjective(beta=0.2)
    constants = {k: batch[k] for k in ("advantages", "mask", "old_logps", "ref_logps")}

    def loss(x: Tensor) -> Tensor:
        return fastrl.policy_loss(x, objective, **constants).loss

    x = batch["logps"].masked_fill(~batch["mask"], 0.0)
    (want,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), want)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x[None])[0], want)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (want,))[1], want.square().sum())
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(x, want))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, want.square().sum())


def test_compiles_as_one_graph() -> None:
    batch = random_batch(dtype=torch.float32)
    for name in ("token", "sequence"):
        objective = PolicyObjective(beta=0.1, entropy_coef=0.1, importance_sampling_level=name)

        def values(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            constants = {k: batch[k] for k in ("advantages", "mask", "old_logps", "ref_logps")}
            out = fastrl.policy_loss(x * 1.0, objective, entropy=h, **constants)
            return out.loss * 2, torch.stack([v.float() for v in out.metrics.values()])

        leaves = [batch[k].clone().requires_grad_() for k in ("logps", "entropy")]
        eager, compiled = (f(*leaves) for f in (values, torch.compile(values, fullgraph=True)))
        torch.testing.assert_close(compiled, eager, equal_nan=True)
        for a, b in zip(*(torch.autograd.grad(x[0], leaves) for x in (compiled, eager)), strict=True):
            torch.testing.assert_close(a, b)


def test_operator_is_well_registered() -> None:
    batch = random_batch()
    objective = PolicyObjective(beta=0.1, entropy_coef=0.1)
    weight, mask = torch.rand(5, 9, dtype=torch.float64), batch["mask"]
    for grad, bonus in itertools.product((True, False), (True, False)):
        leaves = [batch[k].masked_fill(~mask, 0.0).requires_grad_(grad) for k in ("logps", "entropy")]
        args = (*leaves, batch["advantages"][:, None], batch["old_logps"], batch["ref_logps"], None, mask, mask, mask)
        handle = objective.handle  # type: ignore[attr-defined]
        torch.library.opcheck(ops.policy_terms, (*args, weight, weight if bonus else None, handle, grad, "cpu"))


@pytest.mark.parametrize("name", ("token_loss", "_ratio", "_kl", "metrics", "_epsilon_high"))
def test_a_method_of_the_users_is_never_bypassed(name: str) -> None:
    calls = []
    original = getattr(PolicyObjective, name)

    def method(self: PolicyObjective, *args: Any) -> Any:
        calls.append(name)
        return original.fget(self) if isinstance(original, property) else original(self, *args)

    own = type("Own", (PolicyObjective,), {name: property(method) if isinstance(original, property) else method})
    objective, batch = own(beta=0.1), random_batch()
    assert objective.kernel_spec is None and PolicyObjective(beta=0.1).kernel_spec is not None
    assert_equal(run(objective, batch, "cpu"), run(PolicyObjective(beta=0.1), batch, "reference"), name, 0.0)
    assert calls
    calls.clear()
    hidden, weight = (
        torch.randn(5, 9, 4, dtype=torch.float64),
        torch.randn(20, 4, dtype=torch.float64, requires_grad=True),
    )
    constants = {k: batch[k] for k in ("advantages", "mask", "old_logps", "ref_logps")}
    ids = torch.zeros(5, 9, dtype=torch.int64)
    fastrl.linear_policy_loss(hidden, weight, ids, objective, **constants).loss.backward()
    assert calls


def test_other_dtypes_take_the_definition() -> None:
    batch = random_batch(dtype=torch.bfloat16)
    objective = PolicyObjective(beta=0.1)
    ours, truth = run(objective, batch, None), run(objective, batch, "reference")
    assert_equal(ours, truth, "bf16", 0.0)
    assert ours["loss"].dtype == torch.bfloat16
    batch = random_batch(dtype=torch.float32)
    batch["entropy"] = batch["entropy"].double()
    assert_equal(run(objective, batch, None), run(objective, batch, "reference"), "entropy in fp64", 0.0)


def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither form evaluates the definition for a built-in objective; so equality above is not with itself."""
    batch = random_batch()
    constants = {k: batch[k] for k in ("advantages", "mask", "old_logps", "ref_logps")}
    objective = PolicyObjective(beta=0.1)
    called = []
    spec = objective.kernel_spec
    monkeypatch.setattr(PolicyObjective, "kernel_spec", spec)
    monkeypatch.setattr(PolicyObjective, "token_loss", lambda *_: called.append("token_loss"))
    monkeypatch.setattr(PolicyObjective, "metrics", lambda *_: called.append("metrics"))
    fastrl.policy_loss(batch["logps"].requires_grad_(), objective, **constants).loss.backward()
    hidden, weight = torch.randn(5, 9, 4), torch.randn(20, 4, requires_grad=True)
    fastrl.linear_policy_loss(
        hidden, weight, torch.zeros(5, 9, dtype=torch.int64), objective, **constants
    ).loss.backward()
    assert not called and weight.grad is not None and weight.grad.any()


def test_bad_arguments_are_named() -> None:
    kernel, x = backends.load("cpu").policy_terms, torch.zeros(2, 3)
    spec = PolicyObjective().kernel_spec
    assert spec is not None
    cases: list[tuple[str, TokenBatch, Tensor]] = [
        ("logps", TokenBatch(x[0], None, x[0]), x[0]),
        ("advantages", TokenBatch(x, None, x[:, :2]), x),
        ("token_weight", TokenBatch(x, None, x), x[:, :1]),
    ]
    for name, tokens, weight in cases:
        with pytest.raises(ValueError, match=name):
            kernel(spec, tokens, weight, None)
    needs_reference = PolicyObjective(beta=0.1)
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match="ref_logps: needed with beta"):
            fastrl.policy_loss(x, needs_reference, advantages=torch.ones(2), mask=torch.ones(2, 3), backend=backend)
    with pytest.raises(ValueError, match="backend must be"):
        fastrl.policy_loss(x, PolicyObjective(), advantages=torch.ones(2), mask=torch.ones(2, 3), backend="gpu")
    assert len(TermSums._fields) == 9

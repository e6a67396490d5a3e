"""The CPU's kernel of the policy terms beside the clipped one: loss, gradients and metrics of the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.objectives.policy import PolicyObjective, policy_loss
from fastrl.objectives.surrogates import PRESETS
from fastrl.objectives.token_selection import covariance_tokens
from fastrl_kernels import cpu, ops
from fastrl_kernels.objective import SURROGATES


def objectives() -> dict[str, PolicyObjective]:
    """Every loss type of every preset that this kernel computes and the other does not."""
    found = {}
    for preset, conventions in PRESETS.items():
        for name in conventions.losses:
            length = {"max_completion_length": 300} if name == "dr_grpo" else {}
            objective = PolicyObjective(loss_type=name, preset=preset, **length)
            if objective.surrogate_spec is not None:
                assert objective.kernel_spec is None
                found[f"{preset} {name}"] = objective
    return found


ALL = objectives()


def batch(dtype: torch.dtype, *, per_token: bool = False, gate: str = "none", old: bool = True) -> dict[str, Any]:
    """Five rows longer than a strip: one empty, holes, and NaN and inf outside the mask."""
    generator = torch.Generator().manual_seed(0)
    b, t = 5, 300

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    mask = torch.rand(b, t, generator=generator) < 0.8
    mask[3] = False
    logps = -randn(b, t).abs() - 1e-3
    gates = {"none": None, "token": randn(b, t).abs(), "row": randn(b, 1).abs()}
    return {
        "logps": torch.where(mask, logps, torch.nan),
        "old_logps": torch.where(mask, (logps + 0.3 * randn(b, t)).clamp(max=-1e-3), torch.inf) if old else None,
        "advantages": randn(b, t) if per_token else randn(b),
        "mask": mask,
        "entropy": randn(b, t).abs(),
        "importance_ratio": gates[gate],
    }


def run(objective: PolicyObjective, given: dict[str, Any], backend: str) -> dict[str, Tensor]:
    leaf = given["logps"].detach().clone().requires_grad_()
    torch.manual_seed(0)  # clip_cov draws
    out = policy_loss(leaf, objective, backend=backend, **{k: x for k, x in given.items() if k != "logps"})
    (grad,) = torch.autograd.grad(out.loss, leaf, torch.tensor(0.7, dtype=leaf.dtype))
    return {"loss": out.loss.detach(), "grad": grad, "logps": out.logps, **out.metrics}


def assert_same(objective: PolicyObjective, given: dict[str, Any], rtol: float = 1e-9, atol: float = 1e-12) -> None:
    ours, truth = run(objective, given, "cpu"), run(objective, given, "reference")
    assert ours.keys() == truth.keys()
    for name, x in truth.items():
        assert ours[name].dtype == x.dtype, name
        torch.testing.assert_close(
            ours[name], x, rtol=max(rtol, 1e-6 if name != "grad" else 0), atol=atol, equal_nan=True
        )


def test_the_kernel_serves_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name.split()[1] for name in ALL} >= {
        "ppo",
        "cispo",
        "sapo",
        "reinforce",
        "gpg",
        "dro",
        "dppo_tv",
        "dppo_kl",
        "gspo",
        "clip_cov",
        "kl_cov",
        "vespo",
        "gmpo",
        "rloo",
    }
    assert {objective.surrogate_spec.surrogate for objective in ALL.values()} == set(SURROGATES)  # type: ignore[union-attr]
    seen = []
    kernel = cpu.surrogate_terms

    def spy(spec: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(spec)
        return kernel(spec, *args, **kwargs)

    monkeypatch.setattr(cpu, "surrogate_terms", spy)
    for objective in ALL.values():
        run(objective, batch(torch.float32), "cpu")
    assert len(seen) == len(ALL)
    gpg = ALL["verl gpg"]
    run(gpg, batch(torch.float64), "reference")
    assert len(seen) == len(ALL)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("gate", ["none", "token", "row"])
def test_equals_the_definition(name: str, gate: str) -> None:
    for per_token in (False, True):
        for old in (False, True):
            assert_same(ALL[name], batch(torch.float64, per_token=per_token, gate=gate, old=old))


@pytest.mark.parametrize("name", ALL)
def test_infinities_and_dead_tokens(name: str) -> None:
    given = batch(torch.float64, per_token=True)
    logps, old, advantages, mask = (given[k] for k in ("logps", "old_logps", "advantages", "mask"))
    mask[:3, :6] = True
    logps[:3, :6], old[:3, :6] = -1.0, -1.2
    logps[0, :3] = -torch.inf
    advantages[0, :3] = torch.tensor([0.0, 1.0, 0.5])  # of one sign: finite numbers of 1e308 would cancel
    old[1, :2] = -torch.inf
    advantages[1, :2] = torch.tensor([-1.0, 0.0])
    logps[2, 0], old[2, 0] = -40.0, -0.5  # beyond verl's bound of the log-ratio, on either side
    logps[2, 1], old[2, 1] = -0.5, -40.0
    advantages[2] = 0
    assert_same(ALL[name], given)


@pytest.mark.parametrize(
    "preset, loss_type", [("verl", "ppo"), ("verl", "gspo"), ("verl", "cispo"), ("openrlhf", "ppo")]
)
def test_ties_at_a_bound(loss_type: str, preset: str) -> None:
    objective = PolicyObjective(loss_type=loss_type, preset=preset, epsilon=0.0)  # the bounds and the ratio are 1
    given = batch(torch.float64, per_token=True)
    given["old_logps"] = given["logps"].clone()
    assert objective.surrogate_spec is not None
    assert_same(objective, given)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("name", ALL)
def test_every_instruction_set_in_fp32(name: str, isa: str) -> None:
    from fastrl_kernels import _C  # type: ignore[attr-defined]

    if isa not in _C.instruction_sets():
        assert isa != "generic"
        return
    best = _C.instruction_set()
    try:
        _C.use_instruction_set(isa)
        assert_same(ALL[name], batch(torch.float32), rtol=2e-5, atol=1e-6)
    finally:
        _C.use_instruction_set(best)


def test_same_bits_for_any_number_of_threads() -> None:
    given, threads = batch(torch.float32), torch.get_num_threads()
    repeated = {k: x.repeat(200, *[1] * (x.ndim - 1)) if isinstance(x, Tensor) else x for k, x in given.items()}
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(ALL["verl ppo"], repeated, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x.nan_to_num(), other[name].nan_to_num()) for name, x in results[0].items())


COVARIANCE = {"clip_cov_ratio": 0.02, "clip_cov_lb": -0.5, "clip_cov_ub": 1.0}  # more candidates than are taken


@pytest.mark.parametrize("preset", [None, "verl"])
@pytest.mark.parametrize("options", [{}, COVARIANCE, {**COVARIANCE, "clip_cov_ratio": 0.9}], ids=["few", "some", "all"])
def test_the_tokens_of_a_covariance(preset: str | None, options: dict[str, Any]) -> None:
    given = batch(torch.float64, per_token=True)
    given["logps"][0, :2], given["advantages"][1, :2] = -torch.inf, torch.inf  # unknown covariances
    given["mask"][:2, :2] = False
    for objective in (
        PolicyObjective(loss_type="clip_cov", preset=preset, **options),
        PolicyObjective(loss_type="kl_cov", preset=preset, kl_cov_ratio=0.1),
    ):
        assert_same(objective, given)
        chosen = covariance_tokens(objective, **{k: given[k] for k in ("logps", "advantages", "mask", "old_logps")})
        assert 0 < int(chosen.sum()) < int(given["mask"].sum())
        assert_same(objective, {**given, "selected": chosen})


@pytest.mark.parametrize("preset", [None, "trl"])
def test_vespo_with_importance_ratios(preset: str | None) -> None:
    objective = PolicyObjective(loss_type="vespo", preset=preset)
    for gate in ("token", "row"):
        given = batch(torch.float64, gate=gate)
        given["importance_ratio"][0, 0], given["importance_ratio"][1, 0] = 0.0, torch.inf
        assert_same(objective, given)
        leaf = given["logps"].clone().requires_grad_()
        out = policy_loss(leaf, objective, backend="cpu", **{k: x for k, x in given.items() if k != "logps"})
        (grad,) = torch.autograd.grad(out.loss, leaf, create_graph=True)  # from the definition
        torch.testing.assert_close(grad, run(objective, given, "reference")["grad"] / 0.7, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["None clip_cov", "verl kl_cov", "None vespo", "trl gmpo", "trl rloo", "None sapo"])
def test_masks_by_entropy_and_by_drift(name: str) -> None:
    options: list[dict[str, Any]] = [{"top_entropy_quantile": 0.4}]
    if not ALL[name].surrogate.per_sequence:
        options.append({"off_policy_mask_threshold": 0.01, "top_entropy_quantile": 0.7})
    for chosen in options:
        assert_same(replace(ALL[name], **chosen), batch(torch.float64, gate="token"))


@pytest.mark.parametrize("name", ["verl ppo", "None gmpo", "trl rloo"])
def test_nothing_or_one_token(name: str) -> None:
    given = batch(torch.float64)
    given["mask"][:] = False
    assert_same(ALL[name], given)
    assert_same(ALL[name], {k: x[:, :1] if isinstance(x, Tensor) and x.ndim == 2 else x for k, x in given.items()})
    given["mask"][0, 0] = True
    given["logps"][0, 0], given["old_logps"][0, 0] = -1.0, -1.5
    assert_same(ALL[name], given)
    assert_same(ALL[name], {k: x[:0] if isinstance(x, Tensor) else x for k, x in given.items()})


@pytest.mark.parametrize(
    "name",
    ["verl ppo", "verl sapo", "verl dro", "None reinforce", "None gmpo", "trl rloo", "verl kl_cov"],
)
def test_gradcheck_and_second_derivatives(name: str) -> None:
    given = batch(torch.float64)
    part = {k: x[:2, :3] if isinstance(x, Tensor) and x.ndim == 2 else x for k, x in given.items()}
    part["mask"] = torch.ones(2, 3, dtype=torch.bool)
    part["advantages"], part["old_logps"] = (
        torch.tensor([1.0, -0.5], dtype=torch.float64),
        -torch.rand(2, 3).double() - 1,
    )
    logps = (part["old_logps"] + 0.05).requires_grad_()
    rest = {k: x for k, x in part.items() if k not in ("logps", "entropy")}

    def loss(x: Tensor) -> Tensor:
        return policy_loss(x, ALL[name], backend="cpu", **rest).loss

    assert torch.autograd.gradcheck(loss, (logps,)) and torch.autograd.gradgradcheck(loss, (logps,))


def test_without_a_gradient_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []
    kernel = cpu.surrogate_terms

    def spy(*args: Any, gradients: bool) -> Any:
        wanted.append(gradients)
        return kernel(*args, gradients=gradients)

    monkeypatch.setattr(cpu, "surrogate_terms", spy)
    given = batch(torch.float32)
    rest = {k: x for k, x in given.items() if k != "logps"}
    assert not policy_loss(given["logps"], ALL["verl ppo"], backend="cpu", **rest).loss.requires_grad
    with torch.no_grad():
        policy_loss(given["logps"].requires_grad_(), ALL["verl ppo"], backend="cpu", **rest)
    assert wanted == [False, False]


def test_an_objective_of_the_users_is_never_bypassed() -> None:
    class Doubled(PolicyObjective):
        def token_loss(self, tokens: Any) -> Tensor:
            return 2 * super().token_loss(tokens)

    given = batch(torch.float64)
    mine, plain = Doubled(loss_type="gpg"), PolicyObjective(loss_type="gpg")
    assert mine.surrogate_spec is None and plain.surrogate_spec is not None
    torch.testing.assert_close(run(mine, given, "cpu")["loss"], 2 * run(plain, given, "cpu")["loss"])


@pytest.mark.parametrize(
    "options", [{"beta": 0.1}, {"nll_coef": 0.1}, {"importance_sampling_level": "sequence"}], ids=str
)
def test_options_that_it_lacks_take_the_definition(options: dict[str, Any]) -> None:
    assert PolicyObjective(loss_type="sapo", **options).surrogate_spec is None


def test_entropy_bonus_takes_the_definition() -> None:
    given = batch(torch.float64)
    objective = PolicyObjective(loss_type="gpg", entropy_coef=0.1)
    entropy = given["entropy"].requires_grad_()
    out = policy_loss(given["logps"], objective, **{k: x for k, x in given.items() if k != "logps"})
    (grad,) = torch.autograd.grad(out.loss, entropy)
    assert grad[given["mask"]].abs().min() > 0
    assert "Surrogate" not in type(out.loss.grad_fn).__name__ and hasattr(ops, "SurrogateTermsFunction")

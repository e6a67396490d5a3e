"""Every path of the backend against fp64: the tile kernels, then the public functions, in fp32 and half precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastrl
from fastrl.benchmark.problems import make_problem
from fastrl_kernels import LogitTransform, RowStats, accumulation_dtype, backends, planner, reference

from .record import Record, run_cases

PLAIN = LogitTransform()
EVERYTHING = LogitTransform(temperature=0.7, logit_scale=1.3, softcap=5.0)


def run(record: Record) -> None:
    settings = record.settings
    backend = backends.load(settings.backend)
    cases: dict[str, Callable[[Record], None]] = {}
    # 1, 129, 507: padding; 50257 (GPT-2): rows at any alignment; 128256 (Llama 3): many blocks.
    vocabularies = (1, 129, 507) if settings.tiny else (1, 129, 507, 2048, 50257, 128256)
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    dtypes += [torch.float16] if settings.backend == "triton" else []
    for vocabulary in vocabularies:
        for dtype in dtypes:
            for name, transform in (("plain", PLAIN), ("softcap, scale, temperature", EVERYTHING)):
                title = f"row kernels {_short(dtype)} V={vocabulary} {name}"
                cases[title] = partial(
                    _rows, backend=backend, v=vocabulary, dtype=dtype, transform=transform, title=title
                )
    cases["row kernels, a common offset of 1e6"] = partial(_offset, backend=backend)
    cases["row kernels, -inf in whole blocks"] = partial(_minus_infinity, backend=backend)
    cases["row kernels, NaN and inf stay in their row"] = partial(_bad_rows, backend=backend)
    cases["row kernels, rows moved in place"] = partial(_moves, backend=backend)
    for vocabulary in (129, 507) if settings.tiny else (129, 507, 50257, 128256):
        for dtype in dtypes if settings.backend != "cpu" else (torch.float32, torch.float64):
            title = f"divergence rows {_short(dtype)} V={vocabulary}"
            cases[title] = partial(_divergence_rows, backend=backend, v=vocabulary, dtype=dtype, title=title)
    for dtype in (torch.float32, torch.bfloat16):
        cases[f"linear_logprobs {_short(dtype)}"] = partial(_linear_logprobs, dtype=dtype)
        cases[f"logprobs_from_logits {_short(dtype)}"] = partial(_logprobs_from_logits, dtype=dtype)
        cases[f"linear_divergence {_short(dtype)}"] = partial(_linear_divergence, dtype=dtype)
        for name, objective in OBJECTIVES.items():
            title = f"linear_policy_loss {name} {_short(dtype)}"
            cases[title] = partial(_linear_policy_loss, dtype=dtype, objective=objective, title=title)
    options: dict[str, dict[str, Any]] = {"capturable": {"capturable": True}, "two lanes": {"limits": {"lanes": 2}}}
    if settings.on_gpu:
        options["bf16 tile"] = {"limits": {"tile_dtype": torch.bfloat16}, "dtype": torch.bfloat16}
        cases["fused forward float32"] = partial(_fused_forward, dtype=torch.float32)
        cases["fused forward bfloat16"] = partial(_fused_forward, dtype=torch.bfloat16)
    for name, how in options.items():
        title = f"linear_policy_loss {name}"
        dtype = how.pop("dtype", torch.float32)
        cases[title] = partial(_linear_policy_loss, dtype=dtype, objective=OBJECTIVES["dapo"], title=title, **how)
    cases["policy_loss"] = _policy_loss
    tested = [settings.backend]
    if settings.on_gpu and settings.backend != "cuda":
        reason = backends.available()["cuda"]
        if reason is None:
            tested.append("cuda")
            for vocabulary in (129, 50257, 128256):
                title = f"cuda row kernels bfloat16 V={vocabulary}"
                cases[title] = partial(
                    _rows, backend=backends.load("cuda"), v=vocabulary, dtype=torch.bfloat16, transform=EVERYTHING,
                    title=title,
                )  # fmt: skip
        else:
            record.skip("backend cuda", reason)
    for name in tested:
        cases[f"group_advantages {name}"] = partial(_group_advantages, backend=name)
        cases[f"gae {name}"] = partial(_gae, backend=name)
    run_cases(record, cases)


DIVERGENCES = (("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.3))
OBJECTIVES = {
    "dapo": fastrl.PolicyObjective(loss_type="dapo"),
    "grpo, KL and entropy": fastrl.PolicyObjective(loss_type="grpo", beta=0.04, entropy_coef=0.01),
    "gspo (two pass)": fastrl.PolicyObjective(loss_type="grpo", importance_sampling_level="sequence"),
}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Tile kernels -------------------------------------------------------------------------------------------------------


def _tile(record: Record, rows: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    device = record.settings.device
    generator = torch.Generator(device).manual_seed(v)
    tile = (3 * torch.randn(rows, v, generator=generator, device=device)).to(dtype)
    upstream = torch.randn(3, rows, generator=generator, device=device).to(accumulation_dtype(dtype))
    return tile, torch.randint(0, v, (rows,), generator=generator, device=device), list(upstream)


def _three(stats: RowStats) -> tuple[Tensor, Tensor, Tensor | None]:
    return stats.row_max, stats.log_sum, stats.mean


def _grad(
    backend: backends.Backend, tile: Tensor, ids: Tensor, transform: LogitTransform, bias: Tensor | None,
    stats: RowStats, upstream: list[Tensor],
) -> Tensor:  # fmt: skip
    out = torch.full_like(tile, math.nan)
    backend.row_grad(tile, out, ids, transform, bias, *_three(stats), *upstream, None, None)
    return out


def _compare_rows(
    record: Record, backend: backends.Backend, tile: Tensor, ids: Tensor, upstream: list[Tensor],
    transform: LogitTransform, bias: Tensor | None, title: str,
) -> None:  # fmt: skip
    before = tile.clone()
    results = []
    eager_backend: backends.Backend = reference  # type: ignore[assignment]
    for kernels, x in ((backend, tile), (eager_backend, tile), (eager_backend, tile.double())):
        stats = kernels.row_stats(x, ids, transform, None if bias is None else bias.to(x.dtype), True)
        gradients = [g.to(accumulation_dtype(x.dtype)) for g in upstream]
        out = _grad(kernels, x, ids, transform, None if bias is None else bias.to(x.dtype), stats, gradients)
        results.append(
            {"logps": stats.logps, "entropy": stats.entropy, "lse": stats.row_max + stats.log_sum, "grad": out}
        )
    ours, eager, truth = results
    for name in ours:
        record.close(f"{title}: {name}", ours[name], eager[name], truth[name].double())
    again = backend.row_stats(tile, ids, transform, bias, True)
    record.check(f"{title}: logps <= 0", bool((ours["logps"] <= 0).all()))
    same = torch.equal(again.logps, ours["logps"])
    same &= torch.equal(_grad(backend, tile, ids, transform, bias, again, upstream), ours["grad"])
    record.check(f"{title}: twice the same bits", same)
    record.check(f"{title}: input unchanged", torch.equal(tile, before))


def _rows(
    record: Record, backend: backends.Backend, v: int, dtype: torch.dtype, transform: LogitTransform, title: str
) -> None:
    tile, ids, upstream = _tile(record, 64, v, dtype)
    bias = torch.randn(v, generator=torch.Generator().manual_seed(0)).to(tile.device, accumulation_dtype(dtype))
    bias = bias.to(dtype).to(bias.dtype)
    _compare_rows(record, backend, tile, ids, upstream, transform, None if transform is PLAIN else bias, title)


def _offset(record: Record, backend: backends.Backend) -> None:
    tile, ids, upstream = _tile(record, 64, 5000, torch.float32)
    _compare_rows(record, backend, tile + 1e6, ids, upstream, PLAIN, None, "offset 1e6")
    _compare_rows(record, backend, tile - 123.0, ids, upstream, PLAIN, None, "all logits negative")


def _minus_infinity(record: Record, backend: backends.Backend) -> None:
    tile, _, upstream = _tile(record, 64, 10_000, torch.float32)
    block = torch.arange(10_000, device=tile.device) // 2048
    for name, kept in (("first", block != 0), ("last", block != 4), ("all but one", block == 2)):
        bias = torch.where(kept, 0.0, -torch.inf)
        inside = kept.nonzero().squeeze(-1)
        position = torch.arange(64, device=tile.device) * 7
        stats = backend.row_stats(tile, inside[position], PLAIN, bias, True)
        out = _grad(backend, tile, inside[position], PLAIN, bias, stats, upstream)
        some, eager = tile[:, kept].contiguous(), reference.row_stats(tile[:, kept], position, PLAIN, None, True)
        truth = reference.row_stats(some.double(), position, PLAIN, None, True)
        record.close(f"-inf in block {name}: logps", stats.logps, eager.logps, truth.logps)
        if stats.entropy is not None and eager.entropy is not None and truth.entropy is not None:
            record.close(f"-inf in block {name}: entropy", stats.entropy, eager.entropy, truth.entropy)
        finite = bool(torch.isfinite(out).all()) and bool((out[:, ~kept] == 0).all())
        record.check(f"-inf in block {name}: gradient finite, and 0 where p is 0", finite)


def _bad_rows(record: Record, backend: backends.Backend) -> None:
    tile, ids, upstream = _tile(record, 8, 10_000, torch.float32)
    clean = backend.row_stats(tile, ids, PLAIN, None, True)
    clean_grad = _grad(backend, tile, ids, PLAIN, None, clean, upstream)
    good = torch.arange(8, device=tile.device) != 2
    for poison in (math.nan, math.inf):
        bad = tile.clone()
        bad[2, 5000] = poison
        stats = backend.row_stats(bad, ids, PLAIN, None, True)
        out = _grad(backend, bad, ids, PLAIN, None, stats, upstream)
        alone = bool(out[2].isnan().all()) and bool(stats.logps[2].isnan()) and torch.equal(out[good], clean_grad[good])
        record.check(f"{poison} stays in its row", alone and torch.equal(stats.logps[good], clean.logps[good]))


def _moves(record: Record, backend: backends.Backend) -> None:
    tile, ids, upstream = _tile(record, 7, 10_000, torch.float32)
    stats = backend.row_stats(tile, ids, EVERYTHING, None, True)
    everywhere = _grad(backend, tile, ids, EVERYTHING, None, stats, upstream)
    source = torch.tensor([6, 1, 3, 4], device=tile.device)
    target = torch.tensor([0, 1, 3, 2], device=tile.device)
    backend.row_grad(tile, tile, ids, EVERYTHING, None, *_three(stats), *upstream, source, target)
    record.check("rows moved in place", torch.equal(tile[target], everywhere[source]))


def _divergence_rows(record: Record, backend: backends.Backend, v: int, dtype: torch.dtype, title: str) -> None:
    tile, _, (upstream, *_) = _tile(record, 64, v, dtype)
    ref_tile = tile.flip(0)
    bias = torch.linspace(-1, 1, v, device=tile.device, dtype=accumulation_dtype(dtype))
    eager_backend: backends.Backend = reference  # type: ignore[assignment]

    def call(kernels: backends.Backend, kind: torch.dtype, *how: Any) -> list[Tensor]:
        x, out = tile.to(kind), torch.full_like(tile, math.nan, dtype=kind)
        biases = [None if b is None else b.to(accumulation_dtype(kind)) for b in how[4:]]
        weight = upstream.to(accumulation_dtype(kind))
        return [kernels.divergence_rows(x, ref_tile.to(kind), *how[:4], *biases, weight, out), out]

    for divergence in DIVERGENCES:
        for name, form in (("plain", (PLAIN, PLAIN, None, None)), ("full", (EVERYTHING, PLAIN, bias, -bias))):
            how = (*divergence, *form)
            ours, eager, truth = (
                call(kernels, kind, *how)
                for kernels, kind in ((backend, dtype), (eager_backend, dtype), (eager_backend, torch.float64))
            )
            what = f"{title} {divergence[0]} {name}"
            for part, *values in zip(("value", "gradient"), ours, eager, truth, strict=True):
                # In fp64 eager is the truth, and has no error to be measured by.
                scale = 4 * values[2].abs().max().item() if dtype == torch.float64 else None
                record.close(f"{what}: {part}", *values, scale=scale)
            again = call(backend, dtype, *how)
            same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
            record.check(f"{what}: twice the same bits", same)
            alone = backend.divergence_rows(tile, ref_tile, *how)
            place = tile.clone()
            backend.divergence_rows(place, ref_tile, *how, upstream, place)
            record.check(f"{what}: in place, and without a gradient", torch.equal(alone, ours[0])
                         and torch.equal(place, ours[1]))  # fmt: skip


# Public functions ---------------------------------------------------------------------------------------------------


def _sizes(record: Record) -> tuple[int, int, int, int]:
    return (3, 17, 24, 507) if record.settings.tiny else (6, 341, 576, 49152)


def _linear_logprobs(record: Record, dtype: torch.dtype) -> None:
    device = record.settings.device
    problem = make_problem(*_sizes(record), dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    upstream = torch.randn(3, *problem.ids.shape, generator=generator, device=device)
    mask = torch.rand(problem.ids.shape, generator=generator, device=device) < 0.8
    bias = torch.randn(problem.weight.shape[0], generator=generator, device=device).to(dtype)
    options = {"temperature": 0.7, "softcap": 20.0}

    def call(backend: str, kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in (problem.hidden, problem.weight, bias)]
        hidden = leaves[0]
        if backend == "eager":  # logits in the inputs' dtype, as a model returns them
            z = torch.nn.functional.linear(hidden, leaves[1], leaves[2]).float()
            z = 20.0 * torch.tanh(z / 20.0) / 0.7
            lp = z.log_softmax(-1)
            outputs = [lp.gather(-1, problem.ids.unsqueeze(-1)).squeeze(-1), -(lp.exp() * lp).sum(-1), z.logsumexp(-1)]
            outputs = [torch.where(mask, x, 0.0) for x in outputs]
        else:
            outputs = list(
                fastrl.linear_logprobs(hidden, leaves[1], problem.ids, bias=leaves[2], mask=mask, entropy=True,
                                       backend=backend, **options)
            )  # fmt: skip
        total = sum((g.to(y.dtype) * y).sum() for g, y in zip(upstream, outputs, strict=True))
        return [x.detach() for x in outputs] + list(torch.autograd.grad(total, leaves))

    ours, eager = call(record.settings.backend, dtype), call("eager", dtype)
    again, truth = call(record.settings.backend, dtype), call("reference", torch.float64)
    names = ("logps", "entropy", "lse", "d hidden", "d weight", "d bias")
    for name, *values in zip(names, ours, eager, truth, strict=True):
        record.close(f"linear_logprobs {_short(dtype)}: {name}", *values)
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    record.check(f"linear_logprobs {_short(dtype)}: twice the same bits", same)


def _logprobs_from_logits(record: Record, dtype: torch.dtype) -> None:
    problem = make_problem(*_sizes(record), dtype, record.settings.device)
    logits = torch.nn.functional.linear(problem.hidden, problem.weight)
    upstream = torch.randn(problem.ids.shape, generator=torch.Generator().manual_seed(1)).to(logits.device)

    def call(fused: bool, kind: torch.dtype) -> list[Tensor]:
        x = logits.to(kind).requires_grad_()
        if fused:
            logps = fastrl.logprobs_from_logits(x, problem.ids, backend=record.settings.backend).logps
        else:
            wide = x if kind == torch.float64 else x.float()
            logps = wide.log_softmax(-1).gather(-1, problem.ids.unsqueeze(-1)).squeeze(-1)
        (grad,) = torch.autograd.grad((upstream.to(logps.dtype) * logps).sum(), x)
        return [logps.detach(), grad]

    rows = zip(("logps", "d logits"), call(True, dtype), call(False, dtype), call(False, torch.float64), strict=True)
    for name, *values in rows:
        record.close(f"logprobs_from_logits {_short(dtype)}: {name}", *values)


def _linear_divergence(record: Record, dtype: torch.dtype) -> None:
    device, (b, t, d, v) = record.settings.device, _sizes(record)
    problem, teacher = make_problem(b, t, d, v, dtype, device), make_problem(b, t, 2 * d, v, dtype, device)
    upstream = torch.randn(b, t, generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.rand(b, t, generator=torch.Generator().manual_seed(2)).to(device) < 0.8

    def call(backend: str, kind: torch.dtype, divergence: tuple[str, float]) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in (problem.hidden, problem.weight)]
        out = fastrl.linear_divergence(
            *leaves, teacher.hidden.detach().to(kind), teacher.weight.detach().to(kind), kind=divergence[0],
            beta=divergence[1] or None, mask=mask, temperature=0.7, backend=backend,
        )  # fmt: skip
        return [out.detach(), *torch.autograd.grad((upstream.to(out.dtype) * out).sum(), leaves)]

    for divergence in DIVERGENCES:
        ours, eager = (call(name, dtype, divergence) for name in (record.settings.backend, "reference"))
        truth = call("reference", torch.float64, divergence)
        title = f"linear_divergence {divergence[0]} {_short(dtype)}"
        for name, *values in zip(("value", "d hidden", "d weight"), ours, eager, truth, strict=True):
            record.close(f"{title}: {name}", *values)
        record.check(f"{title}: masked rows have no gradient", bool((ours[1][~mask] == 0).all()))


def _fused_forward(record: Record, dtype: torch.dtype) -> None:
    """Scoring without a tile of logits, forced, at a small and a large hidden size."""
    for sizes in (_sizes(record), (2, 100, 4096, 50257)):
        problem = make_problem(*sizes, dtype, record.settings.device)
        inputs = (problem.hidden, problem.weight, problem.ids)
        with torch.no_grad(), planner.forced(fused_forward=True):
            ours = fastrl.linear_logprobs(*inputs, entropy=True, backend=record.settings.backend)
            again = fastrl.linear_logprobs(*inputs, entropy=True, backend=record.settings.backend)
        with torch.no_grad():
            eager = fastrl.linear_logprobs(*inputs, entropy=True, backend="reference")
            wide = (problem.hidden.double(), problem.weight.double(), problem.ids)
            truth = fastrl.linear_logprobs(*wide, entropy=True, backend="reference")
        title = f"fused forward {_short(dtype)} {sizes}"
        for name, x, y, z in zip(("logps", "entropy", "lse"), ours, eager, truth, strict=True):
            record.close(f"{title}: {name}", x, y, z)
        same = all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
        record.check(f"{title}: twice the same bits", same)


def _linear_policy_loss(
    record: Record, dtype: torch.dtype, objective: fastrl.PolicyObjective, title: str,
    limits: dict[str, Any] | None = None, **options: Any,
) -> None:  # fmt: skip
    problem = make_problem(*_sizes(record), dtype, record.settings.device, live_share=0.66)
    problem.mask[-1, 5:] = False  # a short completion
    ref_logps = problem.old_logps - 0.05
    arguments = {"advantages": problem.advantages, "mask": problem.mask, "old_logps": problem.old_logps,
                 "ref_logps": ref_logps}  # fmt: skip

    def finish(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def fused() -> list[Tensor]:
        leaves = list(problem.leaves())
        with planner.forced(**(limits or {})):
            out = fastrl.linear_policy_loss(
                *leaves, problem.ids, objective, backend=record.settings.backend, **arguments, **options
            )
        return finish(out.loss, leaves)

    def plain(kind: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(kind).requires_grad_() for x in (problem.hidden, problem.weight)]
        z = torch.nn.functional.linear(*leaves)
        lp = (z if kind == torch.float64 else z.float()).log_softmax(-1)
        logps = lp.gather(-1, problem.ids.unsqueeze(-1)).squeeze(-1)
        out = fastrl.policy_loss(logps, objective, entropy=-(lp.exp() * lp).sum(-1), **arguments)
        return finish(out.loss, leaves)

    ours, eager, truth, again = fused(), plain(dtype), plain(torch.float64), fused()
    for name, scale, *values in zip(
        ("loss", "d hidden", "d weight"), (1.0, None, None), ours, eager, truth, strict=True
    ):
        record.close(f"{title}: {name}", *values, scale=scale)
    dead = problem.advantages == 0
    if objective.beta == 0 and objective.entropy_coef == 0:
        record.check(f"{title}: rows without advantage have no gradient", bool((ours[1][dead] == 0).all()))
    record.check(f"{title}: masked rows have no gradient", bool((ours[1][~problem.mask] == 0).all()))
    record.check(f"{title}: twice the same bits", all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)))


def _policy_loss(record: Record) -> None:
    problem = make_problem(4, 33, 16, 129, torch.float32, record.settings.device)
    logps = problem.old_logps + 0.2 * torch.randn(problem.ids.shape, generator=torch.Generator().manual_seed(2)).to(
        problem.old_logps.device
    )
    for name, objective in OBJECTIVES.items():
        results = []
        for device, dtype in ((logps.device, torch.float32), (torch.device("cpu"), torch.float64)):
            leaf = logps.to(device, dtype).requires_grad_()
            moved = {k: getattr(problem, k).to(device) for k in ("advantages", "mask", "old_logps")}
            loss = fastrl.policy_loss(leaf, objective, ref_logps=moved["old_logps"] - 0.05, entropy=-leaf, **moved).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
        for part, ours, truth in zip(("loss", "gradient"), *results, strict=True):
            truth = truth.to(ours.device)
            record.close(
                f"policy_loss {name}: {part}", ours, truth.float(), truth, scale=1.0 if part == "loss" else None
            )


def _gae(record: Record, backend: str) -> None:
    device = record.settings.device
    generator = torch.Generator().manual_seed(0)
    for b, t in ((3, 17), (5, 129)) if record.settings.tiny else ((3, 17), (64, 2048), (1000, 333)):
        rewards, values = torch.randn(2, b, t, generator=generator, dtype=torch.float64)
        mask = torch.rand(b, t, generator=generator) < 0.8
        for through in (False, True):
            options = {"gamma": 0.99, "lam": 0.95, "through_mask": through}
            plain = (rewards.float(), values.float())
            truth = fastrl.gae(rewards, values, mask, backend="reference", **options)
            eager = fastrl.gae(*plain, mask, backend="reference", **options)
            ours = fastrl.gae(*(x.to(device) for x in plain), mask.to(device), backend=backend, **options)
            for name, x, y, z in zip(("advantages", "returns"), ours, eager, truth, strict=True):
                record.close(f"gae {backend} {b} x {t} through_mask={through}: {name}", x, y.to(device), z.to(device))


def _group_advantages(record: Record, backend: str) -> None:
    device = record.settings.device
    generator = torch.Generator().manual_seed(0)
    for count in (1, 17, 333) if record.settings.tiny else (1, 17, 333, 4096):
        rewards = torch.randn(count, generator=generator, dtype=torch.float64)
        rewards[::7] = math.nan
        group_ids = torch.randint(0, max(1, count // 6), (count,), generator=generator)
        rewards[group_ids == 0] = 0.1  # a unanimous group
        for baseline in ("mean", "leave_one_out"):
            for scale in ("group", "batch", "none"):
                options = {"baseline": baseline, "scale": scale}
                truth = fastrl.group_advantages(rewards, group_ids, backend="reference", **options).to(device)
                eager = fastrl.group_advantages(rewards.float(), group_ids, backend="reference", **options).to(device)
                ours = fastrl.group_advantages(
                    rewards.float().to(device), group_ids.to(device), backend=backend, **options
                )
                title = f"group_advantages {backend} B={count} {baseline} {scale}"
                record.close(title, ours, eager, truth)
                record.check(f"{title}: zeros", torch.equal(ours == 0, eager == 0))


def kernels_once(record: Record) -> None:
    """One small call of every kernel, for compute-sanitizer."""
    backend = backends.load(record.settings.backend)
    for v in (129, 5000):
        tile, ids, upstream = _tile(record, 5, v, torch.float32)
        bias = torch.zeros(v, device=tile.device)
        stats = backend.row_stats(tile, ids, EVERYTHING, bias, True)
        record.say(f"row_stats ran, V={v}, sum of logps {stats.logps.sum().item():.6g}")
        out = _grad(backend, tile, ids, EVERYTHING, bias, stats, upstream)
        record.say(f"row_grad ran, V={v}, sum of gradients {out.sum().item():.6g}")
        both = (tile, tile.flip(0), "jsd", 0.3, EVERYTHING, PLAIN, bias, None, upstream[0], out)
        value = backend.divergence_rows(*both)
        record.say(f"divergence_rows ran, V={v}, sum {value.sum().item():.6g}, of gradients {out.sum().item():.6g}")
    rewards = torch.arange(40.0, device=record.settings.device)
    for scale in ("group", "batch", "none"):
        out = backend.group_advantages(rewards, (rewards % 7).long(), "leave_one_out", scale, 1e-4)
        record.say(f"group_advantages ran, {scale}, sum {out.sum().item():.6g}")

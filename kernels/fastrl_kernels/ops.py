"""The operators `fastrl::*`: torch.library registration, fakes, autograd. `functional` validates the arguments."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends, engine, planner
from .engine import Gradients, Head, Needs, Rows
from .head import LogitTransform, RowStats, accumulation_dtype
from .objective import TermSums, TokenBatch, TokenObjective, coefficients, find_objective, weighted_terms
from .shards import shard_layout


class HeadSettings(NamedTuple):
    """The arguments that every operator on a head ends with."""

    temperature: float
    logit_scale: float
    softcap: float | None
    backend: str
    group: str  # name of a process group, or empty
    memory_budget: int | None  # bytes for tiles of logits, None: the device's
    capturable: bool  # no synchronisation, no shape that depends on values
    explain: bool  # print the plan


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, settings: HeadSettings, inside: Tensor | None
) -> tuple[Head, int, int]:
    """The head of a call, the size of its whole vocabulary, and of the group's largest shard."""
    process_group = dist.distributed_c10d._resolve_process_group(settings.group) if settings.group else None  # type: ignore[arg-type]
    first_id, vocabulary, widest = 0, weight.shape[0], weight.shape[0]
    if process_group is not None:
        first_id, vocabulary, widest = shard_layout(weight, process_group)
    transform = LogitTransform(settings.temperature, settings.logit_scale, settings.softcap)
    backend = backends.load(settings.backend)
    inside = inside if settings.capturable else None
    return Head(hidden, weight, bias, ids, transform, backend, process_group, first_id, inside), vocabulary, widest


def _plan(
    kind: str,
    head: Head,
    widest: int,
    settings: HeadSettings,
    rows: Tensor | None,
    needs: Needs | None = None,
    scored: int = 0,
    kept: bool = False,
) -> planner.Plan:
    total = head.ids.shape[0]
    fused = hasattr(head.backend, "linear_row_stats") and head.weight.dtype != torch.float64
    work = planner.Work(
        kind, total if rows is None else rows.shape[0], total, head.hidden.shape[1], widest, head.weight.dtype,
        head.hidden.device, needs is not None and needs.hidden, needs is not None and needs.weight, scored,
        head.group is not None, kept, fused, settings.memory_budget,
    )  # fmt: skip
    plan = planner.make_plan(work)
    if settings.explain:
        print(plan.explain(), flush=True)
    return plan


def check_range(mask: Tensor | None, ids: Tensor, vocabulary: int) -> None:
    """Raises ValueError where an id inside the mask is outside the vocabulary."""
    _select(mask, ids, vocabulary)


def _select(mask: Tensor | None, ids: Tensor, vocabulary: int, capturable: bool = False) -> Tensor | None:
    """Index of the rows in the mask (None: all of them), after checking that their ids are in the vocabulary.

    One host synchronisation: the ids' check and the count of rows travel together. capturable: all rows, and on a GPU
    no check (the kernels give such a row NaN).
    """
    if capturable and ids.device.type != "cpu":
        return None
    inside = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    wrong = inside & ((ids < 0) | (ids >= vocabulary))
    count, wrong_count = torch.stack([inside.sum(), wrong.sum()]).tolist()
    if wrong_count:
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"ids: {wrong_count} of {count} scored ids are outside the vocabulary [0, {vocabulary}); the first is "
            f"{int(ids[first])} at flat position {first}. Mask the positions that hold no token."
        )
    if capturable or count == ids.shape[0]:
        return None
    return torch.nonzero_static(inside, size=count).squeeze(-1)


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # logps, entropy, lse; row_max, log_sum, mean


def _outputs(stats: RowStats) -> Outputs:
    """What a scoring operator returns: three differentiable outputs and three numbers per row for its backward.

    entropy and mean are empty where the entropy was not asked for.
    """
    entropy, mean = stats.entropy, stats.mean
    if entropy is None or mean is None:
        entropy, mean = stats.logps.new_empty(0), stats.logps.new_empty(0)
    return stats.logps, entropy, stats.row_max + stats.log_sum, stats.row_max, stats.log_sum, mean


def _fake_outputs(like: Tensor, n: int, dtype: torch.dtype, entropy: bool) -> Outputs:
    def row(size: int = n) -> Tensor:
        return like.new_empty(size, dtype=dtype)

    optional = n if entropy else 0
    return row(), row(optional), row(), row(), row(), row(optional)


# Head: log-probability, entropy and log-sum-exp of given tokens -----------------------------------------------------


@torch.library.custom_op("fastrl::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N,) int64
    mask: Tensor | None,  # (N,) bool
    entropy: bool,
    keep: bool,  # return the raw products too, for the backward: `planner.keeps_logits`
    tolerance: float,  # of the backward, see `linear_logprobs_backward`
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    group: str,
    memory_budget: int | None,
    capturable: bool,
    explain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy, lse, row_max, log_sum, mean, see `_outputs`; raw products of the masked rows (N, V) or (0, V)."""
    settings = HeadSettings(temperature, logit_scale, softcap, backend, group, memory_budget, capturable, explain)
    head, vocabulary, widest = _head(hidden, weight, bias, ids, settings, mask)
    rows = _select(mask, ids, vocabulary, capturable)
    plan = _plan("score", head, widest, settings, rows)
    n = ids.shape[0] if keep else 0
    logits = hidden.new_empty(n, weight.shape[0], dtype=head.dtype)
    if rows is not None:
        logits[rows.shape[0] :] = 0.0
    stats = engine.score(head, rows, entropy, plan, logits=logits if keep else None)
    return *_outputs(_within(stats, head.inside)), logits


def _within(stats: RowStats, inside: Tensor | None) -> RowStats:
    """0 outside the mask, for a head that runs all rows."""
    if inside is None:
        return stats
    return RowStats(*(None if x is None else x.masked_fill(~inside, 0.0) for x in stats))  # type: ignore[arg-type]


@linear_logprobs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    entropy: bool,
    keep: bool,
    *_: Any,
) -> tuple[Tensor, ...]:
    n, dtype = ids.shape[0], accumulation_dtype(weight.dtype)
    logits = hidden.new_empty(n if keep else 0, weight.shape[0], dtype=dtype)
    return *_fake_outputs(hidden, n, dtype, entropy), logits


@torch.library.custom_op("fastrl::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    logps: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    mean: Tensor,
    logits: Tensor,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    tolerance: float,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    group: str,
    memory_budget: int | None,
    capturable: bool,
    explain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty where not needed); rows with no upstream gradient cost nothing.

    tolerance: rows whose gradients' norms together are within that share of the sum are left out (`engine.negligible`).
    """
    settings = HeadSettings(temperature, logit_scale, softcap, backend, group, memory_budget, capturable, explain)
    head, vocabulary, widest = _head(hidden, weight, bias, ids, settings, mask)
    upstream = [g for g in (grad_logps, grad_entropy, grad_lse) if g is not None]
    live = functools.reduce(torch.logical_or, [g != 0 for g in upstream], torch.zeros_like(ids, dtype=torch.bool))
    if mask is not None:
        live &= mask
    stats = RowStats(row_max, log_sum, logps, mean if mean.numel() else None)
    if tolerance > 0 and grad_lse is None:
        norms = engine.gradient_norms(grad_logps, grad_entropy, stats)
        live &= ~engine.negligible(torch.where(live, norms, 0.0), tolerance)
    if head.inside is not None:
        grad_logps, grad_entropy, grad_lse = (
            None if g is None else g.masked_fill(~live, 0.0) for g in (grad_logps, grad_entropy, grad_lse)
        )
    needs = Needs(need_hidden, need_weight, need_bias)
    rows = _select(live, ids, vocabulary, capturable)
    kept = logits.shape[0] > 0
    # The forward kept the rows of its mask one behind the other.
    places = mask.cumsum(0) - 1 if kept and mask is not None and not capturable else None
    plan = _plan("backward", head, widest, settings, rows, needs, kept=kept)
    return tuple(  # type: ignore[return-value]
        engine.backward(
            head, stats, rows, grad_logps, grad_entropy, grad_lse, needs, plan, logits if kept else None, places
        )
    )


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if needs.hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs.weight else weight.new_empty(0),
        torch.empty_like(bias)
        if needs.bias and bias is not None
        else weight.new_empty(0, dtype=accumulation_dtype(weight.dtype)),
    )


@linear_logprobs_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, bias, Needs(*args[11:14]))


def _linear_logprobs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, mask, _, _, *ctx.settings = inputs
    logps, entropy, _, *rest = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(hidden, weight, bias, ids, mask, logps, entropy, *rest)


def _linear_logprobs_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, *rest = ctx.saved_tensors
    logps, entropy, lse = (None if g is None else g.contiguous() for g in grads[:3])
    if rest[-2].numel() == 0:  # entropy was not asked for: its output is an empty tensor
        entropy = None
    needs = Needs(*ctx.needs_input_grad[:3])
    out = linear_logprobs_backward(hidden, weight, bias, *rest, logps, entropy, lse, *needs, *ctx.settings)
    return *(g if need else None for g, need in zip(out, needs, strict=True)), *[None] * (4 + len(ctx.settings))


linear_logprobs.register_autograd(_linear_logprobs_backward, setup_context=_linear_logprobs_setup)


# The same from logits that are there already ------------------------------------------------------------------------


@torch.library.custom_op("fastrl::logprobs_from_logits", mutates_args=())
def logprobs_from_logits(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N,) int64
    mask: Tensor | None,  # (N,) bool
    entropy: bool,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy, lse, row_max, log_sum, mean; see `_outputs`."""
    n = ids.shape[0]
    rows = _select(mask, ids, logits.shape[1])
    picked = logits if rows is None else logits.index_select(0, rows)
    stats = backends.load(backend).row_stats(
        picked, ids if rows is None else ids[rows], LogitTransform(temperature), None, entropy
    )
    if rows is not None:
        stats = RowStats(*(None if x is None else x.new_zeros(n).index_copy_(0, rows, x) for x in stats))  # type: ignore[arg-type]
    return _outputs(stats)


@logprobs_from_logits.register_fake
def _(logits: Tensor, ids: Tensor, mask: Tensor | None, entropy: bool, temperature: float, backend: str) -> Outputs:
    return _fake_outputs(logits, ids.shape[0], accumulation_dtype(logits.dtype), entropy)


@torch.library.custom_op("fastrl::logprobs_from_logits_backward", mutates_args=())
def logprobs_from_logits_backward(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    mean: Tensor,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    temperature: float,
    backend: str,
) -> Tensor:
    """Gradient of the logits, a new tensor; rows outside the mask are 0 and their logits are not read."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = None if mask is None else mask.nonzero().squeeze(-1)
    if rows is not None:
        out.zero_()
    backends.load(backend).row_grad(
        logits, out, ids, LogitTransform(temperature), None, row_max, log_sum,
        mean if grad_entropy is not None else None, grad_logps, grad_entropy, grad_lse, rows, rows,
    )  # fmt: skip
    return out


@logprobs_from_logits_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _logprobs_from_logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, mask, _, ctx.temperature, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(logits, ids, mask, *output[3:])


def _logprobs_from_logits_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    logps, entropy, lse = (None if g is None else g.contiguous() for g in grads[:3])
    if saved[-1].numel() == 0:
        entropy = None
    return logprobs_from_logits_backward(*saved, logps, entropy, lse, ctx.temperature, ctx.backend), *[None] * 5


logprobs_from_logits.register_autograd(_logprobs_from_logits_backward, setup_context=_logprobs_from_logits_setup)


# Head and token-local objective in one pass -------------------------------------------------------------------------


def _policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N,) int64
    live: Tensor,  # (N,) bool: rows that may carry a gradient
    dead: Tensor | None,  # (N,) bool: further rows to score
    token_weight: Tensor,  # (N,) aggregation weight of each token's loss
    entropy_weight: Tensor | None,  # (N,) weight of each token's entropy in the bonus
    advantages: Tensor,  # (N,)
    old_logps: Tensor | None,  # (N,)
    ref_logps: Tensor | None,  # (N,)
    gate: Tensor | None,  # (N,)
    weight_grad: Tensor | None,  # (V, D) buffer that dW is added to
    objective: str,
    entropy: bool,
    needs: Needs,
    tolerance: float,
    settings: HeadSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inside = live if dead is None else live | dead
    head, vocabulary, widest = _head(hidden, weight, bias, ids, settings, inside)
    rule = find_objective(objective)

    # One table, so that a chunk gathers its rows of all the vectors at once.
    vectors = {
        "advantages": advantages, "old_logps": old_logps, "ref_logps": ref_logps, "gate": gate,
        "weight": token_weight, "entropy_weight": entropy_weight,
    }  # fmt: skip
    table = torch.stack([x.to(head.dtype) for x in vectors.values() if x is not None])

    if head.inside is not None:
        table = table.masked_fill(~head.inside, 0.0)

    def chunk(rows: Rows, logps: Tensor, entropies: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        columns = iter((table[:, rows] if isinstance(rows, slice) else table.index_select(1, rows)).unbind())
        given: dict[str, Any] = {name: None if x is None else next(columns) for name, x in vectors.items()}
        weight, bonus = given.pop("weight"), given.pop("entropy_weight")
        return coefficients(rule, TokenBatch(logps, entropies, **given), weight, bonus, head.backend.policy_terms)

    capturable = settings.capturable
    live_rows = _select(inside if capturable else live, ids, vocabulary, capturable)
    dead_rows, scored = None, 0
    if dead is not None and not capturable:
        dead_rows = _select(dead, ids, vocabulary)
        scored = ids.shape[0] if dead_rows is None else dead_rows.shape[0]
    plan = _plan("single pass", head, widest, settings, live_rows, needs, scored)
    terms, stats, grads, skipped = engine.single_pass(
        head, live_rows, chunk, entropy, needs, plan, tolerance=tolerance, weight_grad=weight_grad
    )
    if scored:
        engine.score(head, dead_rows, entropy, _plan("score", head, widest, settings, dead_rows), stats)
    stats = _within(stats, head.inside)
    return terms.sum(), *_outputs(stats)[:2], torch.stack(skipped), *grads


@torch.library.custom_op("fastrl::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N,) int64
    live: Tensor,  # (N,) bool: rows that may carry a gradient
    dead: Tensor | None,  # (N,) bool: further rows to score
    token_weight: Tensor,  # (N,) aggregation weight of each token's loss
    entropy_weight: Tensor | None,  # (N,) weight of each token's entropy in the bonus
    advantages: Tensor,  # (N,)
    old_logps: Tensor | None,  # (N,)
    ref_logps: Tensor | None,  # (N,)
    gate: Tensor | None,  # (N,)
    objective: str,  # handle of a token-local objective
    entropy: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    tolerance: float,  # see `engine.single_pass`
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    group: str,
    memory_budget: int | None,
    capturable: bool,
    explain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, logps and entropy of the scored rows (0 elsewhere), `engine.Skipped`, and the loss's gradients of hidden,
    weight and bias."""
    settings = HeadSettings(temperature, logit_scale, softcap, backend, group, memory_budget, capturable, explain)
    return _policy_loss(
        hidden, weight, bias, ids, live, dead, token_weight, entropy_weight, advantages, old_logps, ref_logps, gate,
        None, objective, entropy, Needs(need_hidden, need_weight, need_bias), tolerance, settings,
    )  # fmt: skip


@torch.library.custom_op("fastrl::linear_policy_loss_into", mutates_args=("weight_grad",))
def linear_policy_loss_into(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N,) int64
    live: Tensor,  # (N,) bool: rows that may carry a gradient
    dead: Tensor | None,  # (N,) bool: further rows to score
    token_weight: Tensor,  # (N,) aggregation weight of each token's loss
    entropy_weight: Tensor | None,  # (N,) weight of each token's entropy in the bonus
    advantages: Tensor,  # (N,)
    old_logps: Tensor | None,  # (N,)
    ref_logps: Tensor | None,  # (N,)
    gate: Tensor | None,  # (N,)
    weight_grad: Tensor,  # (V, D) in the accumulation dtype
    objective: str,  # handle of a token-local objective
    entropy: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    tolerance: float,  # see `engine.single_pass`
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    group: str,
    memory_budget: int | None,
    capturable: bool,
    explain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_policy_loss` that adds dW to a buffer instead of returning it."""
    settings = HeadSettings(temperature, logit_scale, softcap, backend, group, memory_budget, capturable, explain)
    return _policy_loss(
        hidden, weight, bias, ids, live, dead, token_weight, entropy_weight, advantages, old_logps, ref_logps, gate,
        weight_grad, objective, entropy, Needs(need_hidden, True, need_bias), tolerance, settings,
    )  # fmt: skip


def _fake_policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, n: int, entropy: bool, needs: Needs
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(weight.dtype)
    row = hidden.new_empty(n, dtype=dtype)
    entropies = torch.empty_like(row) if entropy else row.new_empty(0)
    skipped = hidden.new_empty(len(engine.Skipped._fields), dtype=torch.float64)
    grads = _fake_gradients(hidden, weight, bias, needs)
    return hidden.new_empty((), dtype=dtype), row, entropies, skipped, *grads


@linear_policy_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_policy_loss(hidden, weight, bias, ids.shape[0], args[9], Needs(*args[10:13]))


@linear_policy_loss_into.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    needs = Needs(*args[11:14])._replace(weight=False)
    return _fake_policy_loss(hidden, weight, bias, ids.shape[0], args[10], needs)


def register_single_pass(op: Any, tensors: int) -> None:
    """Autograd of an operator that makes its gradients with its value.

    Its first output is a scalar, its last three are that scalar's gradients of its first three inputs: hidden, weight
    and bias. Its first `tensors` inputs are tensors, or None.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.settings = inputs[tensors:]
        ctx.traced = type(output[0]) is not Tensor
        if ctx.traced:
            ctx.save_for_backward(*output[-3:])
        else:
            # Held aside, not saved: the first backward gives these very tensors away, so that one dW exists.
            ctx.grads = output[-3:]
            ctx.exclusive = False  # see give_up_gradients
            ctx.save_for_backward(*inputs[:tensors])

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = [None] * (tensors - 3 + len(ctx.settings))
        if grad is None:
            return None, None, None, *nothing
        if ctx.traced:
            scaled = [g * grad.to(g.dtype) for g in ctx.saved_tensors]
        else:
            grads, ctx.grads = ctx.grads, None
            if grads is None:  # a second backward through the same graph: the first gave the gradients away
                grads = op(*ctx.saved_tensors, *ctx.settings)[-3:]
            unit = grad.device.type == "cpu" and grad.item() == 1.0
            scaled = list(grads) if unit else [g.mul_(grad) if ctx.exclusive else g * grad for g in grads]
        return *(g if need else None for g, need in zip(scaled, ctx.needs_input_grad[:3], strict=True)), *nothing

    op.register_autograd(backward, setup_context=setup)


def _linear_policy_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, _, _, _, *grads = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    tensors, ctx.settings = inputs[:12], inputs[12:]
    ctx.traced = type(loss) is not Tensor
    if ctx.traced:
        ctx.save_for_backward(*grads)
    else:
        # Held aside, not saved: the backward gives these very tensors away, so that one dW exists and not two.
        ctx.grads = Gradients(*grads)
        ctx.exclusive = False  # see give_up_gradients
        ctx.objective = find_objective(ctx.settings[0])  # alive for a second backward
        ctx.save_for_backward(*tensors)


def give_up_gradients(loss: Tensor) -> None:
    """The caller of `linear_policy_loss` keeps none of the gradient outputs: its backward may scale them in place."""
    if not torch.compiler.is_compiling() and loss.grad_fn is not None:
        loss.grad_fn.exclusive = True  # type: ignore[attr-defined]


def _linear_policy_loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = [None] * (9 + len(ctx.settings))
    if grad_loss is None:
        return None, None, None, *nothing
    if ctx.traced:
        scaled = [g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
    else:
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # a second backward through the same graph: the first gave the gradients away
            grads = Gradients(*linear_policy_loss(*ctx.saved_tensors, *ctx.settings)[4:])
        unit = grad_loss.device.type == "cpu" and grad_loss.item() == 1.0
        scaled = list(grads) if unit else [g.mul_(grad_loss) if ctx.exclusive else g * grad_loss for g in grads]
    needs = ctx.needs_input_grad[:3]
    return *(g if need else None for g, need in zip(scaled, needs, strict=True)), *nothing


linear_policy_loss.register_autograd(_linear_policy_loss_backward, setup_context=_linear_policy_loss_setup)


class PolicyLossInto(torch.autograd.Function):
    """`linear_policy_loss_into` with gradients of hidden and bias; dW is in the buffer when the forward ends.

    So the upstream gradient of the loss must be 1: anything else is an error, on a GPU an assertion of the device.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        *outputs, dx, _, dbias = linear_policy_loss_into(hidden, weight, bias, *rest)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(dx, dbias)
        ctx.rest = len(rest)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, dbias = ctx.saved_tensors
        nothing = [None] * ctx.rest
        if grads[0] is None:
            return None, None, None, *nothing
        message = "weight_grad: dW was added with an upstream gradient of 1, but the loss was scaled before backward()"
        if grads[0].device.type == "cpu" and grads[0].item() != 1.0:
            raise ValueError(f"{message}; pass the scale as `normalizer`, or leave weight_grad out")
        if grads[0].device.type != "cpu":
            torch._assert_async(grads[0] == 1.0, message)
        return *(
            g if need else None for g, need in zip((dx, None, dbias), ctx.needs_input_grad, strict=False)
        ), *nothing


# Policy objective on given log-probabilities ------------------------------------------------------------------------


def _run_policy_terms(
    logps: Tensor,  # (B, T)
    entropy: Tensor | None,  # (B, T)
    advantages: Tensor,  # (B, T) or (B, 1)
    old_logps: Tensor | None,  # (B, T)
    ref_logps: Tensor | None,  # (B, T)
    gate: Tensor | None,  # (B, T) or (B, 1)
    scored: Tensor,  # (B, T) bool: tokens that enter the loss
    mask: Tensor,  # (B, T) bool: tokens that count in the clip ratios
    live: Tensor,  # (B, T) bool
    token_weight: Tensor,  # (B, T)
    entropy_weight: Tensor | None,  # (B, T)
    objective: str,  # handle of an objective with a kernel_spec
    gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, `TermSums` as columns (B, 9), and the loss's gradients in logps and entropy (empty where not needed)."""
    spec = find_objective(objective).kernel_spec  # type: ignore[attr-defined]
    tokens = TokenBatch(logps, entropy, advantages, old_logps, ref_logps, gate, scored)
    made = backends.load(backend).policy_terms(
        spec, tokens, token_weight, entropy_weight, mask, live, terms=False, gradients=gradients
    )
    assert made.sums is not None  # sums are always asked for here
    policy, bonus = made.sums[:, :2].sum(0).unbind()
    loss = policy - bonus
    grads = (logps.new_empty(0) if g is None else g for g in (made.grad_logps, made.grad_entropy))
    return loss.to(logps.dtype), made.sums, *grads  # type: ignore[return-value]


policy_terms = torch.library.custom_op("fastrl::policy_terms", _run_policy_terms, mutates_args=())


@policy_terms.register_fake
def _(logps: Tensor, entropy: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entropy_weight, _, gradients, _ = args[-4:]
    sums = logps.new_empty(logps.shape[0], len(TermSums._fields), dtype=torch.float64)

    def grad(wanted: bool) -> Tensor:
        return torch.empty_like(logps, memory_format=torch.contiguous_format) if wanted else logps.new_empty(0)

    bonus = gradients and entropy is not None and entropy_weight is not None
    return logps.new_empty(()), sums, grad(gradients), grad(bonus)


def _policy_terms_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:11], *output[2:])
    if type(output[0]) is Tensor:  # a traced graph holds no objective, and can't be differentiated twice
        ctx.objective = find_objective(inputs[11])


def _policy_terms_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = [None] * 12
    if grad_loss is None:
        return None, None, *nothing
    logps, entropy, advantages, old_logps, ref_logps, gate, scored, *_, weight, bonus, by_logps, by_entropy = (
        ctx.saved_tensors
    )
    needs = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():  # create_graph: this gradient will be differentiated, so it comes from the definition

        def clean(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape != scored.shape else torch.where(scored, x, 0.0)

        vectors = {"advantages": advantages, "old_logps": old_logps, "ref_logps": ref_logps, "gate": gate}
        given: dict[str, Any] = {name: clean(x) for name, x in vectors.items()}
        tokens = TokenBatch(torch.where(scored, logps, 0.0), clean(entropy), mask=scored, **given)
        loss = weighted_terms(ctx.objective, tokens, weight, bonus).sum()
        inputs = [x for x, need in zip((logps, entropy), needs, strict=True) if need]
        made = iter(torch.autograd.grad(loss, inputs, grad_loss, create_graph=True, allow_unused=True))
        return *(next(made) if need else None for need in needs), *nothing
    scaled_entropy = grad_loss * by_entropy if needs[1] and bonus is not None else None
    return grad_loss * by_logps if needs[0] else None, scaled_entropy, *nothing


policy_terms.register_autograd(_policy_terms_backward, setup_context=_policy_terms_setup)


class PolicyTermsFunction(torch.autograd.Function):
    """`policy_terms` where nothing is traced: the operator's own autograd wrapper takes longer than a small batch."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _run_policy_terms(*inputs)
        _policy_terms_setup(ctx, inputs, output)
        return output

    backward = staticmethod(_policy_terms_backward)


class SurrogateTermsFunction(torch.autograd.Function):
    """Loss of an objective with a `surrogate_spec`, whose value and gradient are given; where nothing is traced."""

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,  # (B, T)
        grad: Tensor,  # (B, T)
        loss: float,
        weight: Tensor,  # (B, 1)
        tokens: TokenBatch,  # constants, and logps again
        objective: TokenObjective,
    ) -> Tensor:
        ctx.save_for_backward(logps, grad)
        ctx.weight, ctx.tokens, ctx.objective = weight, tokens, objective
        return torch.tensor(loss, dtype=logps.dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logps, grad = ctx.saved_tensors
        nothing = [None] * 5
        if not torch.is_grad_enabled():
            return grad_loss * grad, *nothing
        # create_graph: this gradient will be differentiated, so it comes from the definition.
        mask, given = ctx.tokens.mask, vars(ctx.tokens)
        vectors = {k: given[k] for k in ("advantages", "old_logps", "gate")}
        inside: dict[str, Any] = {
            k: x if x is None or x.shape != mask.shape else torch.where(mask, x, 0.0) for k, x in vectors.items()
        }
        tokens = replace(ctx.tokens, **inside, logps=torch.where(mask, logps, 0.0), entropy=None)
        loss = weighted_terms(ctx.objective, tokens, ctx.weight, None).sum()
        (grad,) = torch.autograd.grad(loss, logps, grad_loss, create_graph=True, allow_unused=True)
        return grad, *nothing


# Advantages ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastrl::gae", mutates_args=())
def gae(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T), in the dtype of rewards
    mask: Tensor,  # (B, T) bool
    gamma: float,
    lam: float,
    through_mask: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T) by a reverse scan over each row; 0 outside the mask."""
    return backends.load(backend).gae(rewards, values, mask, gamma, lam, through_mask)


@gae.register_fake
def _(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)


@torch.library.custom_op("fastrl::group_advantages", mutates_args=())
def group_advantages(rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, eps: float, backend: str) -> Tensor:
    """`(r - baseline) / (std + eps)` within groups of equal ids, (B,)."""
    return backends.load(backend).group_advantages(rewards, group_ids, baseline, scale, eps)


@group_advantages.register_fake
def _(rewards: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rewards)

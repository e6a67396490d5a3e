"""The operators `fastrl::*`: torch.library registration, fakes, autograd. `functional` validates the arguments."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends, engine
from .engine import Gradients, Head, Needs, Rows
from .head import LogitTransform, RowStats, accumulation_dtype
from .objective import TokenBatch, coefficients, find_objective
from .shards import shard_layout


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    transform: LogitTransform,
    backend: str,
    group: str,
) -> tuple[Head, int]:
    """The head of a call, and the size of its whole vocabulary. `group` is the name of a process group, or empty."""
    process_group = dist.distributed_c10d._resolve_process_group(group) if group else None  # type: ignore[arg-type]
    first_id, vocabulary, widest = 0, weight.shape[0], weight.shape[0]
    if process_group is not None:
        first_id, vocabulary, widest = shard_layout(weight, process_group)
    head = Head(hidden, weight, bias, ids, transform, backends.load(backend), widest, process_group, first_id)
    return head, vocabulary


def check_range(mask: Tensor | None, ids: Tensor, vocabulary: int) -> None:
    """Raises ValueError where an id inside the mask is outside the vocabulary."""
    _select(mask, ids, vocabulary)


def _select(mask: Tensor | None, ids: Tensor, vocabulary: int) -> Tensor | None:
    """Index of the rows in the mask (None: all of them), after checking that their ids are in the vocabulary.

    One host synchronisation: the ids' check and the count of rows travel together.
    """
    inside = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    wrong = inside & ((ids < 0) | (ids >= vocabulary))
    count, wrong_count = torch.stack([inside.sum(), wrong.sum()]).tolist()
    if wrong_count:
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"ids: {wrong_count} of {count} scored ids are outside the vocabulary [0, {vocabulary}); the first is "
            f"{int(ids[first])} at flat position {first}. Mask the positions that hold no token."
        )
    if count == ids.shape[0]:
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
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy, lse, row_max, log_sum, mean; see `_outputs`."""
    transform = LogitTransform(temperature, logit_scale, softcap)
    head, vocabulary = _head(hidden, weight, bias, ids, transform, backend, group)
    stats = engine.score(head, _select(mask, ids, vocabulary), entropy)
    return _outputs(stats)


@linear_logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, mask: Tensor | None, entropy: bool, *_: Any
) -> Outputs:
    return _fake_outputs(hidden, ids.shape[0], accumulation_dtype(weight.dtype), entropy)


@torch.library.custom_op("fastrl::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    mean: Tensor,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty where not needed); rows with no upstream gradient cost nothing."""
    transform = LogitTransform(temperature, logit_scale, softcap)
    head, vocabulary = _head(hidden, weight, bias, ids, transform, backend, group)
    upstream = [g for g in (grad_logps, grad_entropy, grad_lse) if g is not None]
    live = functools.reduce(torch.logical_or, [g != 0 for g in upstream], torch.zeros_like(ids, dtype=torch.bool))
    if mask is not None:
        live &= mask
    stats = RowStats(row_max, log_sum, row_max, mean if mean.numel() else None)
    needs = Needs(need_hidden, need_weight, need_bias)
    rows = _select(live, ids, vocabulary)
    return tuple(engine.backward(head, stats, rows, grad_logps, grad_entropy, grad_lse, needs))  # type: ignore[return-value]


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
    return _fake_gradients(hidden, weight, bias, Needs(*args[8:11]))


def _linear_logprobs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, mask, _, *ctx.head_args = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(hidden, weight, bias, ids, mask, *output[3:])


def _linear_logprobs_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, *rest = ctx.saved_tensors
    logps, entropy, lse = (None if g is None else g.contiguous() for g in grads[:3])
    if rest[-1].numel() == 0:  # entropy was not asked for: its output is an empty tensor
        entropy = None
    needs = Needs(*ctx.needs_input_grad[:3])
    out = linear_logprobs_backward(hidden, weight, bias, *rest, logps, entropy, lse, *needs, *ctx.head_args)
    return *(g if need else None for g, need in zip(out, needs, strict=True)), *[None] * (3 + len(ctx.head_args))


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
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, logps and entropy of the scored rows (0 elsewhere), and the loss's gradients of hidden, weight and bias."""
    transform = LogitTransform(temperature, logit_scale, softcap)
    head, vocabulary = _head(hidden, weight, bias, ids, transform, backend, group)
    rule = find_objective(objective)

    def pick(x: Tensor | None, rows: Rows) -> Tensor | None:
        return None if x is None else x[rows].to(head.dtype)

    def chunk(rows: Rows, logps: Tensor, entropies: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        constants = (pick(x, rows) for x in (advantages, old_logps, ref_logps, gate))
        tokens = TokenBatch(logps, entropies, *constants)  # type: ignore[arg-type]
        return coefficients(rule, tokens, pick(token_weight, rows), pick(entropy_weight, rows))  # type: ignore[arg-type]

    live_rows = _select(live, ids, vocabulary)
    dead_rows = None if dead is None else _select(dead, ids, vocabulary)
    if dead is not None and dead_rows is None and ids.shape[0]:  # every row is dead
        dead_rows = torch.arange(ids.shape[0], device=ids.device)
    needs = Needs(need_hidden, need_weight, need_bias)
    terms, stats, grads = engine.single_pass(head, live_rows, dead_rows, chunk, entropy, needs)
    return terms.sum(), *_outputs(stats)[:2], *grads


@linear_policy_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(weight.dtype)
    entropy, needs = args[9], Needs(*args[10:13])
    row = hidden.new_empty(ids.shape[0], dtype=dtype)
    entropies = torch.empty_like(row) if entropy else row.new_empty(0)
    return hidden.new_empty((), dtype=dtype), row, entropies, *_fake_gradients(hidden, weight, bias, needs)


def _linear_policy_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, _, _, *grads = output
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
            grads = Gradients(*linear_policy_loss(*ctx.saved_tensors, *ctx.settings)[3:])
        unit = grad_loss.device.type == "cpu" and grad_loss.item() == 1.0
        scaled = list(grads) if unit else [g.mul_(grad_loss) if ctx.exclusive else g * grad_loss for g in grads]
    needs = ctx.needs_input_grad[:3]
    return *(g if need else None for g, need in zip(scaled, needs, strict=True)), *nothing


linear_policy_loss.register_autograd(_linear_policy_loss_backward, setup_context=_linear_policy_loss_setup)


# Advantages ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastrl::group_advantages", mutates_args=())
def group_advantages(rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, eps: float, backend: str) -> Tensor:
    """`(r - baseline) / (std + eps)` within groups of equal ids, (B,)."""
    return backends.load(backend).group_advantages(rewards, group_ids, baseline, scale, eps)


@group_advantages.register_fake
def _(rewards: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rewards)

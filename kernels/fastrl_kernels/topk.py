"""Log-probabilities of several given tokens per position, as a teacher's top-k are, without the logits.

One tile of logits at a time: its rows are reduced, the given columns picked out. The gradient makes it again:
`-sum(g) p` in place by row pass 2, and `g` at the given columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, ops, planner, reference, validation
from .engine import Gradients, Head, Needs, _Accumulator, _chunks, _take, _tiles
from .functional import harmonize
from .head import LogitTransform, accumulation_dtype


def _plan(head: Head, rows: Tensor | None, needs: Needs, memory_budget: int | None) -> planner.Plan:
    n = head.hidden.shape[0]
    work = planner.Work(
        "single pass", n if rows is None else rows.shape[0], n, head.hidden.shape[1], head.weight.shape[0],
        head.weight.dtype, head.hidden.device, needs.hidden, needs.weight, memory_budget=memory_budget,
    )  # fmt: skip
    return planner.make_plan(work)


def _picked(head: Head, products: Tensor, ids: Tensor) -> Tensor:
    """Logits (n, K) of some columns of a tile of raw products."""
    return reference.transform_logits(
        products.gather(1, ids), head.transform, None if head.bias is None else head.bias[ids]
    )


def _score(head: Head, ids: Tensor, rows: Tensor | None, plan: planner.Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (N, K), and row_max and log_sum (N,); 0 outside the given rows."""
    logps = head.hidden.new_zeros(ids.shape, dtype=head.dtype)
    row_max, log_sum = (logps.new_zeros(ids.shape[0]) for _ in range(2))
    tile = _tiles(head, plan, plan.tile_dtype)[0]
    for _, part in _chunks(head, rows, plan):
        x = head.rows(part)
        products = tile[: x.shape[0]]
        head.project(x, products, plan.weight_block)
        stats = head.reduce(products, head.local_ids(part), False)
        row_max[part], log_sum[part] = stats.row_max, stats.log_sum
        z = _picked(head, products, _take(ids, part))
        logps[part] = (z - stats.row_max.unsqueeze(-1)) - stats.log_sum.unsqueeze(-1)
    return logps, row_max, log_sum


def _gradients(
    head: Head,
    ids: Tensor,  # (N, K)
    row_max: Tensor,  # (N,)
    log_sum: Tensor,  # (N,)
    grad: Tensor,  # (N, K)
    rows: Tensor | None,
    needs: Needs,
    plan: planner.Plan,
) -> Gradients:
    total = _Accumulator(head, needs, plan)
    tile = _tiles(head, plan, plan.tile_dtype)[0]
    transform = head.transform
    for _, part in _chunks(head, rows, plan):
        x, columns = head.rows(part), _take(ids, part)
        products = tile[: x.shape[0]]
        head.project(x, products, plan.weight_block)
        upstream = _take(grad, part)
        at_columns = upstream * (transform.logit_scale / transform.temperature)
        if transform.softcap is not None:
            z = _picked(head, products, columns)
            at_columns = at_columns * (1 - (z * transform.temperature / transform.softcap) ** 2)
        out = total.gradient_tile(products, 0)
        head.backend.row_grad(
            products, out, head.local_ids(part), transform, head.bias, _take(row_max, part), _take(log_sum, part),
            None, None, None, -upstream.sum(-1), None, None,
        )  # fmt: skip
        out.scatter_add_(1, columns, at_columns.to(out.dtype))
        total.add(out, x, part)
    return total.finish()


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: LogitTransform, backend: str
) -> Head:
    return Head(hidden, weight, bias, ids[:, 0], transform, backends.load(backend))


def _rows(counts: Tensor | None) -> Tensor | None:
    """Index of the rows that count; None: all of them."""
    rows = None if counts is None else counts.nonzero().squeeze(-1)
    return None if counts is None or rows is None or rows.shape[0] == counts.shape[0] else rows


def _check_ids(ids: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    wrong = ((ids < 0) | (ids >= vocabulary)).any(-1)
    if mask is not None:
        wrong = wrong & mask
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"topk_ids: {int(wrong.sum())} rows hold ids outside the vocabulary [0, {vocabulary}); the first is row "
            f"{first}: {ids[first].tolist()[:16]}"
        )


@torch.library.custom_op("fastrl::linear_topk_logprobs", mutates_args=())
def linear_topk_logprobs_op(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K) int64
    mask: Tensor | None,  # (N,) bool
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logps (N, K), row_max and log_sum (N,)."""
    _check_ids(ids, mask, weight.shape[0])
    head = _head(hidden, weight, bias, ids, LogitTransform(temperature, logit_scale, softcap), backend)
    rows = _rows(mask)
    return _score(head, ids, rows, _plan(head, rows, Needs(False, False, False), memory_budget))


@linear_topk_logprobs_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    logps = hidden.new_empty(ids.shape, dtype=accumulation_dtype(weight.dtype))
    return logps, logps.new_empty(ids.shape[0]), logps.new_empty(ids.shape[0])


@torch.library.custom_op("fastrl::linear_topk_logprobs_backward", mutates_args=())
def linear_topk_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    grad: Tensor,  # (N, K)
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty where not needed); rows with no upstream gradient cost nothing."""
    head = _head(hidden, weight, bias, ids, LogitTransform(temperature, logit_scale, softcap), backend)
    live = (grad != 0).any(-1)
    rows = _rows(live if mask is None else live & mask)
    needs = Needs(need_hidden, need_weight, need_bias)
    return tuple(_gradients(head, ids, row_max, log_sum, grad, rows, needs, _plan(head, rows, needs, memory_budget)))  # type: ignore[return-value]


@linear_topk_logprobs_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return ops._fake_gradients(hidden, weight, bias, Needs(*args[5:8]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs, nothing = Needs(*ctx.needs_input_grad[:3]), [None] * (2 + len(ctx.settings))
    if grad is None:
        return None, None, None, *nothing
    out = linear_topk_logprobs_backward(*ctx.saved_tensors, grad.contiguous(), *needs, *ctx.settings)
    return *(g if need else None for g, need in zip(out, needs, strict=True)), *nothing


linear_topk_logprobs_op.register_autograd(_backward, setup_context=_setup)


def linear_topk_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    topk_ids: Tensor,  # (..., K)
    *,
    mask: Tensor | None = None,  # (...)
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Log-probabilities of K given tokens at each position, straight from hidden states and the LM head.

    Eager equivalent: `(hidden @ weight.T / temperature).log_softmax(-1).gather(-1, topk_ids)`.

    Differentiable in hidden, weight and bias. The forward costs 2NDV FLOPs for N tokens in the mask, the backward
    6lNDV, l being the share of tokens with an upstream gradient. Beside inputs, outputs and gradients it holds one tile
    of logits.

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, backend: as `linear_logprobs`.
        topk_ids: `(..., K)` integers in `[0, V)`, aligned with hidden: nothing is shifted. An id may occur twice.
        mask: `(...)`, nonzero where the token counts. Elsewhere no row is read, the result is 0, no gradient flows.
        memory_budget: bytes that the tile of logits may take, or None; see `linear_logprobs`.

    Returns:
        `(..., K)` in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, an id out of range; the message says it.
        RuntimeError: the forced backend does not work on this machine; the message says why.
    """
    validation.check_weight(weight, bias, hidden)
    rows = tuple(hidden.shape[:-1])
    if topk_ids.dtype.is_floating_point or topk_ids.dtype == torch.bool:
        raise TypeError(f"topk_ids: expected integers, got {topk_ids.dtype}")
    if tuple(topk_ids.shape[:-1]) != rows or topk_ids.ndim != hidden.ndim or topk_ids.shape[-1] == 0:
        raise ValueError(f"topk_ids: expected shape {(*rows, 'K')} with K >= 1, got {tuple(topk_ids.shape)}")
    validation.check_device("topk_ids", topk_ids, hidden.device)
    validation.check_run(memory_budget, 0.0, False)
    mask = validation.check_mask(mask, rows, hidden.device)
    mask = None if mask is None else mask.reshape(-1)
    transform = LogitTransform(float(temperature), float(logit_scale), None if softcap is None else float(softcap))
    name = backends.choose(backend, hidden.device)
    hidden, weight, bias = harmonize(hidden, weight, bias)
    hidden, ids = hidden.reshape(-1, hidden.shape[-1]), topk_ids.reshape(-1, topk_ids.shape[-1]).to(torch.int64)
    if name == "reference":
        if memory_budget is not None:
            raise ValueError("memory_budget: the reference builds all the logits; use backend 'cpu' or 'triton'")
        _check_ids(ids, mask, weight.shape[0])
        return reference.linear_topk_logprobs(hidden, weight, ids, bias, transform, mask).view(topk_ids.shape)
    logps, *_ = linear_topk_logprobs_op(
        hidden, weight, bias, ids, mask, transform.temperature, transform.logit_scale, transform.softcap, name,
        memory_budget,
    )  # fmt: skip
    return logps.view(topk_ids.shape)

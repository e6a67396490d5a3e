"""Log-probabilities of several given tokens per position, as a teacher's top-k are, and divergences from that teacher.

One tile of logits at a time: its rows are reduced, the given columns picked out. The gradient of the tile is
`-sum(g) p`, in place by row pass 2, and `g` at the given columns. Where the loss is known beforehand, all of it happens
in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, ops, planner, reference, validation
from .divergence import check_kind
from .engine import Gradients, Head, Needs, Rows, _Accumulator, _chunks, _take, _tiles
from .functional import harmonize
from .head import LogitTransform, accumulation_dtype
from .objective import _autograd_enabled_here

TAILS = ("drop", "renormalize", "bucket")
# (rows, logps (n, K)) of a chunk -> upstream gradient (n, K) of its log-probabilities
Upstream = Callable[[Rows, Tensor], Tensor]


def _pass(
    head: Head, ids: Tensor, counts: Tensor | None, upstream: Upstream | None, needs: Needs, memory_budget: int | None
) -> tuple[Tensor, Gradients]:
    """Log-probabilities (N, K), 0 in rows that don't count (None: all do), and the gradients that `upstream` makes."""
    n, transform = ids.shape[0], head.transform
    rows = None if counts is None else counts.nonzero().squeeze(-1)
    if rows is not None and rows.shape[0] == n:
        rows = None
    work = planner.Work(
        "single pass", n if rows is None else rows.shape[0], n, head.hidden.shape[1], head.weight.shape[0],
        head.weight.dtype, head.hidden.device, needs.hidden, needs.weight, memory_budget=memory_budget,
    )  # fmt: skip
    plan = planner.make_plan(work)
    logps = head.hidden.new_zeros(ids.shape, dtype=head.dtype)
    total = _Accumulator(head, needs, plan)
    tile = _tiles(head, plan, plan.tile_dtype)[0]
    for _, part in _chunks(head, rows, plan):
        x, columns, token = head.rows(part), _take(ids, part), head.local_ids(part)
        products = tile[: x.shape[0]]
        head.project(x, products, plan.weight_block)
        stats = head.reduce(products, token, False)
        bias = None if head.bias is None else head.bias[columns]
        z = reference.transform_logits(products.gather(1, columns), transform, bias)
        taken = (z - stats.row_max.unsqueeze(-1)) - stats.log_sum.unsqueeze(-1)
        logps[part] = taken
        if upstream is None or not any(needs):
            continue
        grad = upstream(part, taken)
        out = total.gradient_tile(products, 0)
        head.backend.row_grad(
            products, out, token, transform, head.bias, stats.row_max, stats.log_sum, None, None, None, -grad.sum(-1),
            None, None,
        )  # fmt: skip
        slope: float | Tensor = transform.logit_scale / transform.temperature
        if transform.softcap is not None:
            slope = slope * (1 - (z * transform.temperature / transform.softcap) ** 2)
        out.scatter_add_(1, columns, (grad * slope).to(out.dtype))
        total.add(out, x, part)
    return logps, total.finish()


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, transform: LogitTransform, backend: str
) -> Head:
    return Head(hidden, weight, bias, ids[:, 0], transform, backends.load(backend))


def _check_ids(ids: Tensor, counts: Tensor | None, vocabulary: int) -> None:
    wrong = ((ids < 0) | (ids >= vocabulary)).any(-1)
    if counts is not None:
        wrong = wrong & counts
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"topk_ids: {int(wrong.sum())} rows hold ids outside the vocabulary [0, {vocabulary}); the first is row "
            f"{first}: {ids[first].tolist()[:16]}"
        )


# Log-probabilities --------------------------------------------------------------------------------------------------


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
) -> Tensor:
    """logps (N, K), 0 outside the mask."""
    _check_ids(ids, mask, weight.shape[0])
    head = _head(hidden, weight, bias, ids, LogitTransform(temperature, logit_scale, softcap), backend)
    return _pass(head, ids, mask, None, Needs(False, False, False), memory_budget)[0]


@linear_topk_logprobs_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=accumulation_dtype(weight.dtype))


@torch.library.custom_op("fastrl::linear_topk_logprobs_backward", mutates_args=())
def linear_topk_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    grad: Tensor,  # (N, K), 0 outside the mask
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
    needs = Needs(need_hidden, need_weight, need_bias)
    return tuple(_pass(head, ids, (grad != 0).any(-1), lambda rows, _: _take(grad, rows), needs, memory_budget)[1])  # type: ignore[return-value]


@linear_topk_logprobs_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return ops._fake_gradients(hidden, weight, bias, Needs(*args[2:5]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *head, mask = ctx.saved_tensors
    grad = grad.contiguous() if mask is None else torch.where(mask.unsqueeze(-1), grad, 0.0)
    needs = Needs(*ctx.needs_input_grad[:3])
    out = linear_topk_logprobs_backward(*head, grad, *needs, *ctx.settings)
    nothing = [None] * (2 + len(ctx.settings))
    return *(g if need else None for g, need in zip(out, needs, strict=True)), *nothing


linear_topk_logprobs_op.register_autograd(_backward, setup_context=_setup)


# Weighted sum of the divergences -------------------------------------------------------------------------------------


@torch.library.custom_op("fastrl::linear_topk_divergence_sum", mutates_args=())
def linear_topk_divergence_sum_op(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (N, K) int64
    ref_logps: Tensor,  # (N, K)
    token_weight: Tensor,  # (N,); a row of weight 0 is not read
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    kind: str,
    beta: float,
    tail: str,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    backend: str,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum, divergence (N,), logps (N, K), and the sum's gradients of hidden, weight and bias."""
    counts = token_weight != 0
    _check_ids(ids, counts, weight.shape[0])
    head = _head(hidden, weight, bias, ids, LogitTransform(temperature, logit_scale, softcap), backend)
    ref_logps, token_weight = ref_logps.to(head.dtype), token_weight.to(head.dtype)

    def upstream(rows: Rows, logps: Tensor) -> Tensor:
        with _autograd_enabled_here(), torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            each = reference.topk_divergence(leaf, _take(ref_logps, rows), kind, beta, tail)
            return torch.autograd.grad((each * _take(token_weight, rows)).sum(), leaf)[0]

    needs = Needs(need_hidden, need_weight, need_bias)
    logps, grads = _pass(head, ids, counts, upstream, needs, memory_budget)
    inside = counts.unsqueeze(-1)
    divergence = reference.topk_divergence(logps, torch.where(inside, ref_logps, 0.0), kind, beta, tail)
    divergence = torch.where(counts, divergence, 0.0)
    return (divergence * token_weight).sum(), divergence, logps, *grads


@linear_topk_divergence_sum_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logps = hidden.new_empty(ids.shape, dtype=accumulation_dtype(weight.dtype))
    grads = ops._fake_gradients(hidden, weight, bias, Needs(*args[2:5]))
    return logps.new_empty(()), logps.new_empty(ids.shape[0]), logps, *grads


ops.register_single_pass(linear_topk_divergence_sum_op, tensors=6)


# Public functions ---------------------------------------------------------------------------------------------------


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    backend: str | None,
    memory_budget: int | None,
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor], str]:
    """Validated operands, rows flattened: hidden, weight, bias, ids; and the backend."""
    validation.check_weight(weight, bias, hidden)
    rows = tuple(hidden.shape[:-1])
    if topk_ids.dtype.is_floating_point or topk_ids.dtype == torch.bool:
        raise TypeError(f"topk_ids: expected integers, got {topk_ids.dtype}")
    if tuple(topk_ids.shape[:-1]) != rows or topk_ids.ndim != hidden.ndim or topk_ids.shape[-1] == 0:
        raise ValueError(f"topk_ids: expected shape {(*rows, 'K')} with K >= 1, got {tuple(topk_ids.shape)}")
    validation.check_device("topk_ids", topk_ids, hidden.device)
    validation.check_run(memory_budget, 0.0, False)
    name = backends.choose(backend, hidden.device)
    if name == "reference" and memory_budget is not None:
        raise ValueError("memory_budget: the reference builds all the logits; use backend 'cpu' or 'triton'")
    hidden, weight, bias = harmonize(hidden, weight, bias)
    ids = topk_ids.reshape(-1, topk_ids.shape[-1]).to(torch.int64)
    return (hidden.reshape(-1, hidden.shape[-1]), weight, bias, ids), name


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
    transform = LogitTransform(float(temperature), float(logit_scale), None if softcap is None else float(softcap))
    operands, name = _prepare(hidden, weight, topk_ids, bias, transform, backend, memory_budget)
    mask = validation.check_mask(mask, tuple(hidden.shape[:-1]), hidden.device)
    mask = None if mask is None else mask.reshape(-1)
    if name == "reference":
        return _reference(operands, transform, mask).view(topk_ids.shape)
    settings = (transform.temperature, transform.logit_scale, transform.softcap, name, memory_budget)
    return linear_topk_logprobs_op(*operands, mask, *settings).view(topk_ids.shape)


def linear_topk_divergence_sum(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    topk_ids: Tensor,  # (..., K)
    ref_logps: Tensor,  # (..., K)
    token_weight: Tensor,  # (...)
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    tail: str = "drop",
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the divergences from a teacher's top-k log-probabilities, in one pass: 6NDV with all gradients.

    Equal to `(token_weight * reference.topk_divergence(linear_topk_logprobs(...), ref_logps, ...)).sum()`, from whose
    definition each chunk takes its coefficients. Rows of weight 0 are not read.

    Args:
        ref_logps: `(..., K)`, constant: the teacher's log-probabilities of topk_ids; -inf: the token is not given.
        token_weight: `(...)` floating point, constant: the weight of each token in the sum.
        kind, beta: see `linear_divergence`; tail: "drop" (forward_kl only), "renormalize" or "bucket", see
            `reference.topk_divergence`.
        All others: as `linear_topk_logprobs`.

    Returns:
        The sum, a scalar; the divergence `(...)` and the log-probabilities `(..., K)`, detached, 0 at weight 0.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_topk_logprobs`; a kind or tail that is unknown or does not go
            with the other.
    """
    kind, beta = check_topk_kind(kind, beta, tail)
    transform = LogitTransform(float(temperature), float(logit_scale), None if softcap is None else float(softcap))
    operands, name = _prepare(hidden, weight, topk_ids, bias, transform, backend, memory_budget)
    validation.check_floating("ref_logps", ref_logps)
    validation.check_shape("ref_logps", ref_logps, tuple(topk_ids.shape), "as topk_ids")
    validation.check_device("ref_logps", ref_logps, hidden.device)
    validation.check_floating("token_weight", token_weight)
    validation.check_shape("token_weight", token_weight, tuple(hidden.shape[:-1]), "one entry per token")
    validation.check_device("token_weight", token_weight, hidden.device)
    ids, token_weight = operands[-1], token_weight.detach().reshape(-1)
    ref_logps = ref_logps.detach().reshape(ids.shape)
    if name == "reference":
        counts = token_weight != 0
        logps = _reference(operands, transform, counts)
        inside = counts.unsqueeze(-1)
        each = reference.topk_divergence(logps, torch.where(inside, ref_logps.to(logps.dtype), 0.0), kind, beta, tail)
        each = torch.where(counts, each, 0.0)
        total = (each * token_weight.to(each.dtype)).sum()
        return total, each.detach().view(hidden.shape[:-1]), logps.detach().view(topk_ids.shape)
    wanted = torch.is_grad_enabled()
    needs = Needs(*(wanted and x is not None and x.requires_grad for x in operands[:3]))
    settings = (transform.temperature, transform.logit_scale, transform.softcap, name, memory_budget)
    total, each, logps, *_ = linear_topk_divergence_sum_op(
        *operands, ref_logps, token_weight, *needs, kind, beta, tail, *settings
    )
    ops.give_up_gradients(total)
    return total, each.view(hidden.shape[:-1]), logps.view(topk_ids.shape)


def check_topk_kind(kind: str, beta: float | None, tail: str) -> tuple[str, float]:
    """`check_kind`, and that the tail goes with it.

    Raises:
        ValueError: an unknown kind or tail, a beta that is out of range or has no use, or "drop" with another kind than
            forward_kl.
    """
    kind, beta = check_kind(kind, beta)
    if tail not in TAILS:
        raise ValueError(f"tail: expected one of {', '.join(TAILS)}, got {tail!r}")
    if tail == "drop" and kind != "forward_kl":
        raise ValueError(f"tail: 'drop' goes with kind 'forward_kl' only, got kind {kind!r}; use one of {TAILS[1:]}")
    return kind, beta


def _reference(
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor], transform: LogitTransform, counts: Tensor | None
) -> Tensor:
    hidden, weight, bias, ids = operands
    _check_ids(ids, counts, weight.shape[0])
    return reference.linear_topk_logprobs(hidden, weight, ids, bias, transform, counts)

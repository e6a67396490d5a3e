"""Divergence between the next-token distributions of two heads over the whole vocabulary, in tiles of both logits.

`linear_divergence` gives it per token, to be differentiated by any loss; `linear_divergence_sum` knows the weight of
each token beforehand, and so makes the gradients with the value. Neither holds more logits than a tile of each head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, engine, ops, planner, reference, validation
from .engine import Gradients, Head, Needs
from .functional import harmonize
from .head import LogitTransform, accumulation_dtype

KINDS = ("forward_kl", "reverse_kl", "jsd")


class Settings(NamedTuple):
    """The arguments that both operators end with."""

    kind: str
    beta: float
    temperature: float
    logit_scale: float
    softcap: float | None
    ref_logit_scale: float
    ref_softcap: float | None
    backend: str
    memory_budget: int | None

    @property
    def transforms(self) -> tuple[LogitTransform, LogitTransform]:
        """Of the student's and of the teacher's raw products."""
        return (
            LogitTransform(self.temperature, self.logit_scale, self.softcap),
            LogitTransform(self.temperature, self.ref_logit_scale, self.ref_softcap),
        )


class Heads(NamedTuple):
    """The tensors that both operators begin with."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    ref_hidden: Tensor  # (N, D2)
    ref_weight: Tensor  # (V, D2)
    ref_bias: Tensor | None  # (V,)


def _compare(
    heads: Heads, counts: Tensor | None, token_weight: Tensor | None, needs: Needs, settings: Settings
) -> tuple[Tensor, Gradients]:
    """Divergence of the rows that count (None: all) and the gradients of its sum, weighted."""
    n, (vocabulary, ref_size) = heads.hidden.shape[0], heads.ref_weight.shape
    rows = None if counts is None else counts.nonzero().squeeze(-1)
    if rows is not None and rows.shape[0] == n:
        rows = None
    work = planner.Work(
        "single pass" if any(needs) else "score", n if rows is None else rows.shape[0], n, heads.hidden.shape[1],
        vocabulary, heads.weight.dtype, heads.hidden.device, needs.hidden, needs.weight,
        memory_budget=settings.memory_budget, tiles=2, second_hidden_size=ref_size,
    )  # fmt: skip
    backend, (transform, ref_transform) = backends.load(settings.backend), settings.transforms
    ids = torch.zeros(1, dtype=torch.int64, device=heads.hidden.device).expand(n)  # no token is singled out
    student = Head(heads.hidden, heads.weight, heads.bias, ids, transform, backend)
    teacher = Head(heads.ref_hidden, heads.ref_weight, heads.ref_bias, ids, ref_transform, backend)
    plan = planner.make_plan(work)
    return engine.compare(student, teacher, rows, settings.kind, settings.beta, token_weight, needs, plan)


# Per token ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastrl::linear_divergence", mutates_args=())
def linear_divergence_op(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (N, D2)
    ref_weight: Tensor,  # (V, D2)
    ref_bias: Tensor | None,  # (V,)
    mask: Tensor | None,  # (N,) bool
    kind: str,
    beta: float,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ref_logit_scale: float,
    ref_softcap: float | None,
    backend: str,
    memory_budget: int | None,
) -> Tensor:
    """Divergence of each row, (N,); 0 outside the mask. The backward makes both heads' logits again."""
    settings = Settings(
        kind, beta, temperature, logit_scale, softcap, ref_logit_scale, ref_softcap, backend, memory_budget
    )
    heads = Heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    return _compare(heads, mask, None, Needs(False, False, False), settings)[0]


@linear_divergence_op.register_fake
def _(hidden: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(weight.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[7:]
    ctx.save_for_backward(*inputs[:7])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *heads, mask = ctx.saved_tensors
    token_weight = grad.contiguous() if mask is None else torch.where(mask, grad, 0.0)
    needs = Needs(*ctx.needs_input_grad[:3])
    *_, dx, dw, db = linear_divergence_sum_op(*heads, token_weight, *needs, *ctx.settings)
    nothing = [None] * (4 + len(ctx.settings))
    return *(g if need else None for g, need in zip((dx, dw, db), needs, strict=True)), *nothing


# Their weighted sum -------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastrl::linear_divergence_sum", mutates_args=())
def linear_divergence_sum_op(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (N, D2)
    ref_weight: Tensor,  # (V, D2)
    ref_bias: Tensor | None,  # (V,)
    token_weight: Tensor,  # (N,); a row of weight 0 is not read
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    kind: str,
    beta: float,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ref_logit_scale: float,
    ref_softcap: float | None,
    backend: str,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum, the divergence of each row (N,), and the sum's gradients of hidden, weight and bias."""
    settings = Settings(
        kind, beta, temperature, logit_scale, softcap, ref_logit_scale, ref_softcap, backend, memory_budget
    )
    heads = Heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    token_weight = token_weight.to(accumulation_dtype(weight.dtype))
    needs = Needs(need_hidden, need_weight, need_bias)
    divergence, grads = _compare(heads, token_weight != 0, token_weight, needs, settings)
    return (divergence * token_weight).sum(), divergence, *grads


@linear_divergence_sum_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(weight.dtype))
    return row.new_empty(()), row, *ops._fake_gradients(hidden, weight, bias, Needs(*args[4:7]))


linear_divergence_op.register_autograd(_backward, setup_context=_setup)
ops.register_single_pass(linear_divergence_sum_op, tensors=7)


# Public functions ---------------------------------------------------------------------------------------------------


def check_kind(kind: str, beta: float | None) -> tuple[str, float]:
    """The kind to compute and its beta: the generalised JSD at 0 and 1 is one of the KLs.

    Raises:
        ValueError: an unknown kind, a beta outside [0, 1], or one beside a kind that has none.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind != "jsd":
        if beta is not None:
            raise ValueError(f"beta: only kind 'jsd' has one, got {beta} with kind {kind!r}")
        return kind, 0.0
    beta = 0.5 if beta is None else float(beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd"), beta


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    kind: str,
    beta: float | None,
    temperature: float,
    scales: tuple[float, float],
    softcaps: tuple[float | None, float | None],
    backend: str | None,
    memory_budget: int | None,
) -> tuple[Heads, Settings]:
    """Validated operands, rows flattened, the teacher's cut from the graph; and the settings."""
    validation.check_weight(weight, bias, hidden)
    validation.check_weight(ref_weight, ref_bias, ref_hidden, "ref_")
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: expected shape {(*hidden.shape[:-1], 'D2')}, one row per row of hidden, "
            f"got {tuple(ref_hidden.shape)}"
        )
    validation.check_device("ref_hidden", ref_hidden, hidden.device)
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: expected the vocabulary of weight, {weight.shape[0]} rows, got {ref_weight.shape[0]}; "
            "cut the padding of the longer one if the tokens are the same"
        )
    validation.check_run(memory_budget, 0.0, False)
    kind, beta = check_kind(kind, beta)
    name = backends.choose(backend, hidden.device)
    if name == "reference" and memory_budget is not None:
        raise ValueError("memory_budget: the reference builds all the logits; use backend 'cpu' or 'triton'")
    caps = [None if cap is None else float(cap) for cap in softcaps]
    settings = Settings(
        kind, beta, float(temperature), float(scales[0]), caps[0], float(scales[1]), caps[1], name, memory_budget
    )
    _ = settings.transforms  # validates them
    hidden, weight, bias = harmonize(hidden, weight, bias)
    ref_hidden, ref_weight, ref_bias = harmonize(ref_hidden.detach(), ref_weight.detach(), ref_bias)
    dtype = accumulation_dtype(weight.dtype)
    if accumulation_dtype(ref_weight.dtype) != dtype:
        ref_hidden, ref_weight = ref_hidden.to(dtype), ref_weight.to(dtype)
    ref_bias = None if ref_bias is None else ref_bias.detach()
    hidden, ref_hidden = hidden.reshape(-1, hidden.shape[-1]), ref_hidden.reshape(-1, ref_hidden.shape[-1])
    return Heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias), settings


def linear_divergence(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (..., D2)
    ref_weight: Tensor,  # (V, D2)
    *,
    kind: str,
    beta: float | None = None,
    mask: Tensor | None = None,  # (...)
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Exact divergence of a student's next-token distributions from a teacher's, per token, without either's logits.

    With p the student's and q the teacher's softmax over the vocabulary, both at `temperature`:

        forward_kl   KL(q || p)   covers what the teacher does (Hinton et al. 2015)
        reverse_kl   KL(p || q)   stays where the teacher is; the KL penalty of RL to a reference model, exact
        jsd          beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q
                     (generalised Jensen-Shannon, Agarwal et al. 2024, eq. 1, as in TRL 1.16's GKD: beta 0 is
                     forward_kl and beta 1 reverse_kl, not the 0 that the formula has there)

    Eager equivalent of reverse_kl: `lp = (hidden @ weight.T / temperature).log_softmax(-1)`, `lq` likewise, then
    `(lp.exp() * (lp - lq)).sum(-1)`.

    Differentiable in hidden, weight and bias; the teacher is constant. For N tokens in the mask and heads of one size
    the forward costs 4NDV FLOPs and the backward 8lNDV, l being the share of tokens whose upstream gradient is not
    exactly 0. Where the weight of each token is known beforehand, `linear_divergence_sum` costs 8NDV together. Beside
    inputs, outputs and gradients it holds one tile of logits of each head.

    Args:
        hidden, weight, bias: the student's hidden states `(..., D)` and head `(V, D)`, `(V,)`; see `linear_logprobs`.
        ref_hidden, ref_weight, ref_bias: the teacher's `(..., D2)`, `(V, D2)` and `(V,)`, of any hidden size and dtype,
            over the same vocabulary.
        kind: "forward_kl", "reverse_kl" or "jsd".
        beta: of "jsd" only: weight of the teacher in the mixture, in [0, 1]; None: 0.5.
        mask: `(...)`, nonzero where the token counts. Elsewhere no row is read, the result is 0, no gradient flows.
        temperature: of both.
        logit_scale, softcap: the student's; see `LogitTransform`.
        ref_logit_scale, ref_softcap: the teacher's own.
        backend: None chooses; "reference" (eager, builds all the logits), "cpu", "triton", "cuda" force.
        memory_budget: bytes that both tiles may take together. None: 48 MiB on the CPU, 512 MiB on a GPU, but at least
            128 rows. A budget given is kept to the row.

    Returns:
        `(...)` in nats, fp32 (fp64 for an fp64 student). A token of probability 0 under one distribution adds nothing
        where it is averaged over that one, and makes a KL inf where it is averaged over the other.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, vocabularies of different size, a beta
            without "jsd"; the message names it.
        RuntimeError: the forced backend does not work on this machine; the message says why.
    """
    shape = hidden.shape[:-1]
    heads, settings = _prepare(
        hidden, weight, ref_hidden, ref_weight, bias, ref_bias, kind, beta, temperature, (logit_scale, ref_logit_scale),
        (softcap, ref_softcap), backend, memory_budget,
    )  # fmt: skip
    mask = validation.check_mask(mask, tuple(shape), hidden.device)
    mask = None if mask is None else mask.reshape(-1)
    if settings.backend == "reference":
        return _reference(heads, mask, settings).view(shape)
    return linear_divergence_op(*heads, mask, *settings).view(shape)


def linear_divergence_sum(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (..., D2)
    ref_weight: Tensor,  # (V, D2)
    token_weight: Tensor,  # (...)
    *,
    kind: str,
    beta: float | None = None,
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`(token_weight * linear_divergence(...)).sum()` and the divergence, in one pass: 8NDV FLOPs with all gradients.

    A chunk's gradients are made while its logits are there. A token of weight 0 is not read and costs nothing; its
    divergence is 0. The sum is differentiable in hidden, weight and bias, the divergence is not. All else is as in
    `linear_divergence`.

    Args:
        token_weight: `(...)` floating point, constant: the weight of each token in the sum.

    Returns:
        The sum, a scalar, and the divergence `(...)`, detached.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_divergence`.
    """
    shape = hidden.shape[:-1]
    heads, settings = _prepare(
        hidden, weight, ref_hidden, ref_weight, bias, ref_bias, kind, beta, temperature, (logit_scale, ref_logit_scale),
        (softcap, ref_softcap), backend, memory_budget,
    )  # fmt: skip
    validation.check_floating("token_weight", token_weight)
    validation.check_shape("token_weight", token_weight, tuple(shape), "one entry per token")
    validation.check_device("token_weight", token_weight, hidden.device)
    token_weight = token_weight.detach().reshape(-1)
    if settings.backend == "reference":
        divergence = _reference(heads, token_weight != 0, settings)
        return (token_weight.to(divergence.dtype) * divergence).sum(), divergence.detach().view(shape)
    wanted = torch.is_grad_enabled()
    needs = Needs(*(wanted and x is not None and x.requires_grad for x in heads[:3]))
    total, divergence, *_ = linear_divergence_sum_op(*heads, token_weight, *needs, *settings)
    ops.give_up_gradients(total)
    return total, divergence.view(shape)


def _reference(heads: Heads, mask: Tensor | None, settings: Settings) -> Tensor:
    transform, ref_transform = settings.transforms
    return reference.linear_divergence(
        *heads[:3], transform, *heads[3:], ref_transform, settings.kind, settings.beta, mask
    )

"""Distillation: a student learns the next-token distributions of a teacher, token by token.

Over the whole vocabulary on given logits or fused with both heads, or over the teacher's top-k log-probabilities.
On-policy distillation as a reward needs no loss of its own: score the student's samples under the teacher with
`linear_logprobs`, and pass `advantages = teacher_logps - logps` (the one-sample reverse KL, negated) to a policy loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels import linear_divergence_sum, linear_logprobs, linear_topk_divergence_sum, reference, validation
from fastrl_kernels.divergence import check_kind
from fastrl_kernels.topk import check_topk_kind

from .aggregation import aggregation_weights
from .sequences import sequences_of


class DistillationOutput(NamedTuple):
    """What a distillation loss returns."""

    loss: Tensor  # scalar, differentiable in the student
    divergence: Tensor  # (B, T) or (N,), detached, in nats; 0 outside the mask
    metrics: dict[str, Tensor]  # detached scalars, means over the tokens of the mask


def distillation_loss(
    logits: Tensor,  # (B, T, V)
    teacher_logits: Tensor,  # (B, T, V)
    *,
    kind: str = "jsd",
    beta: float | None = None,
    mask: Tensor | None = None,  # (B, T)
    temperature: float = 1.0,
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    ids: Tensor | None = None,  # (B, T)
    nll_coef: float = 0.0,
) -> DistillationOutput:
    """Divergence of a student's distributions from a teacher's, on logits that exist already.

    With p = softmax(logits / temperature), q that of the teacher, and m = (1 - beta) p + beta q, the loss of a token is

        forward_kl   KL(q || p): the student covers all that the teacher does (Hinton et al. 2015)
        reverse_kl   KL(p || q): it keeps to what the teacher finds likely (MiniLLM, Gu et al. 2024)
        jsd          beta KL(q || m) + (1 - beta) KL(p || m): between the two (GKD, Agarwal et al. 2024, eq. 1)

    without a factor temperature^2, as in TRL 1.16's `GKDTrainer.generalized_jsd_loss`, with which it agrees: its beta 0
    and 1 are forward_kl and reverse_kl; its batchmean is "token-mean" where it has labels and "seq-mean-token-sum"
    where not, its sum "token-sum", its num_items_in_batch the normalizer, its mean "token-mean" with a normalizer of
    tokens x V.

    Use it for small vocabularies and tests, `linear_distillation_loss` where the logits would not fit, a top-k form
    where the teacher is a service.

    Args:
        logits: the student's, `(B, T, V)`, or `(N, V)` with cu_seqlens; fp32, fp64, bf16 or fp16.
        teacher_logits: of the same shape, constant.
        kind: "forward_kl", "reverse_kl" or "jsd".
        beta: of "jsd" only, in [0, 1]; None: 0.5.
        mask: `(B, T)`, nonzero where the token counts; None: everywhere. Elsewhere nothing is read.
        temperature: of both distributions, above 0.
        aggregation, normalizer, length: see `aggregation_weights`.
        cu_seqlens: `(B + 1,)` offsets of packed sequences.
        ids: `(B, T)`, the tokens at these positions; needed with nll_coef.
        nll_coef: weight of each token's negative log-likelihood, at temperature 1, beside its divergence.

    Returns:
        DistillationOutput; metrics "divergence", and "nll" with nll_coef.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    validation.check_floating("logits", logits)
    validation.check_floating("teacher_logits", teacher_logits)
    validation.check_shape("teacher_logits", teacher_logits, tuple(logits.shape), "as logits")
    validation.check_device("teacher_logits", teacher_logits, logits.device)
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    kind, beta = check_kind(kind, beta)
    counts, weights = _weights(logits, mask, aggregation, normalizer, length, cu_seqlens)
    inside = counts.unsqueeze(-1)
    z = torch.where(inside, logits, 0.0).to(weights.dtype)
    log_p, log_q = (
        (x.to(weights.dtype) / temperature).log_softmax(-1)
        for x in (z, torch.where(inside, teacher_logits.detach(), 0.0))
    )
    divergence = reference.divergence(log_p, log_q, kind, beta)
    loss, nll = (weights * divergence).sum(), None
    if _wants_nll(ids, nll_coef, counts):
        taken = torch.where(counts, ids, 0).to(torch.int64).unsqueeze(-1)  # type: ignore[arg-type]
        nll = -z.log_softmax(-1).gather(-1, taken).squeeze(-1)
        loss = loss + nll_coef * (weights * nll).sum()
    return _output(loss, divergence, nll, counts)


def linear_distillation_loss(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (B, T, D2)
    teacher_weight: Tensor,  # (V, D2)
    *,
    kind: str = "jsd",
    beta: float | None = None,
    mask: Tensor | None = None,  # (B, T)
    temperature: float = 1.0,
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    ids: Tensor | None = None,  # (B, T)
    nll_coef: float = 0.0,
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> DistillationOutput:
    """`distillation_loss` straight from hidden states and both heads: neither model's logits ever exist.

    Equal to `distillation_loss(hidden @ weight.T, teacher_hidden @ teacher_weight.T)`. A chunk of rows at a time: its
    logits under both heads, its divergence, its gradients; 8NDV FLOPs for heads of one size, with all gradients, and
    nothing for tokens outside the mask. With nll_coef the student's logits are made once more, at temperature 1 (8NDV
    more). It holds one tile of logits of each head.

    Args:
        hidden, weight, bias: the student's hidden states `(B, T, D)`, or `(N, D)` with cu_seqlens, and its head.
        teacher_hidden, teacher_weight, teacher_bias: the teacher's, constant: of another hidden size D2 or dtype, over
            the same vocabulary.
        kind, beta, mask, temperature, aggregation, normalizer, length, cu_seqlens, ids, nll_coef: as
            `distillation_loss`.
        logit_scale, softcap, teacher_logit_scale, teacher_softcap: of each head; see `LogitTransform`.
        backend: None chooses; "reference" (builds all the logits), "cpu", "triton", "cuda" force.
        memory_budget: bytes that the two tiles may take; see `linear_divergence`.

    Returns:
        DistillationOutput; metrics "divergence", and "nll" with nll_coef.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
        RuntimeError: the forced backend does not work on this machine; the message says why.
    """
    validation.check_weight(weight, bias, hidden)
    counts, weights = _weights(hidden, mask, aggregation, normalizer, length, cu_seqlens)
    head = {"logit_scale": logit_scale, "softcap": softcap, "backend": backend, "memory_budget": memory_budget}
    loss, divergence = linear_divergence_sum(
        hidden, weight, teacher_hidden, teacher_weight, weights, kind=kind, beta=beta, bias=bias, ref_bias=teacher_bias,
        temperature=temperature, ref_logit_scale=teacher_logit_scale, ref_softcap=teacher_softcap,
        **head,  # type: ignore[arg-type]
    )  # fmt: skip
    nll = None
    if _wants_nll(ids, nll_coef, counts):
        nll = -linear_logprobs(hidden, weight, ids, bias=bias, mask=counts, **head).logps  # type: ignore[arg-type]
        loss = loss + nll_coef * (weights * nll).sum()
    return _output(loss, divergence, nll, counts)


def topk_distillation_loss(
    logps: Tensor,  # (B, T, K)
    teacher_logps: Tensor,  # (B, T, K)
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    tail: str = "drop",
    mask: Tensor | None = None,  # (B, T)
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> DistillationOutput:
    """Distillation from a teacher's K most likely tokens, as inference engines return them, on given log-probabilities.

    tail says what becomes of the probability outside the K tokens:

        drop          sum_k q_k (log q_k - log p_k), forward_kl only: verl 0.9's forward_kl_topk before its clamp at 0
                      (the K probabilities do not add up to one, so the loss can be negative)
        renormalize   the divergence of p and q given that one of the K tokens is taken: the student's mass outside them
                      is free
        bucket        one outcome more, "any other token", of probability 1 - sum_k q_k and 1 - sum_k p_k: the student
                      learns how much is outside, not where; exact for K = V

    Use it where the teacher's hidden states are out of reach, or are kept as its K best tokens on disk.

    Args:
        logps: the student's log-probabilities of the K tokens under its whole vocabulary, `(B, T, K)`, or `(N, K)` with
            cu_seqlens.
        teacher_logps: the teacher's, constant, at the temperature of the student's. -inf marks a token that is not
            given (fewer than K): it leaves both sums. With "renormalize" the teacher's logits serve as well.
        kind, beta: "forward_kl", "reverse_kl" or "jsd"; see `distillation_loss`.
        tail: "drop", "renormalize" or "bucket".
        mask, aggregation, normalizer, length, cu_seqlens: as `distillation_loss`.

    Returns:
        DistillationOutput; metrics "divergence", "student_mass" and "teacher_mass" (probability of the K tokens).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    validation.check_floating("logps", logps)
    validation.check_floating("teacher_logps", teacher_logps)
    validation.check_shape("teacher_logps", teacher_logps, tuple(logps.shape), "as logps")
    validation.check_device("teacher_logps", teacher_logps, logps.device)
    kind, beta = check_topk_kind(kind, beta, tail)
    counts, weights = _weights(logps, mask, aggregation, normalizer, length, cu_seqlens)
    inside = counts.unsqueeze(-1)
    student, teacher = (torch.where(inside, x, 0.0).to(weights.dtype) for x in (logps, teacher_logps.detach()))
    divergence = reference.topk_divergence(student, teacher, kind, beta, tail)
    return _topk_output((weights * divergence).sum(), divergence, student, teacher, counts)


def linear_topk_distillation_loss(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    topk_ids: Tensor,  # (B, T, K)
    topk_logprobs: Tensor,  # (B, T, K)
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    tail: str = "drop",
    mask: Tensor | None = None,  # (B, T)
    temperature: float = 1.0,
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> DistillationOutput:
    """`topk_distillation_loss` straight from the student's hidden states and head, without its logits.

    Equal to it on `linear_topk_logprobs(hidden, weight, topk_ids)`, in one pass: 6NDV FLOPs with all gradients, a
    chunk of rows at a time, and nothing for tokens outside the mask.

    Args:
        hidden, weight, bias, logit_scale, softcap: the student's, `(B, T, D)`, or `(N, D)` with cu_seqlens, and its
            head.
        topk_ids: `(B, T, K)` integers, the teacher's tokens at each position (aligned: nothing is shifted). Where fewer
            than K are given, any id with a log-probability of -inf.
        topk_logprobs: `(B, T, K)`, the teacher's log-probabilities of them at `temperature`.
        temperature: of the student's distribution.
        kind, beta, tail, mask, aggregation, normalizer, length, cu_seqlens: as `topk_distillation_loss`.
        backend, memory_budget: as `linear_logprobs`.

    Returns:
        DistillationOutput; metrics as `topk_distillation_loss`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
        RuntimeError: the forced backend does not work on this machine; the message says why.
    """
    validation.check_floating("topk_logprobs", topk_logprobs)
    validation.check_shape("topk_logprobs", topk_logprobs, tuple(topk_ids.shape), "as topk_ids")
    validation.check_weight(weight, bias, hidden)
    counts, weights = _weights(hidden, mask, aggregation, normalizer, length, cu_seqlens)
    loss, divergence, logps = linear_topk_divergence_sum(
        hidden, weight, topk_ids, topk_logprobs, weights, kind=kind, beta=beta, tail=tail, bias=bias,
        temperature=temperature, logit_scale=logit_scale, softcap=softcap, backend=backend, memory_budget=memory_budget,
    )  # fmt: skip
    return _topk_output(loss, divergence, logps, topk_logprobs.detach(), counts)


def _topk_output(
    loss: Tensor, divergence: Tensor, logps: Tensor, teacher_logps: Tensor, counts: Tensor
) -> DistillationOutput:
    out = _output(loss, divergence, None, counts)
    given = torch.where(teacher_logps > -torch.inf, logps.detach(), -torch.inf)
    for name, x in (("student_mass", given), ("teacher_mass", teacher_logps)):
        out.metrics[name] = _mean(x.exp().sum(-1), counts)
    return out


def _weights(
    rows: Tensor,  # (B, T, anything) or (N, anything)
    mask: Tensor | None,
    aggregation: str,
    normalizer: Tensor | float | None,
    length: float | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Which tokens count, bool, and the weight of each in the loss."""
    tokens = rows.detach()[..., 0]
    sequences = sequences_of(tokens, cu_seqlens, "tokens")
    counts = validation.check_mask(mask, tuple(tokens.shape), tokens.device)
    if counts is None:
        counts = torch.ones_like(tokens, dtype=torch.bool)
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    weights = aggregation_weights(aggregation, counts, sequences, normalizer=normalizer, length=length, dtype=dtype)
    return counts, weights


def _wants_nll(ids: Tensor | None, nll_coef: float, counts: Tensor) -> bool:
    if (ids is None) != (nll_coef == 0):
        raise ValueError(
            f"ids and nll_coef go together, got nll_coef {nll_coef} {'without' if ids is None else 'with'} ids"
        )
    if ids is not None:
        validation.check_ids(ids, tuple(counts.shape), counts.device)
    return ids is not None


def _mean(x: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, x, 0.0).sum() / counts.sum().clamp(min=1)


def _output(loss: Tensor, divergence: Tensor, nll: Tensor | None, counts: Tensor) -> DistillationOutput:
    divergence = torch.where(counts, divergence.detach(), 0.0)
    metrics = {"divergence": _mean(divergence, counts)}
    if nll is not None:
        metrics["nll"] = _mean(nll.detach(), counts)
    return DistillationOutput(loss, divergence, metrics)

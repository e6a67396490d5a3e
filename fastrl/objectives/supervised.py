"""Supervised fine-tuning: the negative log-likelihood of given tokens, on given logps or fused with the LM head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl_kernels import TokenBatch, backends, linear_logprobs, ops, register_objective, validation
from fastrl_kernels.functional import harmonize
from fastrl_kernels.head import LogitTransform, accumulation_dtype

from .aggregation import aggregate_loss, aggregation_weights
from .policy import LossOutput
from .sequences import sequences_of


def _dynamic(logps: Tensor) -> Tensor:
    """-p logp with p held constant; exactly 0, with no gradient, where p is."""
    p = logps.detach().exp()
    return -p * logps.masked_fill(p == 0, 0.0)


SFT_LOSSES: Mapping[str, Callable[[Tensor], Tensor]] = {"nll": torch.neg, "dft": _dynamic}


@dataclass(frozen=True)
class SupervisedObjective:
    """The token-local objective of a loss type."""

    loss_type: str

    def token_loss(self, tokens: TokenBatch) -> Tensor:
        return SFT_LOSSES[self.loss_type](tokens.logps)


_OBJECTIVES = [SupervisedObjective(name) for name in SFT_LOSSES]
_HANDLES = {objective.loss_type: register_objective(objective) for objective in _OBJECTIVES}


def sft_loss(
    logps: Tensor,  # (B, T)
    *,
    mask: Tensor,  # (B, T)
    loss_type: str = "nll",
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
    eps: float = 0.0,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> LossOutput:
    """The loss of demonstrations, of each token aggregated over the mask:

        nll    -logp             the negative log-likelihood
        dft    -sg(p) logp       dynamic fine-tuning (Wu et al. 2025, arXiv:2508.05629), TRL 1.16's `loss_type="dft"`

    "token-mean" is the cross entropy of TRL's SFTTrainer, of transformers' causal LMs and of OpenRLHF 0.11's GPTLMLoss,
    and its SFTLoss with token_level_loss; without that it is "seq-mean-token-mean" with eps 1e-8. On dp_size ranks
    OpenRLHF's loss is this one with normalizer = the whole batch's count / dp_size. Use it to train on given answers,
    or as the likelihood term beside a preference loss; dft, whose gradient does not grow where the model disagrees, to
    keep what the model knew before.

    Args:
        logps: `(B, T)`, or `(N,)` with cu_seqlens: log-probabilities of the tokens. One of -inf makes the nll inf, its
            gradient is that of any other token; in dft it has neither (TRL: NaN).
        mask: nonzero where the token counts (the answer). Values elsewhere are never used and may be NaN or inf.
        loss_type: "nll" or "dft".
        aggregation, normalizer, length, eps: see `aggregate_loss`. TRL's num_items_in_batch is a normalizer.
        cu_seqlens: `(B + 1,)` bounds of packed sequences.

    Returns:
        LossOutput: loss; logps, detached, 0 outside the mask; metrics: nll, the mean over this batch's tokens, in nats;
        num_tokens.

    Raises:
        ValueError, TypeError: an unknown loss_type, and as `aggregate_loss`.
    """
    _check_loss_type(loss_type)
    validation.check_floating("logps", logps)
    inside = validation.check_mask(mask, tuple(logps.shape), logps.device)
    assert inside is not None  # only None gives None
    logps = torch.where(inside, logps, 0.0)
    loss = aggregate_loss(
        SFT_LOSSES[loss_type](logps.to(accumulation_dtype(logps.dtype))), aggregation, mask=inside,
        cu_seqlens=cu_seqlens, normalizer=normalizer, length=length, eps=eps,
    )  # fmt: skip
    return _output(loss, logps.detach(), inside)


def linear_sft_loss(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (B, T)
    *,
    mask: Tensor,  # (B, T)
    loss_type: str = "nll",
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
    eps: float = 0.0,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
    capturable: bool = False,
    explain: bool = False,
) -> LossOutput:
    """The SFT loss straight from hidden states and the LM head, in a single pass: 6NDV FLOPs for N tokens of the mask.

    Eager equivalent: `sft_loss(linear_logprobs(hidden, weight, ids).logps, ...)`. Each chunk's logits become its
    gradient before the next chunk; tokens outside the mask cost nothing, are never read and get a gradient of exactly
    0. Without a gradient wanted only the 2NDV of the logits are spent.

    Args:
        hidden: `(B, T, D)`, or `(N, D)` with cu_seqlens: `hidden[..., t, :]` scores `ids[..., t]` (nothing is shifted).
        weight, ids, bias, temperature, logit_scale, softcap, tp_group, backend, memory_budget, capturable, explain:
            see `linear_logprobs`.
        entropy: a metric too, the mean over this batch's tokens, in nats; it has no part in the loss.
        The rest: see `sft_loss`.

    Returns:
        LossOutput as `sft_loss`, in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs` and `sft_loss`.
    """
    _check_loss_type(loss_type)
    name = backends.choose(backend, hidden.device)
    head = {"bias": bias, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    run = {"memory_budget": memory_budget, "capturable": capturable, "explain": explain}
    over = {"aggregation": aggregation, "normalizer": normalizer, "length": length, "eps": eps}
    if name == "reference":
        stats = linear_logprobs(
            hidden, weight, ids, mask=mask, entropy=entropy, tp_group=tp_group, backend=name,
            **head, **run,  # type: ignore[arg-type]
        )  # fmt: skip
        out = sft_loss(
            stats.logps, mask=mask, loss_type=loss_type, cu_seqlens=cu_seqlens, **over  # type: ignore[arg-type]
        )  # fmt: skip
        return out if stats.entropy is None else _with_entropy(out, stats.entropy)
    validation.check_weight(weight, bias, hidden)
    validation.check_ids(ids, tuple(hidden.shape[:-1]), hidden.device)
    validation.check_run(memory_budget, 0.0, capturable)
    inside = validation.check_mask(mask, tuple(ids.shape), hidden.device)
    assert inside is not None  # only None gives None
    sequences = sequences_of(ids, cu_seqlens, "ids")
    hidden, weight, bias = harmonize(hidden, weight, bias)
    weights = aggregation_weights(
        mask=inside, sequences=sequences, dtype=accumulation_dtype(weight.dtype), **over  # type: ignore[arg-type]
    ).reshape(-1)  # fmt: skip
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    transform = LogitTransform(float(temperature), float(logit_scale), None if softcap is None else float(softcap))
    states, rows = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1).to(torch.int64)
    loss, logps, entropies, *_ = ops.linear_policy_loss(
        states, weight, bias, rows, inside.reshape(-1), None, weights, None, weights, None, None, None,
        _HANDLES[loss_type], entropy,
        *needs, 0.0, transform.temperature, transform.logit_scale, transform.softcap, name,
        "" if tp_group is None else tp_group.group_name, *run.values(),
    )  # fmt: skip
    ops.give_up_gradients(loss)
    out = _output(loss, logps.view(ids.shape).detach(), inside)
    return _with_entropy(out, entropies) if entropy else out


def _check_loss_type(loss_type: str) -> None:
    if loss_type not in SFT_LOSSES:
        raise ValueError(f"loss_type: expected one of {', '.join(SFT_LOSSES)}, got {loss_type!r}")


def _output(loss: Tensor, logps: Tensor, inside: Tensor) -> LossOutput:
    count = inside.sum()
    return LossOutput(loss, logps, {"nll": -logps.sum() / count.clamp(min=1), "num_tokens": count})


def _with_entropy(out: LossOutput, entropies: Tensor) -> LossOutput:
    mean = entropies.detach().sum() / out.metrics["num_tokens"].clamp(min=1)
    return out._replace(metrics={**out.metrics, "entropy": mean})

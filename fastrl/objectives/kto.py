"""Kahneman-Tversky optimisation: answers that are each desirable or undesirable, not in pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl_kernels import linear_logprobs, validation

from .pairs import summarize, token_counts
from .preference import PreferenceOutput, answer_tokens

KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")


@dataclass(frozen=True, kw_only=True)
class KTOObjective:
    """KTO and unpaired APO. Names and semantics are TRL 1.16's `KTOConfig`.

    With l = log pi(y|x) - log pi_ref(y|x), summed over the answer's tokens, and kl = max(0, `kto_kl`), constant:

        kto                desirable 1 - sigmoid(beta (l - kl)), undesirable 1 - sigmoid(beta (kl - l))
        apo_zero_unpaired  desirable 1 - sigmoid(beta l), undesirable sigmoid(beta l)

    times the weight of the class; the loss is the mean over all answers. KTO: Ethayarajh et al. 2024, eq. 7 and 8; APO:
    D'Oosterlinck et al. 2024, eq. 7.

    Use it where there is one judgement per answer (a thumb up or down), or where one class is rare: the paper sets
    the weights so that desirable_weight x desirable answers : undesirable_weight x undesirable ones is 1:1 to 4:3.

    Args:
        loss_type: "kto" or "apo_zero_unpaired".
        beta: above 0.
        desirable_weight, undesirable_weight: at least 0.

    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        def require(name: str, valid: bool, expected: str) -> None:
            if not valid:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        require("loss_type", self.loss_type in KTO_LOSS_TYPES, f"one of {', '.join(KTO_LOSS_TYPES)}")
        require("beta", self.beta > 0 and math.isfinite(self.beta), "a number above 0")
        require("desirable_weight", self.desirable_weight >= 0, "a number of at least 0")
        require("undesirable_weight", self.undesirable_weight >= 0, "a number of at least 0")

    @property
    def needs_kl(self) -> bool:
        return self.loss_type == "kto"

    def losses(self, logratios: Tensor, desirable: Tensor, kl: Tensor) -> Tensor:
        """`(B,)`: the loss of each answer."""
        gain = self.beta * (logratios - kl)
        losses = torch.sigmoid(torch.where(desirable, -gain, gain))
        return torch.where(desirable, self.desirable_weight * losses, self.undesirable_weight * losses)


@torch.no_grad()
def kto_kl(
    logps: Tensor,  # (B, T)
    ref_logps: Tensor,  # (B, T) or (B,)
    *,
    mask: Tensor,  # (B, T)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> Tensor:
    """KTO's estimate of KL(policy || reference) in nats: the mean log-ratio of prompts with answers of other prompts.

    The mean is over the answers that have a token. It is not clamped: `kto_loss` does that, after the estimates of
    micro-batches or ranks have been averaged, as TRL does.

    Args:
        logps, ref_logps: of the mismatched answers' tokens, `(B, T)`, or `(N,)` with cu_seqlens; ref_logps may be
            `(B,)`, summed before.
        mask: nonzero where a token belongs to the answer; nothing is read elsewhere.
        cu_seqlens: `(B + 1,)` integers, the offsets of packed answers.

    Returns:
        A scalar.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device.
    """
    tokens = answer_tokens(logps, mask, cu_seqlens, ref_logps)
    answers = summarize(tokens, token_counts(tokens))
    present = answers.counts > 0
    return torch.where(present, answers.logratios, 0.0).sum() / present.sum().clamp(min=1)


def kto_loss(
    logps: Tensor,  # (B, T)
    objective: KTOObjective,
    *,
    labels: Tensor,  # (B,)
    mask: Tensor,  # (B, T)
    ref_logps: Tensor,  # (B, T) or (B,)
    kl: Tensor | float | None = None,
    entropy: Tensor | None = None,  # (B, T)
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> PreferenceOutput:
    """KTO's loss on given log-probabilities (formula, paper and use: `KTOObjective`); differentiable in logps.

    An answer without a token is none: it has no loss and is not counted. A log-probability of -inf gives its own
    answer the loss's limit (0 or the class's weight) and no gradient; NaN is not skipped, as it is in TRL.

    Args:
        logps: of the answers' tokens under the policy, `(B, T)`, or `(N,)` with cu_seqlens.
        objective: what to compute.
        labels: `(B,)`, nonzero for desirable answers.
        mask: nonzero where a token belongs to the answer. Values elsewhere are never used and may be NaN or inf.
        ref_logps: under the reference, per token; or `(B,)`, summed before.
        kl: of the whole batch, from `kto_kl`, constant; negative counts as 0. Needed by "kto", refused by
            "apo_zero_unpaired".
        entropy: nats per token, for the metric only.
        normalizer: answers of the whole batch: with it, and with the same kl, the losses of micro-batches add up to the
            whole batch's loss. None: this batch's own.
        cu_seqlens: `(B + 1,)` integers, the offsets of packed answers.

    Returns:
        PreferenceOutput in fp32 (fp64 for fp64 logps). Metrics: kl; means per class (NaN where it does not occur; TRL
        leaves the key out): rewards/chosen, rewards/rejected (desirable, undesirable), logps/chosen, logps/rejected;
        rewards/margins, their difference; entropy (where given, token mean).

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, kl missing or of no use.
    """
    tokens = answer_tokens(logps, mask, cu_seqlens, ref_logps, entropy=entropy)
    answers = summarize(tokens, token_counts(tokens))
    validation.check_shape("labels", labels, tuple(answers.counts.shape), "one per answer")
    validation.check_device("labels", labels, logps.device)
    if (kl is None) == objective.needs_kl:
        expected = "the batch's KL, see kto_kl" if objective.needs_kl else "None, it has no use for it"
        raise ValueError(f"kl: {objective.loss_type} expects {expected}, got {kl!r}")
    if normalizer is not None and not isinstance(normalizer, Tensor) and not normalizer > 0:
        raise ValueError(f"normalizer: expected None or a number above 0, got {normalizer!r}")
    anchor = torch.as_tensor(0.0 if kl is None else kl, dtype=answers.logps.dtype, device=logps.device).detach()
    if anchor.numel() != 1:
        raise ValueError(f"kl: expected one number for the whole batch, got shape {tuple(anchor.shape)}")
    anchor = anchor.reshape(()).clamp(min=0)

    present, desirable = answers.counts > 0, labels != 0
    losses = objective.losses(answers.logratios, desirable, anchor)
    loss = torch.where(present, losses, 0.0).sum() / (present.sum().clamp(min=1) if normalizer is None else normalizer)

    logps, rewards = answers.logps.detach(), objective.beta * answers.logratios.detach()
    metrics = {"kl": anchor}
    for name, members in (("chosen", present & desirable), ("rejected", present & ~desirable)):
        for what, x in (("rewards", rewards), ("logps", logps)):
            metrics[f"{what}/{name}"] = torch.where(members, x, 0.0).sum() / members.sum()
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if answers.entropy is not None:
        metrics["entropy"] = answers.entropy.sum() / answers.counts.sum().clamp(min=1)
    return PreferenceOutput(loss, logps, rewards, metrics)


def linear_kto_loss(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (B, T)
    objective: KTOObjective,
    *,
    labels: Tensor,  # (B,)
    mask: Tensor,  # (B, T)
    ref_logps: Tensor,  # (B, T) or (B,)
    kl: Tensor | float | None = None,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    entropy: bool = False,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
    grad_tolerance: float = 0.0,
    capturable: bool = False,
    explain: bool = False,
) -> PreferenceOutput:
    """KTO's loss straight from hidden states and the LM head; the logits are never built.

    Eager equivalent: `kto_loss(linear_logprobs(hidden, weight, ids, mask=mask).logps, objective, ...)`, which is also
    how it is computed: two passes, (2 + 6l)NDV FLOPs, l being the share of tokens whose coefficient is not exactly 0.

    Args:
        hidden: `(B, T, D)`, or packed `(N, D)` with cu_seqlens: `hidden[b, t]` scores `ids[b, t]`.
        entropy: also give the entropy metric.
        weight, bias, temperature, logit_scale, softcap, tp_group, backend, memory_budget, grad_tolerance, capturable,
            explain: see `linear_logprobs`.
        The rest: see `kto_loss`.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs` and `kto_loss`.
    """
    if hidden.ndim != (3 if cu_seqlens is None else 2):
        expected = "(B, T, D)" if cu_seqlens is None else "(N, D) with cu_seqlens"
        raise ValueError(f"hidden: expected shape {expected}, got {tuple(hidden.shape)}")
    validation.check_ids(ids, tuple(hidden.shape[:-1]), hidden.device)
    stats = linear_logprobs(
        hidden, weight, ids, mask=mask, entropy=entropy, bias=bias, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, tp_group=tp_group, backend=backend, memory_budget=memory_budget,
        grad_tolerance=grad_tolerance, capturable=capturable, explain=explain,
    )  # fmt: skip
    return kto_loss(
        stats.logps, objective, labels=labels, mask=mask, ref_logps=ref_logps, kl=kl, entropy=stats.entropy,
        normalizer=normalizer, cu_seqlens=cu_seqlens,
    )  # fmt: skip

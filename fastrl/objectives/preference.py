"""The two forms of every preference loss on pairs: on given log-probabilities, and fused with the LM head."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl_kernels import linear_logprobs, validation
from fastrl_kernels.head import accumulation_dtype

from .dpo import PreferenceObjective
from .masking import as_numbers, known_finite
from .pairs import Answers, AnswerTokens, PairObjective, split, summarize, token_counts
from .sequences import sequences_of

__all__ = ["PreferenceObjective", "PreferenceOutput", "linear_preference_loss", "preference_loss"]


class PreferenceOutput(NamedTuple):
    """What a preference loss returns. All but the loss is detached."""

    loss: Tensor  # scalar, differentiable
    logps: Tensor  # (2B,) per answer, chosen ones first (KTO: (B,)), summed or averaged as the objective does
    rewards: Tensor  # the same shape: implicit rewards
    metrics: dict[str, Tensor]  # scalars, TRL's names


def preference_loss(
    chosen_logps: Tensor,  # (B, T)
    rejected_logps: Tensor,  # (B, T')
    objective: PairObjective,
    *,
    chosen_mask: Tensor,  # (B, T)
    rejected_mask: Tensor,  # (B, T')
    ref_chosen_logps: Tensor | None = None,  # (B, T) or (B,)
    ref_rejected_logps: Tensor | None = None,  # (B, T') or (B,)
    nll_logps: Tensor | None = None,  # any shape
    nll_mask: Tensor | None = None,  # as nll_logps, or as chosen_logps
    chosen_log_sum_sq_probs: Tensor | None = None,  # (B, T)
    rejected_log_sum_sq_probs: Tensor | None = None,  # (B, T')
    chosen_entropy: Tensor | None = None,  # (B, T)
    rejected_entropy: Tensor | None = None,  # (B, T')
    reward_shift: Tensor | float | None = None,
    normalizer: Tensor | float | None = None,
    nll_normalizer: Tensor | float | None = None,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,  # (B + 1,) each
) -> PreferenceOutput:
    """A preference loss on given log-probabilities of B pairs; differentiable in all three logps.

        loss = sum over pairs of the pair's loss / pairs + nll_weight * NLL

    The pair's loss and the weight of the NLL (a token mean) are the objective's: `PreferenceObjective` (DPO and its
    kin), `CPOObjective` (CPO, SimPO, AlphaPO), `ORPOObjective`, `TPOObjective`, or any `PairObjective` of one's own. A
    pair of which neither answer has a token is no pair: it has no loss and is not counted.

    A log-probability of -inf gives its own pair an infinite loss or the loss's limit (NaN where two infinities meet),
    which the batch's loss shows; the gradients of other pairs do not change (aot: nor do their ranks).

    Args:
        chosen_logps, rejected_logps: of the answers' tokens under the policy; packed `(N,)`, `(N',)` with cu_seqlens.
        objective: what to compute.
        chosen_mask, rejected_mask: nonzero where a token belongs to the answer. Values elsewhere are never used and may
            be NaN or inf.
        ref_chosen_logps, ref_rejected_logps: under the reference, per token; or `(B,)`, summed before (under ld_alpha
            with its weights). Needed by PreferenceObjective unless reference_free; the others refuse them.
        nll_logps: tokens of the NLL term. Default: chosen_logps. TPO needs them: those of the gold answers.
        nll_mask: which of them count. Default: chosen_mask (ORPO as in TRL: the prompt's tokens too).
        chosen_log_sum_sq_probs, rejected_log_sum_sq_probs: log of the sum of the squared probabilities of all
            vocabulary entries at each token, for use_weighting.
        chosen_entropy, rejected_entropy: nats per token, for the metric only.
        reward_shift: the moving mean of the rewards that bco_pair subtracts (`RunningMean`); None: 0, as in TRL.
        normalizer: pairs of the whole batch, so that the losses of micro-batches add up to the whole batch's loss; with
            an NLL term also nll_normalizer, the whole batch's NLL tokens. None: this batch's own. aot and aot_unpaired
            rank the pairs of the batch: they refuse it, a split would be another loss.
        cu_seqlens: offsets of the packed chosen and of the packed rejected answers.

    Returns:
        PreferenceOutput in fp32 (fp64 for fp64 logps). Metrics, means over pairs: rewards/chosen, rewards/rejected,
        rewards/accuracies (share of chosen above rejected), rewards/margins, logps/chosen, logps/rejected; nll_loss
        (where it is part of the loss), entropy (where given, token mean of the pairs); PreferenceObjective with a
        reference: rewards/displaced, the share of pairs of positive margin whose chosen answer is less likely than
        under the reference; ORPO: log_odds_ratio, log_odds_chosen.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, an input missing or of no use to the objective.
    """
    offsets = (None, None) if cu_seqlens is None else cu_seqlens
    if len(offsets) != 2:
        raise ValueError(f"cu_seqlens: expected a pair, of the chosen and of the rejected, got {len(offsets)}")
    sides = [
        answer_tokens(
            chosen_logps, chosen_mask, offsets[0], ref_chosen_logps, chosen_log_sum_sq_probs, chosen_entropy, "chosen_"
        ),
        answer_tokens(
            rejected_logps, rejected_mask, offsets[1], ref_rejected_logps, rejected_log_sum_sq_probs, rejected_entropy,
            "rejected_",
        ),
    ]  # fmt: skip
    if sides[0].sequences.count != sides[1].sequences.count:
        raise ValueError(
            f"rejected_logps: expected {sides[0].sequences.count} answers, as chosen_logps, "
            f"got {sides[1].sequences.count}"
        )
    for name, first, second in (
        ("ref_rejected_logps", ref_chosen_logps, ref_rejected_logps),
        ("rejected_entropy", chosen_entropy, rejected_entropy),
        ("rejected_log_sum_sq_probs", chosen_log_sum_sq_probs, rejected_log_sum_sq_probs),
    ):
        if (first is None) != (second is None):
            raise ValueError(f"{name}: expected together with {name.replace('rejected', 'chosen')}, or neither")
    _check_given("ref_chosen_logps", ref_chosen_logps, objective.needs_reference, not objective.refuses_reference)
    weighs = objective.weighs_pairs
    _check_given("chosen_log_sum_sq_probs", chosen_log_sum_sq_probs, weighs, weighs)
    _check_given("nll_logps", nll_logps, objective.nll_on_gold, objective.nll_weight != 0)
    _check_given("nll_mask", nll_mask, nll_logps is not None, objective.nll_weight != 0)

    finite = all(side.finite for side in sides)  # an infinite answer has a gradient in the other
    sides = [side._replace(finite=finite) for side in sides]
    counts = [token_counts(side) for side in sides]
    shared = None if objective.tail_weight is None else torch.minimum(*counts)
    chosen, rejected = (_answers(objective, *side, shared) for side in zip(sides, counts, strict=True))
    nll: Answers | AnswerTokens = chosen
    if nll_logps is not None and nll_mask is not None:
        nll = answer_tokens(nll_logps.reshape(1, -1), nll_mask.reshape(1, -1), side="nll_")
    elif nll_mask is not None:
        nll = answer_tokens(chosen_logps, nll_mask, offsets[0], side="nll_")
    return _loss(objective, chosen, rejected, nll, reward_shift, normalizer, nll_normalizer)


def linear_preference_loss(
    hidden: Tensor,  # (2B, T, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (2B, T)
    objective: PairObjective,
    *,
    mask: Tensor,  # (2B, T)
    ref_logps: Tensor | None = None,  # (2B, T) or (2B,)
    nll_mask: Tensor | None = None,  # (2B, T)
    reward_shift: Tensor | float | None = None,
    normalizer: Tensor | float | None = None,
    nll_normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
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
    """A preference loss straight from hidden states and the LM head; the logits are never built.

    Eager equivalent: `preference_loss(*linear_logprobs(hidden, weight, ids, mask=mask).logps.chunk(2), ...)`, which is
    also how it is computed: a pair's coefficient needs all of its tokens, so two passes, (2 + 6l)NDV FLOPs, l being the
    share of tokens whose coefficient is not exactly 0 (hinge drops satisfied pairs). use_weighting scores the logits
    once more, at half the temperature: log sum_v p_v^2 = lse(2z) - 2 lse(z), 2NDV.

    Args:
        hidden: `(2B, T, D)`: B chosen answers, then the B rejected ones, as TRL concatenates them (TPO with its NLL:
            `(3B, T, D)`, then B gold ones); or packed `(N, D)` with cu_seqlens. `hidden[b, t]` scores `ids[b, t]`.
        ids, mask, ref_logps, nll_mask: in that order, `(2B, T)`, or `(N,)` packed. ref_logps also `(2B,)`, summed.
        nll_mask: tokens of the NLL term, read in the chosen answers only (ORPO as in TRL: prompt and answer). Default:
            mask.
        cu_seqlens: `(2B + 1,)` (TPO: `(3B + 1,)`) integers, the offsets of all answers.
        entropy: also give the entropy metric.
        weight, bias, temperature, logit_scale, softcap, tp_group, backend, memory_budget, grad_tolerance, capturable,
            explain: see `linear_logprobs`.
        The rest: see `preference_loss`.

    Returns:
        PreferenceOutput, see `preference_loss`.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs` and `preference_loss`.
    """
    if hidden.ndim != (3 if cu_seqlens is None else 2):
        expected = "(2B, T, D)" if cu_seqlens is None else "(N, D) with cu_seqlens"
        raise ValueError(f"hidden: expected shape {expected}, got {tuple(hidden.shape)}")
    validation.check_ids(ids, tuple(hidden.shape[:-1]), hidden.device)
    parts, kinds = (3, "chosen, rejected and gold") if objective.nll_on_gold else (2, "chosen and rejected")
    sequences = sequences_of(ids, cu_seqlens, "ids")
    if sequences.count % parts != 0:
        name = "hidden" if cu_seqlens is None else "cu_seqlens"
        raise ValueError(f"{name}: expected {parts}B answers, {kinds}, got {sequences.count}")
    _check_given("ref_logps", ref_logps, objective.needs_reference, not objective.refuses_reference)
    _check_given("nll_mask", nll_mask, False, objective.nll_weight != 0 and not objective.nll_on_gold)

    mask = _checked_mask("mask", mask, ids)
    pairs = sequences.count // parts
    scored, nll_tokens = mask, None
    if nll_mask is not None:
        chosen = sequences.spread(torch.arange(sequences.count, device=ids.device) < pairs)
        nll_tokens = chosen & _checked_mask("nll_mask", nll_mask, ids)
        scored = mask | nll_tokens
    head = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap, "tp_group": tp_group, "backend": backend}
    run = {"memory_budget": memory_budget, "capturable": capturable, "explain": explain}
    stats = linear_logprobs(
        hidden, weight, ids, mask=scored, entropy=entropy, temperature=temperature, grad_tolerance=grad_tolerance,
        **head, **run,  # type: ignore[arg-type]
    )  # fmt: skip
    log_sum_sq_probs = None
    if objective.weighs_pairs:
        with torch.no_grad():
            doubled = linear_logprobs(
                hidden, weight, ids, mask=mask, temperature=temperature / 2, **head, **run  # type: ignore[arg-type]
            )  # fmt: skip
            log_sum_sq_probs = doubled.lse - 2 * stats.lse
    tokens = answer_tokens(stats.logps, mask, cu_seqlens, ref_logps, log_sum_sq_probs, stats.entropy)
    count = token_counts(tokens)
    shared = None
    if objective.tail_weight is not None:
        shared = torch.minimum(count[:pairs], count[pairs : 2 * pairs]).repeat(parts)
    answers = split(_answers(objective, tokens, count, shared), parts)
    nll: Answers | AnswerTokens = answers[2 if objective.nll_on_gold else 0]
    if nll_tokens is not None:
        nll = answer_tokens(stats.logps, nll_tokens, cu_seqlens)
    return _loss(objective, answers[0], answers[1], nll, reward_shift, normalizer, nll_normalizer)


def _answers(objective: PairObjective, tokens: AnswerTokens, count: Tensor, shared: Tensor | None) -> Answers:
    average, tail_weight = objective.average_log_prob, objective.tail_weight
    return summarize(tokens, count, average=average, shared=shared, tail_weight=tail_weight)


def _loss(
    objective: PairObjective,
    chosen: Answers,
    rejected: Answers,
    nll: Answers | AnswerTokens,
    reward_shift: Tensor | float | None,
    normalizer: Tensor | float | None,
    nll_normalizer: Tensor | float | None,
) -> PreferenceOutput:
    _check_given("reward_shift", reward_shift, False, objective.takes_reward_shift)
    _check_normalizers(objective, normalizer, nll_normalizer)
    losses = objective.pair_losses(chosen, rejected, 0.0 if reward_shift is None else reward_shift)
    if chosen.closeness is not None and rejected.closeness is not None:
        losses = losses * torch.exp(chosen.closeness + rejected.closeness)
    present = (chosen.counts + rejected.counts) > 0
    pairs = present.sum().clamp(min=1)
    loss = torch.where(present, losses, 0.0).sum() / (pairs if normalizer is None else normalizer)
    with torch.no_grad():
        rewards = objective.rewards(chosen), objective.rewards(rejected)
        metrics = _metrics(objective, chosen, rejected, *rewards, present, pairs)
        logps = torch.cat([chosen.logps, rejected.logps])
    if objective.nll_weight != 0:
        nll_loss = _nll(nll, nll_normalizer)
        loss = torch.add(loss, nll_loss, alpha=objective.nll_weight)
        metrics["nll_loss"] = nll_loss.detach()
    return PreferenceOutput(loss, logps, torch.cat(rewards), metrics)


def _nll(of: Answers | AnswerTokens, normalizer: Tensor | float | None) -> Tensor:
    """The token-mean negative log-likelihood."""
    sums, counts = (of.sums, of.counts) if isinstance(of, Answers) else (of.total, of.members)
    return sums.sum() / -(counts.sum().clamp(min=1) if normalizer is None else normalizer)


def _metrics(
    objective: PairObjective,
    chosen: Answers,
    rejected: Answers,
    upper: Tensor,  # (B,) rewards
    lower: Tensor,  # (B,)
    present: Tensor,  # (B,) bool
    pairs: Tensor,
) -> dict[str, Tensor]:
    per_pair = {
        "rewards/chosen": upper,
        "rewards/rejected": lower,
        "rewards/accuracies": (upper > lower).to(upper.dtype),
        "rewards/margins": upper - lower,
        "logps/chosen": chosen.logps,
        "logps/rejected": rejected.logps,
        **objective.extra_metrics(chosen, rejected),
    }
    means = torch.where(present, torch.stack(list(per_pair.values())), 0.0).sum(-1) / pairs
    metrics = dict(zip(per_pair, means.unbind(), strict=True))
    if chosen.entropy is not None and rejected.entropy is not None:
        tokens = (chosen.counts.sum() + rejected.counts.sum()).clamp(min=1)
        metrics["entropy"] = (chosen.entropy.sum() + rejected.entropy.sum()) / tokens
    return metrics


# Checks -------------------------------------------------------------------------------------------------------------


def answer_tokens(
    logps: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    ref_logps: Tensor | None = None,
    log_sum_sq_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    side: str = "",
) -> AnswerTokens:
    """Tokens of some answers, checked and in the dtype they are summed in; side: what errors put before the names."""
    name = f"{side}logps"
    validation.check_floating(name, logps)
    sequences = sequences_of(logps, cu_seqlens, name)
    dtype = accumulation_dtype(logps.dtype)

    def constant(what: str, x: Tensor | None, summed: bool = False) -> Tensor | None:
        if x is None:
            return None
        if not (summed and tuple(x.shape) == (sequences.count,)):
            validation.check_shape(what, x, tuple(logps.shape), f"one per token, as {name}")
        validation.check_device(what, x, logps.device)
        return x.detach().to(dtype)

    ref_logps = constant(f"ref_{name}", ref_logps, summed=True)
    inside = _checked_mask(f"{side}mask", mask, logps)
    return AnswerTokens(
        logps.to(dtype),
        inside,
        as_numbers(inside, dtype),
        sequences,
        ref_logps,
        constant(f"{side}log_sum_sq_probs", log_sum_sq_probs),
        constant(f"{side}entropy", entropy),
        known_finite(logps) and (ref_logps is None or known_finite(ref_logps)),
    )


def _checked_mask(name: str, mask: Tensor, like: Tensor) -> Tensor:
    validation.check_shape(name, mask, tuple(like.shape), "one entry per token")
    validation.check_device(name, mask, like.device)
    return mask.bool()


def _check_given(name: str, x: object, needed: bool, allowed: bool) -> None:
    if x is None and needed:
        raise ValueError(f"{name}: needed by the objective, got None")
    if x is not None and not allowed:
        raise ValueError(f"{name}: the objective has no use for it, expected None")


def _check_normalizers(
    objective: PairObjective, normalizer: Tensor | float | None, nll_normalizer: Tensor | float | None
) -> None:
    for name, x in (("normalizer", normalizer), ("nll_normalizer", nll_normalizer)):
        if x is not None and not isinstance(x, Tensor) and not x > 0:
            raise ValueError(f"{name}: expected None or a number above 0, got {x!r}")
    if normalizer is not None and objective.sorts_batch:
        raise ValueError("normalizer: the objective ranks the pairs of a batch, a part of one has another loss")
    if nll_normalizer is not None and objective.nll_weight == 0:
        raise ValueError("nll_normalizer: the objective has no NLL term, expected None")
    if (normalizer is None) != (nll_normalizer is None) and objective.nll_weight != 0:
        raise ValueError("nll_normalizer: expected together with normalizer: pairs and NLL tokens of the whole batch")

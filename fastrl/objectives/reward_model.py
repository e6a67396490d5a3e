"""Losses of reward models: pairs and rankings of answers, outcome labels on tokens, step labels at step ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl_kernels import validation
from fastrl_kernels.head import LogitTransform, accumulation_dtype
from fastrl_kernels.reference import transform_logits

from .aggregation import aggregation_weights
from .score_head import last_rows, row_scores
from .sequences import sequences_of

PAIR_KINDS = ("sigmoid", "log_exp")
RANKING_KINDS = ("pairwise", "plackett_luce")
IGNORE = -100  # a label that says that the token has none


class RewardOutput(NamedTuple):
    """What the loss of a reward model returns."""

    loss: Tensor  # scalar, differentiable
    scores: Tensor  # detached, what the loss compared: see each function
    metrics: dict[str, Tensor]  # detached scalars


# Pairs of answers ---------------------------------------------------------------------------------------------------


def reward_model_loss(
    chosen_scores: Tensor,  # (B,)
    rejected_scores: Tensor,  # (B,)
    *,
    margin: Tensor | None = None,  # (B,)
    center_rewards_coefficient: float | None = None,
    kind: str = "sigmoid",
    mask: Tensor | None = None,  # (B,)
    normalizer: Tensor | float | None = None,
) -> RewardOutput:
    """The Bradley-Terry loss of a reward model on pairs, the mean over pairs of

        -log sigmoid(r_w - r_l - margin) + center_rewards_coefficient * (r_w + r_l)^2

    The model of preferences is Bradley and Terry's (1952), the loss Ouyang et al. 2022, eq. 1 for two answers. The
    margin, larger where the annotators were surer, is Llama 2's (Touvron et al. 2023, eq. 2). Centering (Eisenstein et
    al. 2023) fixes the constant that Bradley-Terry leaves free, so that scores of different prompts can be compared; it
    is the square of the pair's sum. Semantics and metrics of TRL 1.16's RewardTrainer; OpenRLHF 0.11's PairWiseLoss is
    the same. Use it to train a reward model on preference pairs; for more answers per prompt see `ranking_loss`.

    Args:
        chosen_scores, rejected_scores: `(B,)`, fp32, fp64, bf16 or fp16. A score may be infinite: a pair that is
            infinitely right costs 0, one that is infinitely wrong inf, one with the same infinity twice NaN.
        margin: `(B,)`, in units of the scores; TRL's `margin` column.
        center_rewards_coefficient: weight of the centering term, TRL recommends 0.01; None: none.
        kind: "sigmoid", or "log_exp", OpenRLHF's LogExpLoss `log(1 + exp(r_l - r_w))`: the same function of the scores,
            which there takes a margin and ignores it. Here a margin with it is an error.
        mask: `(B,)`, nonzero where the pair counts; scores elsewhere are never used and may be NaN.
        normalizer: pairs that the mean is over. The losses of micro-batches that share the whole batch's normalizer add
            up to the whole batch's loss. None: this batch's own.

    Returns:
        RewardOutput in fp32 (fp64 for fp64). scores: `(2B,)`, chosen then rejected, 0 outside the mask. Metrics:
        accuracy, the share of pairs with `r_w > r_l`; margin, the mean of `r_w - r_l` (neither uses the margin given);
        min_reward, mean_reward, max_reward over all scores. NaN where no pair counts.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, an unknown kind, or a margin with "log_exp".
    """
    _check_kind(kind, PAIR_KINDS)
    if kind == "log_exp" and margin is not None:
        raise ValueError("margin: OpenRLHF's LogExpLoss ignores it, so kind 'log_exp' takes none; use kind 'sigmoid'")
    if chosen_scores.ndim != 1:
        raise ValueError(f"chosen_scores: expected shape (B,), got {tuple(chosen_scores.shape)}")
    given = {"chosen_scores": chosen_scores, "rejected_scores": rejected_scores}
    pairs = None if mask is None else _present(mask, chosen_scores, "one per pair")
    for name, x in (given if margin is None else given | {"margin": margin}).items():
        _check_like(name, x, chosen_scores, "one per pair, as chosen_scores")
        validation.check_floating(name, x)
    dtype = accumulation_dtype(torch.promote_types(chosen_scores.dtype, rejected_scores.dtype))

    def counted(x: Tensor) -> Tensor:
        return x.to(dtype) if pairs is None else torch.where(pairs, x.to(dtype), 0.0)

    chosen, rejected = counted(chosen_scores), counted(rejected_scores)
    gap = chosen - rejected
    terms = -F.logsigmoid(gap if margin is None else gap - counted(margin))
    if center_rewards_coefficient is not None:
        terms = terms + center_rewards_coefficient * (chosen + rejected).square()
    loss = _mean(terms, pairs, normalizer)
    scores = torch.cat([chosen, rejected]).detach()
    gap, count = gap.detach(), gap.numel() if pairs is None else pairs.sum()
    metrics = {"accuracy": (gap > 0).sum().to(dtype) / count, "margin": gap.sum() / count}
    return RewardOutput(loss, scores, metrics | _reward_metrics(scores, None if pairs is None else pairs.repeat(2)))


def linear_reward_model_loss(
    hidden: Tensor,  # (2B, T, D), (N, D) with cu_seqlens, or (2B, D)
    weight: Tensor,  # (1, D)
    *,
    bias: Tensor | None = None,  # (1,)
    mask: Tensor | None = None,  # (2B, T) or (N,)
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    margin: Tensor | None = None,  # (B,)
    center_rewards_coefficient: float | None = None,
    kind: str = "sigmoid",
    normalizer: Tensor | float | None = None,
) -> RewardOutput:
    """The Bradley-Terry loss straight from hidden states and the reward head.

    Eager equivalent: the scores `hidden @ weight.T + bias` at the last token of each sequence's mask, as in
    transformers' sequence classification models, then `reward_model_loss` of their two halves. Only those 2B rows are
    multiplied (4BD FLOPs, in fp32 for half-precision inputs); the others are never read, and their gradient is exactly
    0. A pair with an empty sequence does not count.

    Args:
        hidden: B chosen sequences, then B rejected, as TRL concatenates them: `(2B, T, D)` padded, `(N, D)` packed with
            cu_seqlens, or `(2B, D)`, the last tokens already gathered.
        weight: `(1, D)` reward head; bias: `(1,)`.
        mask: nonzero where there is a token (an attention mask: padding on either side, holes); None: everywhere.
        cu_seqlens: `(2B + 1,)` bounds of packed sequences.
        The rest: see `reward_model_loss`.

    Returns:
        RewardOutput; scores: `(2B,)`.

    Raises:
        ValueError, TypeError: as `reward_model_loss`; a head of more than one output, an odd number of sequences.
    """
    if weight.ndim != 2 or weight.shape[0] != 1:
        raise ValueError(f"weight: expected a reward head of shape (1, D), got {tuple(weight.shape)}")
    if hidden.ndim == 2 and cu_seqlens is None:
        hidden = hidden.unsqueeze(1)
        mask = mask if mask is None or mask.ndim != 1 else mask.unsqueeze(1)
    tokens = hidden[..., 0]
    sequences = sequences_of(tokens, cu_seqlens, "hidden without D")
    if sequences.count % 2:
        raise ValueError(f"hidden: expected chosen, then as many rejected sequences, got {sequences.count} in all")
    rows, present = last_rows(_present(mask, tokens, "one per token"), sequences)
    chosen, rejected = row_scores(hidden, weight, bias, rows, present).squeeze(-1).chunk(2)
    return reward_model_loss(
        chosen, rejected, margin=margin, center_rewards_coefficient=center_rewards_coefficient, kind=kind,
        mask=torch.logical_and(*present.chunk(2)), normalizer=normalizer,
    )  # fmt: skip


# Several answers of one prompt --------------------------------------------------------------------------------------


def ranking_loss(
    scores: Tensor,  # (P, K)
    ranks: Tensor,  # (P, K)
    *,
    kind: str = "pairwise",
    mask: Tensor | None = None,  # (P, K)
    normalizer: Tensor | float | None = None,
) -> RewardOutput:
    """The loss of a reward model on K ranked answers per prompt, the mean over prompts of

        pairwise        -1 / C(k, 2) * sum over pairs, i ranked before j, of log sigmoid(r_i - r_j)
        plackett_luce   -sum over answers i of (r_i - logsumexp of r_j over the answers j not ranked before i)

    k being the number of answers that are there. "pairwise" is InstructGPT's (Ouyang et al. 2022, eq. 1): all pairs of
    a prompt in one loss, weighted so that every prompt counts alike. "plackett_luce" is the likelihood of the whole
    ranking (Plackett 1975; Xia et al. 2008, ListMLE): the best answer is chosen first, then the best of the rest. For
    two answers both are `reward_model_loss`. Use the pairwise form where rankings are noisy collections of comparisons,
    the other where the order as a whole is meant.

    Args:
        scores: `(P, K)`, fp32, fp64, bf16 or fp16.
        ranks: `(P, K)` numbers, smaller is better, of any scale: only their order counts. Ties say nothing in
            "pairwise": the pair has no term, and C(k, 2) still counts it. In "plackett_luce" tied answers share one
            denominator (Breslow's rule), which does not depend on their order and draws their scores together.
        kind: "pairwise" or "plackett_luce".
        mask: `(P, K)`, nonzero where there is an answer; scores and ranks elsewhere are never used and may be NaN.
        normalizer: prompts that the mean is over. None: those with two answers of different rank; no other prompt has a
            gradient in "pairwise", or counts.

    Returns:
        RewardOutput in fp32 (fp64 for fp64); scores: `(P, K)`, 0 outside the mask. Metrics over the pairs of different
        rank: accuracy, margin; over the answers: min_reward, mean_reward, max_reward. NaN where there is none.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, or an unknown kind.
    """
    _check_kind(kind, RANKING_KINDS)
    validation.check_floating("scores", scores)
    if scores.ndim != 2:
        raise ValueError(f"scores: expected shape (P, K), got {tuple(scores.shape)}")
    _check_like("ranks", ranks, scores, "one per answer, as scores")
    present = _present(mask, scores, "one per answer")
    dtype = accumulation_dtype(scores.dtype)
    scores = torch.where(present, scores.to(dtype), 0.0)
    both = present.unsqueeze(-1) & present.unsqueeze(-2)  # (P, K, K)
    before = both & (ranks.unsqueeze(-1) < ranks.unsqueeze(-2))
    gap = torch.where(before, scores.unsqueeze(-1) - scores.unsqueeze(-2), 0.0)
    if kind == "pairwise":
        answers = present.sum(-1)
        pairs = (answers * (answers - 1) / 2).clamp(min=1).to(dtype)
        terms = -torch.where(before, F.logsigmoid(gap), 0.0).sum((-2, -1)) / pairs
    else:
        rest = both & (ranks.unsqueeze(-1) <= ranks.unsqueeze(-2)) | torch.eye(
            scores.shape[1], dtype=torch.bool, device=scores.device
        )
        denominators = torch.where(rest, scores.unsqueeze(-2), -torch.inf).logsumexp(-1)
        terms = torch.where(present, denominators - scores, 0.0).sum(-1)
    ranked = before.any(-1).any(-1)
    loss = _mean(terms, ranked, normalizer)
    gap, count = gap.detach(), before.sum()
    metrics = {"accuracy": (gap > 0).sum().to(dtype) / count, "margin": gap.sum() / count}
    return RewardOutput(loss, scores.detach(), metrics | _reward_metrics(scores.detach(), present))


# Labels of tokens ---------------------------------------------------------------------------------------------------


def outcome_reward_loss(
    logits: Tensor,  # (B, T) or (B, T, C); packed (N,) or (N, C)
    labels: Tensor,  # (B,), or one per token
    *,
    mask: Tensor | None = None,  # (B, T) or (N,)
    label_ids: Sequence[int] | Tensor | None = None,  # (K,)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
) -> RewardOutput:
    """The loss of an outcome reward model: every token of an answer predicts whether the answer is right.

        one logit z per token     -y log sigmoid(z) - (1 - y) log sigmoid(-z)
        C logits per token        -log softmax(z)[y]

    averaged over the tokens of the mask that have a label: torch's (binary) cross entropy. Token-level verifiers are
    Cobbe et al. 2021's (section 4.3); Lightman et al. 2023 train their outcome models in the same manner (appendix E).
    Use it where only final answers can be checked; the score at the last token judges the answer, those before it
    estimate the chance that it will be right.

    Args:
        logits: one per token, `(B, T)` or `(B, T, 1)`, or C of them, `(B, T, C)`; `(N, ...)` with cu_seqlens.
        labels: the outcome per answer, `(B,)`, or labels per token. With one logit 0, 1 or a soft label between them;
            with C logits an integer class. -100: no label, the token is ignored.
        mask: nonzero where the token counts (the answer, without prompt and padding). None: wherever there is a label.
            Logits elsewhere are never used and may be NaN.
        label_ids: K token ids of the vocabulary that stand for the classes: then C is the vocabulary, only these K
            logits are used (restricted softmax), and labels are token ids among them.
        aggregation, normalizer, length: see `aggregate_loss`; the counts are of the tokens used.
        cu_seqlens: `(B + 1,)` bounds of packed sequences.

    Returns:
        RewardOutput in fp32 (fp64 for fp64). scores: `(n, C)` logits of the n tokens used, in their order. Metrics:
        num_labels, n; accuracy, the share of tokens whose predicted class (z > 0, or the largest logit) is the label
        (soft labels: above 0.5), NaN where n is 0.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, or a label outside its range.
    """
    labels = _spread(labels, _first_logit(logits, cu_seqlens), cu_seqlens)
    return _logits_loss(logits, labels, mask, label_ids, cu_seqlens, aggregation, normalizer, length)


def process_reward_loss(
    logits: Tensor,  # (B, T, C) or (B, T); packed (N, C) or (N,)
    labels: Tensor,  # (B, T) or (N,)
    *,
    mask: Tensor | None = None,  # (B, T) or (N,)
    label_ids: Sequence[int] | Tensor | None = None,  # (K,)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
) -> RewardOutput:
    """The loss of a process reward model: the token that ends a step predicts whether the step is right.

    `outcome_reward_loss` with a label at each step end and -100 at every other token: with three logits the classes
    bad, neutral, good (PRM800K, Lightman et al. 2023: rating + 1), with two those of TRL's former PRMTrainer
    (transformers' token classification loss: the mean over the batch's labels), with one logit hard or soft binary
    labels (Math-Shepherd's share of rollouts that end right, Wang et al. 2024). With label_ids the step's label is a
    token, such as "+" or "-", scored by the LM head at the step's tag. Use it where steps can be judged: it says where
    an answer went wrong.

    Args:
        logits: `(B, T, C)`, or one per token, `(B, T)`; `(N, ...)` with cu_seqlens.
        labels: one per token, -100 where no step ends.
        The rest, and what is returned and raised: see `outcome_reward_loss`.
    """
    shape = tuple(_first_logit(logits, cu_seqlens).shape)
    validation.check_shape("labels", labels, shape, "one per token, -100 where no step ends")
    return _logits_loss(logits, labels, mask, label_ids, cu_seqlens, aggregation, normalizer, length)


def linear_outcome_reward_loss(
    hidden: Tensor,  # (B, T, D) or (N, D)
    weight: Tensor,  # (C, D)
    labels: Tensor,  # (B,), or one per token
    *,
    bias: Tensor | None = None,  # (C,)
    mask: Tensor | None = None,  # (B, T) or (N,)
    label_ids: Sequence[int] | Tensor | None = None,  # (K,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
) -> RewardOutput:
    """The outcome loss straight from hidden states and the score head (or, with label_ids, the LM head).

    Eager equivalent: `outcome_reward_loss(hidden @ weight.T + bias, labels, ...)`. Only the n tokens that have a label
    are multiplied, with the K rows of label_ids where those are given: 2nCD FLOPs, in fp32 for half-precision inputs.
    Other tokens are never read, and their gradient is exactly 0; no logits of theirs exist.

    Args:
        hidden: `(B, T, D)`, or `(N, D)` with cu_seqlens; fp32, fp64, bf16 or fp16.
        weight: `(C, D)` score head, C = 1 for the binary form; `(V, D)`, the LM head, with label_ids. bias: `(C,)`.
        logit_scale, softcap: what the model does to its LM head's logits, see `LogitTransform`.
        The rest, and what is returned and raised: see `outcome_reward_loss`.
    """
    labels = _spread(labels, hidden[..., 0], cu_seqlens)
    transform = LogitTransform(1.0, float(logit_scale), softcap)
    return _linear_loss(
        hidden, weight, bias, labels, mask, label_ids, transform, cu_seqlens, aggregation, normalizer, length
    )


def linear_process_reward_loss(
    hidden: Tensor,  # (B, T, D) or (N, D)
    weight: Tensor,  # (C, D)
    labels: Tensor,  # (B, T) or (N,)
    *,
    bias: Tensor | None = None,  # (C,)
    mask: Tensor | None = None,  # (B, T) or (N,)
    label_ids: Sequence[int] | Tensor | None = None,  # (K,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    aggregation: str = "token-mean",
    normalizer: Tensor | float | None = None,
    length: float | None = None,
) -> RewardOutput:
    """The process loss straight from hidden states and the score head (or, with label_ids, the LM head).

    Eager equivalent: `process_reward_loss(hidden @ weight.T + bias, labels, ...)`. Only step ends are multiplied; for
    the rest see `linear_outcome_reward_loss` and `process_reward_loss`.
    """
    validation.check_shape("labels", labels, tuple(hidden.shape[:-1]), "one per token, -100 where no step ends")
    transform = LogitTransform(1.0, float(logit_scale), softcap)
    return _linear_loss(
        hidden, weight, bias, labels, mask, label_ids, transform, cu_seqlens, aggregation, normalizer, length
    )


def _first_logit(logits: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The first logit of each token: a tensor of the tokens' shape."""
    validation.check_floating("logits", logits)
    dims, tokens = (2, "(B, T)") if cu_seqlens is None else (1, "(N,)")
    if logits.ndim not in (dims, dims + 1):
        raise ValueError(f"logits: expected one or C logits per token of {tokens}, got {tuple(logits.shape)}")
    return logits if logits.ndim == dims else logits[..., 0]


def _spread(labels: Tensor, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Labels per token, from labels per token or per sequence."""
    sequences = sequences_of(tokens, cu_seqlens, "logits or hidden, without its last dimension")
    if labels.shape == (sequences.count,):
        return sequences.spread(labels).expand(tokens.shape)
    if labels.shape != tokens.shape:
        raise ValueError(
            f"labels: expected shape ({sequences.count},), one per sequence, or {tuple(tokens.shape)}, one per token, "
            f"got {tuple(labels.shape)}"
        )
    return labels


def _logits_loss(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    label_ids: Sequence[int] | Tensor | None,
    cu_seqlens: Tensor | None,
    aggregation: str,
    normalizer: Tensor | float | None,
    length: float | None,
) -> RewardOutput:
    columns = logits.reshape(labels.numel(), -1)
    chosen = _label_ids(label_ids, columns.shape[1], logits.device)

    def score(rows: Tensor) -> Tensor:
        z = columns.index_select(0, rows).to(accumulation_dtype(logits.dtype))
        return z if chosen is None else z.index_select(1, chosen)

    return _token_loss(score, labels, mask, chosen, logits.device, cu_seqlens, aggregation, normalizer, length)


def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    label_ids: Sequence[int] | Tensor | None,
    transform: LogitTransform,
    cu_seqlens: Tensor | None,
    aggregation: str,
    normalizer: Tensor | float | None,
    length: float | None,
) -> RewardOutput:
    validation.check_weight(weight, bias, hidden)
    chosen = _label_ids(label_ids, weight.shape[0], hidden.device)
    if chosen is not None:
        weight = weight.index_select(0, chosen)
        bias = None if bias is None else bias.index_select(0, chosen)

    def score(rows: Tensor) -> Tensor:
        return transform_logits(row_scores(hidden, weight, bias, rows), transform)

    return _token_loss(score, labels, mask, chosen, hidden.device, cu_seqlens, aggregation, normalizer, length)


def _token_loss(
    score: Callable[[Tensor], Tensor],  # positions (n,) of tokens -> their logits (n, C)
    labels: Tensor,  # (B, T) or (N,)
    mask: Tensor | None,
    label_ids: Tensor | None,  # (C,)
    device: torch.device,
    cu_seqlens: Tensor | None,
    aggregation: str,
    normalizer: Tensor | float | None,
    length: float | None,
) -> RewardOutput:
    """The one definition behind the outcome and process losses."""
    validation.check_device("labels", labels, device)
    labelled = _present(mask, labels, "one per token") & (labels != IGNORE)
    rows = labelled.reshape(-1).nonzero().squeeze(-1)
    logits, wanted = score(rows), labels.reshape(-1).index_select(0, rows)
    weights = aggregation_weights(
        aggregation, labelled, sequences_of(labels, cu_seqlens, "labels"), normalizer=normalizer, length=length,
        dtype=logits.dtype,
    ).reshape(-1).index_select(0, rows)  # fmt: skip
    if logits.shape[1] == 1:
        z, wanted = logits.squeeze(-1), _probabilities(wanted, logits.dtype)
        terms = F.binary_cross_entropy_with_logits(z, wanted, reduction="none")
        right = (z > 0) == (wanted > 0.5)
    else:
        wanted = _classes(wanted, logits.shape[1], label_ids)
        terms = F.cross_entropy(logits, wanted, reduction="none")
        right = logits.argmax(-1) == wanted
    metrics = {
        "accuracy": right.sum().to(logits.dtype) / right.numel(),
        "num_labels": labelled.sum(),
    }
    return RewardOutput((weights * terms).sum(), logits.detach(), metrics)


def _probabilities(labels: Tensor, dtype: torch.dtype) -> Tensor:
    labels = labels.detach().to(dtype)
    wrong = ~((labels >= 0) & (labels <= 1))
    if wrong.any():
        raise ValueError(f"labels: expected numbers in [0, 1] for one logit per token, got {labels[wrong][0].item()}")
    return labels


def _classes(labels: Tensor, classes: int, label_ids: Tensor | None) -> Tensor:
    """Class (n,) of each label: the label itself, or its place in label_ids."""
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers for {classes} logits per token, got {labels.dtype}")
    labels = labels.to(torch.int64)
    if label_ids is None:
        wrong, expected = (labels < 0) | (labels >= classes), f"classes in [0, {classes})"
    else:
        match = labels.unsqueeze(-1) == label_ids
        wrong, expected = ~match.any(-1), f"token ids among label_ids {label_ids.tolist()}"
    if wrong.any():
        raise ValueError(f"labels: expected {expected}, or {IGNORE} for no label, got {labels[wrong][0].item()}")
    return labels if label_ids is None else match.to(torch.uint8).argmax(-1)


def _label_ids(label_ids: Sequence[int] | Tensor | None, vocabulary: int, device: torch.device) -> Tensor | None:
    if label_ids is None:
        return None
    ids = torch.as_tensor(label_ids, device=device)
    if ids.ndim != 1 or ids.numel() < 2 or ids.dtype.is_floating_point or ids.unique().numel() != ids.numel():
        raise ValueError(f"label_ids: expected at least two different token ids, got {label_ids!r}")
    if ((ids < 0) | (ids >= vocabulary)).any():
        raise ValueError(f"label_ids: expected token ids in the vocabulary [0, {vocabulary}), got {ids.tolist()}")
    return ids.to(torch.int64)


# Pieces -------------------------------------------------------------------------------------------------------------


def _check_kind(kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise ValueError(f"kind: expected one of {', '.join(kinds)}, got {kind!r}")


def _check_like(name: str, x: Tensor, like: Tensor, meaning: str) -> None:
    validation.check_shape(name, x, tuple(like.shape), meaning)
    validation.check_device(name, x, like.device)


def _present(mask: Tensor | None, like: Tensor, meaning: str) -> Tensor:
    """The mask as booleans, all True for None."""
    if mask is None:
        return torch.ones(like.shape, dtype=torch.bool, device=like.device)
    _check_like("mask", mask, like, meaning)
    return mask.bool()


def _mean(terms: Tensor, inside: Tensor | None, normalizer: Tensor | float | None) -> Tensor:
    """Mean of the terms inside, None: of all; 0 where there is none."""
    if normalizer is not None and not isinstance(normalizer, Tensor) and not normalizer > 0:
        raise ValueError(f"normalizer: expected a number above 0, got {normalizer!r}")
    if inside is None:
        return terms.sum() / (max(terms.numel(), 1) if normalizer is None else normalizer)
    total = torch.where(inside, terms, 0.0).sum()
    return total / (inside.sum().clamp(min=1) if normalizer is None else normalizer)


def _reward_metrics(scores: Tensor, inside: Tensor | None) -> dict[str, Tensor]:
    """TRL's min_reward, mean_reward and max_reward; NaN where there is no score. scores are 0 outside, None: of all."""
    if inside is None and scores.numel():
        low, high = scores.aminmax()
        return {"min_reward": low, "mean_reward": scores.mean(), "max_reward": high}
    inside = torch.ones_like(scores, dtype=torch.bool) if inside is None else inside
    count = inside.sum()
    lowest = torch.where(inside, scores, torch.inf).flatten()
    highest = torch.where(inside, scores, -torch.inf).flatten()
    bounds = [lowest.min(), highest.max()] if scores.numel() else [scores.new_full((), torch.nan)] * 2
    low, high = (torch.where(count > 0, x, torch.nan) for x in bounds)
    return {"min_reward": low, "mean_reward": scores.sum() / count, "max_reward": high}

"""What losses on pairs of a chosen and a rejected answer share: log-probabilities per answer, and the interface."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .sequences import Sequences


class Answers(NamedTuple):
    """What a loss knows of the chosen (or of the rejected) answers."""

    logps: Tensor  # (B,): sum over the answer's tokens, or their mean where the objective averages
    ref_logps: Tensor | None  # (B,): the same under the reference; None: there is no reference
    counts: Tensor  # (B,): tokens
    sums: Tensor  # (B,): log-probabilities summed over the answer's tokens, whatever the objective does with them
    closeness: Tensor | None = None  # (B,): mean of logp - log sum_v p_v^2, for WPO
    entropy: Tensor | None = None  # (B,): sum over the answer's tokens, nats

    @property
    def logratios(self) -> Tensor:
        """`(B,)`: log pi(y|x) / pi_ref(y|x), or log pi(y|x) without a reference."""
        return self.logps if self.ref_logps is None else self.logps - self.ref_logps

    @property
    def lengths(self) -> Tensor:
        """`(B,)`: tokens, at least 1."""
        return self.counts.clamp(min=1)


class AnswerTokens(NamedTuple):
    """The tokens of some answers: `(B, T)` each, or `(N,)` packed. Nothing is read outside the mask."""

    logps: Tensor
    mask: Tensor  # bool
    members: Tensor  # the mask as 0 and 1
    sequences: Sequences
    ref_logps: Tensor | None = None  # per token, or (B,): summed already
    log_sum_sq_probs: Tensor | None = None
    entropy: Tensor | None = None
    finite: bool = False  # logps and ref_logps are known to be finite, outside the mask too

    @property
    def total(self) -> Tensor:
        """`(B,)`: logps summed over each answer's tokens."""
        if self.finite:  # a product takes a third of the time of a choice on a CPU
            return self.sequences.sum(self.logps * self.members)
        return self.sequences.sum_inside(self.logps, self.mask)


@dataclass(frozen=True, kw_only=True)
class PairObjective:
    """A loss on pairs, as `preference_loss` and `linear_preference_loss` run it in every form.

    A subclass defines `pair_losses` in plain PyTorch and overrides what else differs: that is the only definition of
    the loss, padded or packed, on log-probabilities or fused with the LM head.

    Args:
        beta: scale of the implicit rewards, above 0.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        self._require("beta", self.beta > 0 and math.isfinite(self.beta), "a number above 0")

    def _require(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def pair_losses(self, chosen: Answers, rejected: Answers, reward_shift: Tensor | float) -> Tensor:
        """`(B,)`: the loss of each pair, without the NLL term."""
        raise NotImplementedError

    def rewards(self, answers: Answers) -> Tensor:
        """`(B,)`: implicit rewards, for the metrics."""
        return self.beta * answers.logratios

    def extra_metrics(self, chosen: Answers, rejected: Answers) -> dict[str, Tensor]:
        """Values per pair `(B,)`, whose means are metrics beside those that every objective has."""
        return {}

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probabilities of a reference have to be given; where not, they may be unless refused."""
        return False

    @property
    def refuses_reference(self) -> bool:
        return True

    @property
    def average_log_prob(self) -> bool:
        """Whether an answer's logps are averaged over its tokens, not summed."""
        return False

    @property
    def tail_weight(self) -> float | None:
        """Weight of the tokens beyond the length that both answers of a pair reach, or None for 1."""
        return None

    @property
    def weighs_pairs(self) -> bool:
        """Whether pairs are weighted by how likely the policy is to produce them (WPO)."""
        return False

    @property
    def nll_weight(self) -> float:
        """Weight of the token-mean negative log-likelihood that is added to the mean over pairs."""
        return 0.0

    @property
    def nll_on_gold(self) -> bool:
        """Whether that likelihood is of a third, gold answer, not of the chosen one."""
        return False

    @property
    def takes_reward_shift(self) -> bool:
        return False

    @property
    def sorts_batch(self) -> bool:
        """Whether a pair's loss depends on the other pairs, so that a batch can't be split."""
        return False


def token_counts(tokens: AnswerTokens) -> Tensor:
    """`(B,)`, in the dtype of logps."""
    return tokens.sequences.sum(tokens.members)


def summarize(
    tokens: AnswerTokens,
    count: Tensor,  # (B,), see token_counts
    *,
    average: bool = False,
    shared: Tensor | None = None,  # (B,)
    tail_weight: float | None = None,
) -> Answers:
    """From tokens to answers.

    Args:
        average: divide an answer's log-probability by its tokens.
        tail_weight: weight of the tokens beyond `shared`, the length that both answers of a pair reach.
    """
    mask, sequences, tail = tokens.mask, tokens.sequences, None
    if tail_weight is not None and shared is not None:
        length = count.to(torch.int64)
        before = sequences.spread(length.cumsum(0) - length)
        position = mask.reshape(-1).cumsum(0).view(mask.shape) - before  # from 1 within the answer
        tail = mask & (position > sequences.spread(shared))

    def weighted(sums: Tensor, x: Tensor) -> Tensor:
        if tail is not None and tail_weight is not None:
            sums = sequences.sum_inside(x, mask & ~tail)
            sums = sums + tail_weight * sequences.sum_inside(x, tail) if tail_weight else sums
        return sums / count.clamp(min=1) if average else sums

    ref_logps, closeness, entropy = tokens.ref_logps, None, None
    if ref_logps is not None and ref_logps.shape == tokens.logps.shape:
        ref_logps = weighted(sequences.sum_inside(ref_logps, mask), ref_logps)
    if tokens.log_sum_sq_probs is not None:
        closeness = sequences.mean(tokens.logps.detach() - tokens.log_sum_sq_probs, mask)
    if tokens.entropy is not None:
        entropy = sequences.sum_inside(tokens.entropy, mask)
    sums = tokens.total
    return Answers(weighted(sums, tokens.logps), ref_logps, count, sums, closeness, entropy)


def split(answers: Answers, parts: int) -> list[Answers]:
    """The answers of a joint batch (all chosen, then all rejected, then any gold ones), apart."""
    columns: list[Any] = [[None] * parts if x is None else list(x.chunk(parts)) for x in answers]
    if answers.counts.shape[0] == 0:  # chunk gives one part
        return [answers] * parts
    return [Answers(*column) for column in zip(*columns, strict=True)]


# Losses of a margin, shared by the objectives ------------------------------------------------------------------------


def logistic(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(margin), or with label smoothing e: -(1 - e) log sigmoid(margin) - e log sigmoid(-margin)."""
    loss = -F.logsigmoid(margin)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)


def hinge(margin: Tensor) -> Tensor:
    """max(0, 1 - margin) (SLiC-HF, Zhao et al. 2023)."""
    return torch.relu(1 - margin)


def squared(difference: Tensor, beta: float) -> Tensor:
    """(difference - 1 / (2 beta))^2 (IPO, Azar et al. 2023, eq. 17; their tau is beta)."""
    return (difference - 1 / (2 * beta)).square()

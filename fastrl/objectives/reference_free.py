"""Preference objectives without a reference model: CPO, SimPO, AlphaPO, TPO and ORPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import Answers, PairObjective, hinge, logistic, squared

CPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")
TPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "tpo-l")


@dataclass(frozen=True, kw_only=True)
class _Contrast(PairObjective):
    """Losses of the difference of two rewards, which the policy's own log-probabilities are."""

    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "a number in [0, 1)")
        if self.label_smoothing > 0 and self.loss_type in ("hinge", "ipo"):
            raise ValueError(f"label_smoothing: loss_type {self.loss_type!r} has none, got {self.label_smoothing!r}")

    @property
    def target_margin(self) -> float:
        return 0.0

    def reward(self, answers: Answers) -> Tensor:
        """`(B,)`: what beta scales."""
        return answers.logps

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * self.reward(answers)

    def pair_losses(self, chosen: Answers, rejected: Answers, reward_shift: Tensor | float = 0.0) -> Tensor:
        difference = self.reward(chosen) - self.reward(rejected)
        if self.loss_type == "ipo":
            return squared(difference, self.beta)
        if self.loss_type == "hinge":
            return hinge(self.beta * difference)
        margin = self.beta * difference
        return logistic(margin - self.target_margin if self.target_margin else margin, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class CPOObjective(_Contrast):
    """CPO, SimPO and AlphaPO. Names and semantics are TRL 1.16's `CPOConfig`.

    With a and b the log-probabilities of the chosen and of the rejected answer, `d = r(a) - r(b)`, `r(x) = x`, or for
    alpha other than 0 `r(x) = (1 - exp(-alpha x)) / alpha`, `ls` = log sigmoid, `e = label_smoothing`:

        sigmoid  -(1 - e) ls(beta d) - e ls(-beta d)     CPO (Xu et al. 2024, eq. 3); a, b sums over tokens
        hinge    max(0, 1 - beta d)                      SLiC-HF (Zhao et al. 2023); sums
        ipo      (d - 1 / (2 beta))^2                    IPO (Azar et al. 2023); means
        simpo    as sigmoid of beta d - simpo_gamma      SimPO (Meng et al. 2024, eq. 6); means
        alphapo  simpo without the NLL term              AlphaPO (Gupta et al. 2025); means

    The loss is the mean over pairs + cpo_alpha * NLL, the token-mean negative log-likelihood of the chosen answers.

    Use it where a reference model does not fit into memory, or is not wanted: simpo is the usual choice, with cpo_alpha
    0 as in its paper, or with the default 1 (CPO-SimPO) to hold the chosen answer's likelihood up. SimPO's beta is
    larger than DPO's: 2 to 10.

    Args:
        loss_type: one of the above.
        beta: above 0.
        label_smoothing: e in [0, 1); refused by hinge and ipo, which have none.
        simpo_gamma: target margin of simpo and alphapo; other loss types have none.
        alpha: shape of AlphaPO's reward, for every loss type; 0: the log-probability itself.
        cpo_alpha: weight of the NLL term, at least 0; None: 1, and 0 for alphapo, which refuses any other.

    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    simpo_gamma: float = 0.5
    alpha: float = 0.0
    cpo_alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("loss_type", self.loss_type in CPO_LOSS_TYPES, f"one of {', '.join(CPO_LOSS_TYPES)}")
        self._require("cpo_alpha", self.cpo_alpha is None or self.cpo_alpha >= 0, "None or a number of at least 0")
        if self.loss_type == "alphapo" and self.cpo_alpha:
            raise ValueError(f"cpo_alpha: alphapo has no NLL term (simpo with an alpha has), got {self.cpo_alpha!r}")

    @property
    def average_log_prob(self) -> bool:
        return self.loss_type in ("ipo", "simpo", "alphapo")

    @property
    def nll_weight(self) -> float:
        if self.cpo_alpha is None:
            return 0.0 if self.loss_type == "alphapo" else 1.0
        return self.cpo_alpha

    @property
    def target_margin(self) -> float:
        return self.simpo_gamma if self.loss_type in ("simpo", "alphapo") else 0.0

    def reward(self, answers: Answers) -> Tensor:
        if self.alpha == 0:
            return answers.logps
        return -torch.expm1(-self.alpha * answers.logps) / self.alpha


@dataclass(frozen=True, kw_only=True)
class TPOObjective(_Contrast):
    """Triple preference optimisation (Saeidi et al. 2024). Names and semantics are TRL 1.16's experimental `TPOConfig`.

    With a and b the log-probabilities of the chosen and of the rejected answer, `d = a - b`, `e = label_smoothing`:

        sigmoid  -(1 - e) ls(beta d) - e ls(-beta d)     sums over tokens
        hinge    max(0, 1 - beta d)                      sums
        ipo      (d - 1 / (2 beta))^2                    means
        tpo-l    as sigmoid of beta d - tpo_l_gamma      means (TPO-L)

    The loss is the mean over pairs + tpo_alpha * the token-mean NLL of a third, gold answer ("reference" in the paper;
    no reference model is meant).

    Use it where each prompt has a gold answer beside a pair: supervised and preference training in one step.

    Args:
        loss_type: one of the above.
        beta: above 0.
        label_smoothing: in [0, 1); refused by hinge and ipo, which have none.
        tpo_alpha: weight of the NLL of the gold answers, at least 0; 0: none are needed.
        tpo_l_gamma: target margin of tpo-l; other loss types have none.

    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    beta: float = 0.01
    tpo_alpha: float = 1.0
    tpo_l_gamma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("loss_type", self.loss_type in TPO_LOSS_TYPES, f"one of {', '.join(TPO_LOSS_TYPES)}")
        self._require("tpo_alpha", self.tpo_alpha >= 0, "a number of at least 0")

    @property
    def average_log_prob(self) -> bool:
        return self.loss_type in ("ipo", "tpo-l")

    @property
    def nll_weight(self) -> float:
        return self.tpo_alpha

    @property
    def nll_on_gold(self) -> bool:
        return self.tpo_alpha > 0

    @property
    def target_margin(self) -> float:
        return self.tpo_l_gamma if self.loss_type == "tpo-l" else 0.0


@dataclass(frozen=True, kw_only=True)
class ORPOObjective(PairObjective):
    """Odds ratio preference optimisation (Hong et al. 2024, eq. 6 and 7), as TRL 1.16's experimental ORPOTrainer.

    With a and b the mean log-probabilities per token of the chosen and of the rejected answer:

        log_odds = (a - b) - (log(1 - exp(a)) - log(1 - exp(b)))
        loss     = NLL - beta * mean over pairs of log sigmoid(log_odds)

    NLL is the token mean over the chosen answers; TRL (and the paper's code) take prompt and answer: pass `nll_mask`.

    Use it to align a base model in one stage, without supervised training before and without a reference.

    Args:
        beta: weight of the odds-ratio term (lambda in the paper), above 0.

    Raises:
        ValueError: beta is not above 0.
    """

    @property
    def average_log_prob(self) -> bool:
        return True

    @property
    def nll_weight(self) -> float:
        return 1.0

    def log_odds(self, chosen: Answers, rejected: Answers) -> Tensor:
        """`(B,)`: log of the ratio of the odds."""
        return (chosen.logps - rejected.logps) - (_log1mexp(chosen.logps) - _log1mexp(rejected.logps))

    def pair_losses(self, chosen: Answers, rejected: Answers, reward_shift: Tensor | float = 0.0) -> Tensor:
        return self.beta * logistic(self.log_odds(chosen, rejected))

    def extra_metrics(self, chosen: Answers, rejected: Answers) -> dict[str, Tensor]:
        log_odds = self.log_odds(chosen, rejected)
        return {"log_odds_ratio": F.logsigmoid(log_odds), "log_odds_chosen": log_odds}


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0; a probability of exactly 1 counts as the next one below it."""
    return torch.log(-torch.expm1(torch.clamp(x, max=-torch.finfo(x.dtype).tiny)))

"""Direct preference optimisation and its kin: one objective of many loss types, each defined once per pair."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import Answers, PairObjective, hinge, logistic, squared

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Those that need only the difference of two scores: the log-partition term of f-DPO cancels in it, nowhere else.
_DIFFERENCE_TYPES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "sft")
_DPOP_TYPES = ("sigmoid", "hinge", "exo_pair", "robust", "discopop")
_SMOOTHED_TYPES = ("exo_pair", "robust", "aot", "aot_unpaired")
_SORTING_TYPES = ("aot", "aot_unpaired")
_MAX_EXPONENT = 80.0  # of the alpha divergence, TRL's: exp of it is finite in fp32


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective(PairObjective):
    """DPO and its kin. Names and semantics are TRL 1.16's `DPOConfig`.

    With C and R the summed log-probabilities of the chosen and of the rejected answer, `c = C - C_ref`, `r = R - R_ref`
    (the log-ratios to the reference), their scores `sc = f(c)`, `sr = f(r)` (see f_divergence_type), `z = sc - sr`,
    `b = beta`, `e = label_smoothing`, `ls` = log sigmoid, `S` = sigmoid and n_c, n_r the lengths, a pair's loss is:

        sigmoid       -ls(b z)                                       DPO (Rafailov et al. 2023, eq. 7)
        hinge         max(0, 1 - b z)                                SLiC-HF (Zhao et al. 2023), RSO (Liu et al. 2023)
        ipo           (sc / n_c - sr / n_r - 1 / (2 b))^2            IPO (Azar et al. 2023, eq. 17), per token
        exo_pair      S(b z) (ls(b z) - log(1 - e)) + S(-b z) (ls(-b z) - log e)       EXO (Ji et al. 2024, eq. 16)
        nca_pair      -ls(b c) - ls(-b c) / 2 - ls(-b r) / 2         NCA (Chen et al. 2024)
        robust        (-(1 - e) ls(b z) + e ls(-b z)) / (1 - 2 e)    robust DPO (Chowdhury et al. 2024)
        bco_pair      -ls(b c - s) - ls(s - b r)                     BCO (Jung et al. 2024); s: reward_shift, 0 in TRL
        sppo_hard     (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2          SPPO (Wu et al. 2024), hard probabilities
        aot           -(1 - e) ls(b d) - e ls(-b d), d the k-th smallest C - R less the k-th smallest C_ref - R_ref
        aot_unpaired  the same, d the k-th smallest c less the k-th smallest r          AOT (Melnyk et al. 2024)
        apo_zero      1 - S(b c) + S(b r)                            APO (D'Oosterlinck et al. 2024, eq. 7)
        apo_down      S(b c) + 1 - S(b (c - r))                      APO (eq. 8)
        discopop      (1 - w) (-ls(b z)) + w exp(-b z), w = S(b z / discopop_tau)       DiscoPOP (Lu et al. 2024, eq. 5)
        sft           -(mean log-probability of all chosen tokens of the batch)
        sigmoid_norm  -ls(b (sc / n_c - sr / n_r))                   DPO per token

    The loss is the mean over pairs, summed over the loss types with their weights.

    When to use which: sigmoid is the default. DPO pushes the margin alone, and the chosen answer may well become less
    likely (Pal et al. 2024, Razin et al. 2024; metric `rewards/displaced`, warning by `LikelihoodWatch`). Three
    remedies are one argument away: an NLL term on the chosen answer (`rpo_alpha=1.0`), an anchored loss
    (`loss_type="apo_zero"` where the chosen answers are better than what the model writes, `"apo_down"` where they are
    worse), or DPO-Positive's penalty (`dpop_lambda=5.0`; the paper has 50). ipo and robust are for noisy labels,
    ld_alpha and sigmoid_norm against a bias to long answers, aot_unpaired for answers that are not in pairs.

    Args:
        loss_type: one of the above, or a sequence of them (MPO, Wang et al. 2024).
        loss_weights: a weight per loss type; None: 1 each.
        beta: strength of the pull to the reference (ipo: tau), above 0.
        label_smoothing: e in [0, 1): the share of labels believed to be flipped. exo_pair needs it above 0 (the paper's
            1e-3), robust below 0.5. Loss types without e in their formula ignore it, as in TRL; where none of them has
            it, a warning says so.
        f_divergence_type: f-DPO (Wang et al. 2023), score f(u) of a log-ratio u. reverse_kl: u; forward_kl:
            1 - exp(-u); js_divergence: log 2 + ls(u); alpha_divergence: (exp(min((a - 1) u, 80)) - 1) / (a - 1).
            Only for loss types written with z, sc or sr, and sft.
        f_alpha_divergence_coef: a; 1 is reverse_kl.
        ld_alpha: LD-DPO (Liu et al. 2024): weight in [0, 1] of the tokens beyond the shorter answer's length; None or
            1: all count fully. Metrics and the reference use it too; sft and n_c, n_r do not.
        use_weighting: WPO (Zhou et al. 2024, eq. 2): each pair is weighted by the policy's own probability of it,
            `W_c W_r` with `W = exp(mean over tokens of (logp - log sum_v p_v^2))`, without gradient.
        discopop_tau: above 0.
        reference_free: C_ref = R_ref = 0. Without it, the reference's log-probabilities have to be given.
        rpo_alpha: weight of the NLL of the chosen answer, token mean (RPO, Pang et al. 2024; TRL's former rpo_alpha):
            the same as "sft" in loss_type.
        dpop_lambda: DPO-Positive (Pal et al. 2024, eq. 3): `z - dpop_lambda max(0, -c)` in place of z, which pays for
            every nat that the chosen answer loses to the reference. For sigmoid, hinge, exo_pair, robust, discopop,
            under reverse_kl.
        preset: None or "trl", or "openrlhf" (0.11.2's DPOLoss): sigmoid is then conservative DPO, -(1 - e) ls(b z)
            - e ls(-b z), and ipo is not divided by lengths; other loss types are refused, it has none.

    Raises:
        ValueError: an argument out of its range, or a combination that is not defined; the message names it.
    """

    loss_type: str | Sequence[str] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05
    reference_free: bool = False
    rpo_alpha: float = 0.0
    dpop_lambda: float = 0.0
    preset: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("loss_type", "loss_weights"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))  # an objective is hashable
        types, require = self.loss_types, self._require
        require("loss_type", bool(types) and set(types) <= set(LOSS_TYPES), f"one or more of {', '.join(LOSS_TYPES)}")
        number = self.loss_weights is None or len(self.loss_weights) == len(types)
        require("loss_weights", number, f"None or {len(types)} weights, one per loss type")
        require("f_divergence_type", self.f_divergence_type in F_DIVERGENCES, f"one of {', '.join(F_DIVERGENCES)}")
        require("f_alpha_divergence_coef", math.isfinite(self.f_alpha_divergence_coef), "a finite number")
        require("ld_alpha", self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "None or a number in [0, 1]")
        require("discopop_tau", self.discopop_tau > 0, "a number above 0")
        require("rpo_alpha", self.rpo_alpha >= 0, "a number of at least 0")
        require("dpop_lambda", self.dpop_lambda >= 0, "a number of at least 0")
        require("preset", self.preset in (None, "trl", "openrlhf"), "None, 'trl' or 'openrlhf'")
        require("label_smoothing", 0 <= self.label_smoothing < 1, "a number in [0, 1)")
        self._check_combinations()

    def _check_combinations(self) -> None:
        types = self.loss_types

        def refuse(name: str, wrong: Sequence[str], why: str) -> None:
            if wrong:
                raise ValueError(f"{name}: got {getattr(self, name)!r} with loss_type {', '.join(wrong)}: {why}")

        if "exo_pair" in types and self.label_smoothing == 0:
            raise ValueError("label_smoothing: exo_pair needs it above 0 (the paper's is 1e-3), got 0")
        if "robust" in types and self.label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing: robust needs it in [0, 0.5), got {self.label_smoothing!r}")
        if self.f_divergence_type != "reverse_kl":
            outside = [t for t in types if t not in _DIFFERENCE_TYPES]
            refuse("f_divergence_type", outside, "defined for differences of scores only")
        if self.use_weighting:
            sorting = [t for t in types if t in _SORTING_TYPES]
            refuse("use_weighting", sorting, "sorting takes the pairs apart that a weight belongs to")
            refuse("use_weighting", [t for t in types if t == "sft"], "it is a mean over tokens, not over pairs")
        if self.dpop_lambda > 0:
            outside = [t for t in types if t not in (*_DPOP_TYPES, "sft")]
            refuse("dpop_lambda", outside, f"defined for {', '.join(_DPOP_TYPES)}")
            if self.f_divergence_type != "reverse_kl" or self.reference_free:
                raise ValueError("dpop_lambda: it needs a reference, and f_divergence_type 'reverse_kl'")
        if self.preset == "openrlhf":
            refuse("preset", [t for t in types if t not in ("sigmoid", "ipo")], "OpenRLHF has sigmoid and ipo only")
        smoothed = [t for t in types if t in _SMOOTHED_TYPES or (t == "sigmoid" and self.preset == "openrlhf")]
        if self.label_smoothing > 0 and not smoothed:
            warnings.warn(
                f"label_smoothing={self.label_smoothing} has no effect on loss_type {', '.join(types)} (as in TRL). "
                f"It acts on {', '.join(_SMOOTHED_TYPES)}, and on sigmoid under preset='openrlhf'.",
                stacklevel=4,
            )

    # What the forms ask -----------------------------------------------------------------------------------------------

    @property
    def loss_types(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def weighted_types(self) -> list[tuple[str, float]]:
        """Loss types with their weights."""
        weights = [1.0] * len(self.loss_types) if self.loss_weights is None else self.loss_weights
        return list(zip(self.loss_types, weights, strict=True))

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free and set(self.loss_types) != {"sft"}

    @property
    def refuses_reference(self) -> bool:
        return self.reference_free

    @property
    def tail_weight(self) -> float | None:
        return self.ld_alpha

    @property
    def weighs_pairs(self) -> bool:
        return self.use_weighting

    @property
    def nll_weight(self) -> float:
        return self.rpo_alpha + sum(weight for kind, weight in self.weighted_types if kind == "sft")

    @property
    def takes_reward_shift(self) -> bool:
        return "bco_pair" in self.loss_types

    @property
    def sorts_batch(self) -> bool:
        return any(t in _SORTING_TYPES for t in self.loss_types)

    def extra_metrics(self, chosen: Answers, rejected: Answers) -> dict[str, Tensor]:
        """rewards/displaced: pairs of positive margin whose chosen answer is less likely than under the reference."""
        if chosen.ref_logps is None:
            return {}
        c, r = chosen.logratios, rejected.logratios
        return {"rewards/displaced": ((c < 0) & (c > r)).to(c.dtype)}

    # The definition ---------------------------------------------------------------------------------------------------

    def scores(self, logratios: Tensor) -> Tensor:
        """f(u) of the f-divergence, for log-ratios u."""
        if self.f_divergence_type == "forward_kl":
            return -torch.expm1(-logratios)
        if self.f_divergence_type == "js_divergence":
            return math.log(2) + F.logsigmoid(logratios)
        power = self.f_alpha_divergence_coef - 1
        if self.f_divergence_type == "reverse_kl" or abs(power) < 1e-6:
            return logratios
        return torch.expm1(torch.clamp(power * logratios, max=_MAX_EXPONENT)) / power

    def pair_losses(self, chosen: Answers, rejected: Answers, reward_shift: Tensor | float = 0.0) -> Tensor:
        c, r = chosen.logratios, rejected.logratios
        sc, sr = self.scores(c), self.scores(r)
        margin = sc - sr
        if self.dpop_lambda > 0:
            margin = margin - self.dpop_lambda * torch.relu(-c)
        per_token = margin
        if self.preset != "openrlhf":
            per_token = sc / chosen.lengths - sr / rejected.lengths
        pairs = _Pairs(chosen, rejected, c, r, self.beta * margin, per_token, reward_shift)
        losses = torch.zeros_like(c)
        for kind, weight in self.weighted_types:
            if kind != "sft":  # the NLL term, see nll_weight
                losses = losses + weight * _LOSSES[kind](self, pairs)
        return losses


@dataclass
class RunningMean:
    """Mean of all rewards so far: the shift of bco_pair (BCO, Jung et al. 2024), `reward_shift=running.mean`."""

    mean: float = 0.0
    count: int = 0

    def update(self, rewards: Tensor) -> None:
        """Takes the rewards of a step, those of all ranks together."""
        self.count += rewards.numel()
        self.mean += (float(rewards.double().sum()) - rewards.numel() * self.mean) / max(1, self.count)

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean, self.count = float(state["mean"]), int(state["count"])


class _Pairs(NamedTuple):
    chosen: Answers
    rejected: Answers
    c: Tensor  # (B,) log-ratios
    r: Tensor
    logits: Tensor  # (B,) beta times the difference of the scores
    per_token: Tensor  # (B,) difference of the scores per token
    reward_shift: Tensor | float


def _sigmoid(o: PreferenceObjective, p: _Pairs) -> Tensor:
    return logistic(p.logits, o.label_smoothing if o.preset == "openrlhf" else 0.0)


def _hinge(o: PreferenceObjective, p: _Pairs) -> Tensor:
    return hinge(p.logits)


def _ipo(o: PreferenceObjective, p: _Pairs) -> Tensor:
    return squared(p.per_token, o.beta)


def _exo_pair(o: PreferenceObjective, p: _Pairs) -> Tensor:
    """KL(softmax over the pair || (1 - e, e))."""
    e = o.label_smoothing
    chosen = torch.sigmoid(p.logits) * (F.logsigmoid(p.logits) - math.log1p(-e))
    return chosen + torch.sigmoid(-p.logits) * (F.logsigmoid(-p.logits) - math.log(e))


def _nca_pair(o: PreferenceObjective, p: _Pairs) -> Tensor:
    c, r = o.beta * p.c, o.beta * p.r
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def _robust(o: PreferenceObjective, p: _Pairs) -> Tensor:
    e = o.label_smoothing
    return (e * F.logsigmoid(-p.logits) - (1 - e) * F.logsigmoid(p.logits)) / (1 - 2 * e)


def _bco_pair(o: PreferenceObjective, p: _Pairs) -> Tensor:
    return -F.logsigmoid(o.beta * p.c - p.reward_shift) - F.logsigmoid(p.reward_shift - o.beta * p.r)


def _sppo_hard(o: PreferenceObjective, p: _Pairs) -> Tensor:
    return squared(p.c, o.beta) + squared(-p.r, o.beta)


def _aot(o: PreferenceObjective, p: _Pairs) -> Tensor:
    reference = torch.zeros_like(p.c)
    if p.chosen.ref_logps is not None and p.rejected.ref_logps is not None:
        reference = p.chosen.ref_logps - p.rejected.ref_logps
    return _by_rank(o, p, p.chosen.logps - p.rejected.logps, reference)


def _aot_unpaired(o: PreferenceObjective, p: _Pairs) -> Tensor:
    return _by_rank(o, p, p.c, p.r)


def _by_rank(o: PreferenceObjective, p: _Pairs, upper: Tensor, lower: Tensor) -> Tensor:
    """The logistic loss of equal ranks of both, each in the place of the `upper` it belongs to."""
    present = (p.chosen.counts + p.rejected.counts) > 0  # a pair without tokens takes no rank
    upper, order = torch.sort(torch.where(present, upper, torch.inf))
    lower = torch.sort(torch.where(present, lower, torch.inf)).values
    ranked = torch.arange(present.shape[0], device=present.device) < present.sum()
    gap = torch.where(ranked, upper, 0.0) - torch.where(ranked, lower, 0.0)
    return torch.zeros_like(gap).scatter(0, order, logistic(o.beta * gap, o.label_smoothing))


def _apo_zero(o: PreferenceObjective, p: _Pairs) -> Tensor:
    return torch.sigmoid(-o.beta * p.c) + torch.sigmoid(o.beta * p.r)


def _apo_down(o: PreferenceObjective, p: _Pairs) -> Tensor:
    return torch.sigmoid(o.beta * p.c) + torch.sigmoid(-o.beta * (p.c - p.r))


def _discopop(o: PreferenceObjective, p: _Pairs) -> Tensor:
    gate = p.logits / o.discopop_tau
    # The product of the gate and the exponential in one exponent: exp(-z) alone overflows where the gate is 0.
    return torch.sigmoid(-gate) * -F.logsigmoid(p.logits) + torch.exp(F.logsigmoid(gate) - p.logits)


def _sigmoid_norm(o: PreferenceObjective, p: _Pairs) -> Tensor:
    return logistic(o.beta * p.per_token)


_LOSSES: dict[str, Callable[[PreferenceObjective, _Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}
LOSS_TYPES = (*_LOSSES, "sft")

"""Correction of the mismatch between the engine that sampled and the trainer: importance weights, rejection, metrics.

The engine (vLLM in bf16, an older policy, a quantized one) samples from another distribution than the trainer scores
with. Weights `pi_trainer / pi_engine` correct the gradient's expectation; rejection drops what lies too far off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl_kernels import validation
from fastrl_kernels.head import accumulation_dtype

from .kl import kl_estimate
from .masking import inside
from .sequences import Sequences, sequences_of

LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask")
_RATIOS = ("k1", "ratio")  # statistics that are log-ratios: their bounds are bounds of the ratio
_DIVERGENCES = ("k2", "k3", "tv", "binary_kl")
REJECTIONS = (
    *(f"{level}_{kind}" for level in ("token", "seq_sum", "seq_mean") for kind in (*_RATIOS, *_DIVERGENCES)),
    *(f"seq_max_{kind}" for kind in _DIVERGENCES),
)


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Drops tokens or whole sequences on which the two policies differ too much.

    With `d = old_logps - sampling_logps` of a token, p and q its probability under engine and trainer:

        k1           -d, the log of engine / trainer (verl's sign)       bounds are of the ratio engine / trainer
        ratio        d, the log of trainer / engine (OpenRLHF's sign)    bounds are of the ratio trainer / engine
        k2, k3       d^2 / 2, exp(d) - d - 1                             see `kl_estimate`
        tv           |p - q|                                             total variation of the event "this token"
        binary_kl    p log(p/q) + (1 - p) log((1 - p)/(1 - q))           its KL; p, q kept in [1e-6, 1 - 1e-6]

    Args:
        statistic: `token_*` decides token by token; `seq_sum_*`, `seq_mean_*` (of k1 or ratio: the geometric mean) and
            `seq_max_*` (not of k1 or ratio) decide for the whole sequence. One of `REJECTIONS`.
        upper: kept is what is at most this.
        lower: kept is what is at least this. None: 1 / upper for k1 and ratio, no bound otherwise.

    Raises:
        ValueError: an unknown statistic, an upper bound that is not above 0, or a lower one not in [0, upper].
    """

    statistic: str
    upper: float
    lower: float | None = None

    def __post_init__(self) -> None:
        if self.statistic not in REJECTIONS:
            raise ValueError(f"statistic: expected one of {', '.join(REJECTIONS)}, got {self.statistic!r}")
        _check_bounds(self.lower, self.upper)
        if self.lower is None and self.kind in _RATIOS and self.upper < 1:
            raise ValueError(f"lower: the default 1 / upper is above upper = {self.upper}, give one")

    @property
    def level(self) -> str:
        return self.statistic.removesuffix(f"_{self.kind}")

    @property
    def kind(self) -> str:
        return next(kind for kind in (*_RATIOS, *_DIVERGENCES) if self.statistic.endswith(f"_{kind}"))

    @property
    def two_sided(self) -> bool:
        return self.lower is not None or self.kind in _RATIOS

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the statistic itself: logs of the ratio's bounds, or as they were given (and 0 for no lower bound)."""
        if self.kind not in _RATIOS:
            return 0.0 if self.lower is None else self.lower, self.upper
        lower = 1 / self.upper if self.lower is None else self.lower
        return -math.inf if lower == 0 else math.log(lower), math.log(self.upper)


@dataclass(frozen=True, kw_only=True)
class RolloutCorrection:
    """How to correct for the mismatch between engine and trainer.

    With `d = old_logps - sampling_logps` and the tokens of the mask only, the ratio is

        token        exp(d)                  low variance, biased: the usual choice for a small mismatch
        sequence     exp(sum of d)           unbiased, its variance grows with the length
        geometric    exp(mean of d)          one ratio per sequence that does not shrink with its length (GSPO's)

    and its weight

        truncate     clamp(ratio, lower, upper)                 TIS (Ionides 2008; Yao et al. 2025)
        mask         ratio if lower <= ratio <= upper, else 0   token level with both bounds: IcePop (Ling Team 2025)

    `trl`, `verl` and `openrlhf` build the corrections of these projects from their own arguments.

    Args:
        level: "token", "sequence" or "geometric"; None: no weights, only rejections.
        mode: "truncate" or "mask".
        lower, upper: bounds of the ratio; None: no bound.
        batch_normalize: divide the weights by their mean: over tokens at token level, over sequences otherwise. Not
            done where that mean is at most 1e-8.
        rejections: all must keep a token; each looks at the unrejected batch.
        log_ratio_bound: log-ratios are kept within it, plus or minus (20 in verl, which with bounds of its own changes
            no more than ratios below e^-20). None: the bounds of the ratio are enough.
        eps: added to the token counts of means; 1e-8 in verl. 0: exact means.

    Raises:
        ValueError: an argument out of its range, or one that needs a level without one.
    """

    level: str | None = "token"
    mode: str = "truncate"
    lower: float | None = None
    upper: float | None = 2.0
    batch_normalize: bool = False
    rejections: tuple[Rejection, ...] = ()
    log_ratio_bound: float | None = None
    eps: float = 0.0

    def __post_init__(self) -> None:
        if self.level is not None and self.level not in LEVELS:
            raise ValueError(f"level: expected None or one of {', '.join(LEVELS)}, got {self.level!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        _check_bounds(self.lower, self.upper)
        unused = {
            "mode": self.mode != "truncate",
            "lower": self.lower is not None,
            "upper": self.upper not in (None, 2),
        }
        for name, given in {**unused, "batch_normalize": self.batch_normalize}.items():
            if self.level is None and given:
                raise ValueError(f"{name}: without a level there are no weights, got {getattr(self, name)!r}")
        if self.mode == "mask" and self.lower is None and self.upper is None:
            raise ValueError("mode: 'mask' needs a lower or an upper bound")
        statistics = [rejection.statistic for rejection in self.rejections]
        if len(set(statistics)) != len(statistics):
            raise ValueError(f"rejections: expected each statistic once, got {', '.join(statistics)}")
        if self.log_ratio_bound is not None and not self.log_ratio_bound > 0:
            raise ValueError(f"log_ratio_bound: expected None or a number above 0, got {self.log_ratio_bound!r}")
        if not self.eps >= 0:
            raise ValueError(f"eps: expected a number of at least 0, got {self.eps!r}")

    @staticmethod
    def trl(
        mode: str = "sequence_mask", clip_max: float | None = 3.0, clip_min: float | None = None
    ) -> RolloutCorrection:
        """TRL 1.16's, from `vllm_importance_sampling_mode`, `..._clip_max` and `..._clip_min`.

        Raises:
            ValueError: an unknown mode, or wrong bounds.
        """
        level, _, kind = mode.partition("_")
        if level not in ("token", "sequence") or kind not in MODES:
            raise ValueError(f"mode: expected token_ or sequence_ with truncate or mask, got {mode!r}")
        if clip_min is None and clip_max is None:
            kind = "truncate"  # without bounds both keep every ratio as it is
        return RolloutCorrection(level=level, mode=kind, lower=clip_min, upper=clip_max)

    @staticmethod
    def verl(
        *,
        rollout_is: str | None = None,
        rollout_is_threshold: float | str = 2.0,
        rollout_is_batch_normalize: bool = False,
        rollout_rs: str | None = None,
        rollout_rs_threshold: float | str | None = None,
    ) -> RolloutCorrection:
        """verl 0.9's, from the arguments of its `rollout_correction` of these names.

        Thresholds are its strings: "2.0" truncates, "0.5_2.0" masks; for `rollout_rs`, a comma-separated list of
        statistics, one threshold for all or one for each.

        Raises:
            ValueError: a threshold or statistic that verl would refuse too.
        """
        if rollout_is not in (None, "token", "sequence"):
            raise ValueError(f"rollout_is: expected None, 'token' or 'sequence', got {rollout_is!r}")
        lower, upper = _verl_bounds("rollout_is_threshold", rollout_is_threshold)
        names = list(dict.fromkeys(name.strip() for name in (rollout_rs or "").split(",") if name.strip()))
        given = [part.strip() for part in str(rollout_rs_threshold or "").split(",") if part.strip()]
        if names and len(given) not in (1, len(names)):
            raise ValueError(
                f"rollout_rs_threshold: expected 1 or {len(names)} thresholds for {rollout_rs!r}, "
                f"got {rollout_rs_threshold!r}"
            )
        rejections = []
        for name, threshold in zip(names, given * len(names) if len(given) == 1 else given, strict=False):
            low, high = _verl_bounds("rollout_rs_threshold", threshold)
            if low is not None and not name.endswith("k1"):
                raise ValueError(f"rollout_rs_threshold: {name} has an upper bound only, got {threshold!r}")
            rejections.append(Rejection(statistic=name, lower=low, upper=high))
        if rollout_is is None:
            lower, upper = None, 2.0
        return RolloutCorrection(
            level=rollout_is,
            mode="truncate" if lower is None else "mask",
            lower=lower,
            upper=upper,
            batch_normalize=rollout_is_batch_normalize and rollout_is is not None,
            rejections=tuple(rejections),
            log_ratio_bound=20.0,
            eps=1e-8,
        )

    @staticmethod
    def openrlhf(
        level: str = "token",
        mode: str = "mask",
        gating: str = "ratio",
        threshold: tuple[float, float] = (0.5, 5.0),
    ) -> RolloutCorrection:
        """OpenRLHF 0.11's, from `is_correction_level`, `_mode`, `_gating` and `_threshold` of its `PolicyLoss`.

        "clip" truncates the token ratio to the threshold. "mask" keeps the token ratio as it is where the gate (at
        level "seq" its mean over the sequence, for the ratio the geometric one) is within the threshold: a rejection.
        OpenRLHF sets the loss of rejected tokens to 0 and still divides by all tokens: multiply the weights by the new
        mask, and aggregate over the old one.

        Raises:
            ValueError: an unknown level, mode or gating, a clip of anything but the token ratio, or wrong bounds.
        """
        if level not in ("token", "seq"):
            raise ValueError(f"level: expected 'token' or 'seq', got {level!r}")
        if mode not in ("clip", "mask"):
            raise ValueError(f"mode: expected 'clip' or 'mask', got {mode!r}")
        if gating not in ("ratio", "tv", "binary_kl"):
            raise ValueError(f"gating: expected 'ratio', 'tv' or 'binary_kl', got {gating!r}")
        lower, upper = threshold
        if mode == "clip":
            if level != "token" or gating != "ratio":
                raise ValueError(f"mode: 'clip' is of the token ratio only, got level {level!r}, gating {gating!r}")
            return RolloutCorrection(lower=lower, upper=upper)
        statistic = f"{'token' if level == 'token' else 'seq_mean'}_{gating}"
        return RolloutCorrection(upper=None, rejections=(Rejection(statistic=statistic, lower=lower, upper=upper),))


class CorrectedRollouts(NamedTuple):
    """What `rollout_correction` returns; nothing carries a gradient."""

    weights: Tensor | None  # (B, T) or (N,), 0 outside the mask (rejected tokens keep theirs); None without a level
    mask: Tensor  # (B, T) or (N,), bool: what no rejection dropped
    metrics: dict[str, Tensor]  # scalars


def rollout_correction(
    old_logps: Tensor,  # (B, T) or (N,)
    sampling_logps: Tensor,  # (B, T) or (N,)
    correction: RolloutCorrection,
    *,
    mask: Tensor,  # (B, T) or (N,)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    group: dist.ProcessGroup | None = None,
) -> CorrectedRollouts:
    """Importance weights and a mask that correct for sampling with another engine or policy than is trained.

    Compute it over whole sequences, before a batch is split; the weights then go to the policy losses as
    `importance_ratio` and the mask as `mask`.

    A token for which the sampler gave no logp (NaN), or with both logps infinite, has ratio 1 and enters no divergence.
    With `old_logps` of -inf alone the ratio is 0, with `sampling_logps` of -inf alone it is infinite: the upper bound,
    or masked; a sequence that holds both has ratio 0. A statistic that is NaN is rejected.

    Metrics are verl 0.9's (`rollout_corr/rollout_is_*` of the weights before batch_normalize, `rollout_corr/
    rollout_rs_*` of the rejections, and of the mismatch `rollout_corr/` kl, k3_kl, chi2_token, chi2_seq and the
    perplexities; means over sequences count an empty one as 0 there), and TRL 1.16's `sampling/*`. The largest and
    smallest of nothing are 0.

    Args:
        old_logps: `(B, T)`, or `(N,)` with cu_seqlens: the trainer's log-probabilities of the sampled tokens.
        sampling_logps: the engine's, of the same shape.
        correction: what to do; see `RolloutCorrection`.
        mask: of the same shape, nonzero where the token counts. Elsewhere the logps are never read.
        cu_seqlens: `(B + 1,)` integers, the offsets of packed sequences.
        group: ranks that hold parts of the batch, for batch_normalize's mean. All must call.

    Returns:
        CorrectedRollouts, in fp32 (fp64 where an input is fp64).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; a group without batch_normalize.
    """
    sequences = sequences_of(old_logps, cu_seqlens, "old_logps")
    for name, x in (("old_logps", old_logps), ("sampling_logps", sampling_logps)):
        validation.check_floating(name, x)
        validation.check_shape(name, x, tuple(old_logps.shape), "one per token")
        if x.device != old_logps.device:
            raise ValueError(f"{name}: expected on {old_logps.device}, where old_logps is, got {x.device}")
    checked = validation.check_mask(mask, tuple(old_logps.shape), old_logps.device)
    if checked is None:
        raise ValueError(f"mask: expected a tensor of shape {tuple(old_logps.shape)}, got None")
    if group is not None and not correction.batch_normalize:
        raise ValueError("group: only batch_normalize takes a mean over the ranks")
    dtype = accumulation_dtype(torch.promote_types(old_logps.dtype, sampling_logps.dtype))
    old, sampling = (inside(x.detach().to(dtype), checked) for x in (old_logps, sampling_logps))
    known = checked & ~(old - sampling).isnan()
    tokens = _Tokens(checked, sequences, correction.eps)
    both = _Mismatch(inside(old, known), inside(sampling, known), correction.log_ratio_bound)

    metrics = _mismatch_metrics(both, _Tokens(known, sequences, correction.eps))
    weights = None
    if correction.level is not None:
        weights, of_weights = _weights(correction, both, known, tokens, group)
        metrics |= of_weights
    kept = checked
    for rejection in correction.rejections:
        keep, of_rejection = _reject(rejection, both, known, tokens)
        kept = kept & keep
        metrics |= of_rejection
    if correction.rejections:
        metrics["rollout_corr/rollout_rs_masked_fraction"] = tokens.mean(~kept)
        dropped = tokens.counts - sequences.counts(kept, dtype) > 0
        metrics["rollout_corr/rollout_rs_seq_masked_fraction"] = _mean(dropped)
    return CorrectedRollouts(weights, kept, metrics)


# Pieces -------------------------------------------------------------------------------------------------------------


class _Tokens:
    """Means over the tokens of a mask, and over each sequence's."""

    def __init__(self, mask: Tensor, sequences: Sequences, eps: float) -> None:
        self.mask, self.sequences, self.eps = mask, sequences, eps
        self.counts = sequences.counts(mask, torch.float64)

    @property
    def nonempty(self) -> Tensor:
        return self.counts > 0

    def mean(self, x: Tensor) -> Tensor:
        total = inside(x, self.mask).sum() if x.is_floating_point() else (x & self.mask).sum().to(torch.float64)
        return total / (self.counts.sum().clamp(min=1) + self.eps).to(total.dtype)

    def means(self, x: Tensor) -> Tensor:
        totals = self.sequences.sum_inside(x, self.mask)
        return totals / (self.counts.clamp(min=1) + self.eps).to(x.dtype)

    def std(self, x: Tensor) -> Tensor:
        """Biased; 0 for a single token."""
        variance = self.mean(x.square()) - self.mean(x).square()
        return torch.where(self.counts.sum() > 1, variance.clamp(min=0).sqrt(), 0.0)


class _Mismatch:
    """The logps of both policies, 0 where there is nothing to compare, and their log-ratio trainer / engine."""

    def __init__(self, old: Tensor, sampling: Tensor, bound: float | None) -> None:
        self.old, self.sampling, self.difference = old, sampling, old - sampling
        self._bound = bound

    def bounded(self, log_ratio: Tensor) -> Tensor:
        return log_ratio if self._bound is None else log_ratio.clamp(-self._bound, self._bound)

    def statistic(self, kind: str) -> Tensor:
        """A rejection's statistic, per token."""
        if kind in ("tv", "binary_kl"):
            p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (self.sampling, self.old))
            return (p - q).abs() if kind == "tv" else p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        d = self.bounded(self.difference)
        return d if kind == "ratio" else kl_estimate(torch.zeros_like(d), d, kind)


def _weights(
    correction: RolloutCorrection,
    both: _Mismatch,
    known: Tensor,
    tokens: _Tokens,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    per_token = correction.level == "token"
    log_ratio = both.difference
    if correction.level == "sequence":
        log_ratio = tokens.sequences.sum(log_ratio)
    elif correction.level == "geometric":
        log_ratio = tokens.sequences.mean(log_ratio, known)
    log_ratio = torch.where(log_ratio.isnan(), -torch.inf, log_ratio)  # both infinities in one sequence
    ratio = both.bounded(log_ratio).exp()
    lower = 0.0 if correction.lower is None else correction.lower
    upper = math.inf if correction.upper is None else correction.upper
    if correction.mode == "truncate":
        weights = ratio.clamp(lower, upper)
    else:
        weights = torch.where((ratio >= lower) & (ratio <= upper), ratio, 0.0)
    metrics = _weight_metrics(correction, both, log_ratio, ratio, weights, tokens)

    def on_tokens(x: Tensor) -> Tensor:
        return inside(x if per_token else tokens.sequences.spread(x), tokens.mask)

    weights = on_tokens(weights)
    if correction.batch_normalize:
        total, number = weights.sum(), tokens.counts.sum()
        if not per_token:
            total, number = tokens.means(weights).sum(), tokens.nonempty.sum()
        sums = torch.stack([total.to(torch.float64), number.to(torch.float64)])
        if group is not None:
            dist.all_reduce(sums, group=group)
        mean = sums[0] / (sums[1].clamp(min=1) + (correction.eps if per_token else 0.0))
        factor = torch.where(mean > 1e-8, mean, 1.0).to(weights.dtype)
        metrics["rollout_corr/rollout_is_batch_norm_factor"] = factor
        weights = weights / factor
    return weights, metrics


def _weight_metrics(
    correction: RolloutCorrection,
    both: _Mismatch,
    log_ratio: Tensor,  # this and the next two per token or, at another level, per sequence
    ratio: Tensor,
    weights: Tensor,
    tokens: _Tokens,
) -> dict[str, Tensor]:
    upper = math.inf if correction.upper is None else correction.upper
    lower = 1 / upper if correction.lower is None else correction.lower
    if correction.level == "token":
        high, low = tokens.mean(ratio > upper), tokens.mean(ratio < lower)
        largest, smallest = _extremes(weights, tokens.mask)
        least, mean, most = smallest, tokens.mean(weights), largest
    else:
        high, low = _mean(log_ratio > _log(upper)), _mean(log_ratio < _log(lower))
        largest, smallest = (x.exp() for x in _extremes(log_ratio))
        if correction.log_ratio_bound is not None:
            largest = largest.clamp(max=math.exp(correction.log_ratio_bound))
        most, least = _extremes(weights)
        mean = _mean(weights)
        weights, ratio = (tokens.sequences.spread(x).expand(tokens.mask.shape) for x in (weights, ratio))
    square = tokens.mean(weights.square())
    size = (tokens.mean(weights) + correction.eps).square() / square
    by_sequence, raw = tokens.means(weights), tokens.means(ratio)
    seq_most, seq_least = _extremes(by_sequence)
    of_weights = {
        "max": largest,
        "min": smallest,
        "mean": tokens.mean(weights),
        "ratio_fraction_high": high,
        "ratio_fraction_low": low,
        "std": tokens.std(weights),
        "eff_sample_size": torch.where(square > 0, size, 0.0),  # 0: no weight is left
        "seq_mean": _mean(by_sequence),
        "seq_std": _std(by_sequence, torch.ones_like(by_sequence, dtype=torch.bool)),
        "seq_max": seq_most,
        "seq_min": seq_least,
        "seq_max_deviation": _extremes((by_sequence - 1).abs())[0],
        "seq_fraction_high": _mean(raw > upper),
        "seq_fraction_low": _mean(raw < lower),
    }
    if correction.mode == "mask":
        of_weights["oob_ratio"] = tokens.mean((ratio < lower) | (ratio > upper))
    of_ratio = {"min": least, "mean": mean, "max": most}
    return {f"rollout_corr/rollout_is_{name}": x for name, x in of_weights.items()} | {
        f"sampling/importance_sampling_ratio/{name}": x for name, x in of_ratio.items()
    }


def _reject(rejection: Rejection, both: _Mismatch, known: Tensor, tokens: _Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """What one rejection keeps, bool and broadcastable to the tokens, and its metrics."""
    sequences = tokens.sequences
    x = both.statistic(rejection.kind)  # per token
    low, high = rejection.bounds
    if rejection.level == "token":
        rows, keep = tokens.means(x), (x <= high)
        if rejection.two_sided:
            keep = keep & (x >= low)
    else:
        known_tokens = _Tokens(known, sequences, tokens.eps)
        reduce = {
            "seq_sum": sequences.sum,
            "seq_mean": known_tokens.means,
            "seq_max": lambda x: sequences.max(x, known),
        }[rejection.level]
        rows = reduce(x)
        keep = rows <= high
        if rejection.two_sided:
            keep = keep & (rows >= low)
        keep = sequences.spread(keep)
        x = sequences.spread(rows).expand(tokens.mask.shape)
    keep = keep.expand(tokens.mask.shape)
    return keep, _rejection_metrics(rejection, x, rows, keep, tokens)


def _rejection_metrics(
    rejection: Rejection,
    x: Tensor,  # per token
    rows: Tensor,  # (B,)
    keep: Tensor,
    tokens: _Tokens,
) -> dict[str, Tensor]:
    low, high = rejection.bounds
    nonempty = tokens.nonempty
    row_high, row_low = _mean(rows > high, nonempty), _mean(rows < low, nonempty)
    row_most, row_least = _extremes(rows, nonempty)
    if rejection.level == "token":
        most, least = _extremes(x, tokens.mask)
        above, below = tokens.mean(x > high), tokens.mean(x < low)
    else:
        most, least, above, below = row_most, row_least, row_high, row_low
    dropped = tokens.sequences.counts(tokens.mask & ~keep, torch.float64) > 0
    metrics = {
        "mean": tokens.mean(x),
        "max": most,
        "min": least,
        "fraction_high": above,
        "fraction_low": below if rejection.two_sided else torch.zeros_like(below),
        "std": tokens.std(x.clamp(low, high)),
        "seq_mean": _mean(rows, nonempty),
        "seq_std": _std(rows, nonempty),
        "seq_max": row_most,
        "seq_min": row_least,
        "seq_max_deviation": _extremes(rows.abs(), nonempty)[0],
        "seq_fraction_high": row_high,
        "masked_fraction": tokens.mean(~keep),
        "seq_masked_fraction": _mean(dropped, nonempty),
    }
    if rejection.two_sided:
        metrics["seq_fraction_low"] = row_low
    return {f"rollout_corr/rollout_rs_{rejection.statistic}_{name}": value for name, value in metrics.items()}


def _mismatch_metrics(both: _Mismatch, known: _Tokens) -> dict[str, Tensor]:
    """How far engine and trainer are apart, over the tokens that both gave a logp."""
    d = both.difference
    trainer, engine = known.means(both.old), known.means(both.sampling)
    gap = engine - trainer
    gap_most, gap_least = _extremes(gap)
    total = both.bounded(known.sequences.sum_inside(d, known.mask))
    metrics = {
        "training_ppl": _mean((-trainer).exp()),
        "training_log_ppl": _mean(-trainer),
        "rollout_ppl": _mean((-engine).exp()),
        "rollout_log_ppl": _mean(-engine),
        "kl": known.mean(-d),
        "k3_kl": known.mean(kl_estimate(torch.zeros_like(d), d, "k3")),
        "log_ppl_diff": _mean(gap),
        "log_ppl_abs_diff": _mean(gap.abs()),
        "log_ppl_diff_max": gap_most,
        "log_ppl_diff_min": gap_least,
        "ppl_ratio": _mean(gap.exp()),
        "chi2_token": known.mean((2 * both.bounded(d)).exp()) - 1,
        "chi2_seq": _mean((2 * total).exp()) - 1,
    }
    apart = {"mean": known.mean(d.abs()), "max": _extremes(d.abs(), known.mask)[0]}
    return {f"rollout_corr/{name}": x for name, x in metrics.items()} | {
        f"sampling/sampling_logp_difference/{name}": x for name, x in apart.items()
    }


def _mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all entries, or those of a mask; 0 where there is none."""
    x = x if x.is_floating_point() else x.to(torch.float64)
    if mask is None:
        return x.sum() / max(1, x.numel())
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def _std(x: Tensor, mask: Tensor) -> Tensor:
    """Unbiased standard deviation over the entries of a mask; 0 for fewer than two."""
    centred = torch.where(mask, x - _mean(x, mask), 0.0)
    return (centred.square().sum() / (mask.sum() - 1).clamp(min=1)).sqrt()


def _extremes(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Largest and smallest entry, of a mask; 0 where there is none."""
    if x.numel() == 0:
        return x.new_zeros(()), x.new_zeros(())
    if mask is None:
        return x.amax(), x.amin()
    found = mask.any()
    most, least = torch.where(mask, x, -torch.inf).amax(), torch.where(mask, x, torch.inf).amin()
    return torch.where(found, most, 0.0), torch.where(found, least, 0.0)


def _log(x: float) -> float:
    return -math.inf if x == 0 else math.log(x)


def _check_bounds(lower: float | None, upper: float | None) -> None:
    if upper is not None and not upper > 0:
        raise ValueError(f"upper: expected a number above 0, got {upper!r}")
    if lower is not None and not 0 <= lower <= (math.inf if upper is None else upper):
        raise ValueError(f"lower: expected a number in [0, upper = {upper}], got {lower!r}")


def _verl_bounds(name: str, threshold: float | str) -> tuple[float | None, float]:
    """Lower and upper bound from verl's "upper" or "lower_upper"."""
    lower, separator, upper = str(threshold).rpartition("_")
    try:
        return float(lower) if separator else None, float(upper)
    except ValueError:
        raise ValueError(f"{name}: expected a number or 'lower_upper', got {threshold!r}") from None

"""Policy-gradient objectives (PPO, GRPO and their kin): the one definition that every form of the loss takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastrl_kernels import TokenBatch, register_objective
from fastrl_kernels.objective import PolicySpec, SurrogateSpec

from .aggregation import AGGREGATIONS, aggregation_weights, row_weights
from .kl import KL_ESTIMATORS, kl_estimate
from .policy_metrics import masked_mean, openrlhf_metrics, trl_metrics, verl_metrics
from .sequences import Sequences
from .surrogates import (
    LOSSES,
    OWN_OPTIONS,
    PRESETS,
    Conventions,
    Function,
    Surrogate,
    clipped,
    covariance_clipped,
    covariance_penalised,
    divergence_mask_kl,
    divergence_mask_tv,
    dual_clipped,
    gamma_weighted,
    geometric_mean,
    log_likelihood,
    log_ratio,
    quadratic,
    sequence_log_ratio,
    soft_gate,
    truncated_ratio,
)  # fmt: skip

LOSS_TYPES = tuple(LOSSES)
_METRICS = {None: trl_metrics, "trl": trl_metrics, "verl": verl_metrics, "openrlhf": openrlhf_metrics}


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """A policy-gradient objective with optional KL penalty, entropy bonus and likelihood of positive examples.

    With ratio `c = exp(logps - old_logps)` per token (or of a sequence), advantage A and mask M:

        policy term   L, the loss type's: `fastrl.objectives.surrogates.LOSSES` has formula, paper, peer and use of each
        token loss    gate * L + nll_coef * [A > 0] * (-logps) + beta * KL
        loss          sum of M * token loss, aggregated, - entropy_coef * mean entropy

    The gate is importance_ratio, off-policy mask and top-entropy mask; none of them touches what is added after it.

    loss_type, and its default aggregation:
        grpo, bnpo, dr_grpo, dapo, luspo: `-min(min(c, delta) A, clip(c, 1 - epsilon, 1 + epsilon_high) A)`, with
            seq-mean-token-mean, token-mean, seq-mean-token-sum-norm, token-mean and seq-mean-token-sum.
        gspo, rloo: the same with a sequence's ratio, exp of the mean or of the sum of its log-ratios.
        gmpo: geometric mean of a sequence's clipped ratios (epsilon is of the log-ratio: 0.4 in the paper).
        ppo: clipped, with the dual clip `clip_ratio_c` where A < 0 (None: 3, inf: off); token-mean.
        cispo: `-sg(min(c, epsilon_high)) A logps`; vespo: `-sg(phi) A logps` with a soft weight of the sequence.
        sapo: a sigmoid in place of the clip; dro: a quadratic penalty in place of the ratio.
        reinforce, gpg: `-A logps`.
        clip_cov, kl_cov: clipped, or penalised, where advantage and logp covary most over the batch.
        dppo_tv, dppo_kl: a mask by the change of the token's probability; epsilon bounds that change.

    preset: None, "trl", "verl" or "openrlhf". Projects differ in what they call by one name; a preset reproduces its
    origin's numbers, and has the loss types that its origin has. None follows TRL 1.16 wherever TRL has the loss type,
    so that argument names mean one thing, and the paper elsewhere, without anyone's clamps: a clamp hides a policy that
    runs away, and stops its gradient. Where None differs from TRL:
        cispo with epsilon_high unset caps the ratio at 1 + epsilon (TRL: at epsilon, which scales every token by 0.2).
        vespo leaves the importance ratios of masked tokens out (TRL multiplies them into the sequence's).
        gmpo, rloo: a sequence without tokens adds 0 (TRL: -A, with no gradient).
    "verl" bounds the log-ratio to +-20 (ppo and its aggregations, cispo, sapo, dppo) or to at most 10 (gspo, with
    the gradient per token), has the dual clip in grpo, dapo and dr_grpo too, clips cispo to [1 - epsilon, 1 +
    epsilon_high], bounds k3, does not multiply the KL by the ratio, averages over the sequences that have a token,
    divides by lengths + 1e-8, and aggregates the entropy bonus like the policy term. "openrlhf" has the same bounds on
    the log-ratio and no dual clip unless asked for.

    Args:
        loss_type: see above.
        preset: see above.
        aggregation: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean" or
            "seq-mean-token-sum-norm" (see `aggregation_weights`); None: the loss type's.
        epsilon: lower clip, at least 0; epsilon_high: upper clip (None: epsilon), DAPO's clip-higher.
        delta: upper bound of the ratio where A < 0 (two-sided clip, INTELLECT-2), or None.
        clip_ratio_c: above 1. ppo: bound of the ratio where A < 0; dppo: cap of the ratio (None: 20). Under "verl" None
            is 3, under "openrlhf" none.
        beta: weight of the KL to the reference; 0: no reference is needed.
        kl_estimator: one of `kl_estimate`'s, or "full": the exact KL over the vocabulary, which `linear_policy_loss`
            computes from the reference's head and `policy_loss` takes as `kl`.
        use_bias_correction_kl: multiply the KL by the ratio, with gradient (DeepSeek-V3.2; TRL's default). None: as the
            preset does; not with "full", gmpo and rloo.
        importance_sampling_level: "token", or "sequence" (GSPO, Zheng et al. 2025).
        entropy_coef: weight of the entropy bonus; a negative one penalises entropy.
        nll_coef: weight of the negative log-likelihood of the tokens of positive advantage, aggregated like the policy
            term (VAPO, Yue et al. 2025, arXiv:2504.05118, which averages over those tokens alone); 0.1 there.
        top_entropy_quantile: rho; only the share rho of tokens of highest entropy enters the policy term and the bonus.
        off_policy_mask_threshold: sequences of negative advantage whose mean `sampling_logps - logps` exceeds it leave
            the policy term (DeepSeek-V3.2), or None.
        max_completion_length: tokens; the divisor of seq-mean-token-sum-norm, unless a normalizer is given.
        sapo_temperature_pos, sapo_temperature_neg, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: TRL's.
        clip_cov_ratio, clip_cov_lb, clip_cov_ub, kl_cov_ratio, ppo_kl_coef, dro_beta: verl's (which has no default for
            the last).

    A token of logp -inf has ratio 0: it adds nothing where the ratio is a factor. Where logps are (reinforce, gpg,
    vespo), it counts as the least finite number and gets no gradient; in dro loss and gradient of it are infinite.

    `token_loss` and `metrics` are the definition. A fused kernel proven equal to them (`kernel_spec`) computes both and
    the gradients in one pass over the tokens.

    A subclass that overrides `token_loss` (plain PyTorch, differentiable) works in every form, single pass included.
    If it needs other tokens than the one it scores, it also overrides `token_local` to be False.

    Raises:
        ValueError: an argument out of its range, or one that the loss type or the preset has no use for (only
            max_completion_length may always be given); the message names it.
    """

    loss_type: str = "dapo"
    preset: str | None = None
    aggregation: str | None = None
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    clip_ratio_c: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool | None = None
    importance_sampling_level: str = "token"
    entropy_coef: float = 0.0
    nll_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    max_completion_length: int | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    clip_cov_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 0.0002
    ppo_kl_coef: float = 0.1
    dro_beta: float = 1.0

    def __post_init__(self) -> None:
        def require(name: str, valid: bool, expected: str) -> None:
            if not valid:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        def optional(name: str, valid: bool, expected: str) -> None:
            require(name, getattr(self, name) is None or valid, f"None or {expected}")

        require("loss_type", self.loss_type in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}")
        require("preset", self.preset in PRESETS, "None, 'trl', 'verl' or 'openrlhf'")
        known = self.conventions.losses
        require("loss_type", self.loss_type in known, f"with preset {self.preset!r} one of {', '.join(known)}")
        optional("aggregation", self.aggregation in AGGREGATIONS, f"one of {', '.join(AGGREGATIONS)}")
        require("epsilon", self.epsilon >= 0, "a number of at least 0")
        optional("epsilon_high", (self.epsilon_high or 0) >= 0, "a number of at least 0")
        optional("delta", (self.delta or 0) > 0, "a number above 0")
        optional("clip_ratio_c", (self.clip_ratio_c or 0) > 1, "a number above 1")
        estimators = (*KL_ESTIMATORS, "full")
        require("kl_estimator", self.kl_estimator in estimators, f"one of {', '.join(estimators)}")
        level = self.importance_sampling_level
        require("importance_sampling_level", level in ("token", "sequence"), "'token' or 'sequence'")
        require("nll_coef", self.nll_coef >= 0, "a number of at least 0")
        require("top_entropy_quantile", 0 <= self.top_entropy_quantile <= 1, "a number in [0, 1]")
        optional("max_completion_length", (self.max_completion_length or 0) > 0, "a number of tokens above 0")
        positive = ("sapo_temperature_pos", "sapo_temperature_neg", "clip_cov_ratio", "kl_cov_ratio", "dro_beta")
        for name in positive:
            require(name, getattr(self, name) > 0, "a number above 0")
        require("clip_cov_lb", self.clip_cov_lb <= self.clip_cov_ub, f"at most clip_cov_ub = {self.clip_cov_ub}")
        self._refuse_unused()
        object.__setattr__(self, "handle", register_objective(self))

    def _refuse_unused(self) -> None:
        entry = self.surrogate
        what = f"loss_type {self.loss_type!r}" + ("" if self.preset is None else f" with preset {self.preset!r}")
        defaults = {f.name: f.default for f in fields(PolicyObjective)}
        for name in OWN_OPTIONS:
            value = getattr(self, name)
            if name not in entry.options and value != defaults[name] and (name, value) != (_LEVEL, entry.level):
                raise ValueError(f"{name}: {what} has no use for it, got {value!r}")
        if entry.fixed_aggregation and self.aggregation not in (None, entry.aggregation):
            raise ValueError(f"aggregation: {what} always has {entry.aggregation!r}, got {self.aggregation!r}")
        if entry.per_sequence and self.off_policy_mask_threshold is not None:
            raise ValueError(f"off_policy_mask_threshold: {what} has no use for it, it has one loss per sequence")
        if self.use_bias_correction_kl and not (entry.kl_times_ratio and self.kl_estimator != "full"):
            reason = "an exact KL" if self.kl_estimator == "full" else what
            raise ValueError(f"use_bias_correction_kl: {reason} has no ratio per token to multiply by")

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or an unpickled objective is built anew: it needs a handle of its own.
        return _rebuild, (type(self), {f.name: getattr(self, f.name) for f in fields(self) if f.init})

    # What is true of the loss type, under the preset -----------------------------------------------------------------

    @cached_property
    def conventions(self) -> Conventions:
        return PRESETS[self.preset]

    @cached_property
    def surrogate(self) -> Surrogate:
        return self.conventions.losses[self.loss_type]

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """What the ratio is clipped to."""
        return self.surrogate.bounds(self)

    @property
    def ratio_cap(self) -> float:
        """clip_ratio_c, or what stands for it where it is None."""
        return self.surrogate.ratio_cap if self.clip_ratio_c is None else self.clip_ratio_c

    @property
    def sequence_ratio(self) -> bool:
        """Whether all tokens of a sequence share one ratio."""
        return self._level != "token"

    @property
    def kl_times_ratio(self) -> bool:
        """Whether the KL of a token is multiplied by its ratio."""
        if self.use_bias_correction_kl is not None:
            return self.use_bias_correction_kl
        return self.conventions.kl_times_ratio and self.surrogate.kl_times_ratio

    @property
    def sampled_kl(self) -> bool:
        """Whether the token loss has a KL term, an estimate from the tokens' own logps."""
        return self.beta != 0 and self.kl_estimator != "full"

    @property
    def exact_kl(self) -> bool:
        """Whether the loss has the KL over the whole vocabulary, which is not a matter of `token_loss`."""
        return self.beta != 0 and self.kl_estimator == "full"

    @property
    def _level(self) -> str:
        return self.surrogate.level or self.importance_sampling_level

    @property
    def _epsilon_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    # What the loss of a token depends on -----------------------------------------------------------------------------

    @property
    def token_local(self) -> bool:
        """Whether a token's loss depends on its own logp and entropy only, so that a single pass can compute it."""
        return (
            self.surrogate.token_local
            and self._level == "token"
            and self.top_entropy_quantile == 1
            and self.off_policy_mask_threshold is None
        )

    def live_tokens(self, *, advantages: Tensor, mask: Tensor, importance_ratio: Tensor | None = None) -> Tensor:
        """Tokens that may carry a gradient, bool in the shape of mask, known before any forward.

        A token is dead, exactly, when it is masked, or when its advantage (or rollout ratio) is 0 and neither a KL nor
        an entropy term acts on it. A subclass with its own `token_loss` keeps all tokens of the mask, unless it
        overrides this too.
        """
        live = mask if mask.dtype == torch.bool else mask != 0
        own_loss = type(self).token_loss is not PolicyObjective.token_loss
        if own_loss or self.sampled_kl or self.entropy_coef != 0 or not self.surrogate.dead_without_advantage:
            return live
        advantages = advantages.unsqueeze(-1) if advantages.ndim < mask.ndim else advantages
        moved = advantages != 0
        if importance_ratio is not None and not self.surrogate.ratio_inside:
            moved = moved & (importance_ratio != 0)
        return live & (moved if self.nll_coef == 0 else moved | (advantages > 0))

    @property
    def kernel_spec(self) -> PolicySpec | None:
        """What the fused kernel has to know to stand in for `token_loss` and `metrics`; None where it must not.

        That is where the kernel computes something else, or a subclass overrides any method that it would bypass.
        """
        return self._kernel_spec if self._is_the_definition else None

    @property
    def surrogate_spec(self) -> SurrogateSpec | None:
        """The same for the CPU's kernel of the other policy terms; None also where the first kernel stands in."""
        return self._surrogate_spec if self._is_the_definition else None

    @property
    def _is_the_definition(self) -> bool:
        kind = type(self)
        return all(getattr(kind, name) is method for name, method in _DEFINITION)

    @cached_property
    def _kernel_spec(self) -> PolicySpec | None:
        entry = self.surrogate
        if entry.loss is not clipped or entry.log_ratio_bounds is not None:
            return None
        if self._level not in ("token", "sequence") or _METRICS[self.preset] is not trl_metrics:
            return None
        if self.nll_coef != 0 or (self.sampled_kl and self.kl_estimator not in _KERNEL_ESTIMATORS):
            return None
        return PolicySpec(
            low=1 - self.epsilon,
            high=1 + self._epsilon_high,
            delta=math.inf if self.delta is None else self.delta,
            beta=self.beta if self.sampled_kl else 0.0,
            kl_estimator=self.kl_estimator if self.sampled_kl else "k3",
            kl_times_ratio=self.kl_times_ratio,
            sequence=self.sequence_ratio,
        )

    @cached_property
    def _surrogate_spec(self) -> SurrogateSpec | None:
        entry = self.surrogate
        kind, level = _KERNEL_SURROGATES.get(entry.loss), _KERNEL_LEVELS.get(self._level)
        if kind is None or level is None or self.sampled_kl or self.nll_coef != 0 or self.delta is not None:
            return None
        if self._kernel_spec is not None:
            return None
        steps = kind in ("variation", "divergence")
        low, high = self.ratio_bounds
        if steps:
            low, high = self.epsilon, self._epsilon_high
        elif kind == "geometric":
            low, high = -self.epsilon, self._epsilon_high
        return SurrogateSpec(
            kind,
            low,
            high,
            cap=self.ratio_cap if steps or entry.loss is dual_clipped else math.inf,
            log_bounds=entry.log_ratio_bounds or (-math.inf, math.inf),
            level=level,
            temperatures=(self.sapo_temperature_pos, self.sapo_temperature_neg),
            coef=self.ppo_kl_coef if kind == "penalised" else self.dro_beta,
            gammas=(self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg),
            length_eps=self.conventions.length_eps,
            reads_padding=entry.reads_padding,
            moved=entry.dead_without_advantage,
        )

    # The definition --------------------------------------------------------------------------------------------------

    def token_loss(self, tokens: TokenBatch) -> Tensor:
        """Loss of each token, before aggregation and without the entropy bonus; broadcasts to the shape of logps."""
        ratio, entry = self._ratio(tokens) if tokens.ratio is None else tokens.ratio, self.surrogate
        loss = entry.loss(self, tokens, ratio)
        if tokens.gate is not None and not entry.per_sequence:
            loss = loss * tokens.gate
        if self.nll_coef != 0:
            loss = loss - self.nll_coef * torch.where(tokens.advantages > 0, tokens.logps, 0.0)
        return loss + self.beta * self._kl(tokens, ratio) if self.sampled_kl else loss

    def _ratio(self, tokens: TokenBatch) -> Tensor:
        """Importance ratio: per token, or one that the tokens of a sequence share, `(B, 1)` in a padded batch."""
        d = log_ratio(tokens) if self._level == "token" else sequence_log_ratio(tokens, self._level)
        bounds = self.surrogate.log_ratio_bounds
        return torch.exp(d if bounds is None else torch.clamp(d, *bounds))

    def _kl(self, tokens: TokenBatch, ratio: Tensor) -> Tensor:
        if tokens.ref_logps is None:
            raise ValueError(f"ref_logps: needed with beta = {self.beta}")
        kl = kl_estimate(tokens.logps, tokens.ref_logps, self.kl_estimator, clamp=self.conventions.kl_clamp)
        return kl * ratio if self.kl_times_ratio else kl

    # Aggregation -----------------------------------------------------------------------------------------------------

    def token_weights(
        self, mask: Tensor, normalizer: Tensor | float | None, dtype: torch.dtype, sequences: Sequences | None = None
    ) -> Tensor:
        """Weight of each token's loss in the sum, in the shape of mask; 0 outside it. See `aggregation_weights`."""
        sequences = Sequences.padded(mask.shape[0]) if sequences is None else sequences
        aggregation, numbers = self._aggregated(mask, normalizer, sequences.count)
        return aggregation_weights(aggregation, mask, sequences, **numbers, dtype=dtype)

    def row_weights(self, mask: Tensor, normalizer: Tensor | float | None, counts: Tensor, total: float) -> Tensor:
        """The weights of a padded batch's tokens, `(B, 1)`, from those of the mask per row, `(B,)`, and in all."""
        aggregation, numbers = self._aggregated(mask, normalizer, counts.shape[0])
        return row_weights(aggregation, counts, total, **numbers)

    def _aggregated(
        self, mask: Tensor, normalizer: Tensor | float | None, sequences: int
    ) -> tuple[str, dict[str, Any]]:
        """The aggregation, and the numbers that it takes."""
        entry, origin = self.surrogate, self.conventions
        aggregation, length = self.aggregation or entry.aggregation, None
        if aggregation == "seq-mean-token-sum-norm":
            length = 1.0 if normalizer is not None else self._length(mask)
        if normalizer is None and aggregation.startswith("seq-") and (origin.counts_empty or entry.per_sequence):
            normalizer = max(1, sequences)
        eps = 0.0 if entry.per_sequence else origin.length_eps
        return aggregation, {"normalizer": normalizer, "length": length, "eps": eps}

    def _length(self, mask: Tensor) -> float:
        if self.max_completion_length is not None:
            return float(self.max_completion_length)
        if self.conventions.width_is_length and mask.ndim == 2:
            return float(max(1, mask.shape[-1]))
        raise ValueError(f"max_completion_length: {self.loss_type} needs it, or a normalizer")

    def entropy_weights(self, mask: Tensor, normalizer: Tensor | float | None, dtype: torch.dtype) -> Tensor | None:
        """Weight of each token's entropy in the bonus, in the shape of mask, or None where there is no bonus."""
        if self.entropy_coef == 0:
            return None
        ones = mask.to(dtype)
        return self.entropy_coef * ones / (ones.sum().clamp(min=1) if normalizer is None else normalizer)

    # Metrics ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def metrics(self, tokens: TokenBatch, mask: Tensor, live: Tensor) -> dict[str, Tensor]:
        """live_fraction; kl and entropy: means over scored tokens (`tokens.mask`); the rest: see `policy_metrics`."""
        scored = mask if tokens.mask is None else tokens.mask
        out = {"live_fraction": live.sum() / mask.sum().clamp(min=1)}
        ratio = self._ratio(tokens) if tokens.ratio is None else tokens.ratio
        if self.sampled_kl:
            out["kl"] = masked_mean(self._kl(tokens, ratio), scored)
        if tokens.entropy is not None:
            out["entropy"] = masked_mean(tokens.entropy, scored)
        return out | _METRICS[self.preset](self, tokens, ratio, mask, scored)


_LEVEL = "importance_sampling_level"
_KERNEL_ESTIMATORS = ("k1", "k2", "k3")
_KERNEL_LEVELS = {"token": "token", "sequence-token": "row_mean", "product": "row_sum"}
_KERNEL_SURROGATES: dict[Function, str] = {
    clipped: "clipped",
    dual_clipped: "clipped",
    covariance_clipped: "clipped",
    covariance_penalised: "penalised",
    gamma_weighted: "gamma",
    geometric_mean: "geometric",
    truncated_ratio: "truncated",
    log_likelihood: "likelihood",
    soft_gate: "soft",
    quadratic: "quadratic",
    divergence_mask_tv: "variation",
    divergence_mask_kl: "divergence",
}

# The definition that the fused kernel stands in for, as it is here: a subclass or a patch that differs is not bypassed.
_DEFINITION = tuple(
    (name, getattr(PolicyObjective, name))
    for name in ("token_loss", "metrics", "_ratio", "_kl", "_epsilon_high", "live_tokens")
)


def _rebuild(kind: type[PolicyObjective], arguments: dict[str, Any]) -> PolicyObjective:
    return kind(**arguments)

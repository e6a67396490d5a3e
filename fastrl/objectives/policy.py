"""Policy-gradient objectives (GRPO and its kin): one definition, on given logps or fused with the LM head."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from fastrl_kernels import TokenBatch, backends, linear_logprobs, ops, register_objective, validation
from fastrl_kernels.functional import harmonize
from fastrl_kernels.head import LogitTransform
from fastrl_kernels.objective import PolicySpec, weighted_terms

from .kl import KL_ESTIMATORS, kl_estimate

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


class LossOutput(NamedTuple):
    """What a policy loss returns."""

    loss: Tensor  # scalar, differentiable
    logps: Tensor  # (B, T), detached; 0 where a token was not scored
    metrics: dict[str, Tensor]  # detached scalars, TRL's names


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """A clipped policy-gradient objective with optional KL penalty and entropy bonus. Argument names are TRL 1.16's.

    With ratio `c = exp(logps - old_logps)` (per token, or per sequence the geometric mean), advantage A and mask M:

        policy term   L = -min(min(c, delta) A, clip(c, 1 - epsilon, 1 + epsilon_high) A)
        token loss    gate * L + beta * KL          gate: rollout ratio, off-policy mask, top-entropy mask
        loss          sum of M * token loss, aggregated by loss_type, - entropy_coef * mean entropy

    loss_type, and what `normalizer` is for it:
        grpo: mean over tokens, then over sequences (Shao et al. 2024, eq. 3). Normalizer: sequences.
        bnpo: mean over the tokens of the (micro-)batch. Normalizer: tokens.
        dr_grpo: sum over tokens / (sequences x max_completion_length) (Liu et al. 2025): no length bias.
            Normalizer: sequences x max_completion_length.
        dapo: sum over tokens / tokens of the whole optimizer step (Yu et al. 2025, eq. 8). Normalizer: tokens.

    Args:
        loss_type: "grpo", "bnpo", "dr_grpo" or "dapo".
        epsilon: lower clip, at least 0; epsilon_high: upper clip (None: epsilon), DAPO's clip-higher.
        delta: upper bound of the ratio where A < 0 (two-sided clip, INTELLECT-2), or None.
        beta: weight of the KL to the reference; 0: no reference is needed.
        kl_estimator: "k1", "k2" or "k3" (see `kl_estimate`).
        use_bias_correction_kl: multiply the KL by the ratio, with gradient (DeepSeek-V3.2; TRL's default).
        importance_sampling_level: "token", or "sequence" (GSPO, Zheng et al. 2025).
        entropy_coef: weight of the entropy bonus; a negative one penalises entropy.
        top_entropy_quantile: rho; only the share rho of tokens of highest entropy enters the policy term and the bonus.
        off_policy_mask_threshold: sequences of negative advantage whose mean `sampling_logps - logps` exceeds it leave
            the policy term (DeepSeek-V3.2), or None.
        max_completion_length: tokens, needed by dr_grpo unless a normalizer is given.

    `token_loss` and `metrics` are the definition. A fused kernel proven equal to them (`kernel_spec`) computes both and
    the gradients in one pass over the tokens.

    A subclass that overrides `token_loss` (plain PyTorch, differentiable) works in every form, single pass included.
    If it needs other tokens than the one it scores, it also overrides `token_local` to be False.

    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = True
    importance_sampling_level: str = "token"
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        def require(name: str, valid: bool, expected: str) -> None:
            if not valid:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        require("loss_type", self.loss_type in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}")
        require("epsilon", self.epsilon >= 0, "a number of at least 0")
        require("epsilon_high", self.epsilon_high is None or self.epsilon_high >= 0, "None or a number of at least 0")
        require("delta", self.delta is None or self.delta > 0, "None or a number above 0")
        require("kl_estimator", self.kl_estimator in KL_ESTIMATORS, f"one of {', '.join(KL_ESTIMATORS)}")
        level = self.importance_sampling_level
        require("importance_sampling_level", level in ("token", "sequence"), "'token' or 'sequence'")
        require("top_entropy_quantile", 0 <= self.top_entropy_quantile <= 1, "a number in [0, 1]")
        length = self.max_completion_length
        require("max_completion_length", length is None or length > 0, "None or a number of tokens above 0")
        object.__setattr__(self, "handle", register_objective(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or an unpickled objective is built anew: it needs a handle of its own.
        return _rebuild, (type(self), {f.name: getattr(self, f.name) for f in fields(self) if f.init})

    # What the loss of a token depends on ----------------------------------------------------------------------------

    @property
    def token_local(self) -> bool:
        """Whether a token's loss depends on its own logp and entropy only, so that a single pass can compute it."""
        return (
            self.importance_sampling_level == "token"
            and self.top_entropy_quantile == 1
            and self.off_policy_mask_threshold is None
        )

    def live_tokens(self, *, advantages: Tensor, mask: Tensor, importance_ratio: Tensor | None = None) -> Tensor:
        """Tokens that may carry a gradient, bool `(B, T)`, known before any forward.

        A token is dead, exactly, when it is masked, or when its advantage (or rollout ratio) is 0 and neither a KL nor
        an entropy term acts on it. A subclass with its own `token_loss` keeps all tokens of the mask, unless it
        overrides this too.
        """
        live = mask if mask.dtype == torch.bool else mask != 0
        own_loss = type(self).token_loss is not PolicyObjective.token_loss
        if own_loss or self.beta != 0 or self.entropy_coef != 0:
            return live
        live = live & (_per_token(advantages) != 0)
        return live if importance_ratio is None else live & (importance_ratio != 0)

    @property
    def kernel_spec(self) -> PolicySpec | None:
        """What the fused kernel has to know to stand in for `token_loss` and `metrics`; None where it must not.

        That is where a subclass overrides any method that the kernel would bypass: it has its own definition.
        """
        if any(getattr(type(self), name) is not method for name, method in _DEFINITION.items()):
            return None
        return PolicySpec(
            low=1 - self.epsilon,
            high=1 + self._epsilon_high,
            delta=math.inf if self.delta is None else self.delta,
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            kl_times_ratio=self.use_bias_correction_kl,
            sequence=self.importance_sampling_level == "sequence",
        )

    # The definition -------------------------------------------------------------------------------------------------

    def token_loss(self, tokens: TokenBatch) -> Tensor:
        """Loss of each token, before aggregation and without the entropy bonus; broadcasts to the shape of logps."""
        ratio = self._ratio(tokens)
        advantages = tokens.advantages
        clipped = torch.clamp(ratio, 1 - self.epsilon, 1 + self._epsilon_high)
        bounded = ratio if self.delta is None else torch.clamp(ratio, max=self.delta)
        loss = -torch.min(bounded * advantages, clipped * advantages)
        if tokens.gate is not None:
            loss = loss * tokens.gate
        return loss if self.beta == 0 else loss + self.beta * self._kl(tokens, ratio)

    @property
    def _epsilon_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def _ratio(self, tokens: TokenBatch) -> Tensor:
        """Importance ratio: per token, or `(B, 1)` per sequence."""
        old = tokens.logps.detach() if tokens.old_logps is None else tokens.old_logps
        log_ratio = tokens.logps - old
        if self.importance_sampling_level == "sequence":
            log_ratio = _masked_mean_rows(log_ratio, tokens.mask).unsqueeze(-1)
        return torch.exp(log_ratio)

    def _kl(self, tokens: TokenBatch, ratio: Tensor) -> Tensor:
        if tokens.ref_logps is None:
            raise ValueError(f"ref_logps: needed with beta = {self.beta}")
        kl = kl_estimate(tokens.logps, tokens.ref_logps, self.kl_estimator)
        return kl * ratio if self.use_bias_correction_kl else kl

    # Aggregation ----------------------------------------------------------------------------------------------------

    def token_weights(self, mask: Tensor, normalizer: Tensor | float | None, dtype: torch.dtype) -> Tensor:
        """Weight `(B, T)` of each token's loss in the sum; 0 outside the mask."""
        ones = mask.to(dtype)
        if self.loss_type == "grpo":
            ones = ones / ones.sum(-1, keepdim=True).clamp(min=1)
        if normalizer is not None:
            return ones / normalizer
        if self.loss_type == "grpo":
            return ones / max(1, ones.shape[0])
        if self.loss_type == "dr_grpo":
            if self.max_completion_length is None:
                raise ValueError("max_completion_length: dr_grpo needs it, or a normalizer")
            return ones / max(1, ones.shape[0] * self.max_completion_length)
        return ones / ones.sum().clamp(min=1)

    def entropy_weights(self, mask: Tensor, normalizer: Tensor | float | None, dtype: torch.dtype) -> Tensor | None:
        """Weight `(B, T)` of each token's entropy in the bonus, or None where there is no bonus."""
        if self.entropy_coef == 0:
            return None
        ones = mask.to(dtype)
        return self.entropy_coef * ones / (ones.sum().clamp(min=1) if normalizer is None else normalizer)

    # Metrics --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def metrics(self, tokens: TokenBatch, mask: Tensor, live: Tensor) -> dict[str, Tensor]:
        """TRL's metrics. kl and entropy: means over scored tokens (`tokens.mask`); clip ratios: shares of `mask`."""
        scored = mask if tokens.mask is None else tokens.mask
        dtype = tokens.logps.dtype
        count = mask.sum().clamp(min=1)
        out = {"live_fraction": live.sum() / count}
        ratio = self._ratio(tokens)
        if self.beta != 0:
            out["kl"] = _masked_mean(self._kl(tokens, ratio), scored)
        if tokens.entropy is not None:
            out["entropy"] = _masked_mean(tokens.entropy, scored)
        if self.delta is not None:
            ratio = torch.clamp(ratio, max=self.delta)
        low = (ratio < 1 - self.epsilon) & (tokens.advantages < 0)
        high = (ratio > 1 + self._epsilon_high) & (tokens.advantages > 0)
        if self.importance_sampling_level == "sequence" and low.shape[-1] == 1:  # one value per sequence
            low_rows, high_rows = low.squeeze(-1).to(dtype), high.squeeze(-1).to(dtype)
            means = [x.to(dtype).mean() for x in (low, high, low | high)]
        else:
            low, high = low & scored, high & scored
            low_rows, high_rows = low.sum(-1) / mask.sum(-1), high.sum(-1) / mask.sum(-1)  # NaN: a fully masked row
            means = [x.sum() / count for x in (low, high, low | high)]
        out["clip_ratio/low_mean"], out["clip_ratio/high_mean"], out["clip_ratio/region_mean"] = means
        out["clip_ratio/low_min"] = -_nan_max(-low_rows)
        out["clip_ratio/high_max"] = _nan_max(high_rows)
        return out


# The definition that the fused kernel stands in for, as it is here: a subclass or a patch that differs is not bypassed.
_DEFINITION = {
    name: getattr(PolicyObjective, name) for name in ("token_loss", "metrics", "_ratio", "_kl", "_epsilon_high")
}


def _rebuild(kind: type[PolicyObjective], arguments: dict[str, Any]) -> PolicyObjective:
    return kind(**arguments)


# The form on given logps --------------------------------------------------------------------------------------------


def policy_loss(
    logps: Tensor,  # (B, T)
    objective: PolicyObjective,
    *,
    advantages: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logps: Tensor | None = None,  # (B, T)
    ref_logps: Tensor | None = None,  # (B, T)
    entropy: Tensor | None = None,  # (B, T)
    importance_ratio: Tensor | None = None,  # (B, T) or (B, 1)
    sampling_logps: Tensor | None = None,  # (B, T)
    normalizer: Tensor | float | None = None,
    entropy_normalizer: Tensor | float | None = None,
    backend: str | None = None,
) -> LossOutput:
    """The policy loss on given log-probabilities; differentiable in logps and entropy, twice if need be.

    In fp32 and fp64 a built-in objective takes one pass over the tokens for loss, gradients and metrics together. Its
    definition runs under autograd instead for a gradient that will be differentiated again, for an objective with a
    `token_loss` of its own, in other dtypes and under `torch.func`.

    Args:
        logps: `(B, T)` of the taken tokens under the policy.
        objective: what to compute; see `PolicyObjective`.
        advantages: `(B,)`, or `(B, T)` per token.
        mask: `(B, T)`, nonzero where the token counts. Values elsewhere are never used and may be NaN or inf.
        old_logps: under the policy that sampled; None: the policy itself (ratio 1).
        ref_logps: under the reference; needed with beta.
        entropy: per token, nats; needed with entropy_coef or top_entropy_quantile, else for the metric only.
        importance_ratio: constant factor of the policy term (rollout-mismatch correction), `(B, T)` or `(B, 1)`.
        sampling_logps: logps given by the rollout engine, for the off-policy mask; NaN counts as no difference.
        normalizer: denominator of the aggregation (its meaning is the loss type's, see `PolicyObjective`). The losses
            of micro-batches that share the whole batch's normalizer add up to the whole batch's loss. None: this
            batch's own.
        entropy_normalizer: tokens over which the bonus averages the entropy. None: this batch's own.
        backend: None chooses; "reference" (the definition), "cpu", "triton" force.

    Raises:
        ValueError: a wrong shape, or a missing input that the objective needs.
        RuntimeError: the forced backend does not work on this machine; the message says why.
    """
    if logps.ndim != 2:
        raise ValueError(f"logps: expected shape (B, T), got {tuple(logps.shape)}")
    tokens, mask = _check(
        logps.shape, logps.dtype, logps.device, advantages, mask, old_logps, ref_logps, importance_ratio
    )
    tokens = replace(tokens, logps=logps, entropy=entropy, mask=mask)
    weights = objective.token_weights(mask, normalizer, logps.dtype)
    live = objective.live_tokens(advantages=advantages, mask=mask, importance_ratio=importance_ratio)
    name = backends.choose(backend, logps.device)
    return _evaluate(objective, tokens, mask, live, weights, sampling_logps, entropy_normalizer, name)


def _evaluate(
    objective: PolicyObjective,
    tokens: TokenBatch,  # (B, T), with the mask of scored tokens
    mask: Tensor,  # (B, T): tokens that count
    live: Tensor,  # (B, T)
    weights: Tensor,  # (B, T)
    sampling_logps: Tensor | None,
    entropy_normalizer: Tensor | float | None,
    backend: str,
) -> LossOutput:
    scored = tokens.mask
    assert scored is not None  # both callers set it

    def clean(x: Tensor | None) -> Tensor | None:  # so that 0 * inf can't happen, in values and in gradients
        return x if x is None or x.shape != scored.shape else torch.where(scored, x, 0.0)

    logps = torch.where(scored, tokens.logps, 0.0)
    bonus_mask = scored
    if objective.top_entropy_quantile < 1:
        bonus_mask = _top_entropy(_needed(tokens.entropy, "entropy", "top_entropy_quantile"), scored, objective)
        tokens = replace(tokens, gate=_times(clean(tokens.gate), bonus_mask.to(logps.dtype)))
    if objective.off_policy_mask_threshold is not None:
        cleaned = replace(tokens, logps=logps, old_logps=clean(tokens.old_logps))
        keep = _on_policy(cleaned, clean(sampling_logps), objective.off_policy_mask_threshold)
        tokens = replace(tokens, gate=_times(clean(tokens.gate), keep.to(logps.dtype)))
    bonus_weights = objective.entropy_weights(bonus_mask, entropy_normalizer, logps.dtype)
    if bonus_weights is not None and tokens.entropy is None:
        raise ValueError("entropy: needed by entropy_coef")
    if _kernel_serves(objective, tokens, weights, bonus_weights, backend):
        if bonus_weights is None and tokens.entropy is not None:
            tokens = replace(tokens, entropy=tokens.entropy.detach())  # no edge of the graph where no gradient flows
        differentiable = (x for x in (tokens.logps, tokens.entropy) if x is not None)
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
        loss, sums, *_ = _policy_terms(objective, tokens, mask, live, weights, bonus_weights, gradients, backend)
        metrics, policy = _metrics_from_sums(objective, tokens, sums)
        metrics["policy_loss"] = policy
        return LossOutput(loss, logps.detach(), metrics)
    tokens = TokenBatch(
        logps,
        clean(tokens.entropy),
        clean(tokens.advantages),  # type: ignore[arg-type]
        clean(tokens.old_logps),
        clean(tokens.ref_logps),
        clean(tokens.gate),
        scored,
    )
    loss = policy = weighted_terms(objective, tokens, weights, None).sum()
    metrics = objective.metrics(tokens, mask, live)
    metrics["policy_loss"] = policy.detach()
    if bonus_weights is not None and tokens.entropy is not None:
        loss = policy - (tokens.entropy * bonus_weights).sum()
    return LossOutput(loss, logps.detach(), metrics)


# The fused kernel on [B, T] vectors ---------------------------------------------------------------------------------


def _kernel_serves(
    objective: PolicyObjective,
    tokens: TokenBatch,
    weights: Tensor,
    bonus_weights: Tensor | None,
    backend: str,
) -> bool:
    """Whether the backend's `policy_terms` may stand in for the definition: its dtypes, and no functional transform."""
    if backend == "reference" or objective.kernel_spec is None:
        return False
    dtype = tokens.logps.dtype
    vectors = (tokens.entropy, weights, bonus_weights)
    if dtype not in (torch.float32, torch.float64) or any(x is not None and x.dtype != dtype for x in vectors):
        return False
    # torch.func and forward-mode autograd have no rule for the operator.
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def _policy_terms(
    objective: PolicyObjective,
    tokens: TokenBatch,  # (B, T)
    mask: Tensor,
    live: Tensor,
    weights: Tensor,
    bonus_weights: Tensor | None,
    gradients: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if objective.beta != 0 and tokens.ref_logps is None:
        raise ValueError(f"ref_logps: needed with beta = {objective.beta}")
    run = ops.policy_terms if torch.compiler.is_compiling() else ops.PolicyTermsFunction.apply
    return run(
        tokens.logps, tokens.entropy, tokens.advantages, tokens.old_logps, tokens.ref_logps, tokens.gate, tokens.mask,
        mask, live, weights, bonus_weights, objective.handle, gradients, backend,  # type: ignore[attr-defined]
    )  # fmt: skip


def _metrics_from_sums(
    objective: PolicyObjective,
    tokens: TokenBatch,
    sums: Tensor,  # (B, 9), the columns of TermSums
) -> tuple[dict[str, Tensor], Tensor]:
    """What `PolicyObjective.metrics` computes, in its dtypes, and the loss without the bonus."""
    dtype, share = tokens.logps.dtype, torch.get_default_dtype()
    total = sums.sum(0)  # few operations on few numbers: on a small batch each costs as much as the kernel
    shares = total[6:9] / total[5].clamp(min=1)  # live, low, high
    rates = sums[:, 7:9]
    if objective.importance_sampling_level == "sequence" and tokens.advantages.shape[-1] == 1:
        clip_dtype, clipped = dtype, rates.mean(0)
    else:
        clip_dtype, clipped = share, shares[1:]
        rates = rates / sums[:, 5:6]  # NaN: a fully masked row
    out = {"live_fraction": shares[0].to(share)}
    kl, entropy = (total[2:4] / total[4].clamp(min=1)).to(dtype).unbind()
    if objective.beta != 0:
        out["kl"] = kl
    if tokens.entropy is not None:
        out["entropy"] = entropy
    low, high, region = torch.cat([clipped, clipped.sum(0, keepdim=True)]).to(clip_dtype).unbind()
    out |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": region}
    if sums.shape[0] == 0:
        lowest = highest = sums.new_full((), torch.nan, dtype=clip_dtype)
    else:
        worst = torch.stack([-rates[:, 0], rates[:, 1]]).nan_to_num(nan=-torch.inf).amax(1)
        lowest, highest = torch.where(worst == -torch.inf, torch.nan, worst).to(clip_dtype).unbind()
    out |= {"clip_ratio/low_min": -lowest, "clip_ratio/high_max": highest}
    return out, total[0].to(dtype)


# The fused form -----------------------------------------------------------------------------------------------------


def linear_policy_loss(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (B, T)
    objective: PolicyObjective,
    *,
    advantages: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    old_logps: Tensor | None = None,  # (B, T)
    ref_logps: Tensor | None = None,  # (B, T)
    importance_ratio: Tensor | None = None,  # (B, T) or (B, 1)
    sampling_logps: Tensor | None = None,  # (B, T)
    normalizer: Tensor | float | None = None,
    entropy_normalizer: Tensor | float | None = None,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    score_dead: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    weight_grad: Tensor | None = None,  # (V, D)
    memory_budget: int | None = None,
    grad_tolerance: float = 0.0,
    capturable: bool = False,
    explain: bool = False,
) -> LossOutput:
    """The policy loss straight from hidden states and the LM head; the logits are never built.

    Eager equivalent: `policy_loss(linear_logprobs(hidden, weight, ids).logps, objective, ...)`.

    A token-local objective takes a single pass: each chunk of live rows is projected, its coefficients come from
    `objective.token_loss`, and its gradients are finished before the next chunk: 6lNDV FLOPs, l being the share of live
    tokens (`PolicyObjective.live_tokens`; dead ones cost nothing, or 2NDV more with score_dead). Otherwise (sequence
    ratio, off-policy mask, entropy quantile) it is `linear_logprobs` and `policy_loss`: (2 + 6l)NDV. Without a gradient
    (`torch.no_grad`) only the 2NDV of the logits are spent; a frozen weight has no dW, neither time nor memory.

    Beside inputs and gradients it holds one tile of logits, 48 MiB on the CPU and 512 MiB on a GPU, but at least 128
    rows (see memory_budget); for a half-precision weight also dW in fp32. The gradients are made in the forward; the
    first backward scales them in place and hands them over (a second one, after retain_graph, computes them again).

    Args:
        hidden: `(B, T, D)`, fp32, fp64, bf16 or fp16: `hidden[b, t]` scores `ids[b, t]`.
        weight: `(V, D)` LM head; bias: `(V,)`; temperature, logit_scale, softcap, tp_group, backend: see
            `linear_logprobs`.
        ids: `(B, T)` integers in `[0, V)` where the mask is set, anything elsewhere.
        score_dead: also score tokens that carry no gradient. Otherwise their logps are 0 and they do not enter the
            entropy metric.
        weight_grad: `(V, D)` fp32 (fp64 for fp64 inputs), such as an fp32 weight's `.grad` or Megatron's `main_grad`:
            dW is added to it chunk by chunk, in the forward, and weight gets no gradient from autograd. So the loss
            must meet backward() unscaled, which is checked. Token-local objectives only; not under torch.compile.
        grad_tolerance: 0 (exact), or the share of each chunk's gradient, in the sum of the rows' L1 norms of dlogits,
            that may be left out: the rows of smallest norm cost their logits and nothing more. Each row's norm is
            `2|c|(1 - p)`, c being d loss / d logp (an entropy bonus adds at most `2|c_H|H`). What was dropped are
            metrics of a single pass, `grad_skipped/rows` (share of the live rows) and `grad_skipped/norm` (share of the
            norms' sum).
        capturable: nothing depends on values, so that a CUDA graph can capture the call: dead rows run too (as zeros),
            ids are not checked on a GPU (one out of range gives NaN). Old logps and all constants stay what they were.
        memory_budget, explain: see `linear_logprobs`.
        The rest: see `policy_loss`.

    Returns:
        LossOutput: loss (fp32, or fp64 for fp64 inputs); logps `(B, T)`, detached; metrics.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs` and `policy_loss`.
    """
    if hidden.ndim != 3:
        raise ValueError(f"hidden: expected shape (B, T, D), got {tuple(hidden.shape)}")
    validation.check_weight(weight, bias, hidden)
    validation.check_ids(ids, tuple(hidden.shape[:-1]), hidden.device)
    validation.check_run(memory_budget, grad_tolerance, capturable)
    hidden, weight, bias = harmonize(hidden, weight, bias)
    shape, device = ids.shape, hidden.device
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    tokens, mask = _check(shape, dtype, device, advantages, mask, old_logps, ref_logps, importance_ratio)
    weights = objective.token_weights(mask, normalizer, dtype)
    live = objective.live_tokens(advantages=advantages, mask=mask, importance_ratio=importance_ratio)
    name = backends.choose(backend, device)
    head = {"bias": bias, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    run = {"memory_budget": memory_budget, "capturable": capturable, "explain": explain}
    if weight_grad is not None:
        validation.check_weight_grad(weight_grad, weight, dtype)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            raise ValueError("weight_grad: dW would be added where no gradient of weight is wanted")
        if not objective.token_local or name == "reference":
            raise ValueError("weight_grad: only a token-local objective makes dW in the forward, and not the reference")

    if not objective.token_local or name == "reference":
        scored = live
        if score_dead or objective.top_entropy_quantile < 1:
            scored = mask
        elif not objective.token_local:  # a live token needs its whole sequence
            scored = live.any(-1, keepdim=True) & mask
        stats = linear_logprobs(
            hidden, weight, ids, mask=scored, entropy=True, tp_group=tp_group, backend=backend,
            grad_tolerance=grad_tolerance, **head, **run,  # type: ignore[arg-type]
        )  # fmt: skip
        assert stats.entropy is not None
        entropy = stats.entropy if objective.entropy_coef != 0 else stats.entropy.detach()
        tokens = replace(tokens, logps=stats.logps, entropy=entropy, mask=scored)
        return _evaluate(objective, tokens, mask, live, weights, sampling_logps, entropy_normalizer, name)

    transform = LogitTransform(float(temperature), float(logit_scale), None if softcap is None else float(softcap))
    bonus = objective.entropy_weights(mask, entropy_normalizer, dtype)
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(shape).reshape(-1)

    constants = (tokens.advantages, tokens.old_logps, tokens.ref_logps, tokens.gate)
    vectors = (weights.reshape(-1), *(flat(x) for x in (bonus, *constants)))
    rows = (ids.reshape(-1).to(torch.int64), live.reshape(-1), (mask & ~live).reshape(-1) if score_dead else None)
    settings = (
        objective.handle, True, *needs, float(grad_tolerance), transform.temperature, transform.logit_scale,  # type: ignore[attr-defined]
        transform.softcap, name, "" if tp_group is None else tp_group.group_name, *run.values(),
    )  # fmt: skip
    states = hidden.reshape(-1, hidden.shape[-1])
    if weight_grad is None:
        loss, logps, entropy, skipped, *_ = ops.linear_policy_loss(states, weight, bias, *rows, *vectors, *settings)
        ops.give_up_gradients(loss)
    else:
        outputs = ops.PolicyLossInto.apply(states, weight, bias, *rows, *vectors, weight_grad, *settings)
        loss, logps, entropy, skipped = outputs
    logps, entropy = logps.view(shape).detach(), entropy.view(shape).detach()
    tokens = replace(tokens, logps=logps, entropy=entropy, mask=mask if score_dead else live)
    if _kernel_serves(objective, tokens, weights, None, name):
        _, sums, *_ = _policy_terms(objective, tokens, mask, live, weights, None, False, name)
        metrics, _ = _metrics_from_sums(objective, tokens, sums)
    else:
        metrics = objective.metrics(tokens, mask, live)
    policy = loss.detach()
    metrics["policy_loss"] = policy if bonus is None else policy + (entropy * bonus).sum()
    if grad_tolerance > 0:
        metrics["grad_skipped/rows"] = skipped[0] / live.sum().clamp(min=1)
        metrics["grad_skipped/norm"] = torch.where(skipped[2] > 0, skipped[1] / skipped[2], 0.0)
    return LossOutput(loss, logps, metrics)


# Pieces -------------------------------------------------------------------------------------------------------------


def _check(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    advantages: Tensor,
    mask: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    importance_ratio: Tensor | None,
) -> tuple[TokenBatch, Tensor]:
    """The constants of a batch, checked and cast (logps stand in by advantages until they are known), and its mask."""
    b, t = shape
    checked = validation.check_mask(mask, (b, t), device)
    if checked is None:
        raise ValueError("mask: expected a (B, T) tensor, got None")
    if advantages.shape not in ((b,), (b, t)):
        raise ValueError(f"advantages: expected shape ({b},) or ({b}, {t}), got {tuple(advantages.shape)}")
    for name, x in (("old_logps", old_logps), ("ref_logps", ref_logps)):
        if x is not None:
            validation.check_shape(name, x, (b, t), "one per token, as logps and ids")
    if importance_ratio is not None and importance_ratio.shape not in ((b, t), (b, 1)):
        raise ValueError(
            f"importance_ratio: expected shape ({b}, {t}) or ({b}, 1), got {tuple(importance_ratio.shape)}"
        )
    inputs = {
        "advantages": advantages,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "importance_ratio": importance_ratio,
    }
    for name, x in inputs.items():
        if x is not None:
            validation.check_device(name, x, device)

    def constant(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype)

    adv = _per_token(advantages).detach().to(dtype)
    return TokenBatch(adv, None, adv, constant(old_logps), constant(ref_logps), constant(importance_ratio)), checked


def _per_token(advantages: Tensor) -> Tensor:
    return advantages.unsqueeze(-1) if advantages.ndim == 1 else advantages


def _needed(x: Tensor | None, name: str, by: str) -> Tensor:
    if x is None:
        raise ValueError(f"{name}: needed by {by}")
    return x


def _times(gate: Tensor | None, factor: Tensor) -> Tensor:
    return factor if gate is None else gate * factor


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def _masked_mean_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean(-1)
    return torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def _nan_max(x: Tensor) -> Tensor:
    """Maximum of the entries that are not NaN; NaN where there is none."""
    if x.numel() == 0:
        return x.new_full((), torch.nan)
    most = torch.where(x.isnan(), -torch.inf, x).amax()
    return torch.where(x.isnan().all(), torch.nan, most)


def _top_entropy(entropy: Tensor, mask: Tensor, objective: PolicyObjective) -> Tensor:
    """Tokens of the mask whose entropy is at least the (1 - rho) quantile (linear, in fp32, as TRL) over the mask."""
    values = torch.where(mask, entropy.detach().float(), torch.nan).flatten()
    threshold = torch.nanquantile(values, 1 - objective.top_entropy_quantile)
    return mask & (entropy.detach() >= threshold)


def _on_policy(tokens: TokenBatch, sampling_logps: Tensor | None, threshold: float) -> Tensor:
    """Where the policy term stays: advantage not negative, or the sequence's mean log-ratio within the threshold."""
    logps = tokens.logps.detach()
    behaviour = tokens.old_logps if sampling_logps is None else sampling_logps
    drift = torch.zeros_like(logps) if behaviour is None else torch.nan_to_num(behaviour - logps, nan=0.0)
    return (tokens.advantages >= 0) | (_masked_mean_rows(drift, tokens.mask).unsqueeze(-1) <= threshold)

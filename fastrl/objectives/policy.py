"""The policy loss of an objective: on given log-probabilities, and fused with the LM head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from fastrl_kernels import TokenBatch, backends, linear_divergence_sum, linear_logprobs, ops, validation
from fastrl_kernels.functional import harmonize
from fastrl_kernels.head import LogitTransform
from fastrl_kernels.objective import SurrogateSpec, weighted_terms

from .policy_inputs import checked_tokens, clean
from .policy_metrics import masked_mean, metrics_from_totals, scalars
from .policy_objective import LOSS_TYPES, PolicyObjective
from .token_selection import by_covariance, entropy_threshold, fast_by_covariance, on_policy

__all__ = ["LOSS_TYPES", "LossOutput", "PolicyObjective", "linear_policy_loss", "policy_loss"]


class LossOutput(NamedTuple):
    """What a policy loss returns."""

    loss: Tensor  # scalar, differentiable
    logps: Tensor  # (B, T) or (N,), detached; 0 where a token was not scored
    metrics: dict[str, Tensor]  # detached scalars, TRL's names (a preset's own under that preset)


# The form on given logps ---------------------------------------------------------------------------------------------


def policy_loss(
    logps: Tensor,  # (B, T) or (N,)
    objective: PolicyObjective,
    *,
    advantages: Tensor,  # (B,) or of the shape of logps
    mask: Tensor,  # (B, T) or (N,)
    old_logps: Tensor | None = None,  # (B, T) or (N,)
    ref_logps: Tensor | None = None,  # (B, T) or (N,)
    kl: Tensor | None = None,  # (B, T) or (N,)
    entropy: Tensor | None = None,  # (B, T) or (N,)
    importance_ratio: Tensor | None = None,  # (B, T), (N,) or (B, 1)
    sampling_logps: Tensor | None = None,  # (B, T) or (N,)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: Tensor | float | None = None,
    entropy_normalizer: Tensor | float | None = None,
    entropy_threshold: Tensor | float | None = None,
    selected: Tensor | None = None,  # (B, T) or (N,)
    backend: str | None = None,
) -> LossOutput:
    """The policy loss on given log-probabilities; differentiable in logps, entropy and kl, twice if need be.

    In fp32 and fp64 an objective on a padded batch takes one pass over the tokens (two or three, where sums over the
    row come first) for loss, gradients and metrics together: a clipped one on every backend, the others on the CPU,
    without KL, entropy bonus and nll_coef. The definition runs under autograd instead in the other cases, for packed
    tokens, for a gradient that will be differentiated again, for an objective with a `token_loss` of its own, in other
    dtypes and under `torch.func`.

    Args:
        logps: `(B, T)` of the taken tokens under the policy, or `(N,)` of packed sequences, with cu_seqlens.
        objective: what to compute; see `PolicyObjective`.
        advantages: `(B,)`, or per token in the shape of logps; `(B,)` is what is read where B = N.
        mask: nonzero where the token counts. Values elsewhere are never used and may be NaN or inf (but see TRL's vespo
            in `PolicyObjective`).
        old_logps: under the policy that sampled; None: the policy itself (ratio 1).
        ref_logps: under the reference; needed with beta.
        kl: exact KL to the reference at each token, in place of ref_logps, with kl_estimator "full".
        entropy: per token, nats; needed with entropy_coef or top_entropy_quantile, else for the metric only.
        importance_ratio: constant factor of the policy term (rollout-mismatch correction), per token or `(B, 1)`; vespo
            and gmpo make one weight of a sequence's.
        sampling_logps: logps given by the rollout engine, for the off-policy mask; NaN counts as no difference.
        cu_seqlens: `(B + 1,)` integers from 0 to N: sequence i is tokens `cu_seqlens[i]:cu_seqlens[i + 1]`.
        normalizer: denominator of the aggregation: tokens (token-mean), sequences (seq-mean-token-sum and -mean), or
            sequences times length (seq-mean-token-sum-norm). The losses of micro-batches that share the whole batch's
            normalizer add up to the whole batch's loss. None: this batch's own.
        entropy_normalizer: tokens over which the bonus averages the entropy. None: this batch's own.
        entropy_threshold, selected: what the whole batch says of a micro-batch's tokens, so that the losses add up
            also with a top_entropy_quantile (`fastrl.objectives.entropy_threshold`) and for clip_cov and kl_cov
            (`covariance_tokens`). None: this batch's own.
        backend: None chooses; "reference" (the definition), "cpu", "triton" force.

    Raises:
        ValueError: a wrong shape, a missing input that the objective needs, or one that it has no use for.
        RuntimeError: the forced backend does not work on this machine; the message says why.
    """
    if logps.ndim != (2 if cu_seqlens is None else 1):
        expected = "(B, T), or (N,) with cu_seqlens" if cu_seqlens is None else "(N,) with cu_seqlens"
        raise ValueError(f"logps: expected shape {expected}, got {tuple(logps.shape)}")
    tokens, mask = checked_tokens(
        logps.shape, logps.dtype, logps.device, logps=logps, entropy=entropy, advantages=advantages, mask=mask,
        old_logps=old_logps, ref_logps=ref_logps, importance_ratio=importance_ratio, selected=selected,
        cu_seqlens=cu_seqlens, ratio_inside=objective.surrogate.ratio_inside,
    )  # fmt: skip
    if kl is not None and not objective.exact_kl:
        raise ValueError("kl: only beta with kl_estimator 'full' takes it; the other estimators need ref_logps")
    for name, x in (("entropy", entropy), ("kl", kl), ("sampling_logps", sampling_logps)):
        if x is not None:
            validation.check_shape(name, x, logps.shape, "one per token, as logps")
    name = backends.choose(backend, logps.device)
    weights, counts = _weights(objective, tokens, mask, normalizer, logps.dtype, name)
    batch = _Batch(
        mask=mask,
        live=None,
        weights=weights,
        counts=counts,
        sampling_logps=sampling_logps,
        entropy_normalizer=entropy_normalizer,
        entropy_threshold=entropy_threshold,
        normalizer=normalizer,
        advantages=advantages.detach(),
    )
    batch.check(objective, tokens)
    out = _evaluate(objective, tokens, batch, name)
    if not objective.exact_kl:
        return out
    if kl is None:
        raise ValueError("kl: needed by kl_estimator 'full' (linear_policy_loss computes it from ref_hidden)")
    kl = torch.where(mask, kl, 0.0).to(logps.dtype)
    return _with_exact_kl(objective, out, objective.beta * (batch.weights * kl).sum(), kl, mask)


class _Batch(NamedTuple):
    """What a form knows of its batch beside the tokens' values."""

    mask: Tensor  # tokens that count
    live: Tensor | None  # tokens that may carry a gradient; None: as the objective says of the tokens
    weights: Tensor  # of each token's loss, in a shape that broadcasts; of no meaning outside the mask
    counts: Tensor | None  # (B,) tokens of the mask in each row, where a kernel of the CPU may run
    sampling_logps: Tensor | None
    entropy_normalizer: Tensor | float | None
    entropy_threshold: Tensor | float | None
    normalizer: Tensor | float | None
    advantages: Tensor  # as they were given

    def check(self, objective: PolicyObjective, tokens: TokenBatch) -> None:
        """Refuses what the objective has no use for."""
        if self.entropy_threshold is not None and objective.top_entropy_quantile == 1:
            raise ValueError("entropy_threshold: only a top_entropy_quantile below 1 has one")
        if tokens.selected is not None and not objective.surrogate.covariance:
            raise ValueError(f"selected: only clip_cov and kl_cov select tokens, not {objective.loss_type}")
        if self.entropy_normalizer is not None and objective.conventions.entropy_as_policy:
            raise ValueError(
                f"entropy_normalizer: preset {objective.preset!r} aggregates the entropy as the policy term, "
                "pass normalizer"
            )

    def bonus_weights(self, objective: PolicyObjective, chosen: Tensor) -> Tensor | None:
        """Weight of each token's entropy in the bonus, or None where there is none."""
        if objective.conventions.entropy_as_policy and objective.entropy_coef != 0:
            return objective.entropy_coef * torch.where(chosen, self.weights, 0.0)
        return objective.entropy_weights(chosen, self.entropy_normalizer, self.weights.dtype)


def _weights(
    objective: PolicyObjective,
    tokens: TokenBatch,
    mask: Tensor,
    normalizer: Tensor | float | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Weights of the tokens, and where a kernel of the CPU may run the tokens of each row, from which they follow."""
    if backend != "cpu" or mask.ndim != 2 or torch.compiler.is_compiling() or not _fit_a_kernel(tokens):
        return objective.token_weights(mask, normalizer, dtype, tokens.sequences), None
    counts, total = backends.load("cpu").row_counts(mask, dtype)  # type: ignore[attr-defined]
    return objective.row_weights(mask, normalizer, counts, total), counts


def _live(objective: PolicyObjective, tokens: TokenBatch, mask: Tensor) -> Tensor:
    return objective.live_tokens(advantages=tokens.advantages, mask=mask, importance_ratio=tokens.gate)


def _evaluate(objective: PolicyObjective, tokens: TokenBatch, batch: _Batch, backend: str) -> LossOutput:
    scored, entry, live = tokens.mask, objective.surrogate, batch.live
    assert scored is not None  # both callers set it
    spec = None if batch.counts is None or objective.entropy_coef != 0 else objective.surrogate_spec
    fast = spec is not None
    gated = objective.top_entropy_quantile < 1 or objective.off_policy_mask_threshold is not None
    if live is None and (gated or not fast):  # before a gate of ours joins the importance ratio
        live = _live(objective, tokens, batch.mask)
    logps = tokens.logps if fast else torch.where(scored, tokens.logps, 0.0)
    bonus_mask = scored
    if objective.top_entropy_quantile < 1:
        if tokens.entropy is None:
            raise ValueError("entropy: needed by top_entropy_quantile")
        threshold = batch.entropy_threshold
        if threshold is None:
            threshold = entropy_threshold(tokens.entropy, scored, objective.top_entropy_quantile)
        bonus_mask = scored & (tokens.entropy.detach() >= threshold)
        tokens = replace(tokens, gate=_times(clean(tokens.gate, scored), bonus_mask.to(logps.dtype)))
    if objective.off_policy_mask_threshold is not None:
        inside = replace(tokens, logps=logps, old_logps=clean(tokens.old_logps, scored))
        keep = on_policy(inside, clean(batch.sampling_logps, scored), objective.off_policy_mask_threshold)
        tokens = replace(tokens, gate=_times(clean(tokens.gate, scored), keep.to(logps.dtype)))
    if entry.covariance and tokens.selected is None:
        if fast:
            selected = fast_by_covariance(objective, tokens)
        else:
            inside = replace(tokens, logps=logps.detach(), old_logps=clean(tokens.old_logps, scored))
            selected = by_covariance(objective, inside)
        tokens = replace(tokens, selected=selected)
    if spec is not None:
        return _by_kernel(objective, spec, tokens, batch, live)
    assert live is not None  # only the kernel can do without
    bonus_weights = batch.bonus_weights(objective, bonus_mask)
    if bonus_weights is not None and tokens.entropy is None:
        raise ValueError("entropy: needed by entropy_coef")
    if _kernel_serves(objective, tokens, batch.weights, bonus_weights, backend):
        if bonus_weights is None and tokens.entropy is not None:
            tokens = replace(tokens, entropy=tokens.entropy.detach())  # no edge of the graph where no gradient flows
        differentiable = (x for x in (tokens.logps, tokens.entropy) if x is not None)
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
        loss, sums, *_ = _policy_terms(objective, tokens, batch, live, bonus_weights, gradients, backend)
        metrics, policy = _metrics_from_sums(objective, tokens, sums)
        metrics["policy_loss"] = policy
        return LossOutput(loss, logps.detach(), metrics)
    vectors = ("entropy", "advantages", "old_logps", "ref_logps", "gate")
    given: dict[str, Any] = {name: clean(getattr(tokens, name), scored) for name in vectors}
    tokens = replace(tokens, logps=logps, **given)
    tokens = replace(tokens, ratio=objective._ratio(tokens))
    loss = policy = weighted_terms(objective, tokens, batch.weights, None).sum()
    if entry.empty_loss and objective.aggregation in (None, entry.aggregation):
        loss = policy = policy + _empty_sequences(tokens, batch)
    metrics = objective.metrics(tokens, batch.mask, live)
    metrics["policy_loss"] = policy.detach()
    if bonus_weights is not None and tokens.entropy is not None:
        loss = policy - (tokens.entropy * bonus_weights).sum()
    return LossOutput(loss, logps.detach(), metrics)


def _by_kernel(
    objective: PolicyObjective, spec: SurrogateSpec, tokens: TokenBatch, batch: _Batch, live: Tensor | None
) -> LossOutput:
    """Loss, gradient and metrics from the CPU's kernel of policy terms."""
    logps, dtype, entry = tokens.logps, tokens.logps.dtype, objective.surrogate
    gradients = torch.is_grad_enabled() and logps.requires_grad
    if tokens.entropy is not None and tokens.entropy.requires_grad:
        tokens = replace(tokens, entropy=tokens.entropy.detach())  # its graph ends here
    kernel = backends.load("cpu").surrogate_terms  # type: ignore[attr-defined]
    made = kernel(spec, tokens, batch.weights, batch.mask, live, gradients=gradients)
    policy = made.totals[0]
    if entry.empty_loss and objective.aggregation in (None, entry.aggregation):
        policy += _empty_sequences(tokens, batch).item()
    if gradients:
        loss = ops.SurrogateTermsFunction.apply(logps, made.grad_logps, policy, batch.weights, tokens, objective)
    else:
        loss = torch.tensor(policy, dtype=dtype)
    own, shares = metrics_from_totals(objective, tokens, made.totals)
    own["policy_loss"], share = policy, torch.get_default_dtype()
    if share == dtype:
        return LossOutput(loss, made.logps, scalars(own | shares, dtype))
    return LossOutput(loss, made.logps, scalars(own, dtype) | scalars(shares, share))


def _empty_sequences(tokens: TokenBatch, batch: _Batch) -> Tensor:
    """TRL's term of sequences without tokens: ratio 1, so -A each; a constant. Nothing for advantages per token."""
    sequences, counts = tokens.sequences, batch.counts
    empty = (sequences.counts(batch.mask, tokens.logps.dtype) if counts is None else counts) == 0
    if batch.advantages.shape != empty.shape:
        return tokens.logps.new_zeros(())
    denominator = max(1, sequences.count) if batch.normalizer is None else batch.normalizer
    return -torch.where(empty, batch.advantages.to(tokens.logps.dtype), 0.0).sum() / denominator


def _with_exact_kl(objective: PolicyObjective, out: LossOutput, term: Tensor, kl: Tensor, mask: Tensor) -> LossOutput:
    """The loss with the term of an exact KL, which is of each token as given."""
    metrics = {**out.metrics, "kl": masked_mean(kl.detach(), mask)}
    metrics["policy_loss"] = metrics["policy_loss"] + term.detach()
    return LossOutput(out.loss + term, out.logps, metrics)


# The fused kernel on [B, T] vectors ----------------------------------------------------------------------------------


def _fit_a_kernel(tokens: TokenBatch, *vectors: Tensor | None) -> bool:
    """Whether a kernel takes such tokens: padded, one of its dtypes throughout, and no functional transform."""
    dtype = tokens.logps.dtype
    if tokens.logps.ndim != 2 or dtype not in (torch.float32, torch.float64):
        return False
    if any(x is not None and x.dtype != dtype for x in (tokens.entropy, *vectors)):
        return False
    # torch.func and forward-mode autograd have no rule for the operators.
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def _kernel_serves(
    objective: PolicyObjective,
    tokens: TokenBatch,
    weights: Tensor,
    bonus_weights: Tensor | None,
    backend: str,
) -> bool:
    """Whether the backend's `policy_terms` may stand in for the definition."""
    return (
        backend != "reference" and objective.kernel_spec is not None and _fit_a_kernel(tokens, weights, bonus_weights)
    )


def _policy_terms(
    objective: PolicyObjective,
    tokens: TokenBatch,  # (B, T)
    batch: _Batch,
    live: Tensor,
    bonus_weights: Tensor | None,
    gradients: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if objective.sampled_kl and tokens.ref_logps is None:
        raise ValueError(f"ref_logps: needed with beta = {objective.beta}")
    run = ops.policy_terms if torch.compiler.is_compiling() else ops.PolicyTermsFunction.apply
    return run(
        tokens.logps, tokens.entropy, tokens.advantages, tokens.old_logps, tokens.ref_logps, tokens.gate, tokens.mask,
        batch.mask, live, batch.weights.expand(tokens.logps.shape), bonus_weights, objective.handle, gradients, backend,  # type: ignore[attr-defined]
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
    if objective.sequence_ratio and tokens.advantages.shape[-1] == 1:
        clip_dtype, clipped = dtype, rates.mean(0)
    else:
        clip_dtype, clipped = share, shares[1:]
        rates = rates / sums[:, 5:6]  # NaN: a fully masked row
    out = {"live_fraction": shares[0].to(share)}
    kl, entropy = (total[2:4] / total[4].clamp(min=1)).to(dtype).unbind()
    if objective.sampled_kl:
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


# The fused form ------------------------------------------------------------------------------------------------------


def linear_policy_loss(
    hidden: Tensor,  # (B, T, D) or (N, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (B, T) or (N,)
    objective: PolicyObjective,
    *,
    advantages: Tensor,  # (B,) or of the shape of ids
    mask: Tensor,  # (B, T) or (N,)
    old_logps: Tensor | None = None,  # (B, T) or (N,)
    ref_logps: Tensor | None = None,  # (B, T) or (N,)
    importance_ratio: Tensor | None = None,  # (B, T), (N,) or (B, 1)
    sampling_logps: Tensor | None = None,  # (B, T) or (N,)
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    normalizer: Tensor | float | None = None,
    entropy_normalizer: Tensor | float | None = None,
    entropy_threshold: Tensor | float | None = None,
    selected: Tensor | None = None,  # (B, T) or (N,)
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,  # (B, T, D') or (N, D')
    ref_weight: Tensor | None = None,  # (V, D')
    ref_bias: Tensor | None = None,  # (V,)
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
    ratio, vespo, gmpo, clip_cov, kl_cov, off-policy mask, entropy quantile) it is `linear_logprobs` and `policy_loss`:
    (2 + 6l)NDV. Without a gradient (`torch.no_grad`) only the 2NDV of the logits are spent; a frozen weight has no dW,
    neither time nor memory. kl_estimator "full" is a further pass over both heads.

    Beside inputs and gradients it holds one tile of logits, 48 MiB on the CPU and 512 MiB on a GPU, but at least 128
    rows (see memory_budget); for a half-precision weight also dW in fp32. The gradients are made in the forward; the
    first backward scales them in place and hands them over (a second one, after retain_graph, computes them again).

    Args:
        hidden: `(B, T, D)`, or `(N, D)` of packed sequences with cu_seqlens; fp32, fp64, bf16 or fp16: `hidden[b, t]`
            scores `ids[b, t]`.
        weight: `(V, D)` LM head; bias: `(V,)`; temperature, logit_scale, softcap, tp_group, backend: see
            `linear_logprobs`.
        ids: `(B, T)` or `(N,)` integers in `[0, V)` where the mask is set, anything elsewhere.
        ref_hidden, ref_weight, ref_bias: the reference's hidden states, `(B, T, D')` or `(N, D')`, and head; needed by
            kl_estimator "full", constants. Temperature, logit_scale and softcap apply to both heads.
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
        LossOutput: loss (fp32, or fp64 for fp64 inputs); logps `(B, T)` or `(N,)`, detached; metrics.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs` and `policy_loss`.
    """
    if hidden.ndim != (3 if cu_seqlens is None else 2):
        expected = "(B, T, D)" if cu_seqlens is None else "(N, D) with cu_seqlens"
        raise ValueError(f"hidden: expected shape {expected}, got {tuple(hidden.shape)}")
    validation.check_weight(weight, bias, hidden)
    validation.check_ids(ids, tuple(hidden.shape[:-1]), hidden.device)
    validation.check_run(memory_budget, grad_tolerance, capturable)
    hidden, weight, bias = harmonize(hidden, weight, bias)
    shape, device = ids.shape, hidden.device
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    tokens, mask = checked_tokens(
        shape, dtype, device, advantages=advantages, mask=mask, old_logps=old_logps, ref_logps=ref_logps,
        importance_ratio=importance_ratio, selected=selected, cu_seqlens=cu_seqlens,
        ratio_inside=objective.surrogate.ratio_inside,
    )  # fmt: skip
    if sampling_logps is not None:
        validation.check_shape("sampling_logps", sampling_logps, shape, "one per token, as ids")
    live, name = _live(objective, tokens, mask), backends.choose(backend, device)
    local = objective.token_local and name != "reference"
    if local:
        weights, counts = objective.token_weights(mask, normalizer, dtype, tokens.sequences), None
    else:
        weights, counts = _weights(objective, tokens, mask, normalizer, dtype, name)
    batch = _Batch(
        mask=mask,
        live=live,
        weights=weights,
        counts=counts,
        sampling_logps=sampling_logps,
        entropy_normalizer=entropy_normalizer,
        entropy_threshold=entropy_threshold,
        normalizer=normalizer,
        advantages=advantages.detach(),
    )
    batch.check(objective, tokens)
    head = {"bias": bias, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    run = {"memory_budget": memory_budget, "capturable": capturable, "explain": explain}
    if weight_grad is not None:
        validation.check_weight_grad(weight_grad, weight, dtype)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            raise ValueError("weight_grad: dW would be added where no gradient of weight is wanted")
        if not objective.token_local or objective.exact_kl or name == "reference":
            raise ValueError("weight_grad: only a token-local objective makes dW in the forward, and not the reference")
    if not objective.exact_kl and (ref_hidden is not None or ref_weight is not None or ref_bias is not None):
        raise ValueError(
            "ref_hidden, ref_weight, ref_bias: only beta with kl_estimator 'full' reads a reference's head"
        )

    if not local:
        scored = live
        if score_dead or objective.top_entropy_quantile < 1 or objective.surrogate.covariance:
            scored = mask
        elif not objective.token_local:  # a live token needs its whole sequence
            sequences = tokens.sequences
            scored = (sequences.spread(sequences.counts(live, dtype)) > 0) & mask
        stats = linear_logprobs(
            hidden, weight, ids, mask=scored, entropy=True, tp_group=tp_group, backend=backend,
            grad_tolerance=grad_tolerance, **head, **run,  # type: ignore[arg-type]
        )  # fmt: skip
        assert stats.entropy is not None
        entropy = stats.entropy if objective.entropy_coef != 0 else stats.entropy.detach()
        tokens = replace(tokens, logps=stats.logps, entropy=entropy, mask=scored)
        out = _evaluate(objective, tokens, batch, name)
    else:
        out = _single_pass(
            objective, tokens, batch, live, hidden, weight, ids, head, run, needs_dead=score_dead,
            weight_grad=weight_grad, tp_group=tp_group, grad_tolerance=grad_tolerance, backend=name,
        )  # fmt: skip
    if not objective.exact_kl:
        return out
    if ref_hidden is None or ref_weight is None:
        raise ValueError("ref_hidden, ref_weight: needed by kl_estimator 'full'")
    if tp_group is not None:
        raise ValueError("tp_group: kl_estimator 'full' does not work on shards of the vocabulary")
    weights = objective.beta * torch.where(mask, batch.weights, 0.0)
    term, kl = linear_divergence_sum(
        hidden, weight, ref_hidden, ref_weight, weights, kind="reverse_kl", ref_bias=ref_bias,
        ref_logit_scale=logit_scale, ref_softcap=softcap, backend=backend, memory_budget=memory_budget, **head,  # type: ignore[arg-type]
    )  # fmt: skip
    return _with_exact_kl(objective, out, term, kl, mask)


def _single_pass(
    objective: PolicyObjective,
    tokens: TokenBatch,
    batch: _Batch,
    live: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    head: dict[str, Any],
    run: dict[str, Any],
    *,
    needs_dead: bool,
    weight_grad: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    grad_tolerance: float,
    backend: str,
) -> LossOutput:
    """Loss and gradients chunk by chunk: `token_loss` sees each chunk once, as vectors."""
    shape, mask, bias = ids.shape, batch.mask, head["bias"]
    softcap = head["softcap"]
    transform = LogitTransform(
        float(head["temperature"]), float(head["logit_scale"]), None if softcap is None else float(softcap)
    )
    bonus = batch.bonus_weights(objective, mask)
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(shape).reshape(-1)

    constants = (tokens.advantages, tokens.old_logps, tokens.ref_logps, tokens.gate)
    vectors = (batch.weights.reshape(-1), *(flat(x) for x in (bonus, *constants)))
    rows = (ids.reshape(-1).to(torch.int64), live.reshape(-1), (mask & ~live).reshape(-1) if needs_dead else None)
    settings = (
        objective.handle, True, *needs, float(grad_tolerance), transform.temperature, transform.logit_scale,  # type: ignore[attr-defined]
        transform.softcap, backend, "" if tp_group is None else tp_group.group_name, *run.values(),
    )  # fmt: skip
    states = hidden.reshape(-1, hidden.shape[-1])
    if weight_grad is None:
        loss, logps, entropy, skipped, *_ = ops.linear_policy_loss(states, weight, bias, *rows, *vectors, *settings)
        ops.give_up_gradients(loss)
    else:
        outputs = ops.PolicyLossInto.apply(states, weight, bias, *rows, *vectors, weight_grad, *settings)
        loss, logps, entropy, skipped = outputs
    logps, entropy = logps.view(shape).detach(), entropy.view(shape).detach()
    tokens = replace(tokens, logps=logps, entropy=entropy, mask=mask if needs_dead else live)
    if _kernel_serves(objective, tokens, batch.weights, None, backend):
        _, sums, *_ = _policy_terms(objective, tokens, batch, live, None, False, backend)
        metrics, _ = _metrics_from_sums(objective, tokens, sums)
    else:
        metrics = objective.metrics(tokens, mask, live)
    policy = loss.detach()
    metrics["policy_loss"] = policy if bonus is None else policy + (entropy * bonus).sum()
    if grad_tolerance > 0:
        metrics["grad_skipped/rows"] = skipped[0] / live.sum().clamp(min=1)
        metrics["grad_skipped/norm"] = torch.where(skipped[2] > 0, skipped[1] / skipped[2], 0.0)
    return LossOutput(loss, logps, metrics)


def _times(gate: Tensor | None, factor: Tensor) -> Tensor:
    return factor if gate is None else gate * factor

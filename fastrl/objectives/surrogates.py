"""The policy terms of the field: one short function each, and the table of what is true of each loss type.

A function takes the objective (for its options), the tokens and their ratio, and returns the loss of each token, in a
shape that broadcasts to the tokens', before any gate, KL or weight. A new loss type is one function and one entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl_kernels import TokenBatch

from .sequences import Sequences

if TYPE_CHECKING:
    from .policy_objective import PolicyObjective

Function = Callable[["PolicyObjective", TokenBatch, Tensor], Tensor]


# What the functions share --------------------------------------------------------------------------------------------


def sequences_in(tokens: TokenBatch) -> Sequences:
    return Sequences.padded(tokens.logps.shape[0]) if tokens.sequences is None else tokens.sequences


def mask_of(tokens: TokenBatch) -> Tensor:
    return torch.ones_like(tokens.logps, dtype=torch.bool) if tokens.mask is None else tokens.mask


def old_logps(tokens: TokenBatch) -> Tensor:
    return tokens.logps.detach() if tokens.old_logps is None else tokens.old_logps


def log_ratio(tokens: TokenBatch) -> Tensor:
    """Log of the policy's probability of each token over that of the policy that sampled it."""
    return tokens.logps - old_logps(tokens)


def sequence_log_ratio(tokens: TokenBatch, level: str) -> Tensor:
    """Log-ratio of each token's sequence: "sequence" mean, "product" sum, "sequence-token" mean as a constant.

    With the last, the gradient is that of the token's own log-ratio (GSPO-token, Zheng et al. 2025).
    """
    sequences, mask, d = sequences_in(tokens), mask_of(tokens), log_ratio(tokens)
    if level == "product":
        return sequences.spread(sequences.sum(torch.where(mask, d, 0.0)))
    mean = sequences.spread(sequences.mean(d, mask))
    if level == "sequence":
        return mean
    own = torch.where(tokens.logps.isfinite(), tokens.logps, 0.0)
    return mean.detach() + (own - own.detach())


def _times(factor: Tensor, x: Tensor) -> Tensor:
    """Their product; an infinite x counts as the largest finite number, so that a factor of 0 makes it 0."""
    most = torch.finfo(x.dtype).max
    return factor * x.clamp(-most, most)


def _mean(objective: PolicyObjective, tokens: TokenBatch, x: Tensor, mask: Tensor) -> Tensor:
    """Mean over each sequence, with the preset's epsilon beside the length."""
    sequences = sequences_in(tokens)
    counts = sequences.counts(mask, x.dtype).clamp(min=1) + objective.conventions.length_eps
    return sequences.sum(torch.where(mask, x, 0.0)) / counts


def clip_bounds(objective: PolicyObjective) -> tuple[float, float]:
    return 1 - objective.epsilon, 1 + objective._epsilon_high


def _truncation(objective: PolicyObjective) -> tuple[float, float]:
    return -math.inf, 1 + objective.epsilon if objective.epsilon_high is None else objective.epsilon_high


def _truncation_trl(objective: PolicyObjective) -> tuple[float, float]:
    return -math.inf, objective._epsilon_high


# The surrogates ------------------------------------------------------------------------------------------------------


def clipped(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    low, high = objective.ratio_bounds
    within = torch.clamp(ratio, low, high)
    bounded = ratio if objective.delta is None else torch.clamp(ratio, max=objective.delta)
    return -torch.min(bounded * tokens.advantages, within * tokens.advantages)


def dual_clipped(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    loss, advantages = clipped(objective, tokens, ratio), tokens.advantages
    if math.isinf(objective.ratio_cap):
        return loss
    return torch.where(advantages < 0, torch.min(loss, -objective.ratio_cap * advantages), loss)


def truncated_ratio(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    return -_times(torch.clamp(ratio.detach(), *objective.ratio_bounds) * tokens.advantages, tokens.logps)


def log_likelihood(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    return -_times(tokens.advantages, tokens.logps)


def soft_gate(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    positive = (tokens.advantages > 0).to(ratio.dtype)
    tau = positive * objective.sapo_temperature_pos + (1 - positive) * objective.sapo_temperature_neg
    return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * tokens.advantages


def gamma_weighted(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    return -_times(gamma_weight(objective, tokens) * tokens.advantages, tokens.logps)


@torch.no_grad()
def gamma_weight(objective: PolicyObjective, tokens: TokenBatch) -> Tensor:
    """VESPO's weight of a sequence; 1 where policy, old policy and rollout engine agree."""
    sequences, mask, floor = sequences_in(tokens), mask_of(tokens), math.log(1e-8)
    u = sequences.sum(torch.where(mask, log_ratio(tokens).clamp(-20.0, 20.0), 0.0))
    if tokens.importance_ratio is not None:
        mismatch = tokens.importance_ratio.log().clamp(floor, 20.0)
        if mismatch.shape != tokens.logps.shape:  # one ratio per sequence
            u = u + mismatch.squeeze(-1)
        elif objective.surrogate.reads_padding:
            u = u + sequences.sum(mismatch)
        else:
            u = u + sequences.sum(torch.where(mask, mismatch, 0.0))
    u = sequences.spread(u.clamp(floor, 20.0))
    positive = (tokens.advantages >= 0).to(u.dtype)
    k = positive * objective.vespo_k_pos + (1 - positive) * objective.vespo_k_neg
    lam = (positive * objective.vespo_lambda_pos + (1 - positive) * objective.vespo_lambda_neg).clamp(min=1e-4)
    return torch.exp(lam + k * u - lam * torch.exp(u))


def geometric_mean(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    sequences, mask = sequences_in(tokens), mask_of(tokens)
    d, advantages, mismatch = log_ratio(tokens), tokens.advantages, tokens.importance_ratio
    within = torch.clamp(d, -objective.epsilon, objective._epsilon_high)
    bounded = torch.where(advantages > 0, torch.min(d, within), torch.max(d, within))
    bounded = torch.where(advantages == 0, 0.0, bounded)
    chosen = mask if tokens.gate is None else mask & (tokens.gate != 0)
    weight = torch.exp(_mean(objective, tokens, bounded, chosen))
    if mismatch is not None:
        mismatch = mismatch if mismatch.shape == d.shape else sequences.spread(mismatch.squeeze(-1)).expand_as(d)
        weight = weight * torch.exp(_mean(objective, tokens, torch.log(mismatch + 1e-10), mask))
    return -sequences.spread(_mean(objective, tokens, advantages.expand_as(d), mask) * weight)


def divergence_mask_tv(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    return _divergence_masked(objective, tokens, ratio, within_tv)


def divergence_mask_kl(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    return _divergence_masked(objective, tokens, ratio, within_kl)


def _divergence_masked(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor, within: Function) -> Tensor:
    keep = within(objective, tokens, ratio)
    weight = torch.clamp(ratio.detach(), max=objective.ratio_cap) * tokens.advantages
    return -_times(torch.where(keep, weight, 0.0), tokens.logps)


@torch.no_grad()
def within_tv(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    """Where an update would not leave the trust region: `|p - q|` of the token itself, in the update's direction."""
    change = tokens.logps.exp() - old_logps(tokens).exp()
    return torch.where(tokens.advantages > 0, change <= objective._epsilon_high, change >= -objective.epsilon)


@torch.no_grad()
def within_kl(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    """The same with KL(old || policy) of the two outcomes "this token" and "any other"."""
    old = old_logps(tokens)
    p, q = tokens.logps.exp(), old.exp()
    kl = _times(-q, tokens.logps - old) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    up, down = (kl <= objective._epsilon_high) | (p <= q), (kl <= objective.epsilon) | (p >= q)
    return torch.where(tokens.advantages > 0, up, down)


def quadratic(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    d, advantages = log_ratio(tokens), tokens.advantages
    # l = d + o: where l is -inf, the square wins.
    return d * (0.5 * objective.dro_beta * d - advantages) - _times(advantages, old_logps(tokens))


def covariance_clipped(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    loss = clipped(objective, tokens, ratio)
    return loss if tokens.selected is None else torch.where(tokens.selected, 0.0, loss)


def covariance_penalised(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> Tensor:
    loss = -ratio * tokens.advantages
    if tokens.selected is None:
        return loss
    return loss + torch.where(tokens.selected, objective.ppo_kl_coef * log_ratio(tokens).abs(), 0.0)


# Where a policy term is cut off, for the metrics ---------------------------------------------------------------------


def ratio_clipped(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (or sequences) clipped from below and from above: where the clip is what the minimum takes."""
    low, high = objective.ratio_bounds
    if objective.delta is not None:
        ratio = torch.clamp(ratio, max=objective.delta)
    return (ratio < low) & (tokens.advantages < 0), (ratio > high) & (tokens.advantages > 0)


def log_ratio_clipped(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    d, advantages = log_ratio(tokens), tokens.advantages
    return (d < -objective.epsilon) & (advantages < 0), (d > objective._epsilon_high) & (advantages > 0)


def outside_tv(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    outside, positive = ~within_tv(objective, tokens, ratio), tokens.advantages > 0
    return outside & ~positive, outside & positive


def outside_kl(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    outside, positive = ~within_kl(objective, tokens, ratio), tokens.advantages > 0
    return outside & ~positive, outside & positive


# What is true of each loss type --------------------------------------------------------------------------------------

# Options that only some loss types use. Every other option of `PolicyObjective` is open to all.
OWN_OPTIONS = (
    "epsilon", "epsilon_high", "delta", "importance_sampling_level", "clip_ratio_c", "sapo_temperature_pos",
    "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "clip_cov_ratio",
    "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "dro_beta",
)  # fmt: skip
_CLIP = ("epsilon", "epsilon_high", "delta", "importance_sampling_level")


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """A loss type: its policy term, what the forms must know of it, and what a reader wants to know."""

    loss: Function
    formula: str  # of a token's loss; c: ratio, A: advantage, l: logps, o: old_logps, d = l - o, sg: no gradient
    paper: str
    peer: str  # whose numbers it reproduces (under that peer's preset, where they differ)
    use: str  # when to take it
    aggregation: str  # unless `PolicyObjective(aggregation=...)` says otherwise
    options: tuple[str, ...] = ()  # which of OWN_OPTIONS it uses
    clipped: Callable[[PolicyObjective, TokenBatch, Tensor], tuple[Tensor, Tensor]] | None = None
    level: str | None = None  # of the ratio: "token", or see `sequence_log_ratio`; None: importance_sampling_level
    bounds: Callable[[PolicyObjective], tuple[float, float]] = clip_bounds  # of the ratio
    log_ratio_bounds: tuple[float, float] | None = None  # of the log-ratio; no gradient beyond them
    ratio_cap: float = math.inf  # clip_ratio_c, where that is None
    token_local: bool = True  # needs no other token's values (at importance_sampling_level "token")
    dead_without_advantage: bool = True  # an advantage of 0 makes a gradient of exactly 0
    ratio_inside: bool = False  # importance_ratio enters the function, it is not a factor of the loss
    per_sequence: bool = False  # the loss is one of a whole sequence; the gate says which of its tokens count
    covariance: bool = False  # picks tokens by the covariance of logps and advantages over the whole batch
    fixed_aggregation: bool = False
    kl_times_ratio: bool = True  # use_bias_correction_kl, where that is None
    reads_padding: bool = False  # TRL's VESPO multiplies the importance ratios of masked tokens into the sequence's
    empty_loss: bool = False  # TRL: a sequence without tokens has ratio 1 and adds -A to the mean over sequences


_GRPO = Surrogate(
    loss=clipped,
    clipped=ratio_clipped,
    formula="-min(min(c, delta) A, clip(c, 1 - epsilon, 1 + epsilon_high) A)",
    paper="Shao et al. 2024, arXiv:2402.03300, eq. 3",
    peer="TRL grpo, verl vanilla",
    use="the usual first choice with one reward per answer; every answer counts alike, whatever its length",
    aggregation="seq-mean-token-mean",
    options=_CLIP,
)

LOSSES: Mapping[str, Surrogate] = {
    "grpo": _GRPO,
    "bnpo": replace(
        _GRPO,
        paper="TRL's name for GRPO averaged over a micro-batch's tokens",
        peer="TRL bnpo",
        use="to reproduce runs that averaged per micro-batch; dapo is the same mean, exact under any split",
        aggregation="token-mean",
    ),
    "dr_grpo": replace(
        _GRPO,
        paper="Liu et al. 2025, arXiv:2503.20783",
        peer="TRL dr_grpo, verl vanilla with seq-mean-token-sum-norm",
        use="no bias towards short correct or long wrong answers; with advantages that are not divided by their std",
        aggregation="seq-mean-token-sum-norm",
    ),
    "dapo": replace(
        _GRPO,
        paper="Yu et al. 2025, arXiv:2503.14476, eq. 8",
        peer="TRL dapo, verl vanilla with token-mean",
        use="long answers of uneven length; with epsilon_high = 0.28 to keep the entropy up",
        aggregation="token-mean",
    ),
    "luspo": replace(
        _GRPO,
        paper="Length-Unbiased Sequence Policy Optimization, 2026, arXiv:2602.05261",
        peer="TRL luspo",
        use="sequence-level ratios without GSPO's bias by length; with importance_sampling_level='sequence'",
        aggregation="seq-mean-token-sum",
    ),
    "gspo": replace(
        _GRPO,
        formula="as grpo, with c = exp(mean of d over the sequence)",
        paper="Zheng et al. 2025, arXiv:2507.18071",
        peer="TRL grpo with importance_sampling_level='sequence', verl gspo, OpenRLHF gspo",
        use="mixture-of-experts models and long answers, where token ratios are noise; epsilon of about 3e-4",
        level="sequence",
        token_local=False,
    ),
    "ppo": Surrogate(
        loss=dual_clipped,
        clipped=ratio_clipped,
        formula="L = max(-c A, -clip(c, 1 - epsilon, 1 + epsilon_high) A); where A < 0: min(L, -clip_ratio_c A)",
        paper="Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al. 2020, arXiv:1912.09729",
        peer="verl vanilla, OpenRLHF PolicyLoss",
        use="per-token advantages of a value function; the dual clip bounds what one bad token can do",
        aggregation="token-mean",
        options=("epsilon", "epsilon_high", "clip_ratio_c"),
        ratio_cap=3.0,
    ),
    "cispo": Surrogate(
        loss=truncated_ratio,
        clipped=ratio_clipped,
        formula="-sg(min(c, epsilon_high)) A l; epsilon_high of None: 1 + epsilon",
        paper="MiniMax-M1, 2025, arXiv:2506.13585",
        peer="TRL cispo; verl cispo clips to [1 - epsilon, 1 + epsilon_high]",
        use="large or off-policy batches: no token loses its gradient; epsilon_high of about 5",
        aggregation="token-mean",
        options=("epsilon", "epsilon_high", "importance_sampling_level"),
        bounds=_truncation,
    ),
    "sapo": Surrogate(
        loss=soft_gate,
        formula="-(4 / tau) sigmoid(tau (c - 1)) A, tau = sapo_temperature_pos where A > 0, else sapo_temperature_neg",
        paper="Soft Adaptive Policy Optimization, 2025, arXiv:2511.20347",
        peer="TRL sapo, verl sapo",
        use="a gradient that fades with the distance from the old policy instead of stopping at a clip",
        aggregation="seq-mean-token-mean",
        options=("importance_sampling_level", "sapo_temperature_pos", "sapo_temperature_neg"),
    ),
    "vespo": Surrogate(
        loss=gamma_weighted,
        formula="-phi A l, phi = sg(exp(lambda + k u - lambda exp(u))), u = sum of d (and of the log of "
        "importance_ratio) over the sequence, in [ln 1e-8, 20]; k, lambda: vespo_*_pos where A >= 0, else vespo_*_neg",
        paper="Variational Sequence-Level Soft Policy Optimization, 2026, arXiv:2602.10693",
        peer="TRL vespo",
        use="stale or asynchronous rollouts: whole sequences that drifted fade out smoothly",
        aggregation="token-mean",
        options=("importance_sampling_level", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        token_local=False,
        ratio_inside=True,
    ),
    "gmpo": Surrogate(
        loss=geometric_mean,
        clipped=log_ratio_clipped,
        formula="per sequence -mean(A) exp(mean of u), u = min(d, e) where A > 0, max(d, e) where A < 0, "
        "e = clip(d, -epsilon, epsilon_high)",
        paper="Zhao et al. 2025, arXiv:2507.20673",
        peer="TRL GMPOTrainer, verl geo_mean",
        use="less sensitive to single outlier ratios than grpo; epsilon of about 0.4, in nats",
        aggregation="seq-mean-token-mean",
        options=("epsilon", "epsilon_high"),
        token_local=False,
        dead_without_advantage=False,
        ratio_inside=True,
        per_sequence=True,
        fixed_aggregation=True,
        kl_times_ratio=False,
    ),
    "rloo": replace(
        _GRPO,
        formula="as grpo, with c = exp(sum of d over the sequence)",
        paper="Ahmadian et al. 2024, arXiv:2402.14740; Kool et al. 2019",
        peer="TRL RLOOTrainer",
        use="an answer as one action, with leave-one-out advantages (group_advantages(baseline='leave_one_out'))",
        options=("epsilon", "epsilon_high"),
        level="product",
        token_local=False,
        kl_times_ratio=False,
    ),
    "reinforce": Surrogate(
        loss=log_likelihood,
        formula="-A l",
        paper="Williams 1992",
        peer="verl compute_policy_loss_reinforce (bypass mode)",
        use="strictly on-policy updates, or with importance_ratio as the only correction",
        aggregation="seq-mean-token-sum",
    ),
    "gpg": Surrogate(
        loss=log_likelihood,
        formula="-A l",
        paper="Chu et al. 2025, arXiv:2504.02546",
        peer="verl gpg",
        use="on-policy updates with group advantages, averaged over tokens; no old or reference model",
        aggregation="token-mean",
    ),
    "clip_cov": Surrogate(
        loss=covariance_clipped,
        clipped=ratio_clipped,
        formula="as ppo without dual clip, but 0 at clip_cov_ratio of the tokens, drawn at random from those with "
        "clip_cov_lb < (A - mean A)(l - mean l) < clip_cov_ub that the clip has left alone",
        paper="Cui et al. 2025, arXiv:2505.22617",
        peer="verl clip_cov",
        use="against the collapse of entropy: the tokens that lower it most get no gradient",
        aggregation="token-mean",
        options=("epsilon", "epsilon_high", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"),
        token_local=False,
        covariance=True,
    ),
    "kl_cov": Surrogate(
        loss=covariance_penalised,
        formula="-c A, plus ppo_kl_coef |d| at the kl_cov_ratio of tokens of largest (A - mean A)(l - mean l)",
        paper="Cui et al. 2025, arXiv:2505.22617",
        peer="verl kl_cov",
        use="as clip_cov, with a penalty in place of the cut",
        aggregation="token-mean",
        options=("kl_cov_ratio", "ppo_kl_coef"),
        token_local=False,
        dead_without_advantage=False,
        covariance=True,
    ),
    "dppo_tv": Surrogate(
        loss=divergence_mask_tv,
        clipped=outside_tv,
        formula="-sg(min(c, clip_ratio_c)) A l where exp(l) - exp(o) <= epsilon_high (A > 0) or >= -epsilon (A <= 0), "
        "else 0",
        paper="DPPO, 2026, arXiv:2602.04879",
        peer="verl dppo_tv",
        use="a trust region in probability: rare tokens, whose ratios swing, keep their gradient",
        aggregation="token-mean",
        options=("epsilon", "epsilon_high", "clip_ratio_c"),
        ratio_cap=20.0,
    ),
    "dppo_kl": Surrogate(
        loss=divergence_mask_kl,
        clipped=outside_kl,
        formula="as dppo_tv, where K <= epsilon_high or exp(l) <= exp(o) (A > 0), K <= epsilon or exp(l) >= exp(o) "
        "(A <= 0); K = KL(old || policy) of a token against all others",
        paper="DPPO, 2026, arXiv:2602.04879",
        peer="verl dppo_kl",
        use="as dppo_tv, with a bound that is stricter for likely tokens",
        aggregation="token-mean",
        options=("epsilon", "epsilon_high", "clip_ratio_c"),
        ratio_cap=20.0,
    ),
    "dro": Surrogate(
        loss=quadratic,
        formula="-(A l - dro_beta / 2 d^2)",
        paper="Richemond et al. 2024, arXiv:2405.19107",
        peer="verl dro",
        use="offline or stale data without ratios: a quadratic penalty keeps the policy near the one that sampled",
        aggregation="token-mean",
        options=("dro_beta",),
        dead_without_advantage=False,
    ),
}


# Where origins differ ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What an origin does that its formulas do not say."""

    losses: Mapping[str, Surrogate]
    kl_times_ratio: bool = True  # use_bias_correction_kl, where that is None
    kl_clamp: str | None = None  # see `kl_estimate`
    counts_empty: bool = True  # a mean over sequences counts those without a token
    length_eps: float = 0.0  # added to a sequence's length
    width_is_length: bool = False  # seq-mean-token-sum-norm divides by the padded width, unless told
    entropy_as_policy: bool = False  # the entropy bonus has the policy term's aggregation, not a mean over tokens


def _named(names: str, **changes: object) -> dict[str, Surrogate]:
    return {name: replace(LOSSES[name], **changes) for name in names.split()}  # type: ignore[arg-type]


_DUAL = {"loss": dual_clipped, "options": ("epsilon", "epsilon_high", "clip_ratio_c"), "level": "token"}
_VERL_LOSSES = {
    **_named("grpo dr_grpo dapo ppo", **_DUAL, log_ratio_bounds=(-20.0, 20.0), ratio_cap=3.0),
    **_named("dppo_tv dppo_kl", log_ratio_bounds=(-20.0, 20.0), ratio_cap=3.0),
    **_named("sapo", log_ratio_bounds=(-20.0, 20.0), options=LOSSES["sapo"].options[1:], fixed_aggregation=True),
    **_named(
        "cispo",
        log_ratio_bounds=(-20.0, 20.0),
        options=("epsilon", "epsilon_high"),
        bounds=clip_bounds,
        formula="-sg(clip(c, 1 - epsilon, 1 + epsilon_high)) A l",
    ),
    **_named(
        "gspo",
        level="sequence-token",
        log_ratio_bounds=(-math.inf, 10.0),
        options=("epsilon", "epsilon_high"),
        aggregation="token-mean",
        formula="as grpo, with c = exp(min(sg(mean of d over the sequence) + l - sg(l), 10))",
    ),
    **_named("reinforce", aggregation="token-mean"),
    **_named("gmpo gpg clip_cov kl_cov dro"),
}

PRESETS: Mapping[str | None, Conventions] = {
    None: Conventions(losses=LOSSES),
    "trl": Conventions(
        losses={
            **_named("grpo bnpo dr_grpo dapo luspo gspo sapo"),
            **_named("cispo", bounds=_truncation_trl, formula="-sg(min(c, epsilon_high)) A l; None: epsilon"),
            **_named("vespo", reads_padding=True),
            **_named("gmpo rloo", empty_loss=True),
        }
    ),
    "verl": Conventions(
        losses=_VERL_LOSSES,
        kl_times_ratio=False,
        kl_clamp="verl",
        counts_empty=False,
        length_eps=1e-8,
        width_is_length=True,
        entropy_as_policy=True,
    ),
    "openrlhf": Conventions(
        losses={
            **_named("grpo dapo ppo", **_DUAL, log_ratio_bounds=(-20.0, 20.0), ratio_cap=math.inf),
            **_named("gspo", options=("epsilon", "epsilon_high"), fixed_aggregation=True),
        },
        kl_times_ratio=False,
        kl_clamp="openrlhf",
        counts_empty=False,
        length_eps=1e-8,
    ),
}

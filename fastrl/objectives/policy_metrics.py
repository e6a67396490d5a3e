"""Metrics of policy objectives under the names of the project whose preset is in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl_kernels import TokenBatch
from fastrl_kernels.objective import SurrogateSums, TermSums

from .surrogates import gamma_weight, log_ratio, mask_of, ratio_clipped, sequences_in

if TYPE_CHECKING:
    from .policy_objective import PolicyObjective


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def nan_max(x: Tensor) -> Tensor:
    """Maximum of the entries that are not NaN; NaN where there is none."""
    if x.numel() == 0:
        return x.new_full((), torch.nan)
    most = torch.where(x.isnan(), -torch.inf, x).amax()
    return torch.where(x.isnan().all(), torch.nan, most)


# TRL's names, which are ours -----------------------------------------------------------------------------------------


def trl_metrics(
    objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor, mask: Tensor, scored: Tensor
) -> dict[str, Tensor]:
    """clip_ratio/*, shares of `mask` (of sequences, where ratio and advantages are theirs), and a loss type's own."""
    entry, out = objective.surrogate, {}
    if objective.loss_type == "vespo":
        phi = gamma_weight(objective, tokens)
        by_row = _by_sequence(tokens, phi, empty=1.0) if tokens.per_sequence else None
        out["vespo/phi_seq_mean"] = masked_mean(phi.expand_as(scored), scored) if by_row is None else by_row.mean()
    if entry.covariance and tokens.selected is not None:
        out[f"{objective.loss_type}/selected_mean"] = (tokens.selected & scored).sum() / mask.sum().clamp(min=1)
    if entry.clipped is None:
        return out
    low, high = entry.clipped(objective, tokens, ratio)
    by_sequence = objective.sequence_ratio and tokens.per_sequence
    if objective.loss_type == "cispo":
        share = _by_sequence(tokens, high.to(ratio.dtype)).mean() if by_sequence else _share(high, mask, scored)
        return {"cispo_clip_ratio": share}
    return out | clip_ratios(tokens, low, high, mask, scored, by_sequence)


def clip_ratios(
    tokens: TokenBatch, low: Tensor, high: Tensor, mask: Tensor, scored: Tensor, by_sequence: bool
) -> dict[str, Tensor]:
    dtype, sequences = tokens.logps.dtype, sequences_in(tokens)
    if by_sequence:
        low_rows, high_rows = (_by_sequence(tokens, x.to(dtype)) for x in (low, high))
        means = [x.mean() for x in (low_rows, high_rows, torch.maximum(low_rows, high_rows))]
    else:
        low, high = low & scored, high & scored
        share = torch.get_default_dtype()
        lengths = sequences.counts(mask, share)
        low_rows, high_rows = (sequences.counts(x, share) / lengths for x in (low, high))  # NaN: a fully masked row
        means = [x.sum() / mask.sum().clamp(min=1) for x in (low, high, low | high)]
    out = dict(zip((f"clip_ratio/{name}_mean" for name in ("low", "high", "region")), means, strict=True))
    return out | {"clip_ratio/low_min": -nan_max(-low_rows), "clip_ratio/high_max": nan_max(high_rows)}


def _share(x: Tensor, mask: Tensor, scored: Tensor) -> Tensor:
    return (x & scored).sum() / mask.sum().clamp(min=1)


def _by_sequence(tokens: TokenBatch, x: Tensor, empty: float = 0.0) -> Tensor:
    """`(B,)` from values that all tokens of a sequence share."""
    if x.ndim == 2:
        return x.squeeze(-1)
    sequences, mask = sequences_in(tokens), mask_of(tokens)
    return torch.where(sequences.counts(mask, x.dtype) > 0, sequences.max(x, mask), empty)


# verl's names --------------------------------------------------------------------------------------------------------


def verl_metrics(
    objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor, mask: Tensor, scored: Tensor
) -> dict[str, Tensor]:
    """actor/pg_clipfrac, actor/pg_clipfrac_lower and actor/ppo_kl: means over tokens, where verl 0.9 reports them."""
    d = log_ratio(tokens)
    if objective.loss_type == "gpg":
        return {}
    values: dict[str, Tensor] = {"actor/ppo_kl": d.abs() if objective.loss_type == "kl_cov" else -d}
    bounds = objective.surrogate.log_ratio_bounds
    if bounds is not None and not objective.sequence_ratio:
        values["actor/ppo_kl"] = -d.clamp(*bounds)
    fractions = VERL_FRACTIONS.get(objective.loss_type)
    if fractions is not None:
        names = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")
        values |= dict(zip(names, fractions(objective, tokens, ratio), strict=False))
    return {name: masked_mean(x.to(d.dtype).expand_as(d), scored) for name, x in values.items()}


def _dual(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    low, high = ratio_clipped(objective, tokens, ratio)
    return low | high, (ratio > objective.ratio_cap) & (tokens.advantages < 0)


def _never(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    nothing = torch.zeros_like(tokens.logps)
    return nothing, nothing


def _divergence(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    assert objective.surrogate.clipped is not None  # dppo has it
    low, high = objective.surrogate.clipped(objective, tokens, ratio)
    return low | high, (ratio > objective.ratio_cap) & ~(low | high)


def _sequence(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    low, high = ratio_clipped(objective, tokens, ratio)
    return low | high, torch.zeros_like(ratio)


def _truncated(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    low, high = objective.ratio_bounds
    return (ratio < low) | (ratio > high), torch.zeros_like(ratio)


def _geometric(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    d = log_ratio(tokens)
    clipped = (d < -objective.epsilon) | (d > objective._epsilon_high)
    return clipped & (tokens.advantages > 0), clipped & (tokens.advantages < 0)


def _selected(objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor) -> tuple[Tensor, ...]:
    return (torch.zeros_like(tokens.logps) if tokens.selected is None else tokens.selected,)


# Shares of tokens (pg_clipfrac, pg_clipfrac_lower) by loss type; dro, kl_cov and reinforce report neither.
VERL_FRACTIONS: Mapping[str, Callable[[PolicyObjective, TokenBatch, Tensor], tuple[Tensor, ...]]] = {
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "ppo"), _dual),
    **dict.fromkeys(("dppo_tv", "dppo_kl"), _divergence),
    "gspo": _sequence,
    "sapo": _never,
    "cispo": _truncated,
    "gmpo": _geometric,
    "clip_cov": _selected,
}


# OpenRLHF's names ----------------------------------------------------------------------------------------------------


def openrlhf_metrics(
    objective: PolicyObjective, tokens: TokenBatch, ratio: Tensor, mask: Tensor, scored: Tensor
) -> dict[str, Tensor]:
    """clip_ratio and ppo_kl, means over tokens."""
    low, high = ratio_clipped(objective, tokens, ratio)
    d = log_ratio(tokens)
    return {"clip_ratio": masked_mean((low | high).to(d.dtype).expand_as(d), scored), "ppo_kl": masked_mean(-d, scored)}


# From the sums of the CPU's kernel ------------------------------------------------------------------------------------

# verl's two fractions; None: 0.
_FRACTIONS: Mapping[str, tuple[str | None, str | None]] = {
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "ppo", "dppo_tv", "dppo_kl"), ("clipped", "capped")),
    "gspo": ("clipped", None),
    "sapo": (None, None),
    "cispo": ("outside", None),
}


def metrics_from_sums(objective: PolicyObjective, sums: Tensor, dtype: torch.dtype, entropy: bool) -> dict[str, Tensor]:
    """What `PolicyObjective.metrics` computes, in its dtypes, for a loss type without a clip per sequence.

    sums: (B, 13), the columns of `TermSums`, then of `SurrogateSums`.
    """
    total = sums.sum(0)
    means = dict(zip(_COLUMNS, (total / total[4].clamp(min=1)).to(dtype).unbind(), strict=True))
    means["clipped"] = means["low"] + means["high"]
    shares = (total[6:9] / total[5].clamp(min=1)).to(torch.get_default_dtype()).unbind()  # live, low, high
    out = {"live_fraction": shares[0]}
    if entropy:
        out["entropy"] = means["entropy"]
    if objective.preset == "openrlhf":
        return out | {"clip_ratio": means["clipped"], "ppo_kl": -means["drift"]}
    if objective.preset != "verl":
        return out | ({"cispo_clip_ratio": shares[2]} if objective.loss_type == "cispo" else {})
    if objective.loss_type == "gpg":
        return out
    out["actor/ppo_kl"] = -means["drift" if objective.sequence_ratio else "log_ratio"]
    if objective.loss_type in _FRACTIONS:
        names = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")
        nothing = torch.zeros_like(means["low"])
        out |= {
            k: nothing if x is None else means[x] for k, x in zip(names, _FRACTIONS[objective.loss_type], strict=True)
        }
    return out


_COLUMNS = (*TermSums._fields, *SurrogateSums._fields)

"""Metrics of policy objectives under the names of the project whose preset is in use."""

from __future__ import annotations

import math
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
_FRACTIONS: Mapping[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "ppo", "dppo_tv", "dppo_kl"), ("clipped", "capped")),
    "gspo": ("clipped", None),
    "sapo": (None, None),
    "cispo": ("outside", None),
    "gmpo": ("outside", "capped"),
    "clip_cov": ("selected",),
}
_COLUMNS = (*TermSums._fields, *SurrogateSums._fields, "lowest", "highest")


def metrics_from_totals(
    objective: PolicyObjective, tokens: TokenBatch, totals: list[float]
) -> tuple[dict[str, float], dict[str, float]]:
    """What `PolicyObjective.metrics` computes: values of the dtype of logps, and of the default dtype.

    totals: see `SurrogateTerms`; nothing here is as long as the batch.
    """
    total = dict(zip(_COLUMNS, totals, strict=True))
    counted, scored = max(1.0, total["counted"]), max(1.0, total["scored"])
    shares = {"live_fraction": total["live"] / counted}
    own = {} if tokens.entropy is None else {"entropy": total["entropy"] / scored}
    total["clipped"] = total["low"] + total["high"]
    if objective.preset == "openrlhf":
        own |= {"clip_ratio": total["clipped"] / scored, "ppo_kl": -total["drift"] / scored}
    elif objective.preset == "verl":
        own |= {name: x / scored for name, x in _verl_sums(objective, total).items()}
    else:
        rows = tokens.logps.shape[0] if tokens.advantages.shape[-1] == 1 else None
        _trl_totals(objective, total, counted, rows, own, shares)
    return own, shares


def _verl_sums(objective: PolicyObjective, total: Mapping[str, float]) -> dict[str, float]:
    if objective.loss_type == "gpg":
        return {}
    drift = -total["drift" if objective.sequence_ratio else "log_ratio"]
    out = {"actor/ppo_kl": -drift if objective.loss_type == "kl_cov" else drift}
    columns = _FRACTIONS.get(objective.loss_type, ())
    names = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")
    return out | {name: 0.0 if x is None else total[x] for name, x in zip(names, columns, strict=False)}


def _trl_totals(
    objective: PolicyObjective,
    total: Mapping[str, float],
    counted: float,
    rows: int | None,  # B, where advantages are those of rows
    own: dict[str, float],
    shares: dict[str, float],
) -> None:
    """Adds what `trl_metrics` computes."""
    entry = objective.surrogate
    if objective.loss_type == "vespo":
        number = max(1.0, total["scored"]) if rows is None else rows
        own["vespo/phi_seq_mean"] = total["phi"] / number if number else math.nan
    if entry.covariance:
        shares[f"{objective.loss_type}/selected_mean"] = total["selected"] / counted
    if entry.clipped is None:
        return
    if objective.loss_type == "cispo":
        shares["cispo_clip_ratio"] = total["high"] / counted
        return
    of_rows = objective.sequence_ratio and rows is not None
    out, number = (own, rows or math.nan) if of_rows else (shares, counted)
    for name, column in (("low", "low"), ("high", "high"), ("region", "clipped")):
        out[f"clip_ratio/{name}_mean"] = total[column] / number
    out["clip_ratio/low_min"], out["clip_ratio/high_max"] = total["lowest"], total["highest"]


def scalars(values: Mapping[str, float], dtype: torch.dtype) -> dict[str, Tensor]:
    """Each value as a tensor."""
    return dict(zip(values, torch.tensor(list(values.values()), dtype=dtype).unbind(), strict=True))

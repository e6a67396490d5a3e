"""Metrics of preference losses, under TRL's names, as sums and counts that passes add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastrl.integrations import LMHead
from fastrl.trainers.preference_batch import PreferenceBatch
from fastrl.trainers.sft import top1_count

Sums = dict[str, tuple[Any, Any]]


def sides(batch: PreferenceBatch, kinds: int) -> dict[str, Tensor]:
    """(B,) bool each: the chosen and the rejected answers of a pass that `by_kind` has ordered."""
    if batch.label is not None:
        return {"chosen": batch.label, "rejected": ~batch.label}
    kind = torch.arange(len(batch), device=batch.mask.device) // (len(batch) // kinds)
    return {"chosen": kind == 0, "rejected": kind == 1}


@torch.no_grad()
def token_metrics(
    hidden: Tensor,  # (B, T, D)
    batch: PreferenceBatch,
    head: LMHead,
    kinds: int,
    evaluating: bool,
) -> Sums:
    """logits/chosen and logits/rejected, unless the logits have a soft cap; mean_token_accuracy in evaluation."""
    inside = {side: batch.mask & answers[:, None] for side, answers in sides(batch, kinds).items()}
    metrics: Sums = {}
    if head.softcap is None:
        means = mean_logits(hidden, head)
        metrics = {f"logits/{side}": (means[tokens].sum(), tokens.sum()) for side, tokens in inside.items()}
    if evaluating:
        tokens = inside["chosen"]
        correct = top1_count(hidden[tokens], batch.completion_ids[tokens], head)
        metrics["mean_token_accuracy"] = (correct, tokens.sum())
    return metrics


def mean_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """(B, T): the mean of all logits of each hidden state (B, T, D), which have no soft cap: that of one mean row."""
    weight = head.weight.mean(0, dtype=torch.float32)
    bias = 0.0 if head.bias is None else head.bias.float().mean()
    return (hidden.float() @ weight + bias) * head.logit_scale


def pair_metrics(means: Mapping[str, Tensor], batch: PreferenceBatch, kinds: int, nll_divisor: float | None) -> Sums:
    """From means over the pairs of a pass.

    Args:
        means: the metrics of `linear_preference_loss`.
        kinds: sequences of a row, the third being the gold answer.
        nll_divisor: what the loss divided nll_loss by; None: the tokens of the pass.
    """
    tokens = batch.mask.view(kinds, -1).sum(-1)
    metrics: Sums = {name: (mean * (len(batch) // kinds), len(batch) // kinds) for name, mean in means.items()}
    metrics["entropy"] = (means["entropy"] * tokens[:2].sum(), tokens[:2].sum())
    if "nll_loss" in means:
        raised = tokens[0 if kinds == 2 else 2]
        metrics["nll_loss"] = (means["nll_loss"] * (raised if nll_divisor is None else nll_divisor), raised)
    return metrics


def answer_metrics(means: Mapping[str, Tensor], batch: PreferenceBatch) -> Sums:
    """From means over the good and over the bad answers of a pass, but for their difference, rewards/margins.

    Args:
        means: the metrics of `linear_kto_loss`.
    """
    tokens = batch.mask.sum()
    metrics: Sums = {"kl": (means["kl"], 1), "entropy": (means["entropy"] * tokens, tokens)}
    for side, answers in sides(batch, 1).items():
        for name in (f"rewards/{side}", f"logps/{side}"):  # NaN where there is no such answer
            metrics[name] = (torch.nan_to_num(means[name]) * answers.sum(), answers.sum())
    return metrics

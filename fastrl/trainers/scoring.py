"""The two ways a trainer runs the policy over rollouts, both without logits: scoring, and the loss with its gradient.

The model must be patched (`fastrl.patch_model`). What goes through it in one forward is a `Pass` of `packing.py`; the
LM head sees only the hidden states that score a completion's token."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastrl.integrations import LMHead
from fastrl.objectives import LossOutput, PolicyObjective, linear_policy_loss
from fastrl.trainers.micro_batches import MicroBatch
from fastrl.trainers.packing import Packer, Pass
from fastrl.trainers.rollouts import Rollouts
from fastrl_kernels import linear_logprobs


@torch.no_grad()
def completion_logps(
    model: nn.Module, rollouts: Rollouts, packer: Packer, *, temperature: float, backend: str | None = None
) -> Tensor:
    """Log-probabilities (B, T) of the completions' tokens, 0 where masked, fp32. Dropout is off.

    Sequences without a token that counts are not run.
    """
    logps = torch.zeros_like(rollouts.completion_ids, dtype=torch.float32)
    rows = rollouts.mask.any(-1).nonzero().squeeze(-1)
    with _eval_mode(model):
        for part in packer.passes(rollouts.select(rows)) if len(rows) else ():

            def score(hidden: Tensor, head: LMHead, part: Pass[Rollouts] = part) -> Tensor:
                return linear_logprobs(
                    part.select(hidden),
                    head.weight,
                    part.batch.completion_ids,
                    bias=head.bias,
                    temperature=temperature,
                    logit_scale=head.logit_scale,
                    softcap=head.softcap,
                    mask=part.batch.mask,
                    backend=backend,
                ).logps

            scored = model(**part.inputs, fastrl_head=score)
            logps[rows[part.sequences], : scored.shape[1]] = scored.to(logps.dtype)
    return logps


class PolicyPass(NamedTuple):
    """A pass of a micro-batch, with what its loss is divided by."""

    layout: Pass[Rollouts]
    normalizer: float
    entropy_normalizer: float | None


def policy_passes(batch: MicroBatch, packer: Packer, objective: PolicyObjective) -> list[PolicyPass]:
    """The passes of a micro-batch, whose losses add up to its loss.

    A top-entropy quantile ranks the tokens of the whole micro-batch, so with one there is a single pass.
    """
    together = objective.top_entropy_quantile < 1
    layouts = packer.passes(batch.rollouts, together=together)
    return [PolicyPass(layout, batch.normalizer, batch.entropy_normalizer) for layout in layouts]


def policy_loss(
    model: nn.Module,
    part: PolicyPass,
    objective: PolicyObjective,
    *,
    temperature: float,
    score_dead: bool,
    backend: str | None = None,
    grad_tolerance: float = 0.0,
) -> LossOutput:
    """The policy loss of a pass, computed inside the model's forward: the sum over its tokens of the eager loss,
    divided by the normalizer."""
    rollouts = part.layout.batch

    def loss(hidden: Tensor, head: LMHead) -> LossOutput:
        return linear_policy_loss(
            part.layout.select(hidden),
            head.weight,
            rollouts.completion_ids,
            objective,
            advantages=rollouts.advantages,
            mask=rollouts.mask,
            old_logps=rollouts.old_logps,
            ref_logps=rollouts.ref_logps,
            sampling_logps=rollouts.sampling_logps,
            normalizer=part.normalizer,
            entropy_normalizer=part.entropy_normalizer,
            bias=head.bias,
            temperature=temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            score_dead=score_dead,
            backend=backend,
            grad_tolerance=grad_tolerance,
        )

    out: LossOutput = model(**part.layout.inputs, fastrl_head=loss)
    return out


def merged_metrics(
    parts: Sequence[tuple[Pass[Rollouts], dict[str, Tensor]]], batch: MicroBatch, objective: PolicyObjective
) -> dict[str, Tensor]:
    """The metrics of a micro-batch from those of its passes.

    The clip ratios are those of the whole micro-batch: a sequence that was left out has advantage 0 and is never
    clipped. The other means are over the sequences that ran.
    """
    by_sequence = objective.importance_sampling_level == "sequence"  # then shares of sequences, not of tokens
    sequences = [len(part.batch) for part, _ in parts]
    tokens = [int(part.batch.mask.sum()) for part, _ in parts]
    merged = {}
    for name in parts[0][1]:
        values = torch.stack([metrics[name] for _, metrics in parts])
        clip = name.startswith("clip_ratio/")
        counts = sequences if clip and by_sequence else tokens
        if name == "policy_loss":
            merged[name] = values.sum()
        elif name.endswith(("_min", "_max")):  # NaN: a pass with no token
            known = values[~values.isnan()] if bool(values.isnan().any()) else values
            merged[name] = values[0] if not len(known) else known.amin() if name.endswith("_min") else known.amax()
        elif len(parts) == 1:
            merged[name] = values[0]
        else:
            merged[name] = (values * values.new_tensor(counts)).sum() / max(sum(counts), 1)
        if clip and name.endswith("_mean"):
            merged[name] = merged[name] * (sum(counts) / max(batch.sequences if by_sequence else batch.tokens, 1))
    if (sum(sequences) < batch.sequences) if by_sequence else (sum(tokens) < batch.tokens):
        merged["clip_ratio/low_min"] = merged["clip_ratio/low_min"].clamp(max=0.0)
    return merged


def no_clipping(batch: MicroBatch, objective: PolicyObjective) -> dict[str, float]:
    """The clip ratios of a micro-batch in which nothing was live; without a token there are no extremes of tokens."""
    extreme = 0.0 if batch.tokens or objective.importance_sampling_level == "sequence" else math.nan
    means = dict.fromkeys(("low_mean", "high_mean", "region_mean"), 0.0)
    return {f"clip_ratio/{name}": value for name, value in {**means, "low_min": extreme, "high_max": extreme}.items()}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode

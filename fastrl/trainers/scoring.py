"""The two ways a trainer runs the policy over rollouts, both without logits: scoring, and the loss with its gradient.

The model must be patched (`fastrl.patch_model`). The position before a completion's first token scores that token, so
the last token of a sequence is never an input."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastrl.integrations import LMHead
from fastrl.integrations.transformers_models import innermost_causal_lm
from fastrl.objectives import LossOutput, PolicyObjective, linear_policy_loss
from fastrl.trainers.micro_batches import MicroBatch
from fastrl.trainers.rollouts import Rollouts
from fastrl_kernels import linear_logprobs


def model_inputs(rollouts: Rollouts, with_positions: bool) -> dict[str, Tensor]:
    """Arguments of the model's forward, all (B, P + T - 1).

    Position ids count from the first token that is not padding, as `generate` does: learned position embeddings
    see the same positions as at sampling, however much padding a batch happens to have.
    """
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)[:, :-1]
    mask = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)[:, :-1].to(torch.int64)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if with_positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward has an argument `position_ids`."""
    forward = type(innermost_causal_lm(model)).forward
    return "position_ids" in inspect.signature(forward).parameters


@torch.no_grad()
def completion_logps(
    model: nn.Module, rollouts: Rollouts, *, temperature: float, batch_size: int, backend: str | None = None
) -> Tensor:
    """Log-probabilities (B, T) of the completions' tokens, 0 where masked, fp32. Dropout is off.

    Sequences without a token that counts are not run; the rest goes `batch_size` at a time.
    """
    logps = torch.zeros_like(rollouts.completion_ids, dtype=torch.float32)
    rows = rollouts.completion_mask.any(-1).nonzero().squeeze(-1)
    positions = takes_positions(model)
    with _eval_mode(model):
        for part in rows.split(batch_size) if len(rows) else ():
            batch = rollouts.select(part)

            def score(hidden: Tensor, head: LMHead, batch: Rollouts = batch) -> Tensor:
                return linear_logprobs(
                    hidden[:, -batch.completion_ids.shape[1] :],
                    head.weight,
                    batch.completion_ids,
                    bias=head.bias,
                    temperature=temperature,
                    logit_scale=head.logit_scale,
                    softcap=head.softcap,
                    mask=batch.completion_mask,
                    backend=backend,
                ).logps

            scored = model(**model_inputs(batch, positions), fastrl_head=score)
            logps[part, : scored.shape[1]] = scored.to(logps.dtype)
    return logps


def policy_loss(
    model: nn.Module,
    batch: MicroBatch,
    objective: PolicyObjective,
    *,
    temperature: float,
    score_dead: bool,
    backend: str | None = None,
) -> LossOutput:
    """The policy loss of a micro-batch, computed inside the model's forward.

    Equal to the sum over its tokens of the eager loss, divided by the normalizer. The clip ratios among the metrics
    are those of the whole micro-batch: a sequence that was left out has advantage 0 and is never clipped.
    """
    rollouts = batch.rollouts

    def loss(hidden: Tensor, head: LMHead) -> LossOutput:
        return linear_policy_loss(
            hidden[:, -rollouts.completion_ids.shape[1] :],
            head.weight,
            rollouts.completion_ids,
            objective,
            advantages=rollouts.advantages,
            mask=rollouts.completion_mask,
            old_logps=rollouts.old_logps,
            ref_logps=rollouts.ref_logps,
            sampling_logps=rollouts.sampling_logps,
            normalizer=batch.normalizer,
            entropy_normalizer=batch.entropy_normalizer,
            bias=head.bias,
            temperature=temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            score_dead=score_dead,
            backend=backend,
        )

    out: LossOutput = model(**model_inputs(rollouts, takes_positions(model)), fastrl_head=loss)
    by_sequence = objective.importance_sampling_level == "sequence"  # then shares of sequences, not of tokens
    kept = len(rollouts) if by_sequence else int(rollouts.completion_mask.sum())
    whole = batch.sequences if by_sequence else batch.tokens
    for name in ("low_mean", "high_mean", "region_mean"):
        out.metrics[f"clip_ratio/{name}"] = out.metrics[f"clip_ratio/{name}"] * (kept / max(whole, 1))
    if kept < whole:
        out.metrics["clip_ratio/low_min"] = out.metrics["clip_ratio/low_min"].clamp(max=0.0)
    return out


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

"""The two ways a trainer runs the policy over rollouts, both without logits: scoring, and the loss with its gradient.

The model must be patched (`fastrl.patch_model`). What goes through it in one forward is a `Pass` of `packing.py`; the
LM head sees only the hidden states that score a completion's token."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrl.integrations import LMHead
from fastrl.objectives import LossOutput, PolicyObjective, linear_policy_loss
from fastrl.trainers.micro_batches import MicroBatch
from fastrl.trainers.packing import Packer, Pass
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.token_batch import TokenBatch
from fastrl_kernels import linear_logprobs


@torch.no_grad()
def completion_logps(
    model: nn.Module,
    rollouts: TokenBatch,
    packer: Packer,
    *,
    temperature: float,
    backend: str | None = None,
    sequences: int | None = None,
) -> Tensor:
    """Log-probabilities (B, T) of the completions' tokens, 0 where masked, fp32; see `over_passes`."""
    score = partial(pass_logps, temperature=temperature, backend=backend)
    return over_passes(model, rollouts, packer, score, sequences)


@torch.no_grad()
def over_passes(
    model: nn.Module,
    batch: TokenBatch,
    packer: Packer,
    function: Callable[[nn.Module, Pass[Any]], Tensor],
    sequences: int | None = None,
) -> Tensor:
    """What `function(model, part)` gives for the tokens of each pass, (b, t, ...), as one (B, T, ...), fp32. Dropout is
    off.

    Sequences without a token that counts are not run, and are 0. So is every token if none is run: then (B, T).

    Args:
        sequences: at most so many in a pass; None: what `packer` says.
    """
    shape = batch.completion_ids.shape
    out: Tensor | None = None
    rows = batch.mask.any(-1).nonzero().squeeze(-1)
    with _eval_mode(model):
        for chunk in rows.split(sequences or max(len(rows), 1)):
            for part in packer.passes(batch.select(chunk)) if len(chunk) else ():
                scored = function(model, part).float()
                out = scored.new_zeros(*shape, *scored.shape[2:]) if out is None else out
                out[chunk[part.sequences], : scored.shape[1]] = scored
    return torch.zeros(shape, device=batch.completion_ids.device) if out is None else out


@torch.no_grad()
def pass_logps(model: nn.Module, part: Pass[Any], *, temperature: float, backend: str | None = None) -> Tensor:
    """Log-probabilities (B, T) of the tokens of a pass, 0 where masked."""

    def score(hidden: Tensor, head: LMHead) -> Tensor:
        return head_logps(part.select(hidden), head, part.batch, temperature=temperature, backend=backend)

    logps: Tensor = model(**part.inputs, fastrl_head=score)
    return logps


def head_logps(
    states: Tensor, head: LMHead, batch: TokenBatch, *, temperature: float, backend: str | None = None
) -> Tensor:
    """Log-probabilities (B, T) of the completions' tokens from the hidden states (B, T, D) that score them, 0 where
    masked."""
    return linear_logprobs(
        states,
        head.weight,
        batch.completion_ids,
        bias=head.bias,
        temperature=temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        mask=batch.mask,
        backend=backend,
    ).logps


Run = Callable[[Pass[Any], Callable[[Tensor, LMHead], Any]], Any]


class ReferenceHead(NamedTuple):
    """What an exact KL compares the policy with."""

    ref_hidden: Tensor  # (B, T, D')
    ref_weight: Tensor  # (V, D')
    ref_bias: Tensor | None  # (V,)


def reference_head(reference: nn.Module, part: Pass[Any]) -> ReferenceHead:
    """Hidden states and head of the reference for a pass. Dropout is off."""
    states, head = states_and_head(reference, part)
    return ReferenceHead(states, head.weight, head.bias)


@torch.no_grad()
def states_and_head(model: nn.Module, part: Pass[Any]) -> tuple[Tensor, LMHead]:
    """The hidden states (B, T, D) that score the tokens of a pass, and the head, without gradient. Dropout is off."""
    with _eval_mode(model):
        both: tuple[Tensor, LMHead] = model(**part.inputs, fastrl_head=lambda hidden, head: (part.select(hidden), head))
    return both


def policy_loss(
    run: Run,
    part: Pass[Rollouts],
    batch: MicroBatch[Rollouts],
    objective: PolicyObjective,
    *,
    reference: ReferenceHead | None = None,
    temperature: float,
    score_dead: bool,
    backend: str | None = None,
    grad_tolerance: float = 0.0,
) -> LossOutput:
    """The policy loss of a micro-batch's pass, computed inside the model's forward: the sum over its tokens of the
    eager loss, divided by what the micro-batch says.

    Args:
        run: runs the model on a pass: `model(**part.inputs, fastrl_head=function)`.
        reference: of the same pass, for an exact KL.
    """
    rollouts = part.batch
    bonus = objective.entropy_coef != 0 and objective.top_entropy_quantile == 1
    if objective.conventions.entropy_as_policy:
        bonus = False  # it has the policy term's divisor
    exact = {} if reference is None else reference._asdict()

    def loss(hidden: Tensor, head: LMHead) -> LossOutput:
        return linear_policy_loss(
            part.select(hidden),
            head.weight,
            rollouts.completion_ids,
            objective,
            advantages=rollouts.advantages,
            mask=rollouts.mask,
            old_logps=rollouts.old_logps,
            ref_logps=rollouts.ref_logps,
            sampling_logps=rollouts.sampling_logps,
            importance_ratio=rollouts.importance_ratio,
            normalizer=batch.divisor(objective),
            entropy_normalizer=max(batch.step_tokens, 1.0) if bonus else None,
            bias=head.bias,
            temperature=temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            score_dead=score_dead,
            backend=backend,
            grad_tolerance=grad_tolerance,
            **exact,
        )

    out: LossOutput = run(part, loss)
    return out


PassMetrics = Sequence[tuple[Pass[Any], dict[str, Tensor]]]  # the passes of a micro-batch, with their metrics


def token_means(parts: PassMetrics) -> dict[str, Tensor]:
    """The metrics of a micro-batch from those of its passes: means over tokens; extremes where a name ends so."""
    tokens = [int(part.batch.mask.sum()) for part, _ in parts]
    names = parts[0][1] if parts else {}
    return {name: _merged(name, [metrics[name] for _, metrics in parts], tokens) for name in names}


def policy_metrics(parts: PassMetrics, batch: MicroBatch[Any], objective: PolicyObjective) -> dict[str, Tensor]:
    """The same for a policy loss.

    Shares of what was clipped are those of the whole micro-batch: a sequence that was left out has advantage 0 and is
    never clipped. The other means are over the sequences that ran.
    """
    by_sequence = objective.sequence_ratio  # then shares of sequences, not of tokens
    if not parts:
        return _nothing_clipped(batch, objective)
    merged = token_means(parts)
    merged["policy_loss"] = torch.stack([metrics["policy_loss"] for _, metrics in parts]).sum()
    sequences, tokens = [len(part.batch) for part, _ in parts], [int(part.batch.mask.sum()) for part, _ in parts]
    counts, everything = (sequences, batch.sequences) if by_sequence else (tokens, batch.tokens)
    for name in merged.keys() & {*_CLIP_SHARES, "vespo/phi_seq_mean"}:
        of_passes = [metrics[name] for _, metrics in parts]
        if name == "vespo/phi_seq_mean":
            merged[name] = _merged(name, of_passes, sequences)
        else:
            merged[name] = _merged(name, of_passes, counts) * (sum(counts) / max(everything, 1))
    if "clip_ratio/low_min" in merged and sum(counts) < everything:
        merged["clip_ratio/low_min"] = merged["clip_ratio/low_min"].clamp(max=0.0)
    return merged


_CLIP_SHARES = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")


def _nothing_clipped(batch: MicroBatch[Any], objective: PolicyObjective) -> dict[str, Tensor]:
    if objective.preset not in (None, "trl") or objective.surrogate.clipped is None:
        return {}
    if objective.loss_type == "cispo":
        return {"cispo_clip_ratio": torch.zeros(())}
    extreme = 0.0 if batch.tokens or objective.sequence_ratio else math.nan  # without a token there are no extremes
    clip = {"low_mean": 0.0, "high_mean": 0.0, "region_mean": 0.0, "low_min": extreme, "high_max": extreme}
    return {f"clip_ratio/{name}": torch.tensor(value) for name, value in clip.items()}


def _merged(name: str, of_passes: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    values = torch.stack(list(of_passes))
    if name.endswith(("_min", "_max")):  # NaN: a pass with no token
        known = values[~values.isnan()] if bool(values.isnan().any()) else values
        return values[0] if not len(known) else known.amin() if name.endswith("_min") else known.amax()
    if len(values) == 1:
        return values[0]
    return (values * values.new_tensor(counts)).sum() / max(sum(counts), 1)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode

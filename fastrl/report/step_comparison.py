"""One optimizer step on the same rollouts, three times: eager PyTorch, our loss, and our loss as the trainer uses it.

Every side runs in a process of its own, so that no side inherits another's memory. Measured are the forward and
backward of the model (the AdamW update is the same for all and left out). All score the completion tokens only:

    eager    logits = hidden W^T of those tokens, log_softmax, gather, fastrl.policy_loss, autograd
    fused    fastrl.linear_policy_loss on the same hidden states, never building the logits
    trainer  the same, as GRPOTrainer does it: sequences without an advantage skip the model, a group's prompt is
             encoded once, and the model is run in passes of a bounded size
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrl.benchmark.memory import Lap, MemoryMeter
from fastrl.integrations import LMHead, patch_model
from fastrl.objectives import PolicyObjective, linear_policy_loss, policy_loss
from fastrl.trainers.model_setup import disable_dropout
from fastrl.trainers.packing import Packer, Pass
from fastrl.trainers.rollouts import Rollouts

SIDES = ("eager", "fused", "trainer")
_TITLES = {
    "eager": "eager loss",
    "fused": "fastrl loss",
    "trainer": "fastrl loss, run as the trainer runs it",
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one side took. `None` where the memory can't be measured on this system."""

    loss: float
    seconds: float  # forward and backward of the step
    loss_seconds: float  # of which: from the hidden states to their gradients and the head's
    step_bytes: int | None  # peak increase of memory over the step
    loss_bytes: int | None  # and over the loss, counted from its beginning
    sequences: int  # that went through the model
    tokens: int  # scored by the loss


def run_side(
    side: str,
    model: nn.Module,
    batch: Rollouts,
    objective: PolicyObjective,
    *,
    temperature: float = 1.0,
    micro_batch: int | None = None,
) -> Measured:
    """Forward and backward of one optimizer step; the gradients are left in the parameters.

    Args:
        side: one of `SIDES`.
        model: a causal LM on the device of `batch`.
        objective: without a KL term, which would need a reference model.
        micro_batch: sequences per forward of the first two, default all; the loss is that of the whole step, whatever
            the split. The trainer's side has its own (`fastrl.trainers.packing`).

    Raises:
        ValueError: unknown side, or an objective with a KL term.
    """
    if side not in SIDES:
        raise ValueError(f"side: expected one of {', '.join(SIDES)}, got {side!r}")
    if objective.beta:
        raise ValueError("objective: a KL term needs a reference model, which this comparison does not load")
    normalizer = _normalizer(objective, batch.completion_mask)
    entropy_normalizer = float(batch.completion_mask.sum())
    if side == "trainer":
        live = objective.live_tokens(advantages=batch.advantages, mask=batch.completion_mask).any(1)
        batch = batch.select(live)
    meter = MemoryMeter(batch.advantages.device)
    laps: list[Lap | None] = []
    loss_laps: list[Lap | None] = []
    total, loss_seconds = 0.0, 0.0

    def head_function(part: Pass, hidden: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
        nonlocal loss_seconds, total
        states = part.select(hidden)
        x = states.detach().requires_grad_()
        laps.append(meter.lap())
        start = time.perf_counter()
        compute = _eager_loss if side == "eager" else _fused_loss
        loss = compute(x, head, part.batch, objective, temperature, normalizer, entropy_normalizer)
        loss.backward()
        total += loss.item()  # waits for the device
        loss_seconds += time.perf_counter() - start
        loss_laps.append(meter.lap())
        return states, x.grad if x.grad is not None else torch.zeros_like(x)

    start = time.perf_counter()
    with patch_model(model):
        for part in _passes(side, model, batch, micro_batch):
            states, gradient = model(**part.inputs, fastrl_head=functools.partial(head_function, part))
            states.backward(gradient)
            del states, gradient
            laps.append(meter.lap())
    seconds = time.perf_counter() - start
    every = [*laps, *loss_laps]
    return Measured(
        loss=total,
        seconds=seconds,
        loss_seconds=loss_seconds,
        step_bytes=_increase([Lap(laps[0].start, lap.peak) for lap in every if lap]) if laps and laps[0] else None,
        loss_bytes=_increase(loss_laps),
        sequences=len(batch),
        tokens=int(batch.completion_mask.sum()),
    )


def _eager_loss(
    hidden: Tensor,
    head: LMHead,
    batch: Rollouts,
    objective: PolicyObjective,
    temperature: float,
    normalizer: float,
    entropy_normalizer: float,
) -> Tensor:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits.float() * head.logit_scale if head.logit_scale != 1.0 else logits.float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if temperature != 1.0:
        logits = logits / temperature
    log_probs = torch.log_softmax(logits, -1)
    logps = log_probs.gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1)
    needs_entropy = objective.entropy_coef != 0 or objective.top_entropy_quantile < 1
    entropy = -(log_probs.exp() * log_probs).sum(-1) if needs_entropy else None
    out = policy_loss(
        logps,
        objective,
        advantages=batch.advantages,
        mask=batch.completion_mask,
        entropy=entropy,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
    )
    return out.loss


def _fused_loss(
    hidden: Tensor,
    head: LMHead,
    batch: Rollouts,
    objective: PolicyObjective,
    temperature: float,
    normalizer: float,
    entropy_normalizer: float,
) -> Tensor:
    out = linear_policy_loss(
        hidden,
        head.weight,
        batch.completion_ids,
        objective,
        advantages=batch.advantages,
        mask=batch.completion_mask,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        temperature=temperature,
        normalizer=normalizer,
        entropy_normalizer=entropy_normalizer,
    )
    return out.loss


def _normalizer(objective: PolicyObjective, mask: Tensor) -> float:
    sequences, width = mask.shape
    if objective.loss_type == "grpo":
        return float(sequences)
    if objective.loss_type == "dr_grpo":
        return float(sequences * (objective.max_completion_length or width))
    return float(mask.sum())


def _passes(side: str, model: nn.Module, batch: Rollouts, micro_batch: int | None) -> Iterator[Pass]:
    if side == "trainer":
        yield from Packer.for_model(model).passes(batch)
        return
    padded = Packer.for_model(model, share_prompts=False)
    for rows in torch.arange(len(batch), device=batch.advantages.device).split(micro_batch or max(len(batch), 1)):
        yield from padded.passes(batch.select(rows), together=True)


def _increase(laps: Sequence[Lap | None]) -> int | None:
    known = [lap.peak - lap.start for lap in laps if lap is not None]
    return max(known) if known else None


class Difference(NamedTuple):
    """How far one set of gradients is from eager's."""

    largest: float  # absolute difference of any entry of any gradient
    largest_entry: float  # absolute, of eager's gradients
    relative: float  # norm of the difference of all gradients / norm of eager's


@dataclasses.dataclass(frozen=True)
class StepComparison:
    """The measurements by side, and for each side but eager the distance of its gradients from eager's."""

    sides: dict[str, Measured]
    differences: dict[str, Difference]
    shape: str  # of the batch, in words

    def to_json(self) -> dict[str, Any]:
        """Everything as plain numbers; bytes and seconds."""
        return {
            "sides": {side: dataclasses.asdict(took) for side, took in self.sides.items()},
            "gradient_differences": {side: difference._asdict() for side, difference in self.differences.items()},
            "batch": self.shape,
        }

    def markdown(self) -> str:
        """A table with one line per side, and what was measured."""
        lines = [
            "| one optimizer step | sequences | time | of it the loss | memory | in the loss | gradient difference |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for side, took in self.sides.items():
            difference = self.differences.get(side)
            distance = "" if difference is None else f"{difference.largest:.1e} ({difference.relative:.1e} of the norm)"
            lines.append(
                f"| {_TITLES[side]} | {took.sequences} | {took.seconds:.1f} s | {took.loss_seconds:.2f} s "
                f"| {_mebibytes(took.step_bytes)} | {_mebibytes(took.loss_bytes)} | {distance} |"
            )
        entry = max((difference.largest_entry for difference in self.differences.values()), default=0.0)
        lines += [
            "",
            f"The same rollouts for each: {self.shape}. Forward and backward, without dropout and the AdamW "
            "update, each in a process of its own; memory is the peak increase over the step, and over the loss (from "
            f"hidden states to their gradients). The gradient difference is the largest of any entry; the "
            f"largest entry of eager's gradients is {entry:.1e}.",
        ]
        return "\n".join(lines)


def compare_step(
    model_path: str,
    batch: Rollouts,
    objective: PolicyObjective,
    *,
    temperature: float = 1.0,
    micro_batch: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    sides: Sequence[str] = SIDES,
) -> StepComparison:
    """Run every side in a fresh process and compare their gradients with eager's, the first.

    Raises:
        RuntimeError: a process failed; the message ends with its output.
    """
    settings = {
        "model": model_path,
        "objective": {item.name: getattr(objective, item.name) for item in dataclasses.fields(objective) if item.init},
        "temperature": temperature,
        "micro_batch": micro_batch,
        "dtype": dtype,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    measured: dict[str, Measured] = {}
    differences: dict[str, Difference] = {}
    with tempfile.TemporaryDirectory(prefix="fastrl-step-") as name:
        folder = Path(name)
        save_file({key: value.contiguous() for key, value in batch.tensors().items()}, folder / "batch.safetensors")
        for side in sides:
            (folder / f"{side}.json").write_text(json.dumps({**settings, "side": side}))
            command = [sys.executable, "-m", "fastrl.report.step_comparison", str(folder / f"{side}.json")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the {side} side of the step comparison failed:\n{done.stderr[-4000:]}")
            measured[side] = Measured(**json.loads((folder / f"{side}.result.json").read_text()))
            if side != sides[0]:
                differences[side] = gradient_difference(
                    folder / f"{sides[0]}.safetensors", folder / f"{side}.safetensors"
                )
                (folder / f"{side}.safetensors").unlink()
    sequences, prompt_width = batch.prompt_ids.shape
    shape = (
        f"{sequences} sequences, prompts up to {prompt_width} tokens, completions up to "
        f"{batch.completion_ids.shape[1]}, {int(batch.completion_mask.sum())} completion tokens, "
        f"{int((batch.advantages != 0).sum())} sequences with an advantage"
    )
    return StepComparison(measured, differences, shape)


def gradient_difference(first: Path, second: Path) -> Difference:
    """Compares two safetensors files of gradients, tensor by tensor; the first is the one to be near to.

    Raises:
        ValueError: they don't hold the gradients of the same parameters.
    """
    largest = entry = square = total = 0.0
    with safe_open(first, framework="pt") as a, safe_open(second, framework="pt") as b:
        if set(a.keys()) != set(b.keys()):
            raise ValueError(f"gradients of different parameters: {sorted(set(a.keys()) ^ set(b.keys()))}")
        for name in a.keys():  # noqa: SIM118  (not a dict)
            one, difference = a.get_tensor(name).double(), a.get_tensor(name).double() - b.get_tensor(name).double()
            largest = max(largest, difference.abs().max().item())
            entry = max(entry, one.abs().max().item())
            square += difference.square().sum().item()
            total += one.square().sum().item()
    return Difference(largest, entry, math.sqrt(square / total) if total else 0.0)


def _mebibytes(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 2**20:.0f} MiB"


def _run_in_this_process(settings_file: Path) -> None:
    from fastrl.report.answers import load_model

    settings = json.loads(settings_file.read_text())
    torch.set_num_threads(settings["threads"])
    device = torch.device(settings["device"])
    model = load_model(settings["model"], settings["dtype"], device)
    model.train()
    disable_dropout(model)  # sides that run other sequences would draw other masks
    batch = Rollouts(**load_file(settings_file.with_name("batch.safetensors"), device=str(device)))
    objective = PolicyObjective(**settings["objective"])
    arguments = {"temperature": settings["temperature"], "micro_batch": settings["micro_batch"]}
    # Threads, kernels and library buffers exist after this; the measured step finds them all.
    warm_up = batch.select(batch.advantages.abs().topk(min(2, len(batch))).indices)
    run_side(settings["side"], model, warm_up, objective, temperature=settings["temperature"])
    model.zero_grad(set_to_none=True)
    gc.collect()
    measured = run_side(settings["side"], model, batch, objective, **arguments)
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    save_file(gradients, settings_file.with_suffix(".safetensors"))
    settings_file.with_suffix(".result.json").write_text(json.dumps(dataclasses.asdict(measured)))


if __name__ == "__main__":
    _run_in_this_process(Path(sys.argv[1]))

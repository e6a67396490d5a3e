"""A reference that follows the policy (Gorbatovski et al. 2024, TR-DPO), as TRL's `sync_ref_model` has it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_PREFIX = "reference."


class ReferenceSync(TrainerCallback):
    """Every `steps` optimizer steps: reference = alpha * policy + (1 - alpha) * reference."""

    def __init__(self, reference: nn.Module, alpha: float, steps: int) -> None:
        self.reference, self.alpha, self.steps = reference, alpha, steps

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Called by Trainer."""
        if state.global_step % self.steps == 0:
            policy = dict(model.named_parameters())
            for name, parameter in self.reference.named_parameters():
                parameter.lerp_(policy[name].to(parameter.dtype), self.alpha)

    def tensors(self) -> dict[str, Tensor]:
        """The reference's parameters, for a checkpoint: they are no longer those of the model that was given."""
        return {_PREFIX + name: parameter for name, parameter in self.reference.named_parameters()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes its parameters back; the tensors that are others' are returned."""
        for name, parameter in self.reference.named_parameters():
            parameter.copy_(tensors[_PREFIX + name])
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}

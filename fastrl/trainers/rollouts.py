"""A batch of rollouts: what was sampled, its advantages, and the log-probabilities that do not change."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastrl.trainers.token_batch import TokenBatch


@dataclass(frozen=True)
class Rollouts(TokenBatch):
    """B sampled sequences. A completion left out of the loss has an all-False `loss_mask`."""

    advantages: Tensor  # (B,) fp32
    old_logps: Tensor | None = None  # (B, T); None: the policy has not changed since
    ref_logps: Tensor | None = None  # (B, T); None: no KL term
    sampling_logps: Tensor | None = None  # (B, T); None: the engine does not tell


def named_tensors(parts: Sequence[Rollouts]) -> dict[str, Tensor]:
    """Several batches as one flat dict, for a safetensors file."""
    return {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.tensors().items()}


def from_named_tensors(tensors: dict[str, Tensor]) -> list[Rollouts]:
    """What `named_tensors` was given."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, field = name.split(".", 1)
        parts.setdefault(int(part), {})[field] = tensor
    return [Rollouts(**parts[i]) for i in sorted(parts)]

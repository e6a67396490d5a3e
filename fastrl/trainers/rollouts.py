"""A batch of rollouts: what was sampled, its advantages, and the log-probabilities that do not change."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from fastrl.trainers.token_batch import TokenBatch

Batch = TypeVar("Batch", bound=TokenBatch)


@dataclass(frozen=True)
class Rollouts(TokenBatch):
    """B sampled sequences. A completion left out of the loss has an all-False `loss_mask`."""

    advantages: Tensor  # (B,) fp32
    old_logps: Tensor | None = None  # (B, T); None: the policy has not changed since
    ref_logps: Tensor | None = None  # (B, T); None: no KL term
    sampling_logps: Tensor | None = None  # (B, T); None: the engine does not tell
    importance_ratio: Tensor | None = None  # (B, T) or (B, 1) factor of the policy term; None: 1


def named_tensors(parts: Sequence[TokenBatch]) -> dict[str, Tensor]:
    """Several batches as one flat dict, for a safetensors file."""
    return {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.tensors().items()}


def from_named_tensors(kind: type[Batch], tensors: dict[str, Tensor]) -> list[Batch]:
    """What `named_tensors` was given, batches of one kind."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, field = name.split(".", 1)
        parts.setdefault(int(part), {})[field] = tensor
    return [kind(**parts[i]) for i in sorted(parts)]

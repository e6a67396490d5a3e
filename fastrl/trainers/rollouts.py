"""A batch of rollouts as tensors: what was sampled, its advantages, and the log-probabilities that do not change."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollouts:
    """B sequences: prompts padded on the left, completions on the right."""

    prompt_ids: Tensor  # (B, P) int64
    prompt_mask: Tensor  # (B, P) bool
    completion_ids: Tensor  # (B, T) int64, T >= 1
    completion_mask: Tensor  # (B, T) bool; all False for an empty completion and for one left out of the loss
    advantages: Tensor  # (B,) fp32
    old_logps: Tensor | None = None  # (B, T); None: the policy has not changed since
    ref_logps: Tensor | None = None  # (B, T); None: no KL term
    sampling_logps: Tensor | None = None  # (B, T); None: the engine does not tell

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and of completions that count, padding left out."""
        return int(self.prompt_mask.sum() + self.completion_mask.sum())

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def select(self, rows: Tensor) -> "Rollouts":
        """The sequences of an index or a mask, without the columns that are padding in all of them.

        At least one column of prompt and of completion stays, so that no tensor is empty.
        """
        picked = Rollouts(**{name: tensor[rows] for name, tensor in self.tensors().items()})
        prompt = _columns(picked.prompt_mask.flip(-1))
        completion = _columns(picked.completion_mask)
        cut = {
            name: tensor[:, -prompt:] if name.startswith("prompt") else tensor[:, :completion]
            for name, tensor in picked.tensors().items()
            if tensor.ndim == 2
        }
        return dataclasses.replace(picked, **cut)

    def split(self, parts: int) -> list["Rollouts"]:
        """Equal shares of the sequences, in order."""
        size = len(self) // parts
        index = torch.arange(len(self), device=self.prompt_ids.device)
        return [self.select(index[start : start + size]) for start in range(0, size * parts, size)]


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


def _columns(mask: Tensor) -> int:
    used = mask.any(0).nonzero()
    return 1 if used.numel() == 0 else int(used[-1]) + 1


def pad(rows: Sequence[Sequence[float]], value: float, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of one width (at least 1), and the mask of what is not padding."""
    width = max(1, *map(len, rows))
    padded = [[value] * (width - len(r)) + list(r) if left else list(r) + [value] * (width - len(r)) for r in rows]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    places = torch.arange(width, device=device)
    mask = places >= width - lengths[:, None] if left else places < lengths[:, None]
    return torch.tensor(padded, device=device), mask

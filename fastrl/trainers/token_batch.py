"""Sequences of tokens as every trainer holds them: a prompt, then a completion of which a loss counts some tokens."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True)
class TokenBatch:
    """B sequences: prompts padded on the left, completions on the right."""

    prompt_ids: Tensor  # (B, P) int64
    prompt_mask: Tensor  # (B, P) bool: what is not padding
    completion_ids: Tensor  # (B, T) int64, T >= 1
    completion_mask: Tensor  # (B, T) bool: what is not padding; all False for an empty completion
    # (B, T) bool: the tokens that the loss counts, within completion_mask; holes are allowed. None: all of them.
    loss_mask: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def mask(self) -> Tensor:
        """(B, T) bool: the tokens that the loss counts."""
        return self.completion_mask if self.loss_mask is None else self.loss_mask

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and completions, padding left out."""
        return int(self.prompt_mask.sum() + self.completion_mask.sum())

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same sequences on a device."""
        return type(self)(**{name: t.to(device, non_blocking=non_blocking) for name, t in self.tensors().items()})

    def select(self, rows: Tensor) -> Self:
        """The sequences of an index or a mask, without the columns that are padding in all of them.

        Columns of completions that come after the last token that counts go too: nothing depends on them. At least one
        column of prompt and of completion stays, so that no tensor is empty.
        """
        picked = type(self)(**{name: tensor[rows] for name, tensor in self.tensors().items()})
        prompt = _columns(picked.prompt_mask.flip(-1))
        completion = _columns(picked.mask)
        cut = {
            name: tensor[:, -prompt:] if name.startswith("prompt") else tensor[:, :completion]
            for name, tensor in picked.tensors().items()
            if tensor.ndim == 2
        }
        return dataclasses.replace(picked, **cut)

    def split(self, parts: int) -> list[Self]:
        """Equal shares of the sequences, in order."""
        size = len(self) // parts
        index = torch.arange(len(self), device=self.prompt_ids.device)
        return [self.select(index[start : start + size]) for start in range(0, size * parts, size)]


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

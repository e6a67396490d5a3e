"""How a batch of sequences is laid out for the model: which tokens go through it in one forward, and where.

A group's prompt is encoded once and not once for each completion: a row is the prompt, then the completions one after
the other. A 4D attention mask lets each completion see the prompt and its own past, and position ids begin anew after
the prompt, so that an unmodified model gives every token the hidden state that it has in a sequence of its own. Where a
model cannot do that exactly (`prompt_sharing` says why), each sequence gets a padded row of its own.

The position before a completion's first token scores that token, so the last token of a sequence is never an input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastrl.integrations.transformers_models import head_of, innermost_causal_lm
from fastrl.trainers.prompt_sharing import PromptSharing, prompt_sharing, takes_positions
from fastrl.trainers.token_batch import TokenBatch

Batch = TypeVar("Batch", bound=TokenBatch)

# Tokens of one forward and backward by default: enough for full-speed GEMMs, no more, since activations grow with it.
TOKENS_PER_PASS = {"cpu": 1024, "cuda": 16384}


@dataclass(frozen=True)
class Pass(Generic[Batch]):
    """The sequences of one forward and backward, and what the model is given for them."""

    sequences: Tensor  # (B,) their places in the batch
    batch: Batch  # B
    inputs: dict[str, Tensor]  # of the model's forward, each (R, S), the mask also (R, 1, S, S)
    tokens: Tensor  # (R, S) bool: what of the inputs has a successor in its sequence, so neither padding nor an end
    places: Tensor  # (B, T) where among the R * S hidden states those are that score each token

    def select(self, hidden: Tensor) -> Tensor:
        """(B, T, D): the hidden states (R, S, D) that score the completions' tokens; any one where none counts."""
        return self._states(hidden)[self.places]

    def select_counted(self, hidden: Tensor) -> Tensor:
        """(n, D): of the hidden states (R, S, D) those that score the tokens which the loss counts, in their order."""
        return self._states(hidden)[self.places[self.batch.mask]]

    def _states(self, hidden: Tensor) -> Tensor:
        # PEFT's prompt learning puts tokens of its own before each row.
        return hidden[:, -self.tokens.shape[1] :].flatten(0, 1)


@dataclass
class _Row:
    """A prompt and some of its completions, side by side."""

    prompt: int  # tokens of the prompt
    size: int  # tokens of the row
    sequences: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Packer:
    """Lays out batches for one model; see `for_model`."""

    takes_positions: bool
    sharing: PromptSharing
    required: bool  # share_prompts=True: sequences that are too long for sharing are an error
    additive_mask: torch.dtype | None  # the attention adds its mask (0 and the least number); None: it takes a boolean
    token_cost: float  # FLOPs of a token in the model's weights
    pair_cost: float  # and of a token and a token of its row in the attention
    tokens: float  # of one pass, at most, unless a single sequence has more

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        share_prompts: bool | None = None,
        tokens_per_pass: float | None = None,
        *,
        one_pass: bool = False,
    ) -> Packer:
        """The layout for a causal LM or a classifier, wrapped or not.

        Args:
            model: the policy; its reference and its copies have the same layout.
            share_prompts: None: where it is exact; True: it must be; False: never.
            tokens_per_pass: at most so many tokens in one pass, padding included, unless one sequence has more; None:
                `TOKENS_PER_PASS` of the model's device.
            one_pass: everything in one pass, as under FSDP.

        Raises:
            ValueError: share_prompts=True for a model where that is not exact; tokens_per_pass together with one_pass.
        """
        if one_pass and tokens_per_pass is not None:
            raise ValueError(
                "tokens_per_pass: not with FSDP, under which every process must run the model equally often; a smaller "
                "per_device_train_batch_size bounds the memory"
            )
        if one_pass:
            tokens_per_pass = math.inf
        sharing = prompt_sharing(model)
        if share_prompts and not sharing.longest:
            raise ValueError(f"share_prompts: not exact for this model: {sharing.why}; set it to None or False")
        if share_prompts is False:
            sharing = PromptSharing(0, "share_prompts is False")
        causal_lm: Any = innermost_causal_lm(model)
        config = causal_lm.config.get_text_config()
        ends = (causal_lm.get_input_embeddings(), head_of(causal_lm))
        vocabulary = {id(p) for module in ends for p in module.parameters()}
        weights = [p for p in causal_lm.parameters() if p.ndim > 1 and id(p) not in vocabulary]
        return cls(
            takes_positions=takes_positions(model),
            sharing=sharing,
            required=bool(share_prompts),
            additive_mask=None if config._attn_implementation == "sdpa" else causal_lm.dtype,
            token_cost=2.0 * sum(p.numel() for p in weights),
            pair_cost=4.0 * config.num_hidden_layers * config.hidden_size,
            tokens=tokens_per_pass or TOKENS_PER_PASS.get(causal_lm.device.type, TOKENS_PER_PASS["cuda"]),
        )

    def for_both(self, other: nn.Module, name: str) -> Packer:
        """The same layout, without shared prompts where another model, which runs on the same passes, cannot follow.

        Args:
            name: the argument that the other model came as, for errors.

        Raises:
            ValueError: share_prompts=True then; or only one of the models takes position ids.
        """
        if takes_positions(other) != self.takes_positions:
            raise ValueError(f"{name}: expected a model that takes position_ids if the model does, and only then")
        causal_lm: Any = innermost_causal_lm(other)
        attention = causal_lm.config.get_text_config()._attn_implementation
        sharing = prompt_sharing(other)
        if (attention == "sdpa") != (self.additive_mask is None):
            sharing = PromptSharing(0, f"{name} has the attention {attention!r}, unlike the model")
        if self.required and not sharing.longest:
            raise ValueError(f"share_prompts: not exact for {name}: {sharing.why}; set it to None or False")
        return dataclasses.replace(self, sharing=min(self.sharing, sharing, key=lambda each: each.longest))

    def passes(self, batch: Batch, *, together: bool = False) -> list[Pass[Batch]]:
        """Every sequence of the batch in one of the passes, longest first; empty for an empty batch.

        Args:
            together: one pass, whatever its size: for what is defined on the whole batch.

        Raises:
            ValueError: share_prompts=True and a sequence that is too long for it.
        """
        if not len(batch):
            return []
        prompts = batch.prompt_mask.sum(-1).tolist()
        steps = torch.arange(1, batch.completion_ids.shape[1] + 1, device=batch.completion_mask.device)
        completions = (batch.mask * steps).amax(-1).tolist()
        longest = max(p + max(c - 1, 0) for p, c in zip(prompts, completions, strict=True))
        if longest <= self.sharing.longest:
            return list(self._packed(batch, prompts, completions, together))
        if self.required:
            raise ValueError(f"share_prompts: not exact for a sequence of {longest} tokens: {self.sharing.why}")
        return list(self._padded(batch, prompts, completions, together))

    # A row for each sequence -----------------------------------------------------------------------------------------

    def _padded(
        self, batch: Batch, prompts: list[int], completions: list[int], together: bool
    ) -> Iterator[Pass[Batch]]:
        sizes = [max(p + max(c, 1) - 1, 1) for p, c in zip(prompts, completions, strict=True)]
        order = sorted(range(len(batch)), key=lambda i: -sizes[i])
        while order:
            width = sizes[order[0]]
            count = len(order) if together else max(1, int(min(self.tokens / width, len(order))))
            sequences = torch.tensor(sorted(order[:count]), device=batch.prompt_ids.device)
            yield self._padded_pass(sequences, batch.select(sequences), width)
            order = order[count:]

    def _padded_pass(self, sequences: Tensor, part: Batch, width: int) -> Pass[Batch]:
        # The padding is on the right, where no token sees it, whatever the model makes of its mask: recurrent layers
        # and positions that a model counts itself would begin with padding on the left.
        ids = torch.cat([part.prompt_ids, part.completion_ids], dim=1)
        mask = torch.cat([part.prompt_mask, part.completion_mask], dim=1)
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        inputs = {"input_ids": ids[:, :width], "attention_mask": mask[:, :width].to(torch.int64)}
        if self.takes_positions:
            inputs["position_ids"] = torch.arange(width, device=ids.device).repeat(len(part), 1)
        lines = torch.arange(len(part), device=ids.device)[:, None]
        steps = torch.arange(part.completion_ids.shape[1], device=ids.device)
        columns = (part.prompt_mask.sum(-1, keepdim=True) - 1 + steps).clamp(0, width - 1)
        return Pass(sequences, part, inputs, mask[:, :width] & mask[:, 1 : width + 1], lines * width + columns)

    # A row for each group --------------------------------------------------------------------------------------------

    def _packed(
        self, batch: Batch, prompts: list[int], completions: list[int], together: bool
    ) -> Iterator[Pass[Batch]]:
        rows: list[_Row] = []
        for group in _groups(batch):
            rows += self._rows(prompts[group[0]], group, [max(completions[i] - 1, 0) for i in group])
        rows.sort(key=lambda row: -row.size)
        while rows:
            width = rows[0].size
            most = len(rows) if together else max(1, int(min(self.tokens / width, len(rows))))
            lines: list[list[_Row]] = []  # of the model's input, each with one or several rows
            later = []
            for row in rows:
                place = next((line for line in lines if sum(r.size for r in line) + row.size <= width), None)
                if place is not None:
                    place.append(row)
                elif len(lines) < most:
                    lines.append([row])
                else:
                    later.append(row)
            yield self._packed_pass(batch, lines, width, completions)
            rows = later

    def _rows(self, prompt: int, group: list[int], sizes: list[int]) -> list[_Row]:
        """A group in as many rows as cost least: each repeats the prompt, and a token's attention is over its row."""
        total = sum(sizes)

        def cost(count: int) -> float:
            size = prompt + total / count
            return count * size * (self.token_cost + self.pair_cost * size)

        count = min(range(1, len(group) + 1), key=cost)
        while True:
            rows = [_Row(prompt, prompt) for _ in range(count)]
            for size, sequence in sorted(zip(sizes, group, strict=True), reverse=True):
                row = min(rows, key=lambda r: r.size)
                row.sequences.append(sequence)
                row.size += size
            if count == len(group) or max(row.size for row in rows) <= self.tokens:
                return [row for row in rows if row.sequences]
            count += 1

    def _packed_pass(self, batch: Batch, lines: list[list[_Row]], width: int, completions: list[int]) -> Pass[Batch]:
        order = sorted(sequence for line in lines for row in line for sequence in row.sequences)
        sequences = torch.tensor(order, device=batch.prompt_ids.device)
        part = batch.select(sequences)
        slots = {sequence: slot for slot, sequence in enumerate(order)}
        first = part.prompt_ids.shape[1]  # column of the first completion token in the table of all tokens
        columns = first + part.completion_ids.shape[1]
        source = torch.zeros(len(lines), width, dtype=torch.int64)  # place of each token in that table
        positions, row_of, member = (torch.zeros_like(source) for _ in range(3))
        row_of.fill_(-1)  # padding at the end of a line sees itself only, so that no row of the mask is empty
        places = torch.zeros(len(order), columns - first, dtype=torch.int64)
        for i, line in enumerate(lines):
            at = 0
            for number, row in enumerate(line):
                end = at + row.prompt
                last = i * width + end - 1
                source[i, at:end] = slots[row.sequences[0]] * columns + torch.arange(first - row.prompt, first)
                positions[i, at:end] = torch.arange(row.prompt)
                row_of[i, at : at + row.size] = number
                at = end
                for name, sequence in enumerate(row.sequences, 1):
                    slot, size = slots[sequence], max(completions[sequence] - 1, 0)
                    end = at + size
                    source[i, at:end] = slot * columns + first + torch.arange(size)
                    positions[i, at:end] = row.prompt + torch.arange(size)
                    member[i, at:end] = name
                    places[slot, 0] = last
                    places[slot, 1 : size + 1] = i * width + torch.arange(at, end)
                    at = end
        device = batch.prompt_ids.device
        table = torch.cat([part.prompt_ids, part.completion_ids], dim=1).flatten()
        inputs = {
            "input_ids": table[source.to(device)],
            "attention_mask": self._mask(row_of.to(device), member.to(device)),
            "position_ids": positions.to(device),
        }
        return Pass(sequences, part, inputs, row_of.to(device) >= 0, places.to(device))

    def _mask(self, row_of: Tensor, member: Tensor) -> Tensor:
        """(R, 1, S, S) of what each token sees: in its row, the prompt (member 0) and its own completion's past."""
        size = row_of.shape[1]
        same_row = row_of[:, :, None] == row_of[:, None, :]
        seen = same_row & ((member[:, None, :] == 0) | (member[:, :, None] == member[:, None, :]))
        seen = (seen & torch.ones(size, size, dtype=torch.bool, device=seen.device).tril())[:, None]
        if self.additive_mask is None:
            return seen
        zero = torch.zeros((), dtype=self.additive_mask, device=seen.device)
        return torch.where(seen, zero, torch.finfo(self.additive_mask).min)


def _groups(batch: TokenBatch) -> list[list[int]]:
    """The sequences of each prompt, prompts in the order of their first sequence."""
    groups: dict[int, list[int]] = {}
    for sequence, prompt in enumerate(prompt_numbers(batch).tolist()):
        groups.setdefault(prompt, []).append(sequence)
    return list(groups.values())


def prompt_numbers(batch: TokenBatch) -> Tensor:
    """(B,) int64: equal where the prompts are equal."""
    return torch.unique(batch.prompt_ids.where(batch.prompt_mask, -1), dim=0, return_inverse=True)[1]

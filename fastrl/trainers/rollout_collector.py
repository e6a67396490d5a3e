"""From prompts to completions and their rewards: what every online method begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging

from fastrl.rollout import Completions, RolloutEngine, SamplingParams
from fastrl.trainers.metrics import MetricStore, completion_metrics
from fastrl.trainers.online_config import OnlineConfig
from fastrl.trainers.prompts import Example, completion_room, decode_completions, tokenize_prompts
from fastrl.trainers.reward_runner import RewardRunner
from fastrl.trainers.token_batch import TokenBatch, pad

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Samples:
    """Completions of this process's prompts, groups side by side, before anything is known of their worth."""

    batch: TokenBatch
    sampling_logps: Tensor | None  # (B, T) of the engine; None: it does not tell
    examples: Sequence[Example]  # a row for each completion, and so the lists that follow
    prompt_ids: list[list[int]]
    sampled: Completions
    completions: list[Any]  # strings, or conversations: what reward functions see
    group: int  # completions of one prompt
    mode: str  # "train", or an evaluation's prefix
    columns: dict[str, list[Any]] = field(default_factory=dict)  # what reward functions add to the table of completions

    @property
    def completion_ids(self) -> list[list[int]]:
        return self.sampled.ids


@dataclass
class RolloutCollector:
    """Samples completions and calls the reward functions; one per trainer."""

    args: OnlineConfig
    accelerator: Accelerator
    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    rewards: RewardRunner | None  # None: a method without rewards
    metrics: MetricStore
    pad_token_id: int
    eos_token_ids: Sequence[int]
    context_length: int | None
    wants_logps: bool  # of the engine

    def collect(
        self,
        examples: Sequence[Example],
        name: str,
        mode: str,
        state: TrainerState,
        sampled: Completions | None = None,
        prompt_ids: list[list[int]] | None = None,
    ) -> Samples:
        """A completion for each of this process's examples: a prompt comes once per completion, groups side by side.

        Args:
            examples: rows of the dataset.
            name: of the dataset, for errors.
            mode: where the metrics go, "train" or an evaluation's prefix.
            state: its count of tokens seen goes up in training.
            sampled: what the engine has made of `request(examples, name, mode)`, or other completions to use; None: the
                engine is asked now.
            prompt_ids: what those are completions of; None: the prompts as `request` has them.

        Raises:
            ValueError: a prompt that cannot be used.
        """
        own_ids, conversational = self._prompts(examples, name)
        prompt_ids = own_ids if prompt_ids is None else prompt_ids
        if sampled is None:
            sampled = self.engine.generate(*self.request(examples, name, mode))
        if len(sampled.ids) != len(prompt_ids):
            raise RuntimeError(f"the rollout engine gave {len(sampled.ids)} completions for {len(prompt_ids)} prompts")
        self._count(prompt_ids, sampled.ids, mode, state)
        completions = decode_completions(sampled.ids, self.tokenizer, conversational)
        return self._samples(examples, prompt_ids, sampled, completions, mode, {})

    def request(self, examples: Sequence[Example], name: str, mode: str) -> tuple[list[list[int]], int, SamplingParams]:
        """The engine's arguments for these examples."""
        prompt_ids, _ = self._prompts(examples, name)
        group = self.group(mode)
        count = group if len(prompt_ids) % group == 0 else 1  # a group may lie on several processes
        return prompt_ids[::count], count, self._sampling(prompt_ids)

    def group(self, mode: str) -> int:
        """Completions of one prompt."""
        in_evaluation = self.args.num_generations_eval if mode != "train" else None
        return in_evaluation or self.args.num_generations

    def picked(self, pieces: Sequence[tuple[Samples, Sequence[int]]]) -> Samples:
        """Rows of several samples, one piece after the other."""

        def pick(of: Callable[[Samples], Sequence[Any]]) -> list[Any]:
            return [of(samples)[row] for samples, rows in pieces for row in rows]

        first = pieces[0][0]
        names = {name for samples, _ in pieces for name in samples.columns}
        nothing = [None] * max(len(samples.examples) for samples, _ in pieces)
        columns = {name: pick(lambda samples: samples.columns.get(name, nothing)) for name in sorted(names)}  # noqa: B023
        logps = None if first.sampled.logps is None else pick(lambda samples: samples.sampled.logps or [])
        sampled = Completions(pick(lambda samples: samples.completion_ids), logps)
        lists = (pick(lambda samples: samples.examples), pick(lambda samples: samples.prompt_ids), sampled)
        return self._samples(*lists, pick(lambda samples: samples.completions), first.mode, columns)

    def _prompts(self, examples: Sequence[Example], name: str) -> tuple[list[list[int]], bool]:
        template = self.args.chat_template_kwargs or {}
        return tokenize_prompts(examples, self.tokenizer, name, template, self.context_length)

    def _samples(
        self,
        examples: Sequence[Example],
        prompt_ids: list[list[int]],
        sampled: Completions,
        completions: list[Any],
        mode: str,
        columns: dict[str, list[Any]],
    ) -> Samples:
        device = self.accelerator.device
        prompts, prompt_mask = pad(prompt_ids, self.pad_token_id, left=True, device=device)
        completion_ids, completion_mask = pad(sampled.ids, self.pad_token_id, left=False, device=device)
        loss_mask = None
        if self.args.mask_truncated_completions:
            loss_mask = completion_mask & ~self.truncated(sampled.ids)[:, None]
        batch = TokenBatch(prompts, prompt_mask, completion_ids, completion_mask, loss_mask=loss_mask)
        logps = None if sampled.logps is None else pad(sampled.logps, 0.0, left=False, device=device)[0]
        return Samples(batch, logps, examples, prompt_ids, sampled, completions, self.group(mode), mode, columns)

    def reward(self, samples: Samples, state: TrainerState) -> Tensor:
        """Rewards (B, F) of all processes' completions in order, one column per function; NaN: no reward.

        Raises:
            RewardFunctionError: a reward function that misbehaves.
        """
        if self.rewards is None:
            raise RuntimeError("this trainer has no reward functions")
        rows = [example.row for example in samples.examples]
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
        columns.pop("completion_ids", None)

        def log_metric(name: str, value: float) -> None:
            self.metrics.add(samples.mode, {name: value})

        prompts = [row["prompt"] for row in rows]
        lists = (prompts, samples.completions, samples.completion_ids, columns)
        own = self.rewards(*lists, state, log_metric, samples.columns.__setitem__)
        silent = own.isnan().all(-1).nonzero()
        if len(silent):
            position = samples.examples[int(silent[0])].position
            logger.warning_once(
                f"No reward function gave a reward for the completion of row {position}; such completions carry no "
                "gradient."
            )
        return self.accelerator.gather(own.to(self.accelerator.device))

    def own_rows(self, values: Tensor) -> Tensor:
        """This process's share of values (B, ...) of all processes."""
        count = len(values) // self.accelerator.num_processes
        return values[self.accelerator.process_index * count :][:count]

    def everyones(self, values: Tensor) -> Tensor:
        """Values (B, T) of all processes, in one width; masks come as masks."""
        numbers = values.to(torch.uint8) if values.dtype == torch.bool else values  # accelerate pads a bool to an int64
        gathered = self.accelerator.gather(self.accelerator.pad_across_processes(numbers, dim=1))
        return gathered.to(values.dtype)

    def truncated(self, completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """(B,) bool: the completions without an end-of-sequence token."""
        ends = [bool(ids) and ids[-1] in self.eos_token_ids for ids in completion_ids]
        return ~torch.tensor(ends, device=self.accelerator.device)

    def _sampling(self, prompt_ids: list[list[int]]) -> SamplingParams:
        sampling = self.args.sampling_params(self.wants_logps)
        room = completion_room(prompt_ids, sampling.max_tokens, self.context_length)
        return replace(sampling, max_tokens=room)

    def _count(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], mode: str, state: TrainerState
    ) -> None:
        device = self.accelerator.device
        lengths = torch.tensor(
            [[len(p), len(c)] for p, c in zip(prompt_ids, completion_ids, strict=True)], device=device
        )
        lengths = self.accelerator.gather(lengths)
        truncated = self.accelerator.gather(self.truncated(completion_ids))
        if mode == "train":
            state.num_input_tokens_seen += int(lengths.sum())
        self.metrics.set(mode, "num_tokens", state.num_input_tokens_seen)
        self.metrics.add(mode, completion_metrics(lengths[:, 1], truncated))

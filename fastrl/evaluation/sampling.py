"""Completions of dataset rows and their rewards: n per prompt, in batches, the same after an interruption."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState

from fastrl.evaluation.sample_file import PromptSamples, Sample, SampleFile
from fastrl.rollout import RolloutEngine, SamplingParams
from fastrl.trainers.prompts import Example, completion_room, decode_completions, tokenize_prompts
from fastrl.trainers.reward_runner import RewardRunner


class Sampled(NamedTuple):
    """Completions of B prompts, n of each, side by side."""

    prompt_ids: list[list[int]]  # B
    completion_ids: list[list[int]]  # B * n
    completions: list[Any]  # B * n strings or conversations, as reward functions get them
    finished: list[bool]  # B * n; False: cut off


def sample(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    num_generations: int,
    sampling: SamplingParams,
    *,
    name: str = "dataset",
    context_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Sampled:
    """Samples completions of rows with a prompt.

    Raises:
        ValueError: a prompt that can't be used; see `fastrl.trainers.prompts.tokenize_prompts`.
    """
    prompts, conversational = tokenize_prompts(examples, tokenizer, name, chat_template_kwargs or {}, context_length)
    room = completion_room(prompts, sampling.max_tokens, context_length)
    made = engine.generate(prompts, num_generations, replace(sampling, max_tokens=room))
    if made.finish_reasons is None:
        finished = [len(ids) < room for ids in made.ids]
    else:
        finished = [reason == "stop" for reason in made.finish_reasons]
    return Sampled(prompts, made.ids, decode_completions(made.ids, tokenizer, conversational), finished)


def rewards_of(runner: RewardRunner, examples: Sequence[Example], sampled: Sampled) -> Tensor:
    """Rewards (B * n, F) fp32 of sampled completions, NaN: none.

    Raises:
        RewardFunctionError: see `fastrl.trainers.reward_runner`.
    """
    repeats = len(sampled.completions) // max(len(examples), 1)
    rows = [example.row for example in examples for _ in range(repeats)]
    taken = ("prompt", "completion", "completion_ids")
    return runner(
        prompts=[row["prompt"] for row in rows],
        completions=sampled.completions,
        completion_ids=sampled.completion_ids,
        columns={column: [row[column] for row in rows] for column in rows[0] if column not in taken},
        trainer_state=TrainerState(),
    )


@dataclass(frozen=True)
class PromptSampler:
    """How the rows of a dataset are sampled and rewarded.

    Batches are the same whatever was sampled before, and each has a seed of its own, so that an interrupted run that
    is continued samples what an uninterrupted one does.

    Args:
        engine, tokenizer: what generates.
        rewards: the functions that are applied to every completion.
        sampling: how to sample; its seed is replaced.
        num_generations: samples per prompt.
        greedy: also a greedy completion of each prompt.
        batch_size: completions at a time.
        seed: of all sampling.
        context_length: of the model; None: not known.
        chat_template_kwargs: for conversational prompts.
    """

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    rewards: RewardRunner
    sampling: SamplingParams
    num_generations: int
    greedy: bool = True
    batch_size: int = 32
    seed: int = 0
    context_length: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def check(self, rows: Any, name: str) -> None:
        """Refuses prompts that can't be sampled, before the first one is.

        Raises:
            ValueError: see `fastrl.trainers.prompts.tokenize_prompts`.
        """
        examples = [Example(index, {"prompt": prompt}) for index, prompt in enumerate(rows["prompt"])]
        tokenize_prompts(examples, self.tokenizer, name, self.chat_template_kwargs, self.context_length)

    def fill(self, file: SampleFile, rows: Any, done: Callable[[list[PromptSamples]], None]) -> None:
        """Samples the rows that a file lacks, adds them to it, and tells `done` of each batch that is in it.

        Args:
            file: see there.
            rows: a `datasets.Dataset` with a column `prompt`.
            done: called after each batch, with those that were in the file first.

        Raises:
            WriteError: a line can't be written.
            RewardFunctionError: see `fastrl.trainers.reward_runner`.
        """
        done([file.prompts[row] for row in sorted(file.prompts)])
        per_batch = max(1, self.batch_size // self.num_generations)
        for first in range(0, len(rows), per_batch):
            batch = range(first, min(first + per_batch, len(rows)))
            missing = [row for row in batch if row not in file.prompts]
            if missing:
                made = self._batch([Example(row, dict(rows[row])) for row in batch])
                new = [prompt for prompt in made if prompt["row"] in missing]
                file.add(new)
                done(new)

    def _batch(self, examples: Sequence[Example]) -> list[PromptSamples]:
        greedy = replace(self.sampling, temperature=0.0, seed=None)
        answers = self._samples(examples, 1, greedy) if self.greedy else [[] for _ in examples]
        samples: list[list[Sample]] = [[] for _ in examples]
        for first in range(0, self.num_generations, self.batch_size):
            count = min(self.batch_size, self.num_generations - first)
            sampling = replace(self.sampling, seed=_seed(self.seed, examples[0].position, first))
            for own, more in zip(samples, self._samples(examples, count, sampling), strict=True):
                own.extend(more)
        return [
            {
                "row": example.position,
                "prompt": example.row["prompt"],
                "greedy": answer[0] if answer else None,
                "samples": own,
            }
            for example, answer, own in zip(examples, answers, samples, strict=True)
        ]

    def _samples(self, examples: Sequence[Example], count: int, sampling: SamplingParams) -> list[list[Sample]]:
        made = sample(
            self.engine,
            self.tokenizer,
            examples,
            count,
            sampling,
            context_length=self.context_length,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        rewards = rewards_of(self.rewards, examples, made).tolist()
        samples: list[Sample] = [
            {
                "completion": completion,
                "tokens": len(ids),
                "finished": finished,
                "rewards": {
                    name: None if math.isnan(value) else value
                    for name, value in zip(self.rewards.names, row, strict=True)
                },
            }
            for completion, ids, finished, row in zip(
                made.completions, made.completion_ids, made.finished, rewards, strict=True
            )
        ]
        return [samples[first : first + count] for first in range(0, len(samples), count)]


def _seed(*numbers: int) -> int:
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # 31 bits: what every engine takes

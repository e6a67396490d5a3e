"""What the optimizer steps of `fastrl.benchmark.optimizer_step` are taken on: stored rollouts, and pairs of answers.

Sampling, rewards and advantages are replaced by stored ones; the texts of the other methods are made of a few
sentences, so that prompts and answers differ in length as those of real data do.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastrl.trainers.ppo_rollouts import PPORollouts
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.token_batch import TokenBatch, pad

PROMPTS = (
    "A farmer has 12 cows and buys 7 more. How many cows does he have now?",
    "Write one short sentence about the sea in autumn.",
    "Which is larger, 9.11 or 9.9? Explain briefly.",
    "Name three animals that can fly and say how.",
)
GROUP = 8  # completions of a prompt
NEW_TOKENS = 32  # of a completion, at most

SENTENCES = (
    "The ferry leaves the old harbour at seven in the morning.",
    "It carries flour, letters and sometimes a bicycle.",
    "Nobody has counted the steps of the lighthouse since 1931.",
    "In winter the keeper reads by a small lamp.",
    "A storm in March broke two windows and the weather vane.",
    "The baker says that salt in the air makes better bread.",
    "Her brother, who repairs engines, does not agree.",
    "On Sundays the square is full of children and dogs.",
    "The map on the wall shows an island that is not there.",
    "Six boats came home that evening, one of them under sail.",
)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepData:
    """The data of one optimizer step: either `stored`, what an online trainer would have sampled, or `rows`."""

    sequences: int  # that the loss is of
    prompt_tokens: int  # of all sequences
    completion_tokens: int
    stored: TokenBatch | None = None
    rows: Sequence[dict[str, Any]] = ()
    note: str = ""  # what tells it from the method's other data, for titles
    facts: dict[str, Any] = field(default_factory=dict)  # more for the rows of the results


def stored_data(batch: TokenBatch, note: str = "", **facts: Any) -> StepData:
    """A batch as the data of a step."""
    tokens = int(batch.prompt_mask.sum()), int(batch.completion_mask.sum())
    return StepData(len(batch), *tokens, stored=batch, note=note, facts=facts)


@functools.cache
def sample_batch(model_path: str, device: torch.device) -> Rollouts:
    """Rollouts of `PROMPTS`, `GROUP` completions each, sampled from the model; advantages from random rewards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from fastrl import group_advantages
    from fastrl.rollout import SamplingParams, TransformersEngine

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.to(device)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for prompt in PROMPTS
        for _ in range(GROUP)
    ]
    set_seed(0)
    engine = TransformersEngine(
        lambda: model,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    completions = engine.generate(prompts, 1, SamplingParams(max_tokens=NEW_TOKENS)).ids
    batch = _token_batch(prompts, completions, tokenizer.pad_token_id)
    rewards = torch.rand(len(prompts), generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(rewards, torch.arange(len(prompts)) // GROUP)
    return Rollouts(**batch.tensors(), advantages=advantages)


def with_live_share(rollouts: Rollouts, share: float) -> StepData:
    """The rollouts with whole groups unanimous (advantage 0), from the last on, until about `share` is live."""
    groups = torch.arange(len(rollouts)) // GROUP
    advantages = rollouts.advantages.where(groups < round(share * (int(groups[-1]) + 1)), 0.0)
    live = (advantages != 0)[:, None] & rollouts.completion_mask
    live_share = float(live.sum() / rollouts.completion_mask.sum())
    batch = replace(rollouts, advantages=advantages)
    return stored_data(batch, f", live share {live_share:.2g}", live_share=live_share, G=GROUP)


def with_values(rollouts: Rollouts) -> PPORollouts:
    """The rollouts with random values, returns and advantages of every token, as PPO has them."""
    generator, mask = torch.Generator().manual_seed(0), rollouts.completion_mask
    tokens = {
        name: torch.randn(mask.shape, generator=generator) * mask for name in ("advantages", "returns", "old_values")
    }
    batch = TokenBatch(rollouts.prompt_ids, rollouts.prompt_mask, rollouts.completion_ids, rollouts.completion_mask)
    return PPORollouts(**batch.tensors(), **tokens)


def pairs(count: int) -> list[dict[str, str]]:
    """Rows with "prompt", "chosen" and "rejected": 1 to 4, 1 to 8 and 1 to 5 of `SENTENCES`."""
    draw = random.Random(0)

    def text(most: int) -> str:
        return " ".join(draw.choices(SENTENCES, k=draw.randint(1, most)))

    return [{"prompt": text(4), "chosen": " " + text(8), "rejected": " " + text(5)} for _ in range(count)]


def row_data(model_path: str, rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> StepData:
    """Rows as the data of a step whose sequences are the prompt with each of the columns `answers`."""
    batch = tokenized(model_path, rows, answers)
    return replace(stored_data(batch), stored=None, rows=rows)


def tokenized(model_path: str, rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> TokenBatch:
    """Each row's prompt with its answers in these columns, which end with the end token."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    texts = [(row["prompt"], row[answer]) for row in rows for answer in answers]
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in texts]
    completions = [
        [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for _, answer in texts
    ]
    return _token_batch(prompts, completions, tokenizer.pad_token_id)


def _token_batch(prompts: Sequence[list[int]], completions: Sequence[list[int]], pad_token_id: int) -> TokenBatch:
    sides = pad(prompts, pad_token_id, left=True, device=_CPU), pad(completions, pad_token_id, left=False, device=_CPU)
    return TokenBatch(*sides[0], *sides[1])

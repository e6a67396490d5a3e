"""Greedy answers to held-out prompts by two models, with their rewards, as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from fastrl.evaluation.sampling import rewards_of, sample
from fastrl.rewards import completion_text
from fastrl.rollout import SamplingParams, TransformersEngine
from fastrl.trainers.model_setup import special_tokens
from fastrl.trainers.prompts import Example
from fastrl.trainers.reward_runner import RewardRunner

# The other settings are unset, because transformers warns of what a greedy search does not use.
_GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}


@dataclass(frozen=True)
class Answers:
    """Answers of one model: texts, and the weighted sum of the rewards of each (NaN: no function gave one)."""

    texts: list[str]
    rewards: list[float]

    @property
    def mean_reward(self) -> float:
        """Mean over the prompts that got a reward; NaN if none did."""
        scored = [reward for reward in self.rewards if not math.isnan(reward)]
        return sum(scored) / len(scored) if scored else math.nan


class Generated(NamedTuple):
    """What `generate` returns, B entries each."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    texts: list[str]
    rewards: Tensor  # (B, F) fp32, NaN: no reward


def load_model(path: str, dtype: str, device: torch.device | str) -> PreTrainedModel:
    """A causal LM in eval mode, from a folder with weights, or with a PEFT adapter, which stays trainable."""
    model: Any
    if (Path(path) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(path, dtype=dtype, is_trainable=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device).eval()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    reward_funcs: Sequence[Callable[..., Any]],
    sampling: SamplingParams,
    *,
    num_generations: int = 1,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Generated:
    """Completions of the column `prompt` of `rows`, `num_generations` each, and their rewards, as a trainer does it.

    Raises:
        ValueError: a prompt that is neither text nor a conversation, or a reward function that fails.
    """
    examples = [Example(index, dict(row)) for index, row in enumerate(rows)]
    pad_token_id, eos_token_ids = special_tokens(tokenizer, model)
    engine = TransformersEngine(model, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id)
    made = sample(
        engine, tokenizer, examples, num_generations, sampling, name="rows", chat_template_kwargs=chat_template_kwargs
    )
    rewards = rewards_of(RewardRunner(list(reward_funcs)), examples, made)
    texts = [completion_text(completion) for completion in made.completions]
    return Generated(
        [ids for ids in made.prompt_ids for _ in range(num_generations)], made.completion_ids, texts, rewards
    )


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    reward_funcs: Sequence[Callable[..., Any]],
    max_tokens: int,
    *,
    weights: Sequence[float] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Answers:
    """Greedy completions of the column `prompt` of `rows`, and their weighted rewards."""
    greedy = SamplingParams(max_tokens=max_tokens, engine_kwargs=_GREEDY)
    made = generate(model, tokenizer, rows, reward_funcs, greedy, chat_template_kwargs=chat_template_kwargs)
    factors = torch.tensor(list(weights) if weights is not None else [1.0] * made.rewards.shape[1])
    total = (made.rewards * factors).nansum(1).masked_fill(made.rewards.isnan().all(1), math.nan)
    return Answers(made.texts, total.tolist())


def answers_table(prompts: Sequence[Any], before: Answers, after: Answers, *, shown: int | None = None) -> str:
    """Markdown: one line per prompt with both answers and rewards, and the mean rewards over all prompts."""
    lines = ["| prompt | before | reward | after | reward |", "|---|---|---:|---|---:|"]
    for index, prompt in enumerate(prompts[:shown]):
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        lines.append(
            f"| {_cell(question)} | {_cell(before.texts[index])} | {before.rewards[index]:g} "
            f"| {_cell(after.texts[index])} | {after.rewards[index]:g} |"
        )
    count = len(prompts)
    lines.append("")
    lines.append(
        f"Mean reward of the greedy answers to {count} prompts: "
        f"{before.mean_reward:.2f} before, {after.mean_reward:.2f} after."
    )
    return "\n".join(lines)


def answers_json(prompts: Sequence[Any], before: Answers, after: Answers) -> dict[str, list[Any]]:
    """Columns for a file; None: no reward."""

    def numbers(rewards: Sequence[float]) -> list[float | None]:
        return [None if math.isnan(reward) else reward for reward in rewards]

    return {
        "prompts": list(prompts),
        "before": before.texts,
        "rewards_before": numbers(before.rewards),
        "after": after.texts,
        "rewards_after": numbers(after.rewards),
    }


def _cell(text: str, limit: int = 100) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= limit else line[: limit - 1] + "…"

"""What the tests of PPO share: small runs, and PPO written out from its definition, one sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_runs import WORDS, GradientRecorder, ScriptedEngine, make_tokenizer, tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_config import PPOConfig

ROWS = ["a", "b c", "d e f", "g h i j", "k", "l m", "n o p q r", "s t"]


def early_letters(completions: list[Any], **kwargs: Any) -> list[float]:
    """The share of early letters, of eight."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(token in "abcdefghijklm" for token in text.split()) / 8 for text in texts]


def tiny_classifier(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A sequence classifier of one label: one layer of width 16, scores of some spread."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, **config}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(WORDS), num_labels=1, pad_token_id=0, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10.0)
    return model


def make_ppo(
    folder: Path,
    model: Any = None,
    *,
    reward_model: Any = None,
    reward_funcs: Any = early_letters,
    train_dataset: Any = None,
    arguments: dict[str, Any] | None = None,
    **config: Any,
) -> PPOTrainer:
    """Rollouts of eight completions of at most eight tokens, no checkpoints; arguments: further ones of the trainer."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "response_length": 8,
        "stop_token": "eos",
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        **config,
    }
    return PPOTrainer(
        PPOConfig(**settings),
        make_tokenizer(),
        tiny_model() if model is None else model,
        reward_model=reward_model,
        reward_funcs=reward_funcs,
        train_dataset=Dataset.from_dict({"prompt": ROWS}) if train_dataset is None else train_dataset,
        **(arguments or {}),
    )


def two_rollouts(folder: Path, **config: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """Gradients and logs of two epochs over each of two rollouts of the same eight completions."""
    recorder = GradientRecorder()
    trainer = make_ppo(
        folder,
        arguments={"rollout_engine": ScriptedEngine(), "callbacks": [recorder]},
        **{"num_ppo_epochs": 2, "max_steps": 4, "max_grad_norm": 0.0, "learning_rate": 1e-3, "whiten_rewards": True},
        **{"kl_target": 0.05, "kl_horizon": 20.0},
        **config,
    )
    trainer.train()
    return recorder.grads, trainer.state.log_history[:-1]


class Definition:
    """PPO in float64 from its definition: a sequence at a time, without padding, masks or packing.

    Args:
        sequences: prompt and completion ids. scores: one for each.
    """

    def __init__(self, args: PPOConfig, sequences: list[tuple[list[int], list[int]]], scores: list[float]) -> None:
        self.args, self.sequences, self.scores = args, sequences, scores

    def run(self, policy: nn.Module, head: nn.Linear, values: nn.Module | None, row: int) -> tuple[Tensor, ...]:
        """Log-probabilities (T,), entropies (T,) and values (T,) of a completion; values: None for the policy's."""
        prompt, completion = self.sequences[row]
        ids = torch.tensor([prompt + completion])
        out = policy(input_ids=ids, output_hidden_states=True)
        log_probs = torch.log_softmax(out.logits[0] / self.args.temperature, -1)[len(prompt) - 1 : -1]
        hidden = out.hidden_states[-1] if values is None else values.model(input_ids=ids).last_hidden_state
        logps = log_probs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        return logps, entropies, head(hidden[0]).squeeze(-1)[len(prompt) - 1 : -1]

    @torch.no_grad()
    def prepare(self, policy: nn.Module, reference: nn.Module, head: nn.Linear, values: nn.Module | None) -> None:
        """Old log-probabilities and values, advantages and returns of every sequence."""
        args, rows = self.args, range(len(self.sequences))
        scored = [self.run(policy, head, values, row) for row in rows]
        self.old_logps, self.old_values = [s[0] for s in scored], [s[2] for s in scored]
        rewards = []
        for row in rows:
            d = self.run(reference, head, values, row)[0] - self.old_logps[row]
            kl = -d if args.kl_estimator == "k1" else torch.exp(d) - 1 - d
            reward = -args.kl_coef * kl
            if len(reward):
                reward[-1] += self.scores[row]
            rewards.append(reward)
        if args.whiten_rewards:
            together = torch.cat(rewards)
            rewards = [(r - together.mean()) / (together.var() + 1e-8).sqrt() + together.mean() for r in rewards]
        self.advantages, self.returns = [], []
        for reward, value in zip(rewards, self.old_values, strict=True):
            advantage, after, estimates = 0.0, 0.0, []
            for r, v in zip(reward.flip(0), value.flip(0), strict=True):
                advantage = r + args.gamma * after - v + args.gamma * args.lam * advantage
                after = v
                estimates.append(advantage)
            estimate = torch.stack(estimates[::-1]) if estimates else torch.zeros(0, dtype=torch.float64)
            self.advantages.append(estimate)
            self.returns.append(estimate + value)
        together = torch.cat(self.advantages)
        self.advantages = [(a - together.mean()) / (together.var() + 1e-8).sqrt() for a in self.advantages]

    def loss(self, policy: nn.Module, head: nn.Linear, values: nn.Module | None, rows: list[int]) -> Tensor:
        """Of an optimizer step on some of the sequences: a mean over their tokens."""
        args, terms = self.args, []
        for row in rows:
            logps, entropies, value = self.run(policy, head, values, row)
            ratio, advantage = torch.exp(logps - self.old_logps[row]), self.advantages[row]
            clipped = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
            policy_term = torch.maximum(-advantage * ratio, -advantage * clipped)
            old, target = self.old_values[row], self.returns[row]
            near = torch.minimum(torch.maximum(value, old - args.cliprange_value), old + args.cliprange_value)
            value_term = 0.5 * torch.maximum((value - target).square(), (near - target).square())
            terms.append(policy_term + args.vf_coef * value_term - args.entropy_coef * entropies)
        return torch.cat(terms).mean()


def sequences_of(batch: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion ids of each row, without padding."""
    return [
        (batch.prompt_ids[i][batch.prompt_mask[i]].tolist(), batch.completion_ids[i][batch.completion_mask[i]].tolist())
        for i in range(len(batch))
    ]

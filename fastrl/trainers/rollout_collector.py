"""From prompts to a batch of rollouts ready to train on: sample, reward, compare within groups, score."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging

from fastrl.objectives import combine_rewards
from fastrl.rollout import RolloutEngine
from fastrl.trainers.grpo_config import GRPOConfig
from fastrl.trainers.metrics import MetricStore, completion_metrics, reward_metrics
from fastrl.trainers.packing import Packer
from fastrl.trainers.prompts import Example, decode_completions, tokenize_prompts
from fastrl.trainers.reward_runner import RewardRunner
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.scoring import completion_logps
from fastrl.trainers.token_batch import pad

logger = logging.get_logger(__name__)


@dataclass
class RolloutCollector:
    """Makes `Rollouts` of examples; one per trainer."""

    args: GRPOConfig
    accelerator: Accelerator
    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    rewards: RewardRunner
    metrics: MetricStore
    pad_token_id: int
    eos_token_ids: Sequence[int]
    context_length: int | None
    policy: Callable[[], nn.Module]
    reference: Callable[[], AbstractContextManager[nn.Module]] | None  # None: no KL term
    packer: Packer

    def collect(
        self, examples: Sequence[Example], name: str, mode: str, state: TrainerState, score_old: bool
    ) -> Rollouts:
        """Rollouts of this process's examples: each prompt repeated once per completion, groups side by side.

        Args:
            examples: rows of the dataset.
            name: of the dataset, for errors.
            mode: where the metrics go, "train" or an evaluation's prefix.
            state: given to the reward functions; its count of tokens seen goes up in training.
            score_old: also compute old_logps, for rollouts that outlive an optimizer step.

        Raises:
            ValueError: a prompt that cannot be used, or a reward function that misbehaves (`RewardFunctionError`).
        """
        train = mode == "train"
        group = self.args.num_generations
        if not train and self.args.num_generations_eval:
            group = self.args.num_generations_eval
        template = self.args.chat_template_kwargs or {}
        prompt_ids, conversational = tokenize_prompts(examples, self.tokenizer, name, template, self.context_length)
        sampled = self._sample(prompt_ids)
        completions = decode_completions(sampled.ids, self.tokenizer, conversational)
        self._count(prompt_ids, sampled.ids, mode, state)
        advantages = self._advantages(examples, completions, sampled.ids, group, mode, state)

        device = self.accelerator.device
        prompts, prompt_mask = pad(prompt_ids, self.pad_token_id, left=True, device=device)
        completion_ids, completion_mask = pad(sampled.ids, self.pad_token_id, left=False, device=device)
        loss_mask = None
        if self.args.mask_truncated_completions:
            loss_mask = completion_mask & ~self._truncated(sampled.ids)[:, None]
        sampling_logps = None if sampled.logps is None else pad(sampled.logps, 0.0, left=False, device=device)[0]
        rollouts = Rollouts(
            prompts,
            prompt_mask,
            completion_ids,
            completion_mask,
            advantages,
            sampling_logps=sampling_logps,
            loss_mask=loss_mask,
        )
        return self._scored(rollouts, score_old)

    def _sample(self, prompt_ids: list[list[int]]) -> Any:
        sampling = self.args.sampling_params()
        if self.context_length is not None:
            room = self.context_length - max(map(len, prompt_ids))
            if room < sampling.max_tokens:
                logger.warning_once(
                    f"A prompt leaves {room} tokens of the model's context, fewer than max_completion_length "
                    f"({sampling.max_tokens}): the completions of its batch are cut there."
                )
                sampling = replace(sampling, max_tokens=room)
        sampled = self.engine.generate(prompt_ids, 1, sampling)
        if len(sampled.ids) != len(prompt_ids):
            raise RuntimeError(f"the rollout engine gave {len(sampled.ids)} completions for {len(prompt_ids)} prompts")
        return sampled

    def _truncated(self, completion_ids: Sequence[Sequence[int]]) -> Tensor:
        ends = [bool(ids) and ids[-1] in self.eos_token_ids for ids in completion_ids]
        return ~torch.tensor(ends, device=self.accelerator.device)

    def _count(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], mode: str, state: TrainerState
    ) -> None:
        device = self.accelerator.device
        lengths = torch.tensor(
            [[len(p), len(c)] for p, c in zip(prompt_ids, completion_ids, strict=True)], device=device
        )
        lengths = self.accelerator.gather(lengths)
        truncated = self.accelerator.gather(self._truncated(completion_ids))
        if mode == "train":
            state.num_input_tokens_seen += int(lengths.sum())
        self.metrics.set(mode, "num_tokens", state.num_input_tokens_seen)
        self.metrics.add(mode, completion_metrics(lengths[:, 1], truncated))

    def _advantages(
        self,
        examples: Sequence[Example],
        completions: list[Any],
        completion_ids: list[list[int]],
        group: int,
        mode: str,
        state: TrainerState,
    ) -> Tensor:
        rows = [example.row for example in examples]
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
        columns.pop("completion_ids", None)

        def log_metric(name: str, value: float) -> None:
            self.metrics.add(mode, {name: value})

        own = self.rewards([row["prompt"] for row in rows], completions, completion_ids, columns, state, log_metric)
        silent = own.isnan().all(-1).nonzero()
        if len(silent):
            logger.warning_once(
                f"No reward function gave a reward for the completion of row {examples[int(silent[0])].position}; such "
                "completions carry no gradient."
            )
        per_func = self.accelerator.gather(own.to(self.accelerator.device))
        advantages, rewards = combine_rewards(
            per_func,
            self.rewards.weights.to(per_func),
            torch.arange(len(per_func), device=per_func.device) // group,
            aggregation=self.args.multi_objective_aggregation,
            baseline=self.args.advantage_baseline,
            scale=str(self.args.scale_rewards),
        )
        over_batch = self.args.scale_rewards == "batch" or self.args.multi_objective_aggregation == "normalize_then_sum"
        self.metrics.add(
            mode, reward_metrics(per_func, self.rewards.names, rewards, group, "batch" if over_batch else "group")
        )
        first = self.accelerator.process_index * len(rows)
        return advantages[first : first + len(rows)]

    def _scored(self, rollouts: Rollouts, score_old: bool) -> Rollouts:
        settings: dict[str, Any] = {"temperature": self.args.temperature, "backend": self.args.loss_backend}
        if score_old:
            old_logps = completion_logps(self.policy(), rollouts, self.packer, **settings)
            rollouts = replace(rollouts, old_logps=old_logps)
        if self.reference is not None:
            with self.reference() as reference:
                ref_logps = completion_logps(reference, rollouts, self.packer, **settings)
            rollouts = replace(rollouts, ref_logps=ref_logps)
        return rollouts

"""The methods whose optimizer steps are raced: for each its data, its contenders, and how both sides make a trainer.

Settings are such that both define the same loss: one micro-batch, no accumulation, and rows in their order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fastrl.benchmark.step_data import (
    GROUP,
    StepData,
    pairs,
    row_data,
    stored_data,
    tokenized,
    with_live_share,
    with_values,
)
from fastrl.trainers.ppo_rollouts import PPORollouts
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.token_batch import TokenBatch

# What a trainer is made with, beside what all share. The first is what the others' gradients are compared with.
EAGER = "eager loss, padded"
CONTENDERS: dict[str, dict[str, Any]] = {
    EAGER: {"loss_backend": "reference", "share_prompts": False},
    "TRL, its defaults": {"trl": True, "gradient_checkpointing": True},
    "TRL, no checkpointing": {"trl": True},
    "fastrl, its defaults": {"gradient_checkpointing": True},
    "fastrl, no checkpointing": {},
}
_NO_CHECKPOINTING = {name: CONTENDERS[name] for name in (EAGER, "TRL, no checkpointing", "fastrl, no checkpointing")}
_SKIPS_NOTHING = {EAGER: {**CONTENDERS[EAGER], "skip_dead_sequences": False}}


@dataclass(frozen=True)
class Request:
    """What the trainer of a contender is made from."""

    library: str  # "trl" or "fastrl"
    model: Any
    arguments: dict[str, Any]  # of its config
    rows: Sequence[dict[str, Any]]
    shared: dict[str, Any]  # keyword arguments of the trainer: tokenizer, callbacks
    stored: Callable[[], Any]  # the batch of the step that is due

    @property
    def theirs(self) -> bool:
        return self.library == "trl"

    def trainer(self, name: str, rows: Sequence[dict[str, Any]] | None = None, **more: Any) -> Any:
        """The library's trainer of this name on `rows` (None: on those of the data)."""
        from datasets import Dataset

        module = importlib.import_module(self.library)
        config = getattr(module, f"{name}Config")(**self.arguments)
        data = Dataset.from_list(list(self.rows if rows is None else rows))
        keywords = {"model": self.model, "args": config, "train_dataset": data, **self.shared, **more}
        return getattr(module, f"{name}Trainer")(**keywords)


@dataclass(frozen=True)
class Method:
    """An optimizer step that is raced."""

    title: str
    # (model path, what gives sampled rollouts, live shares of these) -> the data of each step
    data: Callable[[str, Callable[[], Rollouts], Sequence[float]], list[StepData]]
    make: Callable[[Request], Any]  # -> the trainer
    contenders: dict[str, dict[str, Any]] = field(default_factory=lambda: CONTENDERS)
    arguments: Callable[[StepData], dict[str, Any]] = lambda data: {}  # of the config, beside what all share
    stored: type[TokenBatch] = Rollouts  # kind of the stored batches, where there are any
    model: str = "AutoModelForCausalLM"


# On rows -------------------------------------------------------------------------------------------------------------


def _on_rows(name: str) -> Callable[[Request], Any]:
    return lambda request: request.trainer(name)


def _in_order(data: StepData) -> dict[str, Any]:
    return {"per_device_train_batch_size": len(data.rows), "train_sampling_strategy": "sequential"}


def _pairs(count: int, path: str, *rest: Any) -> list[StepData]:
    return [row_data(path, pairs(count), ("chosen", "rejected"))]


def _texts(count: int, path: str, *rest: Any) -> list[StepData]:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(count)]
    return [row_data(path, rows, ("completion",))]


def _answers(count: int, path: str, *rest: Any) -> list[StepData]:
    made = [
        {"prompt": row["prompt"], "completion": row[answer], "label": answer == "chosen"}
        for row in pairs(count)
        for answer in ("chosen", "rejected")
    ]
    return [row_data(path, made, ("completion",))]


# On stored batches ---------------------------------------------------------------------------------------------------


def _replay(trainer: Any, stored: Callable[[], Any]) -> Any:
    """A trainer of ours that takes what is stored where it would sample."""
    trainer.collect_samples = lambda *args: None
    trainer.make_rollouts = lambda *args, **kwargs: stored()
    return trainer


def _replay_theirs(trainer: Any, outputs: Callable[[], dict[str, Any]]) -> Any:
    trainer._generate_and_score_completions = lambda *args: outputs()
    return trainer


def _trl_batch(batch: TokenBatch) -> dict[str, Any]:
    """What TRL's online trainers make of sampled completions."""
    return {
        "prompt_ids": batch.prompt_ids,
        "prompt_mask": batch.prompt_mask.long(),
        "completion_ids": batch.completion_ids,
        "completion_mask": batch.completion_mask.long(),
        "num_items_in_batch": batch.completion_mask.sum(),
    }


def _prompts(request: Request) -> list[dict[str, Any]]:
    return [{"prompt": str(i)} for i in range(request.arguments["per_device_train_batch_size"])]


def _no_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def _grpo(request: Request) -> Any:
    """With a KL term, the forward of the reference is part of the step."""
    trainer = request.trainer("GRPO", _prompts(request), reward_funcs=_no_reward)

    def rollouts() -> Rollouts:
        batch: Rollouts = request.stored()
        return replace(batch, ref_logps=trainer.reference_logps(batch)) if trainer.args.beta else batch

    def outputs() -> dict[str, Any]:
        batch: Rollouts = request.stored()
        made = {**_trl_batch(batch), "advantages": batch.advantages}
        if trainer.args.beta:
            ids, mask = (torch.cat([made[f"prompt_{x}"], made[f"completion_{x}"]], 1) for x in ("ids", "mask"))
            with torch.no_grad():
                score = trainer._get_per_token_logps_and_entropies
                made["ref_per_token_logps"] = score(trainer.ref_model, ids, mask, batch.completion_ids.shape[1])[0]
        return made

    return _replay_theirs(trainer, outputs) if request.theirs else _replay(trainer, rollouts)


def _distillation(request: Request) -> Any:
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(request.model.config._name_or_path, dtype=torch.float32)
    trainer = request.trainer("Distillation", _prompts(request), teacher_model=teacher)
    if request.theirs:
        return _replay_theirs(trainer, lambda: _trl_batch(request.stored()))
    return _replay(trainer, request.stored)


def _ppo(request: Request) -> Any:
    trainer = request.trainer("PPO", _prompts(request), reward_funcs=_no_reward)
    nn.init.normal_(trainer.critic.score.weight, std=0.02)  # else the policy gets no gradient from the values
    return _replay(trainer, request.stored)


def _sampled(path: str, rollouts: Callable[[], Rollouts], live_shares: Sequence[float]) -> list[StepData]:
    return [with_live_share(rollouts(), share) for share in live_shares]


def _two_groups(rollouts: Rollouts) -> Rollouts:
    return rollouts.select(torch.arange(2 * GROUP))


def _of_rollout(length: str, **more: Any) -> Callable[[StepData], dict[str, Any]]:
    """Arguments of an online trainer; `length` is what it calls the most tokens of a completion."""

    def arguments(data: StepData) -> dict[str, Any]:
        assert data.stored is not None
        sizes = {"per_device_train_batch_size": data.sequences, length: data.stored.completion_ids.shape[1]}
        return {**sizes, **more}

    return arguments


_GROUPS = partial(_of_rollout, "max_completion_length", num_generations=GROUP)

METHODS: dict[str, Method] = {
    "grpo": Method("GRPO", _sampled, _grpo, {**CONTENDERS, **_SKIPS_NOTHING}, _GROUPS()),
    "grpo_kl": Method(
        "GRPO with a reference",
        lambda path, rollouts, shares: [stored_data(_two_groups(rollouts()), G=GROUP)],
        _grpo,
        {**_NO_CHECKPOINTING, **_SKIPS_NOTHING},
        _GROUPS(beta=0.04),
    ),
    "sft": Method(
        "SFT",
        partial(_texts, 6),
        _on_rows("SFT"),
        {**CONTENDERS, "TRL, padding_free": {"trl": True, "padding_free": True, "max_length": None}},
        _in_order,
    ),
    "dpo": Method("DPO", partial(_pairs, 3), _on_rows("DPO"), arguments=_in_order),
    "dpo_precomputed": Method(
        "DPO, reference precomputed",
        partial(_pairs, 3),
        _on_rows("DPO"),
        _NO_CHECKPOINTING,
        lambda data: {**_in_order(data), "precompute_ref_log_probs": True},
    ),
    "reward": Method(
        "Reward model",
        partial(_pairs, 4),
        _on_rows("Reward"),
        arguments=_in_order,
        model="AutoModelForSequenceClassification",
    ),
    "kto": Method("KTO", partial(_answers, 3), _on_rows("KTO"), arguments=_in_order),
    "distillation": Method(
        "Distillation",
        lambda path, *rest: [stored_data(tokenized(path, pairs(6), ("chosen",)))],
        _distillation,
        arguments=_of_rollout("max_completion_length"),
        stored=TokenBatch,
    ),
    "ppo": Method(
        "PPO",
        lambda path, rollouts, shares: [stored_data(with_values(_two_groups(rollouts())), G=GROUP)],
        _ppo,
        {name: made for name, made in CONTENDERS.items() if "trl" not in made},  # TRL has no PPO any more
        _of_rollout("response_length", num_ppo_epochs=1, num_mini_batches=1, kl_coef=0.0),
        PPORollouts,
    ),
}

"""Folders of runs as they lie on disk, and a small trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SAMPLE, Line, LineTrainer, grpo_log
from transformers import TrainingArguments


@pytest.fixture
def make_line_trainer(tmp_path: Path) -> Callable[..., LineTrainer]:
    """`make_line_trainer(**arguments)`: 4 steps, a log each."""

    def make(**arguments: Any) -> LineTrainer:
        torch.manual_seed(0)
        rows = [{"x": torch.randn(2), "labels": torch.tensor(1.0)} for _ in range(16)]
        settings = {"output_dir": str(tmp_path / "run"), "max_steps": 4, "per_device_train_batch_size": 4}
        settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
        args = TrainingArguments(**settings | arguments)
        return LineTrainer(Line(), args, train_dataset=rows, eval_dataset=rows)

    return make


@pytest.fixture
def grpo_run(tmp_path: Path) -> Path:
    """A run that was killed after 16 of 20 steps, while it wrote a line."""
    folder = tmp_path / "grpo_run"
    (folder / "report").mkdir(parents=True)
    lines = [json.dumps(grpo_log(step)) for step in range(1, 17)]
    lines.insert(8, json.dumps({"eval_reward": 0.3, "eval_loss": 0.2, "eval_runtime": 1.0, "step": 8}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"loss": 0.')
    facts = {
        "method": "GRPO",
        "model": "tiny",
        "parameters": 2_000_000,
        "trainable": 20_000,
        "max_steps": 20,
        "device": "a processor, 2 threads",
        "versions": {"fastrl": "0.1.0", "torch": "2.13.0", "peft": None},
        "settings": {"dataset_name": "data <of> mine"},
        "changed": ["learning_rate"],
        "arguments": {"learning_rate": 1e-6, "beta": 0.0, "hub_token": "<HUB_TOKEN>"},
        "starts": [{"time": "2026-01-01T00:00:00+00:00", "step": 0, "command": "fastrl grpo --config 'a b'"}],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    answers = {
        "prompts": ["2 + 2"],
        "before": ["5"],
        "rewards_before": [None],
        "after": [SAMPLE],
        "rewards_after": [1.0],
    }
    (folder / "report" / "answers.json").write_text(json.dumps(answers))
    return folder


@pytest.fixture
def trl_run(tmp_path: Path) -> Path:
    """What another trainer on transformers leaves: trainer_state.json in the last checkpoint."""
    folder = tmp_path / "trl_run"
    for step in (4, 12):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        history = [{"loss": 1 / s, "reward": s / 10, "num_tokens": 50.0 * s, "step": s} for s in range(1, step + 1)]
        state = {"global_step": step, "log_history": history}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    return folder

"""A language model of a few thousand weights and a tokenizer of a few words, both made here: no downloads."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_runs import count_letters, make_tokenizer, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastrl.trainers import GRPOConfig, GRPOTrainer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors of this size a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """See make_tokenizer."""
    return make_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny Llama."""
    return tiny_model()


@pytest.fixture
def prompts() -> Dataset:
    """Eight prompts of different lengths, with a column for the reward functions."""
    rows = ["a", "b c", "d e f", "g h i j", "k", "l m", "n o p q r", "s t"]
    return Dataset.from_dict({"prompt": rows, "answer": [str(i) for i in range(len(rows))]})


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, prompts: Dataset) -> Callable[..., GRPOTrainer]:
    """`make_trainer(model=..., reward_funcs=..., **config)`: small batches, short completions, no checkpointing."""

    def make(
        model: Any = None,
        reward_funcs: Any = count_letters,
        *,
        train_dataset: Any = prompts,
        processing_class: Any = tokenizer,
        trainer_arguments: dict[str, Any] | None = None,
        **config: Any,
    ) -> GRPOTrainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
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
        return GRPOTrainer(
            model=tiny_model() if model is None else model,
            reward_funcs=reward_funcs,
            args=GRPOConfig(**settings),
            train_dataset=train_dataset,
            processing_class=processing_class,
            **(trainer_arguments or {}),
        )

    return make

"""A language model of a few thousand weights and a tokenizer of a few words, both made here: no downloads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_runs import WORDS, count_letters, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastrl.trainers import GRPOConfig, GRPOTrainer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter or digit, separated by blanks; without a chat template."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


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

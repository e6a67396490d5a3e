"""A language model of a few thousand weights and a tokenizer of a few words, both made here: no downloads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastrl.trainers import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)  # for tensors of this size a second thread costs more than it gives

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", *"abcdefghijklmnopqrstuvwxyz", *"0123456789"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter or digit, separated by blanks; without a chat template."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_model(family: str = "llama", seed: int = 0, **config: Any) -> PreTrainedModel:
    """Two layers of width 32; weights spread enough that its samples differ in length and content."""
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny Llama."""
    return tiny_model()


@pytest.fixture
def prompts() -> Dataset:
    """Eight prompts of different lengths, with a column for the reward functions."""
    rows = ["a", "b c", "d e f", "g h i j", "k", "l m", "n o p q r", "s t"]
    return Dataset.from_dict({"prompt": rows, "answer": [str(i) for i in range(len(rows))]})


def count_letters(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward that differs within most groups: the number of early letters, capped."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(min(sum(token in "abcdefghijklm" for token in text.split()), 3)) for text in texts]


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

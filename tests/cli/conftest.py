"""A model folder of a few thousand weights with its tokenizer, prompts in a file and a reward: a run in a second."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"0123456789", *"abcdefghijklmnopqrst"]

REWARDS = """
import os
import signal

calls = 0


def counts_letters(completions, answer, **kwargs):
    global calls
    calls += 1
    if calls > int(os.environ.get("STOP_AFTER", "1000")):
        raise KeyboardInterrupt
    return [sum(word.isalpha() for word in text.split()) / 8 + int(expected) / 100
            for text, expected in zip(completions, answer)]


def terminated(completions, **kwargs):
    global calls
    calls += 1
    if calls > int(os.environ["STOP_AFTER"]):
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(text)) for text in completions]


def raises(completions, **kwargs):
    raise RuntimeError("the judge is away")
"""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `run.yaml`, prompts and `judge.py`, the module of the reward functions."""
    monkeypatch.delitem(sys.modules, "judge", raising=False)  # another test's
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "judge.py").write_text(REWARDS)
    prompts = ["a", "b c", "d e f", "g h i j", "k", "l m", "n o p q r", "s t"]
    rows = [{"prompt": prompt, "answer": str(index)} for index, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(
        f"""
model_name_or_path: {model_folder}
dataset_name: prompts.jsonl
reward_funcs: [judge.counts_letters]
output_dir: out
max_steps: 6
per_device_train_batch_size: 8
num_generations: 4
max_completion_length: 6
learning_rate: 1e-2
lr_scheduler_type: linear
logging_steps: 1
save_steps: 2
disable_tqdm: true
dataloader_pin_memory: false
report: []
"""
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "judge", raising=False)
    return tmp_path

"""An untrained language model for sums, small enough to be trained from scratch in a minute, and its tokenizer.

One token per character: the digits, "+", "-" and "=". It serves where a real model is too slow on a CPU.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastrl_kernels.tuning import fastrl_cache_dir

# Part of the cache key: raise it when what is written below changes.
_VERSION = 1
_SPECIAL = ("<pad>", "<eos>", "<unk>")
_CHARACTERS = "0123456789+-="


def tiny_model_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder with the model (two layers of width 128, random weights of a fixed seed) and its tokenizer.

    Args:
        cache_dir: where to keep it; default `fastrl_cache_dir()`.
    """
    root = (fastrl_cache_dir() if cache_dir is None else Path(cache_dir)) / "models"
    target = root / f"tiny-arithmetic-{_VERSION}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        _tokenizer().save_pretrained(work)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(_config()).save_pretrained(work)
        work.chmod(0o755)  # mkdtemp makes it private
        try:
            os.rename(work, target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, and its folder is as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *_CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(_SPECIAL) + len(_CHARACTERS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=False,
    )

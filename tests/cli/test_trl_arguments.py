"""What TRL's scripts import beside trainers: parser, arguments of model and data, mixtures of data sets."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import HfArgumentParser

import fastrl

CONFIGS = ("SFTConfig", "RewardConfig", "DPOConfig", "KTOConfig", "GRPOConfig", "DistillationConfig")


@dataclasses.dataclass
class Mine:
    need: int
    rate: float = 0.5
    name: str = "x"
    on: bool = True


def parse(words: str, yaml: str = "", tmp_path: Path | None = None, **how: Any) -> Any:
    if tmp_path is not None:
        (tmp_path / "c.yaml").write_text(yaml)
        words = f"--config {tmp_path / 'c.yaml'} {words}"
    return fastrl.TrlParser(Mine).parse_args_and_config(words.split(), **how)


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    assert parse("--need 3 --no_on") == (Mine(3, on=False),)
    yaml = "need: 4\nrate: 1e-3\nname: no\non: false\n"
    assert parse("", yaml, tmp_path) == (Mine(4, 1e-3, "no", False),)
    assert parse("--rate 2 --on", yaml, tmp_path) == (Mine(4, 2.0, "no", True),)
    assert parse("--rate=2", yaml, tmp_path)[0].rate == 2
    with pytest.raises(SystemExit):
        parse("", "rate: 1\n", tmp_path)  # `need` is in neither


def test_file_sets_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRL_TEST_ENV", "before")
    assert parse("--need 1", "env:\n  FASTRL_TEST_ENV: 7\n", tmp_path) == (Mine(1),)
    assert os.environ["FASTRL_TEST_ENV"] == "7"
    with pytest.raises(ValueError, match="env: expected a mapping"):
        parse("--need 1", "env: 7\n", tmp_path)


def test_what_no_dataclass_has_is_an_error_or_returned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown arguments: --else 5"):
        parse("--need 1", "else: 5\n", tmp_path)
    assert parse("--need 1", "else: 5\n", tmp_path, fail_with_unknown_args=False) == (Mine(1),)
    with pytest.raises(ValueError, match="--more"):
        parse("--need 1 --more 6")
    both = parse("--need 1 --more 6", "else: 5\n", tmp_path, return_remaining_strings=True)
    assert both == (Mine(1), ["--else", "5", "--more", "6"])
    apart = parse(
        "--need 1 --more 6",
        "else: 5\n",
        tmp_path,
        return_remaining_strings=True,
        separate_remaining_strings=True,
    )
    assert apart == (Mine(1), ["--else", "5"], ["--more", "6"])


def test_files_and_dataclasses_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.yaml: no such file"):
        parse("--config gone.yaml")
    with pytest.raises(ValueError, match="expected lines of the form"):
        parse("--need 1", "- 1\n", tmp_path)
    taken = dataclasses.make_dataclass("Taken", [("config", str, "")])
    with pytest.raises(ValueError, match="field named 'config'"):
        fastrl.TrlParser([Mine, taken])


def test_subparsers_get_the_defaults_too(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("need: 4\n")
    parser = fastrl.TrlParser()
    commands = parser.add_subparsers(parser_class=fastrl.TrlParser)
    commands.add_parser("go", dataclass_types=[Mine])
    assert parser.set_defaults_with_config(need=4, other=5) == ["--other", "5"]
    assert parser.parse_args(["go"]).need == 4


@pytest.mark.parametrize("name", [*CONFIGS, "PPOConfig", "PRMConfig"])
def test_configurations_parse_as_those_of_trl(name: str, tmp_path: Path) -> None:
    """JSON for mappings, bare switches, lists; and where TRL is installed every one of its options, read alike."""
    config = getattr(fastrl, name)
    classes = (fastrl.ScriptArguments, config, fastrl.ModelConfig, fastrl.DatasetMixtureConfig)
    words = ["--learning_rate", "5.0e-7", "--bf16", "false", "--use_peft", "--no_gradient_checkpointing"]
    words += ["--model_init_kwargs", '{"dtype": "float16"}', "--lora_target_modules", "all-linear"]
    words += ["--no_remove_unused_columns"] if name in ("SFTConfig", "DPOConfig") else []
    script, args, model, mixture = fastrl.TrlParser(classes).parse_args_and_config(
        [*words, "--output_dir", str(tmp_path), "--dataset_name", "d"]
    )
    assert args.learning_rate == 5e-7 and args.gradient_checkpointing is False and args.bf16 is False
    assert args.model_init_kwargs == {"dtype": "float16"} and script.dataset_name == "d" and mixture.datasets == []
    assert model.use_peft and model.lora_target_modules == "all-linear"
    with pytest.raises(ValueError, match="model_init_kwargs: expected a mapping, or its JSON text"):
        config(output_dir=str(tmp_path), model_init_kwargs="float16")


@pytest.mark.parametrize("name", [*CONFIGS, "ScriptArguments", "ModelConfig", "DatasetMixtureConfig"])
def test_every_option_of_trl_is_read_as_there(name: str) -> None:
    trl = pytest.importorskip("trl")
    different = options(getattr(trl, name)) - options(getattr(fastrl, name))
    # Any text there, one of some words here.
    words = {"scale_rewards", "dtype", "bnb_4bit_quant_type"}
    assert {option[0].lstrip("-").replace("-", "_") for option in different} <= words


def options(config: type) -> set[tuple[Any, ...]]:
    actions = HfArgumentParser(config)._actions  # type: ignore[arg-type]
    return {
        (option, action.nargs, action.const, getattr(action.type, "__name__", None))
        for action in actions
        for option in action.option_strings
    }


def rows(folder: Path, name: str, count: int) -> str:
    """A file of `count` rows, by `datasets`' own way to name it."""
    Dataset.from_dict({"text": [f"{name}{i}" for i in range(count)], "n": list(range(count))}).to_json(
        folder / f"{name}.jsonl"
    )
    return str(folder / f"{name}.jsonl")


def test_mixtures(tmp_path: Path) -> None:
    a, b = rows(tmp_path, "a", 6), rows(tmp_path, "b", 4)

    def mixture(first: Any = None, second: Any = None, **more: Any) -> Any:
        paths = ({"path": "json", "data_files": a}, {"path": "json", "data_files": b})
        entries = [{**path, **(entry or {})} for path, entry in zip(paths, (first, second), strict=True)]
        return fastrl.get_dataset(fastrl.DatasetMixtureConfig(datasets=entries, **more))  # type: ignore[arg-type]

    assert mixture()["train"]["text"] == [f"a{i}" for i in range(6)] + [f"b{i}" for i in range(4)]
    cut = mixture({"columns": ["text"], "split": "train[:2]"}, {"columns": ["text"]})["train"]
    assert cut.column_names == ["text"] and cut["text"][:3] == ["a0", "a1", "b0"]
    # All of b, and twice as many of a would be 8 of 6: 6 of a, and half as many of b.
    shares = mixture({"fraction": 2.0}, {"fraction": 1.0})["train"]
    assert shares["text"] == [f"a{i}" for i in range(6)] + ["b0", "b1", "b2"]
    split = mixture(test_split_size=0.2)
    assert len(split["train"]) == 8 and split["test"]["text"] == mixture(test_split_size=0.2)["test"]["text"]
    with pytest.raises(ValueError, match="fraction: expected one for each"):
        mixture({"fraction": 1.0})
    with pytest.raises(ValueError, match="streaming: not supported"):
        mixture(streaming=True)
    with pytest.raises(ValueError, match="datasets: expected at least one"):
        fastrl.get_dataset(fastrl.DatasetMixtureConfig())


def test_adapter_and_quantization() -> None:
    assert fastrl.get_peft_config(fastrl.ModelConfig()) is None
    adapter = fastrl.get_peft_config(fastrl.ModelConfig(use_peft=True, lora_r=3, lora_target_modules=["q", "v"]))
    assert adapter.r == 3 and adapter.target_modules == {"q", "v"} and adapter.task_type == "CAUSAL_LM"
    assert fastrl.get_quantization_config(fastrl.ModelConfig()) is None
    bits = fastrl.get_quantization_config(fastrl.ModelConfig(load_in_4bit=True, dtype="bfloat16"))
    assert bits.load_in_4bit and str(bits.bnb_4bit_compute_dtype) == "torch.bfloat16"
    assert fastrl.get_quantization_config(fastrl.ModelConfig(load_in_8bit=True)).load_in_8bit
    with pytest.raises(ValueError, match="exclude each other"):
        fastrl.ModelConfig(load_in_8bit=True, load_in_4bit=True)


def test_names_that_are_something_else_here_say_what() -> None:
    with pytest.raises(ImportError, match="no LogCompletionsCallback: use log_completions=True"):
        from fastrl import LogCompletionsCallback  # noqa: F401
    with pytest.raises(ImportError, match="no CPOTrainer: use DPOTrainer with loss_type 'cpo'"):
        from fastrl import CPOTrainer  # noqa: F401
    assert not hasattr(fastrl, "Nothing")

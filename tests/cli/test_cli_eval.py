"""`fastrl eval` and `fastrl sample` on a tiny model: continued where they were stopped, refused in one line."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from fastrl.cli import main
from fastrl.evaluation import sample_file
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.reward_config import RewardConfig
from fastrl.trainers.sft import SFTTrainer
from fastrl.trainers.sft_config import SFTConfig

EVAL = ["eval", "--config", "eval.yaml"]
SAMPLE = ["sample", "--config", "sample.yaml"]


@pytest.fixture
def files(project: Path, model_folder: Path) -> Path:
    common = f"""
model_name_or_path: {model_folder}
dataset_name: prompts.jsonl
reward_funcs: [judge.has_letter, judge.counts_letters]
num_generations: 4
max_completion_length: 6
batch_size: 8
"""
    (project / "eval.yaml").write_text(common + "output_dir: out\n")
    (project / "sample.yaml").write_text(common + "output_file: best.jsonl\n")
    (project / "judge.py").write_text(
        (project / "judge.py").read_text()
        + """

def has_letter(completions, **kwargs):
    return [float(any(word in "abcdefghij" for word in text.split())) for text in completions]


def hangs(completions, prompts, **kwargs):
    import threading
    if "a" in prompts:
        threading.Event().wait(60)
    return [1.0] * len(completions)
"""
    )
    return project


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluation_writes_samples_results_and_figure(files, capsys):
    assert main(EVAL) == 0
    settings, *prompts = lines(files / "out/samples.jsonl")
    assert settings["settings"]["num_generations"] == 4 and [p["row"] for p in prompts] == list(range(8))
    assert all(len(p["samples"]) == 4 and p["greedy"] is not None for p in prompts)
    results = json.loads((files / "out/results.json").read_text())
    assert results["prompts"] == 8 and results["sizes"] == [1, 2, 4]
    curves = results["curves"]
    assert list(curves) == [
        "pass@n",
        "best of n (counts_letters)",
        "majority vote",
        "weighted vote (counts_letters)",
    ]
    right = [[s["rewards"]["has_letter"] >= 1 for s in p["samples"]] for p in prompts]
    assert curves["pass@n"][0]["mean"] == pytest.approx(sum(map(sum, right)) / 32)
    assert curves["pass@n"][2]["mean"] == pytest.approx(sum(map(any, right)) / 8)
    best = [max(p["samples"], key=lambda s: s["rewards"]["counts_letters"]) for p in prompts]
    assert curves["best of n (counts_letters)"][2]["mean"] >= sum(s["rewards"]["has_letter"] for s in best) / 8 - 1e-9
    assert results["greedy"]["mean"] == sum(p["greedy"]["rewards"]["has_letter"] for p in prompts) / 8
    assert (files / "out/accuracy.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "Accuracy over 8 prompts, 4 samples each" in shown and "greedy" in shown and "pass@n" in shown


def test_an_interrupted_evaluation_is_continued_with_the_same_samples(files, capsys, monkeypatch):
    assert main([*EVAL, "--output_dir", "whole"]) == 0
    whole = lines(files / "whole/samples.jsonl")

    import judge

    judge.calls = 0
    monkeypatch.setenv("STOP_AFTER", "3")
    assert main(EVAL) == 130
    assert "interrupted; what was sampled is kept, and the same command continues" in capsys.readouterr().err
    path = files / "out/samples.jsonl"
    assert 1 < len(lines(path)) < 9
    with path.open("a") as file:
        file.write('{"row": 7, "prompt": "s t", "greedy": nul')  # a line that a kill cut off
    judge.calls = 0
    monkeypatch.setenv("STOP_AFTER", "1000")
    assert main(EVAL) == 0
    assert lines(path)[1:] == whole[1:]
    results = [json.loads((files / name / "results.json").read_text()) for name in ("whole", "out")]
    assert results[0]["curves"] == results[1]["curves"]
    judge.calls = 0
    assert main(EVAL) == 0 and judge.calls == 0  # nothing is left to sample


def test_other_settings_are_refused_and_fresh_keeps_the_earlier_samples(files, capsys):
    assert main([*EVAL, "--max_prompts", "2"]) == 0
    before = (files / "out/samples.jsonl").read_bytes()
    assert main([*EVAL, "--max_prompts", "2", "--temperature", "0.5"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "made with other settings: temperature (temperature was 1.0, now it is 0.5)" in error and "--fresh" in error
    assert (files / "out/samples.jsonl").read_bytes() == before
    assert main([*EVAL, "--max_prompts", "2", "--threshold", "0.5"]) == 0  # the samples do not depend on it
    assert main([*EVAL, "--max_prompts", "2", "--temperature", "0.5", "--fresh"]) == 0
    assert (files / "out.1/samples.jsonl").read_bytes() == before


def test_a_full_disk_loses_nothing(files, capsys, monkeypatch):
    fsync, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls > 2:  # after the settings and one batch, with the line already half there
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(sample_file.os, "fsync", full)
    assert main(EVAL) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device; the samples of 2 prompts are kept" in error and "same command continues" in error
    assert len(lines(files / "out/samples.jsonl")) == 3
    monkeypatch.setattr(sample_file.os, "fsync", fsync)
    assert main(EVAL) == 0
    assert [p["row"] for p in lines(files / "out/samples.jsonl")[1:]] == list(range(8))

    results = (files / "out/results.json").read_bytes()
    monkeypatch.setattr(sample_file.os, "fsync", full)
    assert main([*EVAL, "--threshold", "2"]) == 2
    assert "results.json can't be written: No space left" in capsys.readouterr().err
    assert (files / "out/results.json").read_bytes() == results
    assert sorted(p.name for p in (files / "out").iterdir()) == ["accuracy.png", "results.json", "samples.jsonl"]


def test_mistakes_are_one_line(files, model_folder, capsys):
    (files / "empty.jsonl").write_text("")
    (files / "no_prompt.jsonl").write_text('{"question": "a"}\n')
    (files / "long.jsonl").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "a " * 64}) + "\n")
    chat = [{"role": "user", "content": "a"}]
    (files / "chat.jsonl").write_text(json.dumps({"prompt": chat}) + "\n")
    (files / "damaged").mkdir()
    (files / "damaged/samples.jsonl").write_text("hello\n")
    for words, message in {
        "--dataset_name empty.jsonl": "the file empty.jsonl is empty",
        "--dataset_name no_prompt.jsonl": "no column 'prompt'",
        "--dataset_name long.jsonl": "the prompt of row 1 has 64 tokens, which leaves no room",
        "--dataset_name chat.jsonl": "no chat template: set tokenizer.chat_template, or give the prompts as strings",
        "--dataset_split test": "dataset_split: prompts.jsonl has no split 'test'",
        "--verifier has_leter": "verifier: expected one of has_letter, counts_letters",
        "--reward_funcs accuracy_reward": "needs the column 'solution'",
        "--temperature 0": "temperature: expected a positive number",
        "--num_generations 0": "num_generations: expected at least 1, got 0",
        "--output_dir damaged": "is not a file of samples",
        "--model_name_or_path damaged": "model_name_or_path: 'damaged' can't be loaded",
        "--reward_model_name_or_path damaged": "reward_model_name_or_path: 'damaged' can't be loaded",
        "--generation_kwargs {tempratur: 1}": "GenerationConfig has no entry tempratur",
    }.items():
        elsewhere = [] if "--output_dir" in words else ["--output_dir", "other", "--fresh"]
        assert main([*EVAL, *elsewhere, *words.split(" ", 1)]) == 2, words
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("fastrl eval: ") and message in last, f"{words}: {last}"


def test_a_tokenizer_without_a_pad_token_and_a_reward_that_hangs(files, model_folder, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = None
    bare = files / "bare"
    bare.mkdir()
    for path in model_folder.iterdir():
        (bare / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(bare)
    words = ["--model_name_or_path", "bare", "--reward_funcs", "[judge.hangs]", "--reward_timeout", "0.2"]
    assert main([*EVAL, *words, "--max_prompts", "3"]) == 0
    rewards = [[s["rewards"]["hangs"] for s in p["samples"]] for p in lines(files / "out/samples.jsonl")[1:]]
    assert rewards == [[None] * 4, [1.0] * 4, [1.0] * 4]
    assert "left out: 1 prompts without a reward of hangs" in capsys.readouterr().out


# fastrl sample


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_best_of_n_become_training_data(files, model_folder, suffix, capsys):
    assert main([*SAMPLE, "--best-of", "6", "--output_file", f"best{suffix}", "--keep_cut_off", "true"]) == 0
    prompts = lines(files / "best.samples")[1:]
    rows = load_dataset("json" if suffix == ".jsonl" else "parquet", data_files=f"best{suffix}")["train"]
    assert rows.column_names == ["prompt", "completion", "reward", "n"] and rows["n"] == [6] * 8
    for row, prompt in zip(rows, prompts, strict=True):
        totals = [sum(sample["rewards"].values()) for sample in prompt["samples"]]
        assert row["prompt"] == prompt["prompt"] and row["reward"] == pytest.approx(max(totals))
        assert row["completion"] == prompt["samples"][totals.index(max(totals))]["completion"]
    assert "8 of 48 completions accepted, for 8 of 8 prompts" in capsys.readouterr().out

    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 1e-2}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    trainer = SFTTrainer(str(model_folder), SFTConfig("sft", **settings, **quiet), train_dataset=rows)
    trainer.train()
    log = trainer.state.log_history[0]
    tokens = sum(len(text.split()) for row in rows for text in (row["prompt"], row["completion"]))
    assert log["num_tokens"] >= tokens and log["loss"] == pytest.approx(math.log(34), rel=0.2)


def test_what_is_accepted(files, capsys):
    assert main([*SAMPLE, "--keep", "all", "--reward_threshold", "1.2", "--keep_cut_off", "true"]) == 0
    prompts = lines(files / "best.samples")[1:]
    expected = [
        (p["prompt"], text)
        for p in prompts
        for text in dict.fromkeys(s["completion"] for s in p["samples"] if sum(s["rewards"].values()) >= 1.2)
    ]
    assert [(row["prompt"], row["completion"]) for row in lines(files / "best.jsonl")] == expected
    assert 0 < len(expected) < 32
    assert main([*SAMPLE, "--keep", "all", "--reward_weights", "[0, 1]"]) == 0  # the same samples, chosen anew
    finished = [s for p in prompts for s in p["samples"] if s["finished"]]
    rows = lines(files / "best.jsonl")
    assert 0 < len(rows) <= len(finished) < 32
    assert {row["completion"] for row in rows} == {s["completion"] for s in finished}
    capsys.readouterr()
    with (files / "judge.py").open("a") as file:
        file.write("\n\ndef silent(completions, **kwargs):\n    return [None] * len(completions)\n")
    sys.modules.pop("judge")
    silent = "--reward_funcs judge.silent --output_file silent.jsonl"
    for words, message in {
        f"{silent} --keep_cut_off true": "silent gave no completion a reward",
        f"{silent} --format preference --fresh": "silent gave no completion a reward",
        "--reward_threshold 99": "none of 32 completions was accepted: lower --reward_threshold (now 99)",
        "--output_file best.csv": "expected a file that ends in .jsonl or .parquet",
        "--reward_weights [1]": "reward_weights: expected 2, one for each of has_letter, counts_letters, got 1",
        "--best-of x": "expected a whole number, got 'x'",
    }.items():
        assert main([*SAMPLE, *shlex.split(words)]) == 2, words
        assert message in capsys.readouterr().err.strip().splitlines()[-1], words


def test_pairs_of_the_models_own_samples_train_a_reward_model(files, model_folder, capsys):
    pairs = ["--format", "preference", "--keep_cut_off", "true", "--output_file", "pairs/train.jsonl"]
    words = [*SAMPLE, *pairs, "--reward_funcs", "[judge.has_letter]", "--best-of", "3"]
    assert main(words) == 0
    prompts = lines(files / "pairs/train.samples")[1:]
    given = [{s["completion"]: s["rewards"]["has_letter"] for s in p["samples"]} for p in prompts]
    mixed = [(p["prompt"], own) for p, own in zip(prompts, given, strict=True) if len(set(own.values())) == 2]
    assert 0 < len(mixed) < 8
    shown = (
        f"{len(mixed)} pairs for {len(mixed)} of 8 prompts, {8 - len(mixed)} gave none; mean reward 1.000 chosen, 0.000"
    )
    assert shown in capsys.readouterr().out
    rows = lines(files / "pairs/train.jsonl")
    assert [row["prompt"] for row in rows] == [text for text, _ in mixed]
    for row, (_, own) in zip(rows, mixed, strict=True):
        assert own[row["chosen"]] == row["chosen_reward"] == 1 and own[row["rejected"]] == row["rejected_reward"] == 0
        assert row["n"] == 3

    import judge

    judge.calls = 0
    assert main([*words, "--keep", "all"]) == 0 and judge.calls == 0  # the same samples, paired anew
    paired = [(row["prompt"], row["chosen"], row["rejected"]) for row in lines(files / "pairs/train.jsonl")]
    right = [(text, [c for c in own if own[c]], [c for c in own if not own[c]]) for text, own in mixed]
    assert paired == [(text, good, bad) for text, goods, bads in right for good in goods for bad in bads]

    loaded = load_dataset(str(files / "pairs"))["train"]  # a folder: the samples are no part of it
    assert loaded["chosen"] == [chosen for _, chosen, _ in paired]
    settings = {"max_steps": 1, "per_device_train_batch_size": len(loaded), "logging_steps": 1, "report_to": "none"}
    quiet = {"disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    trainer = RewardTrainer(str(model_folder), RewardConfig("reward", **settings, **quiet), train_dataset=loaded)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=0.1)

    capsys.readouterr()
    assert main([*words, "--reward_threshold", "2"]) == 2
    assert "no two completions of any of 8 prompts make a pair" in capsys.readouterr().err.strip().splitlines()[-1]


def test_conversations_stay_conversations_and_a_reward_model_chooses(files, model_folder, capsys):
    folder = files / "chat"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    for path in model_folder.iterdir():
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(files / "scorer")
    tokenizer.save_pretrained(files / "scorer")
    chats = [[{"role": "user", "content": text}] for text in ("a", "b c", "d")]
    Dataset.from_dict({"prompt": chats}).to_json(files / "chats.jsonl")
    shared = ["--model_name_or_path", "chat", "--dataset_name", "chats.jsonl", "--reward_model_name_or_path", "scorer"]
    assert main([*SAMPLE, *shared, "--reward_funcs", "[]", "--keep_cut_off", "true"]) == 0
    rows = lines(files / "best.jsonl")
    assert [row["prompt"] for row in rows] == chats
    assert all(row["completion"][0]["role"] == "assistant" for row in rows)
    scores = [[s["rewards"]["scorer"] for s in p["samples"]] for p in lines(files / "best.samples")[1:]]
    assert [row["reward"] for row in rows] == [max(own) for own in scores] and len({*scores[0]}) > 1
    words = [*SAMPLE, *shared, "--reward_funcs", "[]", "--keep_cut_off", "true", "--format", "preference"]
    assert main(words) == 0
    rows = lines(files / "best.jsonl")
    assert [(row["chosen_reward"], row["rejected_reward"]) for row in rows] == [(max(own), min(own)) for own in scores]
    assert all(row[side][0]["role"] == "assistant" for row in rows for side in ("chosen", "rejected"))

    assert main([*EVAL, *shared, "--reward_funcs", "[think_format_reward]"]) == 0
    curves = json.loads((files / "out/results.json").read_text())["curves"]
    assert list(curves)[1:] == ["best of n (scorer)", "majority vote", "weighted vote (scorer)"]

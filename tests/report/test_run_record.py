"""`run.json` and `metrics.jsonl`: there from the first log on, right after a kill and a resumption."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import LineTrainer

from fastrl.run_files import read_history, read_json, read_metrics

Make = Callable[..., LineTrainer]


def test_lines_are_the_logs(make_line_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fastrl", "sft", "--hub_token", "secret", "--config", "a b.yaml"])
    trainer = make_line_trainer(learning_rate=0.125)
    trainer.record.settings["dataset_name"] = "mine"
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    folder = Path(trainer.args.output_dir)
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4, 4] and "eval_loss" in lines[0]
    assert lines[2]["reward"] == 1.0 and lines[2]["none"] is None and lines[-1]["eval_loss"] > 0
    seconds = [line["seconds"] for line in lines[1:]]
    assert seconds == sorted(seconds) and seconds[0] > 0
    facts = read_json(folder / "run.json")
    assert facts["parameters"] == facts["trainable"] == 3 and facts["settings"] == {"dataset_name": "mine"}
    assert "learning_rate" in facts["changed"] and "weight_decay" not in facts["changed"]
    assert facts["arguments"]["learning_rate"] == 0.125 and facts["versions"]["torch"]
    assert facts["starts"][0]["command"] == "fastrl sft --hub_token ... --config 'a b.yaml'"


def test_a_resumed_run_continues_at_its_checkpoint(make_line_trainer: Make) -> None:
    first = make_line_trainer(save_strategy="steps", save_steps=2, max_steps=3)
    first.train()
    folder = Path(first.args.output_dir)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 0.1, "st')  # killed here
    second = make_line_trainer(save_strategy="steps", save_steps=2)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert [start["step"] for start in read_json(folder / "run.json")["starts"]] == [0, 2]
    assert [line["reward"] for line in lines if "reward" in line] == [0.0, 1.0, 2.0, 3.0]


def test_a_new_run_in_the_folder_starts_the_files_anew(make_line_trainer: Make) -> None:
    make_line_trainer().train()
    trainer = make_line_trainer(max_steps=2)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 2]
    assert len(read_json(folder / "run.json")["starts"]) == 1


def test_a_full_disk_does_not_end_the_run(make_line_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_line_trainer()
    (Path(trainer.args.output_dir) / "metrics.jsonl").mkdir(parents=True)  # can't be replaced by a file
    trainer.train()
    assert trainer.state.global_step == 4


def test_numbers_that_json_does_not_have_are_null(make_line_trainer: Make) -> None:
    trainer = make_line_trainer()
    trainer.train()
    trainer.log({"odd": math.nan, "large": math.inf, "text": "x"})
    last = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()[-1]
    content = json.loads(last, parse_constant=pytest.fail)
    assert content["odd"] is None and content["large"] is None and content["text"] == "x"


def test_history_of_checkpoints_where_there_are_no_lines(trl_run: Path) -> None:
    assert [entry["step"] for entry in read_history(trl_run)] == list(range(1, 13))
    (trl_run / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 12, "log_his')
    assert len(read_history(trl_run)) == 4
    assert read_history(trl_run / "nowhere") == []

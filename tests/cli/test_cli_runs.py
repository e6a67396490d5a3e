"""Runs through the command line: refused, resumed, started anew; a killed run gives the metrics of one that was not."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
from transformers import Trainer

from fastrl.cli import main
from fastrl.cli.errors import UserError
from fastrl.cli.main import Terminated, _terminated_like_interrupted
from fastrl.cli.runs import choose_start, complete_from_checkpoint, saved_step
from fastrl.trainers.checkpoint_files import check_complete

TIMES = {"step_time", "tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def history(folder):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


def test_killed_and_resumed_run_logs_what_an_uninterrupted_one_does(project, monkeypatch, capsys):
    assert main(["grpo", "--config", "run.yaml", "--output_dir", "whole"]) == 0
    whole = history(project / "whole")
    assert [entry["step"] for entry in whole if "reward" in entry] == [1, 2, 3, 4, 5, 6]

    import judge

    for stop_after in (1, 3, 2):  # before the first checkpoint, between two, right after one
        judge.calls = 0
        monkeypatch.setenv("STOP_AFTER", str(stop_after))
        resume = ["--resume"] if (project / "out").exists() else []
        assert main(["grpo", "--config", "run.yaml", *resume]) == 130
    judge.calls = 0
    monkeypatch.setenv("STOP_AFTER", "1000")
    assert main(["grpo", "--config", "run.yaml", "--resume"]) == 0
    assert "resuming from out/checkpoint-" in capsys.readouterr().err
    resumed = history(project / "out")
    assert [entry for entry in resumed if "reward" in entry] == [entry for entry in whole if "reward" in entry]
    for name in ("model.safetensors", "config.json"):
        assert (project / "out" / name).read_bytes() == (project / "whole" / name).read_bytes(), name


def test_existing_run_is_refused_kept_or_continued(project, capsys):
    assert main(["grpo", "--config", "run.yaml", "--max_steps", "2"]) == 0
    before = history(project / "out")
    assert main(["grpo", "--config", "run.yaml"]) == 2
    assert "output_dir out already holds a run: continue it with --resume" in capsys.readouterr().err
    assert history(project / "out") == before

    assert main(["grpo", "--config", "run.yaml", "--max_steps", "2", "--resume"]) == 0
    assert "this run is finished" in capsys.readouterr().err
    assert history(project / "out") == before

    assert main(["grpo", "--config", "run.yaml", "--max_steps", "4", "--resume"]) == 0
    assert [entry["step"] for entry in history(project / "out") if "reward" in entry] == [1, 2, 3, 4]

    assert main(["grpo", "--config", "run.yaml", "--max_steps", "2", "--fresh"]) == 0
    assert "the earlier one is now out.1" in capsys.readouterr().err
    assert len([entry for entry in history(project / "out.1") if "reward" in entry]) == 4
    assert len([entry for entry in history(project / "out") if "reward" in entry]) == 2


def test_run_killed_before_its_result_was_saved_is_completed(project):
    assert main(["grpo", "--config", "run.yaml", "--max_steps", "2"]) == 0
    weights = (project / "out" / "model.safetensors").read_bytes()
    for path in (project / "out").iterdir():
        if path.is_file():
            path.unlink()
    assert main(["grpo", "--config", "run.yaml", "--max_steps", "2", "--resume"]) == 0
    assert saved_step(project / "out") == 2
    assert (project / "out" / "model.safetensors").read_bytes() == weights
    assert not (project / "out" / "optimizer.pt").exists()


def test_result_of_an_earlier_shorter_run_is_replaced(project):
    assert main(["grpo", "--config", "run.yaml", "--max_steps", "2"]) == 0
    short = (project / "out" / "model.safetensors").read_bytes()
    state = (project / "out" / "trainer_state.json").read_text()
    assert main(["grpo", "--config", "run.yaml", "--max_steps", "4", "--resume"]) == 0
    longer = (project / "out" / "model.safetensors").read_bytes()
    # Killed after its last checkpoint, the longer run would have left the result of the shorter one.
    (project / "out" / "model.safetensors").write_bytes(short)
    (project / "out" / "trainer_state.json").write_text(state)
    assert main(["grpo", "--config", "run.yaml", "--max_steps", "4", "--resume"]) == 0
    assert (project / "out" / "model.safetensors").read_bytes() == longer != short


def test_a_result_without_checkpoints_is_not_overwritten(project, capsys):
    words = ["--max_steps", "1", "--save_strategy", "no"]
    assert main(["grpo", "--config", "run.yaml", *words]) == 0
    assert main(["grpo", "--config", "run.yaml", *words, "--resume"]) == 2
    assert "holds a run but no complete checkpoint that this one can resume" in capsys.readouterr().err


def test_a_broken_newest_checkpoint_is_passed_over(project):
    assert main(["grpo", "--config", "run.yaml", "--max_steps", "4"]) == 0
    with open(project / "out" / "checkpoint-4" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    start = choose_start(project / "out", check_complete, resume=True, fresh=False)
    assert start.checkpoint is not None and start.checkpoint.name == "checkpoint-2"
    shutil.rmtree(project / "out" / "checkpoint-2")
    with pytest.raises(UserError, match="no complete checkpoint that this one can resume"):
        choose_start(project / "out", check_complete, resume=True, fresh=False)
    (project / "out" / "trainer_state.json").unlink()  # as if it had been killed
    start = choose_start(project / "out", check_complete, resume=True, fresh=False)
    assert start.checkpoint is None and "starting the run again from its first step" in start.message


def test_resume_without_a_run_starts_one(tmp_path):
    start = choose_start(tmp_path / "new", check_complete, resume=True, fresh=False)
    assert start.checkpoint is None and "nothing to resume" in start.message
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README").touch()
    assert choose_start(tmp_path / "notes", check_complete, resume=False, fresh=False).checkpoint is None


def test_fresh_never_overwrites_an_earlier_copy(tmp_path):
    for _ in range(2):
        (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
        choose_start(tmp_path / "out", check_complete, resume=False, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.1", "out.2"]


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="is a file"):
        choose_start(tmp_path / "out", check_complete, resume=False, fresh=False)


def test_only_what_belongs_to_the_model_is_taken_from_a_checkpoint(tmp_path):
    names = ["model.safetensors", "config.json", "tokenizer.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    names += ["rng_state_0.pth", "fastrl_manifest.json", "0_fastrl_state.json", "trainer_state.json", "scaler.pt"]
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    for name in names:
        (checkpoint / name).write_text('{"global_step": 7}')
    complete_from_checkpoint(tmp_path, checkpoint)
    taken = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert taken == {"model.safetensors", "config.json", "tokenizer.json", "trainer_state.json"}


def test_a_terminated_run_is_resumed(project, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("STOP_AFTER", "3")
    words = ["grpo", "--config", "run.yaml", "--reward_funcs", "judge.terminated"]
    assert main(words) == 143
    assert "fastrl grpo: terminated; --resume continues from the newest checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert not list((project / "out").glob(".partial*"))
    monkeypatch.setenv("STOP_AFTER", "1000")
    assert main([*words, "--resume"]) == 0
    assert "resuming from out/checkpoint-2" in capsys.readouterr().err


def test_a_worker_of_a_run_is_terminated_without_a_traceback(capfd):
    """A pool that `datasets` forks is ended by SIGTERM, which in the run itself is an exception."""
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()

    def work():
        begun.set()
        time.sleep(10)

    with _terminated_like_interrupted():
        worker = fork.Process(target=work)
        worker.start()
        assert begun.wait(10)  # Python forgets a signal that comes while it forks
        worker.terminate()
        worker.join()
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    assert worker.exitcode == 143 and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "place",
    [
        "trainers.grpo.GRPOTrainer._save_optimizer_and_scheduler",
        "trainers.grpo.GRPOTrainer._save",
        "report.write_report",
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(project, monkeypatch, capsys, place):
    save = Trainer._save

    def full(*args, **kwargs):
        if place.endswith("._save") and "checkpoint" in str(args[1]):  # only the result does not fit
            return save(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/file")

    words = ["grpo", "--config", "run.yaml", "--max_steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(f"fastrl.{place}", full)
        assert main([*words, "--report", "[curves]" if "report" in place else "[]"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fastrl grpo: ") and "No space left on device" in last and "make room" in last
    kept = [] if "optimizer" in place else ["checkpoint-2"]
    assert [path.name for path in (project / "out").glob("*checkpoint*")] == kept
    assert main([*words, "--resume"]) == 0
    assert ("this run is finished" in capsys.readouterr().err) == bool(kept)
    assert saved_step(project / "out") == 2


def test_a_checkpoint_of_another_run_is_passed_over(project, capsys, caplog):
    assert main(["grpo", "--config", "run.yaml", "--max_steps", "2"]) == 0
    words = ["grpo", "--config", "run.yaml", "--output_dir", "other", "--max_steps", "4", "--seed", "7"]
    assert main(words) == 0
    (project / "other" / "checkpoint-4").rename(project / "out" / "checkpoint-4")
    capsys.readouterr()
    assert main(["grpo", "--config", "run.yaml", "--max_steps", "5", "--resume"]) == 0
    assert "out/checkpoint-4 is of another run (seed: 7 there, 42 here)" in caplog.text
    assert [entry["step"] for entry in history(project / "out") if "reward" in entry] == [1, 2, 3, 4, 5]
    words[words.index("4")] = "6"
    assert main([*words, "--num_generations", "8", "--resume"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fastrl grpo: ") and "no complete checkpoint in other that this run can continue" in last


def test_a_failing_reward_function_is_one_line_and_spares_the_checkpoints(project, capsys, caplog):
    assert main(["grpo", "--config", "run.yaml", "--max_steps", "2"]) == 0
    capsys.readouterr()
    arguments = ["--max_steps", "8", "--resume", "--reward_funcs", "judge.raises"]
    assert main(["grpo", "--config", "run.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert "reward function 'raises' raised RuntimeError: the judge is away" in last and "judge.py, line " in last
    assert "for every completion of 3 batches in a row" in last
    assert caplog.text.count("Traceback") == 1 and "it failed for 8 of 8" in caplog.text  # at the first batch
    start = choose_start(project / "out", check_complete, resume=True, fresh=False)
    assert start.checkpoint is not None and start.checkpoint.name == "checkpoint-4"

"""What a run shows while it goes on: lines in a file, a panel on a terminal."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from small_runs import LineTrainer
from transformers import PrinterCallback, ProgressCallback

from fastrl.trainers.progress import ProgressView, sparkline

Make = Callable[..., LineTrainer]


def terminal(trainer: LineTrainer) -> io.StringIO:
    """Puts the trainer's view on a terminal of 30 lines; returns what is written there."""
    screen = io.StringIO()
    trainer.progress.console = Console(file=screen, force_terminal=True, width=90, height=30, color_system=None)
    return screen


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_file_gets_one_line_per_log(
    make_line_trainer: Make, capsys: pytest.CaptureFixture[str], disable_tqdm: bool
) -> None:
    trainer = make_line_trainer(disable_tqdm=disable_tqdm, eval_strategy="steps", eval_steps=2)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(ProgressView) == 1 and not {ProgressCallback, PrinterCallback} & {*kinds}
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(trainer.state.log_history) == 7
    assert re.fullmatch(
        r"step 2/4 \(0:00:0\d elapsed, 0:00:0\d left\): loss [\d.e-]+, reward 1, grad_norm [\d.e-]+, "
        r"tokens_per_second [\d.e+]+", lines[1]
    )  # fmt: skip
    assert re.fullmatch(r"step 2/4 \(.*\): eval_loss [\d.e-]+", lines[2]) and "train_runtime" in lines[-1]


def test_a_terminal_gets_a_panel(make_line_trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_line_trainer(eval_strategy="steps", eval_steps=2, logging_steps=2, disable_tqdm=False)
    screen = terminal(trainer)
    trainer.train()
    shown = screen.getvalue()
    assert capsys.readouterr().out == ""
    assert "evaluation 1/2" in shown and "tokens/s" in shown and "s/step" in shown and "GiB" in shown
    last = shown[shown.rindex("╭") :]
    assert "4/4" in last and "elapsed" in last and "evaluation" not in last
    assert re.search(r"reward +3 +▁▃▆█", last) and re.search(r"eval_loss +[\d.e-]+ +█▁", last)
    assert "none" not in last and last.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_what_loggers_say_goes_above_the_panel(make_line_trainer: Make, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("someone.elses")
    handler = logging.StreamHandler(sys.stderr)  # holds the stream of this moment, as that of transformers does
    logger.addHandler(handler)
    trainer = make_line_trainer(disable_tqdm=False)
    screen = terminal(trainer)
    compute_loss = trainer.compute_loss

    def warns(*args: Any, **kwargs: Any) -> Any:
        logger.warning("beware of this")
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = warns  # type: ignore[method-assign]
    trainer.train()
    logger.removeHandler(handler)
    assert screen.getvalue().count("beware of this") == 4 and "beware" not in capfd.readouterr().err
    assert handler.stream is sys.stderr


def test_an_evaluation_alone(make_line_trainer: Make) -> None:
    trainer = make_line_trainer(disable_tqdm=False)
    screen = terminal(trainer)
    trainer.evaluate()
    assert "evaluation 1/2" in screen.getvalue() and screen.getvalue().rstrip().endswith("\x1b[?25h")


def test_the_terminal_is_given_back_when_training_fails(make_line_trainer: Make) -> None:
    trainer = make_line_trainer(disable_tqdm=False)
    screen = terminal(trainer)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    trainer.compute_loss = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert screen.getvalue().rstrip().endswith("\x1b[?25h")


def test_only_the_main_process_shows_anything(make_line_trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_line_trainer(disable_tqdm=False)
    screen = terminal(trainer)
    trainer.state.is_world_process_zero = False
    for event in ("on_train_begin", "on_step_end", "on_prediction_step", "on_log", "on_evaluate", "on_train_end"):
        getattr(trainer.progress, event)(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0})
    assert screen.getvalue() == capsys.readouterr().out == ""


def test_a_closed_stream_does_not_end_the_run(make_line_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_line_trainer()
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stdout", closed)
    trainer.train()
    assert trainer.state.global_step == 4


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, 2.0, 7.0], 8) == "▁▂▃█"
    assert sparkline([1.0, 1.0], 8) == "▁▁" and sparkline([], 8) == ""
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == "▁█"

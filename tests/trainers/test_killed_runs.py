"""Every trainer, killed with SIGKILL at a random moment of a random step and resumed, is the run that was not killed:
the same weights bit for bit, the same log."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killable_runs import COMMON, RUNS
from tiny_runs import history

from fastrl.trainers.checkpoint_files import newest_complete

MOMENTS = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_log", "on_prediction_step", "writing"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Starts to kill a run of each trainer: {"folder", "process", "deaths": name -> (step, moment)}."""
    folder = tmp_path_factory.mktemp("killed")
    moments = random.Random().sample(MOMENTS * 2, len(RUNS))
    # Logs and evaluations come every second step: the last that is sure to come is that of step 6.
    deaths = {name: (random.randint(2, 5), moment) for name, moment in zip(RUNS, moments, strict=True)}
    print(deaths)
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tests / "killable_runs.py"), str(folder), json.dumps(deaths)]
    return {"folder": folder, "process": subprocess.Popen(command, env=environment), "deaths": deaths}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_where_the_uninterrupted_one_does(killed: dict[str, Any], tmp_path: Path, name: str) -> None:
    straight = RUNS[name](tmp_path, {})
    straight.train()
    assert killed["process"].wait(600) == 0
    step, moment = killed["deaths"][name]
    resumed = RUNS[name](killed["folder"] / name, {})
    written = int(str(newest_complete(resumed.args.output_dir)).rpartition("-")[2])
    assert step - 1 <= written < COMMON["max_steps"], (step, moment)
    resumed.train(resume_from_checkpoint=True)

    expected = dict(straight.model.named_parameters())
    for parameter, weight in resumed.model.named_parameters():
        assert torch.equal(weight, expected[parameter]), (parameter, step, moment)
    assert history(resumed) == history(straight), (step, moment)
    logged = {key for log in history(straight) for key in log}
    assert {"loss", "eval_loss"} <= logged
    moving = [log["loss"] for log in history(straight) if "loss" in log]
    assert len(moving) == 3 and len(set(moving)) > 1

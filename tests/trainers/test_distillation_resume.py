"""A distillation that is cut off, or killed, and resumed is the one that was not: weights bit for bit, same metrics."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_runs import make_distillation
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_runs import tiny_model
from transformers import TrainerCallback

from fastrl.trainers.checkpointing import newest_complete
from fastrl.trainers.distillation import DistillationTrainer

TIMES = ("step_time", "tokens_per_second", "runtime", "per_second", "train_loss", "total_flos")
SETTINGS: dict[str, Any] = {"max_steps": 9, "save_strategy": "steps", "save_steps": 5, "lmbda": 0.5, "beta": 0.5} | {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,  # two optimizer steps to a rollout
    "tokens_per_pass": 32,
    "seed": 6,  # of the five rollouts the second and the last are the student's own
}


def history(trainer: DistillationTrainer) -> list[dict[str, Any]]:
    """What was logged, without what the clock decides."""
    kept = [{k: v for k, v in log.items() if not any(part in k for part in TIMES)} for log in trainer.state.log_history]
    return [log for log in kept if len(log) > 2]


def same(resumed: DistillationTrainer, straight: DistillationTrainer) -> None:
    expected = dict(straight.model.named_parameters())
    for name, weight in resumed.model.named_parameters():
        assert torch.equal(weight, expected[name]), name
    assert history(resumed) == history(straight)


class Killed(BaseException):
    pass


class Dies(TrainerCallback):
    """Ends the run in the middle of a step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        if state.global_step == 7:
            raise Killed


@pytest.mark.parametrize("situation", ["dropout", "lora_and_a_teacher_that_samples"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, situation: str) -> None:
    def make(folder: str, **arguments: Any) -> DistillationTrainer:
        settings = {**SETTINGS, "seq_kd": situation != "dropout"}
        if situation != "dropout":
            arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.1)
        model = tiny_model(attention_dropout=0.2 if situation == "dropout" else 0.0)
        return make_distillation(tmp_path / folder, model, arguments=arguments, **settings)

    straight = make("straight")
    straight.train()
    assert {log["on_policy"] for log in history(straight) if "on_policy" in log} == {0.0, 1.0}
    cut = make("cut", callbacks=[Dies()])
    with pytest.raises(Killed):
        cut.train()
    assert newest_complete(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-5")
    saved = load_file(tmp_path / "cut" / "checkpoint-5" / "fastrl_state.safetensors")
    assert {"0.completion_ids", "3.completion_mask"} <= saved.keys()  # in the middle of a rollout
    resumed = make("cut")
    resumed.train(resume_from_checkpoint=True)
    same(resumed, straight)


RUN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from transformers import TrainerCallback
from test_distillation_resume import SETTINGS, make_distillation
torch.set_num_threads(1)
class Dies(TrainerCallback):
    def die(self, args, state, control, **kwargs):
        if state.global_step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)
    {moment} = die
make_distillation(Path({folder!r}), arguments={{"callbacks": [Dies()]}}, **{{**SETTINGS, "save_steps": 1}}).train()
"""


def test_killed_process(tmp_path: Path) -> None:
    """SIGKILL at a random step: the run resumes and ends where the uninterrupted one does."""
    step, moment = random.randint(2, 8), random.choice(["on_step_begin", "on_pre_optimizer_step", "on_substep_end"])
    print(f"killed at step {step}, {moment}")
    settings = {**SETTINGS, "save_steps": 1}
    code = RUN.format(tests=str(Path(__file__).parent), step=step, moment=moment, folder=str(tmp_path / "killed"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=180, check=False)
    assert done.returncode == -signal.SIGKILL
    assert newest_complete(tmp_path / "killed") == str(tmp_path / "killed" / f"checkpoint-{step}")
    resumed = make_distillation(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    straight = make_distillation(tmp_path / "straight", **settings)
    straight.train()
    same(resumed, straight)

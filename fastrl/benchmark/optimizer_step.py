"""The whole optimizer step of GRPO on a real model: TRL's trainer and ours, on the same rollouts and advantages.

Policy forward, loss, backward, clipping, AdamW: what a trainer does between its rollouts and its next ones. Every
contender is a trainer in a process of its own, so that none inherits another's memory; they take their steps in turns.
Sampling and rewards are replaced by stored rollouts, nothing else is. In its first step each writes down its gradients,
and one whose gradients are not those of the eager loss gets no time.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastrl.benchmark.memory import MemoryMeter
from fastrl.trainers.rollouts import Rollouts, from_named_tensors, named_tensors
from fastrl.trainers.token_batch import pad

PROMPTS = (
    "A farmer has 12 cows and buys 7 more. How many cows does he have now?",
    "Write one short sentence about the sea in autumn.",
    "Which is larger, 9.11 or 9.9? Explain briefly.",
    "Name three animals that can fly and say how.",
)
GROUP = 8  # completions of a prompt
NEW_TOKENS = 32  # of a completion, at most

# What a trainer is made with, beside what all share. The first is what the others' gradients are compared with.
EAGER = "eager loss, padded"
CONTENDERS: dict[str, dict[str, Any]] = {
    EAGER: {"loss_backend": "reference", "share_prompts": False, "skip_dead_sequences": False},
    "TRL, its defaults": {"trl": True, "gradient_checkpointing": True},
    "TRL, no checkpointing": {"trl": True},
    "fastrl, its defaults": {"gradient_checkpointing": True},
    "fastrl, no checkpointing": {},
}
# Relative distance of all gradients from the eager ones, in the 2-norm.
ALLOWED = {"float32": 1e-4, "bfloat16": 5e-2}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Batch:
    """The stored rollouts of a step, and what share of their tokens carries a gradient."""

    rollouts: Rollouts
    live_share: float


def sample_batch(model_path: str, device: torch.device) -> Rollouts:
    """Rollouts of `PROMPTS`, `GROUP` completions each, sampled from the model; advantages from random rewards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from fastrl import group_advantages
    from fastrl.rollout import SamplingParams, TransformersEngine

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.to(device)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for prompt in PROMPTS
        for _ in range(GROUP)
    ]
    set_seed(0)
    engine = TransformersEngine(
        lambda: model,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    completions = engine.generate(prompts, 1, SamplingParams(max_tokens=NEW_TOKENS)).ids
    cpu = torch.device("cpu")
    ids, mask = pad(prompts, tokenizer.pad_token_id, left=True, device=cpu)
    completion_ids, completion_mask = pad(completions, tokenizer.pad_token_id, left=False, device=cpu)
    rewards = torch.rand(len(prompts), generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(rewards, torch.arange(len(prompts)) // GROUP)
    return Rollouts(ids, mask, completion_ids, completion_mask, advantages)


def with_live_share(rollouts: Rollouts, share: float) -> Batch:
    """The rollouts with whole groups unanimous (advantage 0), from the last on, until about `share` is live."""
    groups = torch.arange(len(rollouts)) // GROUP
    advantages = rollouts.advantages.where(groups < round(share * (int(groups[-1]) + 1)), 0.0)
    live = (advantages != 0)[:, None] & rollouts.completion_mask
    return Batch(replace(rollouts, advantages=advantages), float(live.sum() / rollouts.completion_mask.sum()))


def optimizer_step_rows(
    device: torch.device,
    *,
    seconds: float = 600.0,
    live_shares: Sequence[float] = (1.0, 0.5),
    contenders: Sequence[str] = tuple(CONTENDERS),
    say: Say = print,
    model_path: str | None = None,
    rollouts: Rollouts | None = None,
) -> list[dict[str, Any]]:
    """One row for each contender and live share, with the keys of `fastrl.benchmark.workload.row_of`.

    Besides those: "B", "G", "prompt_tokens" and "completion_tokens" (in all), "peak_bytes" of the whole process during
    the step (on a GPU: of its tensors), "errors" {"gradients": relative distance from the eager loss's}. A contender
    that is not installed or whose gradients are wrong has "refused" with the reason and no time.

    Args:
        seconds: rounds go on, at least one and at most five, while there is time for another.
        live_shares: shares of the groups whose advantages are not 0.
        contenders: some of `CONTENDERS`; the eager one always runs.
        model_path: a folder with a causal LM and its tokenizer; None: SmolLM2-135M-Instruct from its package.
        rollouts: groups of `GROUP` side by side; None: sampled from the model.

    Raises:
        ValueError: an unknown contender.
        RuntimeError: a contender's process failed; the message ends with its output.
    """
    unknown = set(contenders) - set(CONTENDERS)
    if unknown:
        raise ValueError(f"contenders: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(CONTENDERS)}")
    if model_path is None:
        from fastrl.data.demo_model import demo_model_path

        model_path = str(demo_model_path())
    if rollouts is None:
        say("sampling the rollouts of the step")
        rollouts = sample_batch(model_path, device)
    batches = [with_live_share(rollouts, share) for share in live_shares]
    names = [EAGER, *(name for name in CONTENDERS if name in contenders and name != EAGER)]
    with tempfile.TemporaryDirectory(prefix="fastrl-step-") as folder:
        return _Race(device, Path(folder), model_path, batches, say).run(names, seconds)


class _Race:
    """Runs the contenders' steps in turns and makes the rows."""

    def __init__(self, device: torch.device, folder: Path, model_path: str, batches: Sequence[Batch], say: Say) -> None:
        from safetensors.torch import save_file

        self.device, self.folder, self.batches, self.say = device, folder, batches, say
        self.dtype = "bfloat16" if device.type == "cuda" else "float32"
        self.model_path = model_path
        tensors = named_tensors([batch.rollouts for batch in batches])
        save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, folder / "rollouts.safetensors")

    def run(self, names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + seconds
        rows = {(name, i): self._row(name, i) for name in names for i in range(len(self.batches))}
        workers: dict[str, _Worker] = {}
        try:
            for name in names:
                if CONTENDERS[name].get("trl") and importlib.util.find_spec("trl") is None:
                    self._refuse(rows, name, "TRL is not installed")
                    continue
                self.say(f"starting {name}")
                workers[name] = _Worker(self.folder / f"{names.index(name)}.json", self._settings(name))
            took: dict[tuple[str, int], list[dict[str, Any]]] = {}
            for round_ in range(5):
                began = time.monotonic()
                for name, worker in list(workers.items()):
                    for i, batch in enumerate(self.batches):
                        self.say(f"round {round_ + 1}: {name}, live share {batch.live_share:.2g}")
                        gradients = self.folder / f"{names.index(name)}-{i}.safetensors" if round_ == 0 else None
                        took.setdefault((name, i), []).append(worker.step(i, gradients))
                        if gradients is not None:
                            self._compare(rows[name, i], gradients, i)
                    if all("refused" in rows[name, i] for i in range(len(self.batches))):
                        workers.pop(name).stop()
                if time.monotonic() + (time.monotonic() - began) > deadline:
                    break
        finally:
            for worker in workers.values():
                worker.stop()
        for key, steps in took.items():
            if "refused" not in rows[key]:
                rows[key].update(_timing(steps))
        return list(rows.values())

    def _row(self, name: str, i: int) -> dict[str, Any]:
        rollouts = self.batches[i].rollouts
        config = json.loads(Path(self.model_path, "config.json").read_text())
        prompt, completion = int(rollouts.prompt_mask.sum()), int(rollouts.completion_mask.sum())
        weights = _backbone_weights(self.model_path)
        return {
            "op": "step",
            "workload": f"GRPO optimizer step, live share {self.batches[i].live_share:.2g}",
            "shape": Path(self.model_path).name,
            "D": config["hidden_size"], "V": config["vocab_size"], "B": len(rollouts), "G": GROUP,
            "prompt_tokens": prompt, "completion_tokens": completion,
            "dtype": self.dtype, "live_share": self.batches[i].live_share,
            "contender": name, "ours": name.startswith("fastrl"), "floor": False,
            "formula": "6 x weights x tokens", "cost": 6 * weights * (prompt + completion), "unit": "FLOP",
        }  # fmt: skip

    def _refuse(self, rows: dict[tuple[str, int], dict[str, Any]], name: str, reason: str) -> None:
        for i in range(len(self.batches)):
            rows[name, i]["refused"] = reason

    def _settings(self, name: str) -> dict[str, Any]:
        return {
            "contender": name,
            "arguments": CONTENDERS[name],
            "model": self.model_path,
            "device": str(self.device),
            "dtype": self.dtype,
            "threads": torch.get_num_threads(),
            "folder": str(self.folder),
            "sequences": len(self.batches[0].rollouts),
        }

    def _compare(self, row: dict[str, Any], gradients: Path, i: int) -> None:
        from fastrl.report.step_comparison import gradient_difference

        eager = self.folder / f"0-{i}.safetensors"
        if gradients == eager:
            row["errors"] = {"gradients": 0.0}
            return
        error = gradient_difference(eager, gradients).relative
        gradients.unlink()
        row["errors"], row["allowed"] = {"gradients": error}, {"gradients": ALLOWED[self.dtype]}
        if not error <= ALLOWED[self.dtype]:
            row["refused"] = f"wrong: gradients {error:.1e} from eager's, allowed {ALLOWED[self.dtype]:.0e}"


class _Worker:
    """A contender's process: it takes one step for each line it is sent, and answers with what the step took."""

    def __init__(self, settings_file: Path, settings: dict[str, Any]) -> None:
        settings_file.write_text(json.dumps(settings))
        self.name = settings["contender"]
        self.errors = settings_file.with_suffix(".log")
        with self.errors.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastrl.benchmark.optimizer_step", str(settings_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._answer()  # ready: loaded, and warm

    def step(self, batch: int, gradients: Path | None) -> dict[str, Any]:
        """One optimizer step: {"seconds", "peak_bytes"}."""
        assert self.process.stdin is not None  # a pipe
        self.process.stdin.write(json.dumps({"batch": batch, "gradients": gradients and str(gradients)}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None  # a pipe
        for line in self.process.stdout:
            if line.startswith(_ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
                return answer
        self.process.wait()
        raise RuntimeError(f"{self.name}: its process failed:\n{self.errors.read_text()[-4000:]}")


_ANSWER = "optimizer step: "  # trainers print, too


def _timing(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = [step["seconds"] for step in steps]
    peaks = [step["peak_bytes"] for step in steps if step["peak_bytes"] is not None]
    return {
        "median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "rounds": len(seconds),
        "peak_bytes": max(peaks) if peaks else None, "extra_bytes": None,
    }  # fmt: skip


def _backbone_weights(model_path: str) -> int:
    """Weights that multiply every token: all but the vocabulary's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
    ends = {id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    return sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in ends)


# In a contender's process -------------------------------------------------------------------------------------------


def _run_in_this_process(settings_file: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    settings = json.loads(settings_file.read_text())
    torch.set_num_threads(settings["threads"])
    device = torch.device(settings["device"])
    batches = from_named_tensors(
        Rollouts, load_file(Path(settings["folder"]) / "rollouts.safetensors", device=str(device))
    )
    first_group = batches[0].select(torch.arange(len(batches[0]), device=device) < GROUP)
    arguments = settings["arguments"]
    theirs = arguments.pop("trl", False)

    class Clock(TrainerCallback):
        """Waits for the next order where a step begins, and answers where it ends."""

        warm = False
        save: str | None = None

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if self.warm:
                line = sys.stdin.readline()
                if not line:
                    raise SystemExit(0)
                order = json.loads(line)
                stored[:] = [batches[order["batch"]]]
                self.save = order["gradients"]
            self.meter = MemoryMeter(device)
            self.elsewhere = 0.0
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if self.save is None:
                return
            model: torch.nn.Module = kwargs["model"]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
            save_file(gradients, self.save)
            self.elsewhere = time.perf_counter() - start

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            lap = self.meter.lap()  # waits for the device
            seconds = time.perf_counter() - self.start - self.elsewhere
            self.warm = True
            answer = {"seconds": seconds, "peak_bytes": None if lap is None else lap.peak}
            print(_ANSWER + json.dumps(answer), flush=True)

    stored = [first_group]  # the warm-up's: threads, kernels and the optimizer's state exist after it
    count = settings["sequences"]
    trainer = (_trl_trainer if theirs else _our_trainer)(
        lambda: stored[0],
        {
            "output_dir": str(settings_file.with_suffix("")),
            "per_device_train_batch_size": count,
            "gradient_accumulation_steps": 1,
            "num_generations": GROUP,
            "max_completion_length": batches[0].completion_ids.shape[1],
            "max_steps": 1_000_000,
            "learning_rate": 1e-6,
            "logging_steps": 1_000_000,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": device.type == "cpu",
            "bf16": settings["dtype"] == "bfloat16",
            "gradient_checkpointing": False,
            **arguments,
        },
        model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        train_dataset=[{"prompt": str(i)} for i in range(count)],
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        callbacks=[Clock()],
    )
    trainer.train()


def _our_trainer(stored: Callable[[], Rollouts], arguments: dict[str, Any], **kwargs: Any) -> Any:
    from fastrl.trainers import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(args=GRPOConfig(**arguments), **kwargs)
    trainer.collector.collect = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    trainer.make_rollouts = lambda *args, **kwargs: stored()  # type: ignore[method-assign]
    return trainer


def _trl_trainer(
    stored: Callable[[], Rollouts], arguments: dict[str, Any], train_dataset: Any, reward_funcs: Any, **kwargs: Any
) -> Any:
    import trl
    from datasets import Dataset

    reward_funcs.__name__ = "stored"
    trainer: Any = trl.GRPOTrainer(
        args=trl.GRPOConfig(**arguments),
        train_dataset=Dataset.from_list(train_dataset),
        reward_funcs=reward_funcs,
        **kwargs,
    )

    def outputs(*args: Any) -> dict[str, Any]:
        rollouts = stored()
        return {
            "prompt_ids": rollouts.prompt_ids,
            "prompt_mask": rollouts.prompt_mask.long(),
            "completion_ids": rollouts.completion_ids,
            "completion_mask": rollouts.completion_mask.long(),
            "advantages": rollouts.advantages,
            "num_items_in_batch": rollouts.completion_mask.sum(),
        }

    trainer._generate_and_score_completions = outputs
    return trainer


if __name__ == "__main__":
    _run_in_this_process(Path(sys.argv[1]))

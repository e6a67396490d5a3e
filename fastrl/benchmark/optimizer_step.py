"""The whole optimizer step of a method on a real model: TRL's trainer and ours, on the same data.

Policy and reference forward, loss, backward, the gradient's norm, AdamW: what a trainer does with a batch. Every
contender is a trainer in a process of its own, so that none inherits another's memory; they take their steps in turns.
Sampling and rewards are replaced by stored rollouts, nothing else is. In its first step each writes down its gradients,
and one whose gradients are not those of the eager loss gets no time. `step_methods` has the methods.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastrl.benchmark.step_data import StepData, sample_batch
from fastrl.benchmark.step_methods import EAGER, METHODS
from fastrl.benchmark.step_worker import ContenderFailed, Worker
from fastrl.trainers.rollouts import Rollouts, named_tensors

# Relative distance of all gradients from the eager ones, in the 2-norm. In fp32 the eager loss itself is 6e-5 from fp64
# on SmolLM2 (one text of 64 tokens; the fused loss 4e-6), for a divergence of two near models more.
ALLOWED = {"float32": 5e-4, "bfloat16": 5e-2}
ROUNDS = 5  # at most

Say = Callable[[str], None]


def optimizer_step_rows(
    device: torch.device,
    method: str = "grpo",
    *,
    seconds: float = 600.0,
    live_shares: Sequence[float] = (1.0, 0.5),
    contenders: Sequence[str] | None = None,
    say: Say = print,
    model_path: str | None = None,
    rollouts: Rollouts | None = None,
) -> list[dict[str, Any]]:
    """One row for each contender and data of the method, with the keys of `fastrl.benchmark.workload.row_of`.

    Besides those: "B" sequences, "prompt_tokens" and "completion_tokens" (in all), "peak_bytes" of the whole process
    during the step (on a GPU: of its tensors), "errors" {"gradients": relative distance from the eager loss's, "TRL":
    from those of TRL's first contender that is right}, "to_eager" and "to_trl": the time in units of the eager loss's
    and of TRL's fastest contender's. A contender that is not installed or whose gradients are wrong has "refused" with
    the reason and no time, and so has one of TRL's that fails.

    Args:
        method: one of `METHODS`.
        seconds: rounds go on, at least one and at most `ROUNDS`, while there is time for another.
        live_shares: of GRPO: shares of the groups whose advantages are not 0.
        contenders: some of the method's (None: all); the eager one always runs.
        model_path: a folder with a causal LM and its tokenizer; None: SmolLM2-135M-Instruct from its package.
        rollouts: groups of `GROUP` side by side, for the methods that need them; None: sampled from the model.

    Raises:
        ValueError: an unknown method or contender.
        ContenderFailed: the process of one of ours failed; the message ends with its output.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    known = METHODS[method].contenders
    unknown = set(contenders or ()) - set(known)
    if unknown:
        raise ValueError(f"contenders: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    if model_path is None:
        from fastrl.data.demo_model import demo_model_path

        model_path = str(demo_model_path())

    def given_or_sampled() -> Rollouts:
        if rollouts is None:
            say("sampling the rollouts of the step")
        return rollouts or sample_batch(str(model_path), device)

    data = METHODS[method].data(model_path, given_or_sampled, live_shares)
    names = [name for name in known if contenders is None or name in contenders or name == EAGER]
    with tempfile.TemporaryDirectory(prefix="fastrl-step-") as folder:
        return _Race(device, Path(folder), model_path, method, data, say).run(names, seconds)


class _Race:
    """Runs the contenders' steps in turns and makes the rows."""

    def __init__(
        self, device: torch.device, folder: Path, model_path: str, method: str, data: Sequence[StepData], say: Say
    ) -> None:
        from safetensors.torch import save_file

        self.device, self.folder, self.model_path, self.data, self.say = device, folder, model_path, data, say
        self.name, self.method = method, METHODS[method]
        self.dtype = "bfloat16" if device.type == "cuda" else "float32"
        self.stored: Path | None = None
        batches = [item.stored for item in data if item.stored is not None]
        if batches:
            self.stored = folder / "stored.safetensors"
            save_file({name: tensor.cpu().clone() for name, tensor in named_tensors(batches).items()}, self.stored)

    def run(self, names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + seconds
        self.names, self.rows = names, {(name, i): self._row(name, i) for name in names for i in range(len(self.data))}
        self.took: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self.workers: dict[str, Worker] = {}
        try:
            for name in names:
                if self._is_theirs(name) and importlib.util.find_spec("trl") is None:
                    self._refuse(name, "TRL is not installed")
                    continue
                self.workers[name] = Worker(self.folder / f"{names.index(name)}.json", self._settings(name))
            for name in list(self.workers):
                self.say(f"warming up {name}")
                self._unless_theirs_fails(name, partial(self.workers[name].step, None))
            for round_ in range(ROUNDS):
                began = time.monotonic()
                for name in list(self.workers):
                    self._unless_theirs_fails(name, partial(self._steps, name, round_))
                if time.monotonic() + (time.monotonic() - began) > deadline:
                    break
        finally:
            for worker in self.workers.values():
                worker.stop()
        for key, steps in self.took.items():
            if "refused" not in self.rows[key]:
                self.rows[key].update(_timing(steps))
        self._compare_times()
        return list(self.rows.values())

    def _steps(self, name: str, round_: int) -> None:
        """A step on each of the method's data; in the first round the gradients are compared."""
        for i, item in enumerate(self.data):
            self.say(f"round {round_ + 1}: {name}{item.note}")
            gradients = self.folder / f"{self.names.index(name)}-{i}.safetensors" if round_ == 0 else None
            self.took.setdefault((name, i), []).append(self.workers[name].step(i, gradients))
            if gradients is not None:
                self._compare_gradients(self.rows[name, i], gradients, i)
        if all("refused" in self.rows[name, i] for i in range(len(self.data))):
            self.workers.pop(name).stop()

    def _unless_theirs_fails(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except ContenderFailed as error:
            if not self._is_theirs(name):
                raise
            self._refuse(name, f"failed: {str(error).splitlines()[-1]}")
            self.workers.pop(name, None)

    def _is_theirs(self, name: str) -> bool:
        return bool(self.method.contenders[name].get("trl"))

    def _row(self, name: str, i: int) -> dict[str, Any]:
        item = self.data[i]
        config = json.loads(Path(self.model_path, "config.json").read_text())
        return {
            "op": "step",
            "workload": f"{self.method.title} optimizer step{item.note}",
            "shape": Path(self.model_path).name,
            "D": config["hidden_size"], "V": config["vocab_size"], "B": item.sequences,
            "prompt_tokens": item.prompt_tokens, "completion_tokens": item.completion_tokens,
            "dtype": self.dtype, **item.facts,
            "contender": name, "ours": name.startswith("fastrl"), "floor": False,
            "formula": "6 x weights x tokens", "unit": "FLOP",
            "cost": 6 * _backbone_weights(self.model_path) * (item.prompt_tokens + item.completion_tokens),
        }  # fmt: skip

    def _refuse(self, name: str, reason: str) -> None:
        for i in range(len(self.data)):
            self.rows[name, i]["refused"] = reason

    def _settings(self, name: str) -> dict[str, Any]:
        """What `take_steps` is given."""
        return {
            "method": self.name,
            "contender": name,
            "arguments": {**self.method.arguments(self.data[0]), **self.method.contenders[name]},
            "model": self.model_path,
            "device": str(self.device),
            "dtype": self.dtype,
            "threads": torch.get_num_threads(),
            "stored": None if self.stored is None else str(self.stored),
            "rows": list(self.data[0].rows),
            "output_dir": str(self.folder / str(self.names.index(name))),
        }

    def _compare_gradients(self, row: dict[str, Any], gradients: Path, i: int) -> None:
        from fastrl.report.step_comparison import gradient_difference

        eager, trl = self.folder / f"0-{i}.safetensors", self.folder / f"trl-{i}.safetensors"
        if gradients == eager:
            row["errors"] = {"gradients": 0.0}
            return
        error = gradient_difference(eager, gradients).relative
        row["errors"], row["allowed"] = {"gradients": error}, {"gradients": ALLOWED[self.dtype]}
        if not error <= ALLOWED[self.dtype]:
            row["refused"] = f"wrong: gradients {error:.1e} from eager's, allowed {ALLOWED[self.dtype]:.0e}"
        elif trl.exists():
            row["errors"]["TRL"] = gradient_difference(trl, gradients).relative
        elif self._is_theirs(row["contender"]):
            gradients.rename(trl)
        gradients.unlink(missing_ok=True)

    def _compare_times(self) -> None:
        for i in range(len(self.data)):
            timed = {name: self.rows[name, i] for name in self.names if "median_s" in self.rows[name, i]}
            theirs = [row["median_s"] for name, row in timed.items() if self._is_theirs(name)]
            for row in timed.values():
                row["to_eager"] = row["median_s"] / timed[EAGER]["median_s"]
                row["to_trl"] = row["median_s"] / min(theirs) if theirs else None


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

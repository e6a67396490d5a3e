"""A contender of `fastrl.benchmark.optimizer_step`: a trainer in a process of its own that takes steps when told."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastrl.benchmark.memory import MemoryMeter, give_back
from fastrl.benchmark.step_data import GROUP
from fastrl.benchmark.step_methods import METHODS, Request
from fastrl.trainers.rollouts import from_named_tensors

_ANSWER = "optimizer step: "  # trainers print, too
_UNCLIPPED = 1e9  # the norm is taken as in any training, but a loss that is off by a factor keeps its gradient


class ContenderFailed(RuntimeError):
    """A contender's process ended; the message ends with its output."""


class Worker:
    """A contender's process: it takes one step for each line it is sent, and answers with what the step took.

    It loads at once, beside others, and takes its first step when it is told to.
    """

    def __init__(self, settings_file: Path, settings: dict[str, Any]) -> None:
        settings_file.write_text(json.dumps(settings))
        self.name = settings["contender"]
        self.errors = settings_file.with_suffix(".log")
        with self.errors.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastrl.benchmark.step_worker", str(settings_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def step(self, data: int | None, gradients: Path | None = None) -> dict[str, Any]:
        """One optimizer step on the data of this number: {"seconds", "peak_bytes"}; its gradients go into the file.

        data: None: the step is there to warm up.

        Raises:
            ContenderFailed: the process has ended.
        """
        assert self.process.stdin is not None  # a pipe
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_answer` says how
            self.process.stdin.write(json.dumps({"data": data, "gradients": gradients and str(gradients)}) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):  # of a line that it has not read
            self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None  # a pipe
        for line in self.process.stdout:
            if line.startswith(_ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
                return answer
        self.process.wait()
        raise ContenderFailed(f"{self.name}: its process failed:\n{self.errors.read_text()[-4000:].rstrip()}")


# In a contender's process -------------------------------------------------------------------------------------------


class _NoMoreOrders(Exception):
    """Ends the training."""


def take_steps(
    settings: dict[str, Any], orders: Iterator[dict[str, Any]], answer: Callable[[dict[str, Any]], None]
) -> None:
    """Trains: one step for each order, until there are no more.

    Args:
        settings: see `optimizer_step._Race`.
        orders: {"data": number (None: a step to warm up), "gradients": file or None}.
        answer: called after each step with {"seconds", "peak_bytes"}.
    """
    import transformers
    from safetensors.torch import load_file, save_file

    method, device = METHODS[settings["method"]], torch.device(settings["device"])
    batches: dict[int | None, Any] = {}
    if settings["stored"] is not None:
        batches |= enumerate(from_named_tensors(method.stored, load_file(settings["stored"], device=str(device))))
        batches[None] = batches[0].select(torch.arange(len(batches[0]), device=device) < GROUP)  # is enough to warm up

    class Clock(transformers.TrainerCallback):
        """Waits for the next order where a step begins, and answers where it ends."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            order = next(orders, None)
            if order is None:
                raise _NoMoreOrders
            self.data, self.save = order["data"], order["gradients"]
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
            give_back(device)  # those that wait would crowd the others out
            answer({"seconds": seconds, "peak_bytes": None if lap is None else lap.peak})

    clock = Clock()
    arguments = dict(settings["arguments"])
    library = "trl" if arguments.pop("trl", False) else "fastrl"
    path = settings["model"]
    torch.manual_seed(0)  # a new score layer is the same for all
    classifier = {"num_labels": 1} if method.model == "AutoModelForSequenceClassification" else {}
    request = Request(
        library=library,
        model=getattr(transformers, method.model).from_pretrained(path, dtype=torch.float32, **classifier),
        arguments={
            "output_dir": settings["output_dir"],
            "gradient_accumulation_steps": 1,
            "max_steps": 1_000_000,
            "learning_rate": 1e-6,
            "max_grad_norm": _UNCLIPPED,
            "logging_steps": 1_000_000,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": device.type == "cpu",
            "bf16": settings["dtype"] == "bfloat16",
            "gradient_checkpointing": False,
            **arguments,
        },
        rows=settings["rows"],
        shared={"processing_class": transformers.AutoTokenizer.from_pretrained(path), "callbacks": [clock]},
        stored=lambda: batches[clock.data],
    )
    trainer = method.make(request)
    _move_off(trainer.model)
    try:
        trainer.train()
    except _NoMoreOrders:
        return


@torch.no_grad()
def _move_off(model: torch.nn.Module) -> None:
    """Changes the weights by about 1%, the same way for all, so that a reference or a teacher is another model."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.mul_(noise.mul_(0.01).add_(1.0))


def _main(settings_file: Path) -> None:
    settings = json.loads(settings_file.read_text())
    torch.set_num_threads(settings["threads"])
    lines: Iterable[str] = iter(sys.stdin.readline, "")
    take_steps(
        settings,
        (json.loads(line) for line in lines),
        lambda answer: print(_ANSWER + json.dumps(answer), flush=True),
    )


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

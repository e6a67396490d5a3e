"""A run as it lies on disk, finished or killed: what it logged, how it was made, what it wrote, what looks wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.report.panels import is_finite, metric_names, metric_series, split_prefix
from fastrl.run_files import (
    ANSWERS_FILE,
    REPORT_FOLDER,
    RUN_FILE,
    completion_files,
    read_completions,
    read_history,
    read_json,
)

if TYPE_CHECKING:
    from fastrl.evaluation.evaluation import Evaluation

# What a method is judged by: the first that a run has logged.
_JUDGED_BY = (
    "reward",
    "objective/scores",
    "rewards/accuracies",
    "accuracy",
    "rewards/margins",
    "mean_token_accuracy",
    "loss",
)


class NotARunError(ValueError):
    """A folder that holds no metrics of a run."""


@dataclass(frozen=True)
class Change:
    """A metric's mean over its first and over its last logs."""

    metric: str
    first: float
    last: float
    logs: int  # in each of the two means

    def __str__(self) -> str:
        return f"{self.metric}: {self.first:.4g} over the first {self.logs} logs, {self.last:.4g} over the last"


@dataclass(frozen=True)
class Run:
    """What `read_run` found in a folder."""

    folder: Path
    history: list[dict[str, Any]]  # of the logs, in order
    facts: dict[str, Any]  # run.json; empty for a run of another trainer

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.resolve().name

    @cached_property
    def metrics(self) -> list[str]:
        """The names that can be drawn."""
        return metric_names(self.history)

    @property
    def last_step(self) -> int:
        """Of the last log."""
        return max(int(entry.get("step") or 0) for entry in self.history)

    @property
    def status(self) -> str:
        """Whether it came to its end."""
        if any("train_runtime" in entry for entry in self.history):
            return f"finished after {self.last_step} steps"
        planned = self.facts.get("max_steps")
        return f"not finished: last log at step {self.last_step}" + (f" of {planned}" if planned else "")

    def total(self, name: str) -> float | None:
        """The last value of a running number: "num_tokens", "seconds"."""
        values = metric_series(self.history, name).y
        return values[-1] if values else None

    def change(self, metric: str, window: int = 5) -> Change | None:
        """First and last means of a metric, apart as far as the logs go; None if it was logged less than twice."""
        values = metric_series(self.history, metric).y
        width = min(window, len(values) // 2)
        if width == 0:
            return None
        return Change(metric, sum(values[:width]) / width, sum(values[-width:]) / width, width)

    def headline(self) -> list[Change]:
        """What the method is judged by, in training and in evaluations."""
        bases = {split_prefix(name)[1] for name in self.metrics}
        judged = next((name for name in _JUDGED_BY if name in bases), None)
        names = [name for name in self.metrics if split_prefix(name)[1] == judged]
        if judged != "loss" and "loss" in self.metrics:
            names.append("loss")
        return [change for name in names if (change := self.change(name, 1 if split_prefix(name)[0] else 5))]

    def samples(self, count: int = 4) -> dict[str, list[dict[str, Any]]]:
        """Completions of the first and of the last log, by title; the highest and the lowest advantages or rewards."""
        files = completion_files(self.folder)
        modes = dict.fromkeys(mode for _, mode in files)
        found = {}
        for mode in modes:
            steps = [step for step, of in files if of == mode]
            for step in dict.fromkeys((steps[0], steps[-1])):
                title = f"step {step}" + ("" if mode == "train" else f", {mode}")
                found[title] = _extremes(read_completions(files[step, mode]), count)
        return found

    def answers(self) -> dict[str, Any]:
        """The answers to held-out prompts before and after training, from the report; empty if there are none."""
        return read_json(self.folder / REPORT_FOLDER / ANSWERS_FILE)

    def evaluations(self) -> dict[str, Evaluation]:
        """What `fastrl eval` wrote into folders within the run's, by their place in it."""
        from fastrl.evaluation.evaluation import Evaluation

        found = {}
        for path in sorted({*self.folder.glob("*/results.json"), *self.folder.glob("*/*/results.json")}):
            with contextlib.suppress(KeyError, TypeError, AttributeError):  # another program's results
                found[str(path.parent.relative_to(self.folder))] = Evaluation.from_json(read_json(path))
        return found

    def warnings(self) -> list[str]:
        """What in the logs a user should look at, a sentence each."""
        return [text for check in _CHECKS if (text := check(self))]


def read_run(folder: str | Path) -> Run:
    """Reads the folder of a run, or one of its checkpoints.

    Raises:
        NotARunError: it does not exist, or no metrics lie in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise NotARunError(f"{path} is not a folder" if path.exists() else f"there is no folder {path}")
    history = read_history(path)
    if not metric_names(history):
        raise NotARunError(
            f"{path} is not a run, or nothing was logged in it yet: no metrics.jsonl or trainer_state.json with metrics"
        )
    return Run(path, history, read_json(path / RUN_FILE))


def _extremes(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The `count` best and worst rows, best first, where they have an advantage or a reward; else the first."""
    plain = ("step", "prompt", "completion")
    numbers = [key for key in (rows[0] if rows else {}) if key not in plain and _mostly_numbers(rows, key)]
    if not numbers or len(rows) <= count:
        return rows[:count]
    ranked = sorted(rows, key=lambda row: [-(row[key] or 0.0) for key in reversed(numbers)])
    return [*ranked[: -(-count // 2)], *ranked[len(ranked) - count // 2 :]]


def _mostly_numbers(rows: Sequence[dict[str, Any]], key: str) -> bool:
    values = [row[key] for row in rows if row[key] is not None]
    return bool(values) and all(isinstance(value, int | float) for value in values)


# Checks of a run's logs -------------------------------------------------------------------------------------------


def _displacement(run: Run) -> str | None:
    from fastrl.objectives.likelihood import REMEDIES, LikelihoodWatch

    for prefix in ("eval_", ""):
        names = [f"{prefix}logps/chosen", f"{prefix}rewards/margins"]
        series = [metric_series(run.history, name).y for name in names]
        pairs = list(zip(*series, strict=False))
        if len(pairs) < 4:
            continue
        watch = LikelihoodWatch(window=min(20, len(pairs) // 2), warn=False)
        for chosen, margin in pairs:
            found = watch.update({"logps/chosen": chosen, "rewards/margins": margin})
        if found["chosen_likelihood_falls"]:
            return (
                f"Likelihood displacement: the chosen answers became less likely ({names[0]} changed by "
                f"{found['logps/chosen_change']:.3g} nats) while the reward margin rose. {REMEDIES}"
            )
    return None


def _no_signal(run: Run) -> str | None:
    change = run.change("frac_reward_zero_std")
    if change is None or change.last < 0.8:
        return None
    return (
        f"In the last logs {change.last:.0%} of the groups had equal rewards for all completions: they teach nothing. "
        "The task is too hard or too easy for the model, or the reward too coarse."
    )


def _truncation(run: Run) -> str | None:
    change = run.change("completions/clipped_ratio")
    if change is None or change.last < 0.5:
        return None
    return (
        f"In the last logs {change.last:.0%} of the completions were cut at max_completion_length: their end, and what "
        "it would have earned, is missing."
    )


def _entropy_collapse(run: Run) -> str | None:
    change = run.change("entropy")
    if change is None or change.last > 0.1 * change.first or change.last > 0.1:
        return None
    return (
        f"The entropy fell from {change.first:.3g} to {change.last:.3g} nats per token: the policy hardly explores "
        "any more. An entropy bonus, a lower learning rate or a KL term keeps it up."
    )


def _reward_failures(run: Run) -> str | None:
    failed: dict[str, float] = {}
    for name in run.metrics:
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == "rewards" and parts[2] in ("errors", "timeouts"):
            failed[f"{parts[1]} ({parts[2]})"] = sum(metric_series(run.history, name).y)
    shown = [name for name, count in failed.items() if count]
    return f"Reward functions failed for some completions, which got no reward: {', '.join(shown)}." if shown else None


def _not_finite(run: Run) -> str | None:
    names = ("loss", "grad_norm")
    holes = [log["step"] for log in run.history if any(name in log and not is_finite(log[name]) for name in names)]
    return f"Loss or gradient was not a finite number, first at step {holes[0]}." if holes else None


_CHECKS = (_not_finite, _displacement, _no_signal, _truncation, _entropy_collapse, _reward_failures)

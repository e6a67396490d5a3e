"""From the samples of many prompts to accuracies with standard errors, as curves against the number of samples n."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from fastrl.evaluation.estimators import (
    best_of_n,
    majority_vote,
    mean_and_error,
    pass_at_k,
    powers_of_two,
    weighted_majority_vote,
)
from fastrl.evaluation.sample_file import PromptSamples, Sample
from fastrl.rewards import completion_text, extracted_answer

PASS, MAJORITY = "pass@n", "majority vote"


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its standard error (None for a single prompt)."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of one value per prompt."""
        mean, error = mean_and_error(values)
        return cls(mean, None if math.isnan(error) else error)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.standard_error is None else f" ± {self.standard_error:.3f}")


@dataclass(frozen=True)
class Evaluation:
    """Accuracies. `curves`: by the way of choosing, one estimate for each n of `sizes`."""

    prompts: int
    samples_per_prompt: int
    sizes: list[int]
    curves: dict[str, list[Estimate]]
    greedy: Estimate | None
    rewards: dict[str, Estimate]  # mean reward of a sample, by function
    cut_off: float  # share of the samples that did not end by themselves
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, ready for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Evaluation:
        """What `to_json` gave; other keys are left out.

        Raises:
            KeyError, TypeError: it is something else.
        """
        values = {item.name: content[item.name] for item in fields(cls)}
        values["curves"] = {name: [Estimate(**point) for point in curve] for name, curve in content["curves"].items()}
        values["rewards"] = {name: Estimate(**reward) for name, reward in content["rewards"].items()}
        values["greedy"] = None if content["greedy"] is None else Estimate(**content["greedy"])
        return cls(**values)

    def table(self) -> str:
        """For a terminal: a line per n, a column per way of choosing."""
        head = ["n", *self.curves]
        lines = [[str(n), *(str(curve[i]) for curve in self.curves.values())] for i, n in enumerate(self.sizes)]
        if self.greedy is not None:
            lines.insert(0, ["greedy", str(self.greedy), *[""] * (len(head) - 2)])
        widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]
        rows = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *lines]
        ]
        return "\n".join(
            [
                f"Accuracy over {self.prompts} prompts, {self.samples_per_prompt} samples each (mean ± standard error)",
                *rows,
                *(f"mean reward of a sample, {name}: {estimate}" for name, estimate in self.rewards.items()),
                f"samples cut off: {self.cut_off:.1%}",
                *self.notes,
            ]
        )


def summarise(
    prompts: Sequence[PromptSamples],
    verifier: str,
    scorers: Sequence[str] = (),
    *,
    reward_models: Collection[str] = (),
    threshold: float = 1.0,
    extract: Callable[[str], str | None] = extracted_answer,
) -> Evaluation:
    """Accuracies of greedy answers, pass@n, and best of n and votes for every n that is a power of two, and for all.

    Each is the mean over prompts of `fastrl.evaluation.estimators`. A sample is correct if the verifier's reward is at
    least `threshold`; one without a reward is not. A prompt none of whose samples got a reward is left out. A scorer
    chooses the best of n, and weights the votes: the score of a reward model counts sigmoid(score), the probability by
    Bradley and Terry that it is better than a completion of score 0, that of a function as it is (without a weighted
    vote if it is negative somewhere). A sample without a score is chosen last and weighs nothing.

    Args:
        prompts: at least one, each with the same number of samples.
        verifier: name of the function whose rewards say what is correct.
        scorers: names of functions that choose.
        reward_models: which of the scorers are reward models.
        threshold: see above.
        extract: from the text of a completion to the answer that it votes for, or None.

    Raises:
        ValueError: no prompts, or none that the verifier could judge.
    """
    judged = [prompt for prompt in prompts if any(s["rewards"][verifier] is not None for s in prompt["samples"])]
    if not judged:
        raise ValueError(
            f"{verifier} gave no sample of the {len(prompts)} prompts a reward: there is nothing to take an accuracy of"
        )
    count = len(judged[0]["samples"])
    sizes = powers_of_two(count)
    values = [[_correct(sample, verifier, threshold) for sample in prompt["samples"]] for prompt in judged]
    answers = [[extract(completion_text(sample["completion"])) for sample in prompt["samples"]] for prompt in judged]
    curves = {PASS: [Estimate.of([pass_at_k(count, int(sum(own)), n) for own in values]) for n in sizes]}
    notes = _notes(prompts, judged, verifier)
    scores = {name: [_scores(prompt["samples"], name) for prompt in judged] for name in scorers}
    for name, of_prompts in scores.items():
        pairs = list(zip(of_prompts, values, strict=True))
        curves[f"best of n ({name})"] = [Estimate.of([best_of_n(s, v, n) for s, v in pairs]) for n in sizes]
    votes = [majority_vote(own, v) for own, v in zip(answers, values, strict=True)]
    curves[MAJORITY] = [Estimate.of([curve[n - 1] for curve in votes]) for n in sizes]
    for name in scorers:
        weights = [_weights(prompt["samples"], name, name in reward_models) for prompt in judged]
        if any((own < 0).any() for own in weights):
            notes.append(f"no vote weighted by {name}: it gave negative rewards")
            continue
        ballots = list(zip(answers, weights, values, strict=True))
        curves[f"weighted vote ({name})"] = [
            Estimate.of([weighted_majority_vote(a, w, v, n) for a, w, v in ballots]) for n in sizes
        ]
    silent = sum(answer is None for own in answers for answer in own)
    if silent:
        notes.append(f"{silent} of {count * len(judged)} samples state no answer and do not vote")
    greedy = [prompt["greedy"] for prompt in judged if prompt["greedy"] is not None]
    samples = [sample for prompt in judged for sample in prompt["samples"]]
    return Evaluation(
        prompts=len(judged),
        samples_per_prompt=count,
        sizes=sizes,
        curves=curves,
        greedy=Estimate.of([_correct(answer, verifier, threshold) for answer in greedy]) if greedy else None,
        rewards=_mean_rewards(judged),
        cut_off=sum(not sample["finished"] for sample in samples) / len(samples),
        notes=notes,
    )


def _correct(sample: Sample, verifier: str, threshold: float) -> float:
    reward = sample["rewards"][verifier]
    return float(reward is not None and reward >= threshold)


def _scores(samples: Sequence[Sample], name: str) -> np.ndarray:
    """A sample without a score below all others."""
    scores = [sample["rewards"][name] for sample in samples]
    least = min((score for score in scores if score is not None), default=0.0) - 1.0
    return np.array([least if score is None else score for score in scores])


def _weights(samples: Sequence[Sample], name: str, reward_model: bool) -> np.ndarray:
    scores = np.array([math.nan if s["rewards"][name] is None else s["rewards"][name] for s in samples], dtype=float)
    return np.nan_to_num(0.5 * (1.0 + np.tanh(scores / 2.0)) if reward_model else scores)


def _mean_rewards(prompts: Sequence[PromptSamples]) -> dict[str, Estimate]:
    means = {}
    for name in prompts[0]["samples"][0]["rewards"]:
        given = [
            [s["rewards"][name] for s in prompt["samples"] if s["rewards"][name] is not None] for prompt in prompts
        ]
        of_prompts = [float(np.mean(rewards)) for rewards in given if rewards]  # type: ignore[arg-type]
        if of_prompts:
            means[name] = Estimate.of(of_prompts)
    return means


def _notes(prompts: Sequence[PromptSamples], judged: Sequence[PromptSamples], verifier: str) -> list[str]:
    notes = []
    if len(judged) < len(prompts):
        notes.append(f"left out: {len(prompts) - len(judged)} prompts without a reward of {verifier} for any sample")
    missing = sum(sample["rewards"][verifier] is None for prompt in judged for sample in prompt["samples"])
    if missing:
        notes.append(f"{missing} samples without a reward of {verifier} count as wrong")
    return notes

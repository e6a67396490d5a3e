"""Which curves of a run belong together: metrics of all trainers by panel, panels by subject."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Of one evaluation or of the whole run: no curve.
_NO_CURVE = re.compile(
    r"step|epoch|seconds|total_flos|train_.+|(eval|test)_.*(runtime|num_tokens|samples_per_second|steps_per_second|model_preparation_time)"
)


@dataclass(frozen=True)
class Panel:
    """A picture of one or several metrics with a common axis.

    Attributes:
        subject: the group it belongs to.
        title: what is drawn, with its unit.
        pattern: matches the whole name of each of its metrics, evaluation prefix removed.
        overview: shown in the overview of a run.
        share: between 0 and 1.
        smooth: a noisy metric, drawn with its running mean.
    """

    subject: str
    title: str
    pattern: str
    overview: bool = False
    share: bool = False
    smooth: bool = True


# The first that matches takes a metric. Names are TRL's; those of its retired PPO trainer too.
PANELS = (
    Panel("reward", "reward", r"reward|objective/(scores|rlhf_reward)", overview=True),
    Panel("reward", "reward of each function", r"rewards/[^/]+/mean"),
    Panel("reward", "standard deviation of the reward", r"reward_std|rewards/[^/]+/std"),
    Panel("reward", "groups of equal rewards", r"frac_reward_zero_std", share=True),
    Panel("reward", "failed calls of reward functions", r"rewards/[^/]+/(errors|timeouts)", smooth=False),
    Panel("preference", "accuracy", r"rewards/accuracies|accuracy", overview=True, share=True),
    Panel("preference", "reward margin", r"rewards/margins|margin", overview=True),
    Panel("preference", "rewards", r"rewards/(chosen|rejected)|(mean|min|max)_reward"),
    Panel("preference", "log-probability of the answers (nats)", r"logps/(chosen|rejected)", overview=True),
    Panel("preference", "change since the first steps", r"(logps/chosen|rewards/margins)_change", smooth=False),
    Panel(
        "preference",
        "likelihood displacement",
        r"rewards/displaced|chosen_likelihood_falls",
        share=True,
    ),
    Panel("preference", "mean logits of the answers", r"logits/(chosen|rejected)"),
    Panel("policy", "token accuracy", r"mean_token_accuracy", overview=True, share=True),
    Panel("policy", "entropy (nats per token)", r"entropy|objective/entropy|policy/entropy_avg", overview=True),
    Panel(
        "policy",
        "KL divergence (nats)",
        r"kl|objective/kl|approx_kl|policy/approxkl_avg|sampling_kl|ref_kl",
        overview=True,
    ),
    Panel("policy", "clipped tokens", r"clip_ratio/.+|cispo_clip_ratio|(policy|val)/clipfrac_avg", share=True),
    Panel("policy", "tokens and sequences with a gradient", r"live_fraction|live_sequence_fraction", True, True),
    Panel("policy", "importance ratio", r"(sampling/importance_sampling_ratio|ratio)/(mean|min|max)|val/ratio"),
    Panel(
        "policy",
        "difference of log-probabilities, sampler and trainer",
        r"sampling/sampling_logp_difference/(mean|max)",
    ),
    Panel("value", "value loss", r"value_loss|loss/value(_avg)?"),
    Panel("value", "values and returns", r"(value|values|returns?)(/mean)?"),
    Panel("value", "explained variance", r"explained_variance"),
    Panel("completions", "completion length (tokens)", r"completions/(mean|min|max)_length", overview=True),
    Panel("completions", "length of those that ended (tokens)", r"completions/(mean|min|max)_terminated_length"),
    Panel("completions", "cut at the maximum", r"completions/clipped_ratio", share=True),
    Panel("loss", "loss", r"loss", overview=True),
    Panel("loss", "parts of the loss", r"(policy|aux|nll|sft|entropy|kl)_loss|loss/.+"),
    Panel("optimizer", "norm of the gradient", r"grad_norm"),
    Panel("optimizer", "learning rate", r"learning_rate|lr", smooth=False),
    Panel("optimizer", "coefficient of the entropy bonus", r"entropy_coef", smooth=False),
    Panel("speed", "tokens per second", r"tokens_per_second"),
    Panel("speed", "seconds per step", r"step_time"),
    Panel("speed", "tokens seen", r"num_tokens|num_input_tokens_seen", smooth=False),
)
SUBJECTS = (*dict.fromkeys(panel.subject for panel in PANELS), "other")


@dataclass(frozen=True)
class Series:
    """One metric over the logs: `x` rises, `y` is finite."""

    metric: str
    x: list[float]
    y: list[float]

    @property
    def from_evaluation(self) -> bool:
        """Whether it was measured in evaluations, which are rarer than logs of training."""
        return split_prefix(self.metric)[0] != ""


def metric_names(history: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that have at least one finite value, in the order of their first log."""
    names = {name: None for entry in history for name, value in entry.items() if is_finite(value)}
    return [name for name in names if not _NO_CURVE.fullmatch(name)]


def metric_series(history: Sequence[Mapping[str, Any]], metric: str, x: str = "step") -> Series:
    """A metric over the optimizer steps or another number of the logs; a step that was logged twice counts once, the
    last. An evaluation, which logs no such number, takes that of the log before."""
    found: dict[int, tuple[float, float]] = {}
    place = 0.0
    for entry in history:
        if is_finite(entry.get(x)):
            place = float(entry[x])
        if is_finite(entry.get(metric)) and "step" in entry:
            found[int(entry["step"])] = place, float(entry[metric])
    points = [found[step] for step in sorted(found)]
    return Series(metric, [place for place, _ in points], [value for _, value in points])


def panels_of(names: Sequence[str]) -> list[tuple[Panel, list[str]]]:
    """The panels that these metrics fill, each with its metrics, by subject; a user's own metric gets one."""
    filled: dict[Panel, list[str]] = {}
    for name in names:
        filled.setdefault(panel_of(name), []).append(name)
    order = {panel: place for place, panel in enumerate(PANELS)}
    return sorted(filled.items(), key=lambda item: (SUBJECTS.index(item[0].subject), order.get(item[0], len(order))))


def panel_of(name: str) -> Panel:
    """Where a metric is drawn."""
    base = split_prefix(name)[1]
    return _known(base) or Panel("other", base, re.escape(base))


def split_prefix(name: str) -> tuple[str, str]:
    """("eval", metric) or ("eval_<data set>", metric) of an evaluation's metric, ("", name) of another."""
    prefix, _, base = name.partition("_")
    if prefix not in ("eval", "test") or not base:
        return "", name
    words = base.split("_")
    for first in range(len(words)):  # the metric is the longest end of the name that is known
        if _known("_".join(words[first:])):
            return "_".join([prefix, *words[:first]]), "_".join(words[first:])
    return prefix, base


def is_finite(value: Any) -> bool:
    """Whether a log's value can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _known(base: str) -> Panel | None:
    return next((panel for panel in PANELS if re.fullmatch(panel.pattern, base)), None)

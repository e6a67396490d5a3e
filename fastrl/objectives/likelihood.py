"""Watches for the known failure of DPO: margins rise while the chosen answers become less likely."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

REMEDIES = (
    "Remedies, one argument each: an NLL term on the chosen answers (PreferenceObjective(rpo_alpha=1.0)), an anchored "
    'loss (loss_type="apo_zero", or "apo_down" where the chosen answers are worse than the model\'s own), or '
    "DPO-Positive's penalty (dpop_lambda=5.0)."
)


@dataclass
class LikelihoodWatch:
    """Compares logps/chosen and rewards/margins now with what they were at the start, and warns once.

    DPO's loss sees the margin only: it may rise while both answers become less likely, and probability moves to answers
    that nobody judged (DPO-Positive, Pal et al. 2024; likelihood displacement, Razin et al. 2024).

        watch = fastrl.LikelihoodWatch()
        for batch in batches:
            out = fastrl.preference_loss(...)
            log(out.metrics | watch.update(out.metrics))

    A change is the mean of the last `window` updates less the mean of the first `window`; it counts where it is larger
    than `sigmas` of its standard error, which the updates' spread within the two windows gives: logps/chosen varies
    from batch to batch with the answers' lengths. Metrics of a fixed evaluation set show a change soonest.

    Args:
        window: updates per mean, at least 2; nothing is judged before 2 x window updates.
        sigmas: at least 0.
        warn: give a UserWarning that names the remedies, once.

    Raises:
        ValueError: window or sigmas out of its range.
    """

    window: int = 20
    sigmas: float = 2.0
    warn: bool = True
    warned: bool = field(default=False, init=False)
    first: list[tuple[float, float]] = field(default_factory=list, init=False)  # (logps/chosen, rewards/margins)
    last: deque[tuple[float, float]] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window: expected at least 2 updates, got {self.window!r}")
        if not self.sigmas >= 0:
            raise ValueError(f"sigmas: expected a number of at least 0, got {self.sigmas!r}")

    def update(self, metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Takes the metrics of a step (those of several ranks averaged before); copies two numbers to the host.

        Returns:
            logps/chosen_change, in nats per answer, and rewards/margins_change, both NaN before 2 x window updates;
            chosen_likelihood_falls: 1.0 where the former fell and the latter rose, else 0.0.

        Raises:
            KeyError: metrics without logps/chosen or rewards/margins.
        """
        point = (float(metrics["logps/chosen"]), float(metrics["rewards/margins"]))
        if not all(math.isfinite(x) for x in point):
            return self._report((math.nan, 0.0), (math.nan, 0.0))
        if len(self.first) < self.window:
            self.first.append(point)
        else:
            self.last.append(point)
        if len(self.last) > self.window:
            self.last.popleft()
        if len(self.last) < self.window:
            return self._report((math.nan, 0.0), (math.nan, 0.0))
        columns = zip(zip(*self.first, strict=True), zip(*self.last, strict=True), strict=True)
        return self._report(*(_change(before, now) for before, now in columns))

    def _report(self, logps: tuple[float, float], margins: tuple[float, float]) -> dict[str, float]:
        falls = logps[0] < -self.sigmas * logps[1] and margins[0] > self.sigmas * margins[1]
        if falls and self.warn and not self.warned:
            self.warned = True
            warnings.warn(
                f"The chosen answers have become less likely, by {-logps[0]:.3g} nats each, while the reward margin "
                f"rose by {margins[0]:.3g}: the loss is paid by pushing both answers down. {REMEDIES}",
                stacklevel=3,
            )
        return {
            "logps/chosen_change": logps[0],
            "rewards/margins_change": margins[0],
            "chosen_likelihood_falls": float(falls),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"first": list(self.first), "last": list(self.last), "warned": self.warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first = [(float(x), float(y)) for x, y in state["first"]]
        self.last = deque((float(x), float(y)) for x, y in state["last"])
        self.warned = bool(state["warned"])


def _change(before: tuple[float, ...], now: tuple[float, ...]) -> tuple[float, float]:
    """Difference of the means, and its standard error."""
    (mean, error), (mean_now, error_now) = _mean(before), _mean(now)
    return mean_now - mean, math.hypot(error, error_now)


def _mean(x: tuple[float, ...]) -> tuple[float, float]:
    mean = math.fsum(x) / len(x)
    variance = math.fsum((y - mean) ** 2 for y in x) / (len(x) - 1)
    return mean, math.sqrt(variance / len(x))

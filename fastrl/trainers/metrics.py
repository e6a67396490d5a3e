"""Metrics between two logs, under TRL's names."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class MetricStore:
    """Values collected since the last log, apart for training and each evaluation; a log gets their means.

    NaN means "there was none" (a reward function that gave no reward in this batch) and does not enter a mean.
    """

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._clock = time.perf_counter()
        self._tokens = 0

    def add(self, mode: str, metrics: Mapping[str, float]) -> None:
        """Adds one value to each metric."""
        for name, value in metrics.items():
            self.values[mode][name].append(float(value))

    def set(self, mode: str, name: str, value: float) -> None:
        """For a running total: the last value counts."""
        self.values[mode][name] = [float(value)]

    def count_tokens(self, tokens: int) -> None:
        """Tokens that training has used, for `tokens_per_second`."""
        self._tokens += tokens

    @property
    def counts_tokens(self) -> bool:
        """Whether training has used tokens since the last log."""
        return self._tokens > 0

    def tokens_per_second(self) -> float:
        """Since the last log, generation and everything else included."""
        return self._tokens / max(time.perf_counter() - self._clock, 1e-9)

    def latest(self, mode: str) -> dict[str, float]:
        """The last value of each metric since the last log."""
        return {name: values[-1] for name, values in self.values.get(mode, {}).items() if values}

    def drain(self, mode: str) -> dict[str, float | None]:
        """Means of what was added since the last drain; None where all values were NaN."""
        means: dict[str, float | None] = {}
        for name, values in self.values.pop(mode, {}).items():
            valid = [value for value in values if not math.isnan(value)]
            means[name] = sum(valid) / len(valid) if valid else None
        if mode == "train":
            if self.counts_tokens:
                means["tokens_per_second"] = self.tokens_per_second()
            self._tokens, self._clock = 0, time.perf_counter()
        return means

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """What has been collected in training and not been logged."""
        return {"train": dict(self.values["train"])}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Continues from `state_dict`."""
        self.values["train"] = defaultdict(list, {name: list(values) for name, values in state["train"].items()})


class MetricSums:
    """Sums and counts over the passes of an optimizer step or an evaluation, whose quotients are its metrics."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}  # name -> (sum, count), fp64
        self.weight = 1.0  # of what is added

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds a (sum, count) to each metric."""
        for name, pair in metrics.items():
            values = [torch.as_tensor(value, dtype=torch.float64, device=self._device).detach() for value in pair]
            self._sums[name] = self._sums.get(name, 0.0) + torch.stack(values) * self.weight

    def take(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The quotients since the last call, NaN where there was nothing to count; `total` sums over processes."""
        names = sorted(self._sums)
        totals = total(torch.stack([self._sums[name] for name in names])).tolist() if names else []
        self._sums = {}
        return {name: s / count if count else math.nan for name, (s, count) in zip(names, totals, strict=True)}


class MetricRange:
    """The least and the largest of the values over the passes of an optimizer step or an evaluation."""

    def __init__(self, device: torch.device) -> None:
        self._none = torch.full((2,), math.inf, dtype=torch.float64, device=device)
        self._bounds = self._none  # the least value, and the least of their negatives

    def add(self, values: Tensor) -> None:
        """Takes values of any shape into account."""
        values = values.detach().double().flatten()
        if len(values):
            self._bounds = torch.minimum(self._bounds, torch.stack([values.min(), (-values).min()]))

    def take(self, gather: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """(least, largest) since the last call, NaN where there was no value.

        Args:
            gather: concatenates the tensors of all processes.
        """
        least, negative = gather(self._bounds).view(-1, 2).amin(0).tolist()
        self._bounds = self._none
        return (math.nan, math.nan) if math.isinf(least) and least == negative else (least, -negative)


def completion_metrics(lengths: Tensor, truncated: Tensor) -> dict[str, float]:
    """TRL's completions/*; lengths (B,) in tokens, truncated (B,) bool: no end-of-sequence token."""
    terminated = lengths[~truncated]
    if terminated.numel() == 0:
        terminated = lengths.new_zeros(1)
    metrics = {"completions/clipped_ratio": truncated.float().mean().item()}
    for suffix, values in (("length", lengths.float()), ("terminated_length", terminated.float())):
        metrics[f"completions/mean_{suffix}"] = values.mean().item()
        metrics[f"completions/min_{suffix}"] = values.min().item()
        metrics[f"completions/max_{suffix}"] = values.max().item()
    return metrics


def reward_metrics(
    rewards_per_func: Tensor,  # (B, F), NaN: no reward
    names: Sequence[str],
    rewards: Tensor,  # (B,)
    group_size: int,
    deviation_over: str,
) -> dict[str, float]:
    """TRL's rewards/*, reward, reward_std and frac_reward_zero_std; deviation_over is "group" or "batch"."""
    metrics = {}
    for name, column in zip(names, rewards_per_func.unbind(-1), strict=True):
        metrics[f"rewards/{name}/mean"] = column.nanmean().item()
        metrics[f"rewards/{name}/std"] = _nan_std(column).item()
    metrics["reward"] = rewards.nanmean().item()
    metrics["reward_std"] = _nan_std(rewards).item()
    groups = rewards.view(-1, group_size) if deviation_over == "group" else rewards.view(1, -1)
    deviations = torch.stack([_nan_std(group) for group in groups])
    metrics["frac_reward_zero_std"] = torch.isclose(deviations, torch.zeros_like(deviations)).float().mean().item()
    return metrics


def _nan_std(values: Tensor) -> Tensor:
    """With Bessel's correction; 0 for a single value, NaN for none."""
    valid = values[~values.isnan()]
    if valid.numel() < 2:
        return values.new_full((), 0.0 if valid.numel() else math.nan)
    return valid.std()

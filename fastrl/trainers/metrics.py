"""Metrics between two logs, under TRL's names, and the progress bar that shows the ones to watch."""

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments


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

    def tokens_per_second(self) -> float:
        """Since the last log, generation and everything else included."""
        return self._tokens / max(time.perf_counter() - self._clock, 1e-9)

    def drain(self, mode: str) -> dict[str, float | None]:
        """Means of what was added since the last drain; None where all values were NaN."""
        means: dict[str, float | None] = {}
        for name, values in self.values.pop(mode, {}).items():
            valid = [value for value in values if not math.isnan(value)]
            means[name] = sum(valid) / len(valid) if valid else None
        if mode == "train":
            if self._tokens:
                means["tokens_per_second"] = self.tokens_per_second()
            self._tokens, self._clock = 0, time.perf_counter()
        return means

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """What has been collected in training and not been logged."""
        return {"train": dict(self.values["train"])}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Continues from `state_dict`."""
        self.values["train"] = defaultdict(list, {name: list(values) for name, values in state["train"].items()})


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


class RolloutProgressCallback(ProgressCallback):
    """The progress bar, with reward, completion length and tokens per second, renewed every step."""

    def show(self, metrics: MetricStore) -> None:
        """Sets what the bar shows, from the latest rollout."""
        reward, length = (metrics.values["train"].get(name) for name in ("reward", "completions/mean_length"))
        if self.training_bar is not None and reward and length:
            speed = metrics.tokens_per_second()
            self.training_bar.set_postfix_str(
                f"reward {reward[-1]:.3f}, length {length[-1]:.0f}, {speed:.0f} tok/s", refresh=False
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Prints one short line: the full set of metrics goes to the loggers and to `trainer.state.log_history`."""
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        watched = ("loss", "grad_norm", "reward", "eval_reward", "entropy", "kl", "live_fraction")
        watched += ("completions/mean_length", "tokens_per_second", "train_runtime", "train_loss")
        shown = [f"{name} {logs[name]:.4g}" for name in watched if isinstance(logs.get(name), int | float)]
        self.training_bar.write(f"step {state.global_step}: " + ", ".join(shown))


def use_rollout_progress(trainer: Trainer) -> RolloutProgressCallback | None:
    """Puts the trainer's plain progress bar out for this one; None where it has none (disable_tqdm, a notebook)."""
    if not any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks):
        return None
    progress = RolloutProgressCallback()
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress)
    return progress

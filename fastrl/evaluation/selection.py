"""From samples to training data: the good ones as rows for SFT, better and worse ones as pairs for rewards or DPO."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastrl.evaluation.sample_file import PromptSamples, Sample

FORMATS = (".jsonl", ".parquet")

Row = dict[str, Any]


def accepted(
    prompts: Iterable[PromptSamples],
    weights: Mapping[str, float],
    *,
    keep: Literal["best", "all"] = "best",
    threshold: float | None = None,
    keep_cut_off: bool = False,
) -> list[Row]:
    """Rows with `prompt`, `completion`, `reward` and `n`, the number of samples it was chosen from.

    A reward is the weighted sum over functions, as in training; a sample that none gave a reward is never accepted. Of
    equal completions of a prompt only one is, and of the best the first.

    Args:
        prompts: in the order of the dataset.
        weights: of the reward functions.
        keep: "best": at most one per prompt, of the highest reward; "all".
        threshold: the least reward.
        keep_cut_off: accept completions that did not end by themselves, too.
    """
    rows: list[Row] = []
    for prompt in prompts:
        rewarded = _rewarded(prompt, weights, keep_cut_off)
        good = [pair for pair in rewarded if threshold is None or pair[1] >= threshold]
        rows += [
            {
                "prompt": prompt["prompt"],
                "completion": completion,
                "reward": reward,
                "n": len(prompt["samples"]),
            }
            for completion, reward in ([max(good, key=_reward)] if keep == "best" and good else good)
        ]
    return rows


def preferences(
    prompts: Iterable[PromptSamples],
    weights: Mapping[str, float],
    *,
    keep: Literal["best", "all"] = "best",
    threshold: float | None = None,
    keep_cut_off: bool = False,
) -> list[Row]:
    """Rows with `prompt`, `chosen`, `rejected`, their rewards and `n`: pairs of a prompt's samples, the better chosen.

    Samples are rewarded and left out as by `accepted`. A prompt whose completions all have one reward gives no row.

    Args:
        prompts, weights, keep_cut_off: see `accepted`.
        keep: "best": at most one pair per prompt, the best and the worst completion; "all": every two completions of
            different reward. With a verifier these are all pairs of a right and a wrong one.
        threshold: the least reward of the chosen one.
    """
    rows: list[Row] = []
    for prompt in prompts:
        rewarded = _rewarded(prompt, weights, keep_cut_off)
        if keep == "best" and rewarded:
            rewarded = [max(rewarded, key=_reward), min(rewarded, key=_reward)]
        rows += [
            {
                "prompt": prompt["prompt"],
                "chosen": chosen,
                "rejected": rejected,
                "chosen_reward": reward,
                "rejected_reward": worse,
                "n": len(prompt["samples"]),
            }
            for chosen, reward in rewarded
            for rejected, worse in rewarded
            if reward > worse and (threshold is None or reward >= threshold)
        ]
    return rows


def _rewarded(prompt: PromptSamples, weights: Mapping[str, float], keep_cut_off: bool) -> list[tuple[Any, float]]:
    """The different completions of a prompt that can be chosen, in their order, each with its reward."""
    rewarded: dict[str, tuple[Any, float]] = {}
    for sample in prompt["samples"]:
        reward = total_reward(sample, weights)
        if reward is not None and (sample["finished"] or keep_cut_off):
            rewarded.setdefault(json.dumps(sample["completion"]), (sample["completion"], reward))
    return list(rewarded.values())


def _reward(rewarded: tuple[Any, float]) -> float:
    return rewarded[1]


def total_reward(sample: Sample, weights: Mapping[str, float]) -> float | None:
    """The weighted sum of a sample's rewards; None if it has none."""
    given = [weights[name] * reward for name, reward in sample["rewards"].items() if reward is not None]
    return sum(given) if given else None


def to_bytes(rows: Sequence[Row], path: Path) -> bytes:
    """The rows in the format that the suffix of the path names.

    Raises:
        ValueError: another suffix than .jsonl or .parquet.
    """
    if path.suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        from datasets import Dataset

        buffer = io.BytesIO()
        Dataset.from_list(list(rows)).to_parquet(buffer)
        return buffer.getvalue()
    raise ValueError(f"expected a file that ends in {' or '.join(FORMATS)}, got {path}")

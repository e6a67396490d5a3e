"""Rejection sampling: the completions that are good enough to train on, as rows that an SFT trainer reads."""

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
        candidates: dict[str, Row] = {}
        for sample in prompt["samples"]:
            reward = total_reward(sample, weights)
            if reward is None or (threshold is not None and reward < threshold):
                continue
            if not sample["finished"] and not keep_cut_off:
                continue
            row = {
                "prompt": prompt["prompt"],
                "completion": sample["completion"],
                "reward": reward,
                "n": len(prompt["samples"]),
            }
            candidates.setdefault(json.dumps(sample["completion"]), row)
        chosen = list(candidates.values())
        rows += [max(chosen, key=lambda row: row["reward"])] if keep == "best" and chosen else chosen
    return rows


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

"""What is counted as correct, what chooses and what votes; and the file of samples, whole, cut off and damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastrl.evaluation import (
    PromptSamples,
    Sample,
    SampleFile,
    SampleFileError,
    accepted,
    plot_evaluation,
    preferences,
    summarise,
)


def made(text: str, right: float | None, score: float | None, finished: bool = True) -> Sample:
    return {"completion": text, "tokens": 1, "finished": finished, "rewards": {"check": right, "judge": score}}


def prompt(row: int, *samples: Sample, greedy: Sample | None = None) -> PromptSamples:
    return {"row": row, "prompt": f"p{row}", "greedy": greedy, "samples": list(samples)}


# "7" is right: half of the votes, but both of the judge's favourites
SEVEN = [made("7", 1, 2.0), made("it is 7", 1, 1.0), made("8", 0, -1.0), made("8", 0, -2.0)]
# "3" is right, and there is one vote; a failed check counts as wrong, a failed judge is chosen last
THREE = [made("no idea", None, 5.0), made("3", 1, None), made("none", 0.5, 0.0), made("", 0, 0.0)]
UNCHECKED = [made("1", None, 0.0), made("2", None, 0.0), made("2", None, 0.0), made("2", None, 0.0)]
PROMPTS = [
    prompt(0, *SEVEN, greedy=made("8", 0, 0.0)),
    prompt(1, *THREE, greedy=made("3", 1, 0.0)),
    prompt(2, *UNCHECKED),
]


def test_curves() -> None:
    result = summarise(PROMPTS, "check", ["judge"], reward_models=["judge"])
    assert result.prompts == 2 and result.samples_per_prompt == 4 and result.sizes == [1, 2, 4]
    mean = {name: [round(point.mean, 9) for point in curve] for name, curve in result.curves.items()}
    assert mean["pass@n"] == [0.375, pytest.approx((5 / 6 + 1 / 2) / 2), 1.0]
    assert mean["best of n (judge)"] == [0.375, pytest.approx((5 / 6 + 0) / 2), 0.5]
    # One sample of the second prompt votes: it wins whenever it is there.
    assert mean["majority vote"] == [0.375, pytest.approx((1 / 2 + 1 / 2) / 2), pytest.approx((1 / 2 + 1) / 2)]
    assert mean["weighted vote (judge)"][2] == 1.0
    assert result.greedy is not None and result.greedy.mean == 0.5
    assert result.greedy.standard_error == pytest.approx(math.sqrt(0.5 / 2))
    assert result.notes == [
        "left out: 1 prompts without a reward of check for any sample",
        "1 samples without a reward of check count as wrong",
        "3 of 8 samples state no answer and do not vote",
    ]
    assert json.loads(json.dumps(result.to_json()))["curves"]["pass@n"][0]["mean"] == 0.375
    assert plot_evaluation(result).startswith(b"\x89PNG")


def test_threshold_and_scores_of_functions() -> None:
    result = summarise(PROMPTS[1:2], "check", ["judge"], threshold=0.5)
    assert result.curves["pass@n"][0].mean == 0.5 and result.curves["pass@n"][0].standard_error is None
    assert "weighted vote (judge)" in result.curves  # no score is negative
    assert "0.500" in result.table() and "±" not in result.table().split("\n", 1)[1]
    negative = summarise(PROMPTS[:1], "check", ["judge"])
    assert "weighted vote (judge)" not in negative.curves
    assert negative.notes == ["no vote weighted by judge: it gave negative rewards"]


def test_nothing_to_judge() -> None:
    with pytest.raises(ValueError, match="check gave no sample of the 1 prompts a reward"):
        summarise(PROMPTS[2:], "check")


def test_accepted_rows() -> None:
    weights = {"check": 1.0, "judge": 0.5}
    assert accepted(PROMPTS, weights) == [
        {"prompt": "p0", "completion": "7", "reward": 2.0, "n": 4},
        {"prompt": "p1", "completion": "no idea", "reward": 2.5, "n": 4},
        {"prompt": "p2", "completion": "1", "reward": 0.0, "n": 4},
    ]
    rows = accepted(PROMPTS, weights, keep="all", threshold=0.0)
    assert [row["completion"] for row in rows] == ["7", "it is 7", "no idea", "3", "none", "", "1", "2"]
    cut = [prompt(0, made("7", 1, 1.0, finished=False), made("8", 0, 0.0))]
    assert [row["completion"] for row in accepted(cut, weights)] == ["8"]
    assert [row["completion"] for row in accepted(cut, weights, keep_cut_off=True)] == ["7"]
    assert accepted([prompt(0, made("7", None, None))], weights) == []


def test_preference_rows() -> None:
    def pairs(prompts: list[PromptSamples], **settings: Any) -> list[tuple[str, str, float, float]]:
        rows = preferences(prompts, {"check": 1.0, "judge": 0.5}, **settings)
        return [(row["chosen"], row["rejected"], row["chosen_reward"], row["rejected_reward"]) for row in rows]

    assert preferences(PROMPTS, {"check": 1.0, "judge": 0.5})[0] == {
        "prompt": "p0",
        "chosen": "7",
        "rejected": "8",
        "chosen_reward": 2.0,
        "rejected_reward": -0.5,
        "n": 4,
    }
    # The third prompt's completions all have reward 0.
    assert pairs(PROMPTS) == [("7", "8", 2.0, -0.5), ("no idea", "", 2.5, 0.0)]
    assert pairs(PROMPTS, threshold=2.1) == [("no idea", "", 2.5, 0.0)]
    assert pairs(PROMPTS[:1], keep="all") == [
        ("7", "it is 7", 2.0, 1.5),
        ("7", "8", 2.0, -0.5),
        ("it is 7", "8", 1.5, -0.5),
    ]
    assert pairs(PROMPTS[:1], keep="all", threshold=2.0) == [("7", "it is 7", 2.0, 1.5), ("7", "8", 2.0, -0.5)]
    right_or_wrong = [prompt(0, made("7", 1, 0), made("7", 1, 0)), prompt(1, made("8", 0, 0), made("9", 0, 0))]
    assert pairs(right_or_wrong) == pairs(right_or_wrong, keep="all") == []
    cut = [prompt(0, made("7", 1, 1.0), made("8", 0, 0.0, finished=False))]
    assert pairs(cut) == [] and pairs(cut, keep_cut_off=True) == [("7", "8", 1.5, 0.0)]
    assert pairs([prompt(0, made("7", 1, 0), made("8", None, None))]) == []


def test_file_of_samples(tmp_path: Path) -> None:
    path = tmp_path / "folder/samples.jsonl"
    SampleFile(path, {"n": 4}).add(PROMPTS[:2])
    whole = path.read_bytes()
    for end in (len(whole) - 1, len(whole) - 20):  # a kill cut the last line off
        path.write_bytes(whole[:end])
        file = SampleFile(path, {"n": 4})
        assert list(file.prompts) == [0]
        file.add(PROMPTS)  # row 0 is there already
        assert list(SampleFile(path, {"n": 4}).prompts) == [0, 1, 2]
    path.write_bytes(whole[:5])  # of the settings
    assert not SampleFile(path, {"n": 8}).prompts
    path.write_bytes(whole)
    with pytest.raises(SampleFileError, match=r"other settings: n \(n was 4, now it is 8\)\. --fresh"):
        SampleFile(path, {"n": 8})
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{oops\n" + lines[2])
    with pytest.raises(SampleFileError, match="line 2: is damaged: delete that line"):
        SampleFile(path, {"n": 4})
    for foreign in (b"hello\n", b"hello", b'{"a": 1}\n'):
        path.write_bytes(foreign)
        with pytest.raises(SampleFileError, match="is not a file of samples"):
            SampleFile(path, {"n": 4})
        assert path.read_bytes() == foreign

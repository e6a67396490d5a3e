"""The estimators against every subset, visited one by one, and against probabilities known in closed form."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fastrl.evaluation.estimators import (
    best_of_n,
    majority_vote,
    mean_and_error,
    pass_at_k,
    powers_of_two,
    weighted_majority_vote,
)


def over_subsets(samples: int, n: int, value: Callable[[tuple[int, ...]], float]) -> float:
    return float(np.mean([value(subset) for subset in itertools.combinations(range(samples), n)]))


def choose(subset: Sequence[int], scores: Sequence[float], values: Sequence[float]) -> float:
    best = max(scores[i] for i in subset)
    return float(np.mean([values[i] for i in subset if scores[i] == best]))


def vote(subset: Sequence[int], answers: Sequence[Any], values: Sequence[float], weights: Sequence[float]) -> float:
    sums: dict[Any, float] = {}
    for i in subset:
        if answers[i] is not None:
            sums[answers[i]] = sums.get(answers[i], 0.0) + weights[i]
    if not sums:
        return 0.0
    winners = [answer for answer, total in sums.items() if total == max(sums.values())]
    worth = [np.mean([v for a, v in zip(answers, values, strict=True) if a == winner]) for winner in winners]
    return float(np.mean(worth))


@pytest.mark.parametrize("correct", [0, 1, 3, 7, 8])
@pytest.mark.parametrize("k", range(1, 9))
def test_pass_at_k(correct: int, k: int) -> None:
    right = [True] * correct + [False] * (8 - correct)
    expected = over_subsets(8, k, lambda subset: any(right[i] for i in subset))
    assert pass_at_k(8, correct, k) == pytest.approx(expected, abs=1e-12)
    assert best_of_n(right, right, k) == pytest.approx(expected, abs=1e-12)  # choosing by correctness itself


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    assert pass_at_k(2000, 1000, 1) == pytest.approx(0.5)


SCORES = {
    "distinct": [0.3, -1.2, 2.0, 0.1, 5.0, -0.4, 1.1],
    "ties": [1.0, 1.0, 0.0, 2.0, 2.0, 2.0, 0.0],
    "all equal": [1.0] * 7,
}
VALUES = [1.0, 0.0, 1.0, 0.5, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n(scores: list[float], n: int) -> None:
    expected = over_subsets(7, n, lambda subset: choose(subset, scores, VALUES))
    assert best_of_n(scores, VALUES, n) == pytest.approx(expected, abs=1e-12)


ANSWERS = {
    "one winner": ["a", "b", "a", "c", "a", "b", "d"],
    "ties": ["a", "b", "a", "b", "c", "c", "d"],
    "abstentions": ["a", None, "b", None, "a", None, None],
    "all different": list("abcdefg"),
    "one answer": ["a"] * 7,
    "nobody votes": [None] * 7,
}


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_majority_vote(answers: list[Any]) -> None:
    curve = majority_vote(answers, VALUES)
    for n in range(1, 8):
        expected = over_subsets(7, n, lambda subset: vote(subset, answers, VALUES, [1.0] * 7))
        assert curve[n - 1] == pytest.approx(expected, abs=1e-12), n
        equal = weighted_majority_vote(answers, [0.7] * 7, VALUES, n)  # all subsets are visited: exact too
        assert equal == pytest.approx(expected, abs=1e-12), n


WEIGHTS = [0.5, 2.0, 0.25, 1.0, 0.125, 4.0, 0.0]


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("n", range(1, 8))
def test_weighted_majority_vote(answers: list[Any], n: int) -> None:
    tiny = [max(weight, 1e-300) for weight in WEIGHTS]
    expected = over_subsets(7, n, lambda subset: vote(subset, answers, VALUES, tiny))
    assert weighted_majority_vote(answers, WEIGHTS, VALUES, n) == pytest.approx(expected, abs=1e-12)


def test_weighted_majority_vote_by_random_subsets() -> None:
    answers = list("aabbbcccddeeffgg") * 2
    values = [1.0 if answer in "bd" else 0.0 for answer in answers]
    exact = majority_vote(answers, values)
    for n in (3, 8, 20):
        drawn = weighted_majority_vote(answers, [2.0] * 32, values, n, draws=4000)
        assert drawn == pytest.approx(exact[n - 1], abs=4 * 0.5 / math.sqrt(4000))
        assert drawn == weighted_majority_vote(answers, [2.0] * 32, values, n, draws=4000)  # the seed is fixed
        assert drawn != weighted_majority_vote(answers, [2.0] * 32, values, n, draws=4000, seed=1)


def test_curves_of_a_known_law() -> None:
    """Two answers, no ties: the vote of an odd n is a tail of the hypergeometric law, also at N = 256."""
    samples, right = 256, 140
    answers = ["right"] * right + ["wrong"] * (samples - right)
    start = time.monotonic()
    curve = majority_vote(answers, [1.0] * right + [0.0] * (samples - right))
    assert time.monotonic() - start < 10
    for n in (1, 3, 31, 255):
        ways = sum(math.comb(right, m) * math.comb(samples - right, n - m) for m in range(n // 2 + 1, n + 1))
        assert curve[n - 1] == pytest.approx(ways / math.comb(samples, n), rel=1e-9)
    assert curve[-1] == pytest.approx(1.0)


def test_mean_and_error() -> None:
    assert mean_and_error([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt(7 / 3 / 3)))
    mean, error = mean_and_error([2.0])
    assert mean == 2.0 and math.isnan(error)


def test_powers_of_two() -> None:
    assert powers_of_two(1) == [1] and powers_of_two(8) == [1, 2, 4, 8] and powers_of_two(12) == [1, 2, 4, 8, 12]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(4, 5, 1), "correct: expected between 0 and 4"),
        (lambda: pass_at_k(4, 2, 5), "expected between 1 and 4 samples, got 5"),
        (lambda: pass_at_k(4, 2, 0), "expected between 1 and 4 samples, got 0"),
        (lambda: best_of_n([1.0], [1.0, 2.0], 1), "one each per sample, got 1 and 2"),
        (lambda: best_of_n([math.nan], [1.0], 1), "scores: expected finite numbers, got nan"),
        (lambda: majority_vote(["a"], [1.0, 2.0]), "one each per sample, got 1 and 2"),
        (lambda: majority_vote(["a"] * 1001, [1.0] * 1001), "expected at most 1000 samples, got 1001"),
        (lambda: majority_vote([], []), "values: expected one number per sample"),
        (lambda: weighted_majority_vote(["a"], [-1.0], [1.0], 1), "weights: expected numbers of at least 0, got -1"),
        (lambda: weighted_majority_vote(["a"], [1.0, 2.0], [1.0], 1), "weights: expected one per sample, 1, got 2"),
        (lambda: powers_of_two(0), "at least one sample, got 0"),
    ],
)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

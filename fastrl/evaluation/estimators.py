"""What n samples of N give on average: pass@k, best of n, majority votes. Plain numpy, one prompt at a time.

Each estimator is the mean over all subsets of n of the N samples, so it is unbiased for n fresh samples, and its curve
against n takes N samples, not a sum of n. All means are exact, by counting, but the weighted vote's, which is a Monte
Carlo mean with a fixed seed wherever there are too many subsets to visit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

DRAWS = 2000  # subsets that a weighted vote visits; all of them where there are no more


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... and `largest` itself.

    Raises:
        ValueError: largest is not positive.
    """
    if largest < 1:
        raise ValueError(f"expected at least one sample, got {largest}")
    return sorted({2**exponent for exponent in range(largest.bit_length())} | {largest})


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k samples is correct, from `correct` of `samples`, in the stable product form of Chen et
    al. 2021 (https://arxiv.org/abs/2107.03374, figure 3): 1 - C(samples - correct, k) / C(samples, k).

    Raises:
        ValueError: not 0 <= correct <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"correct: expected between 0 and {samples}, the samples, got {correct}")
    _check_size(k, samples)
    if samples - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def best_of_n(scores: ArrayLike, values: ArrayLike, n: int) -> float:
    """Expected value of the sample of the highest score among n; ties are broken at random.

    The sample of rank r (1 is the lowest of N) is the best of C(r - 1, n - 1) of the C(N, n) subsets.

    Args:
        scores: (N,) what chooses, for example a reward model's scores.
        values: (N,) what counts, for example 1 for a correct sample.
        n: size of the subsets.

    Raises:
        ValueError: different lengths, a score or value that is not finite, or not 1 <= n <= N.
    """
    chosen, counted = _finite(scores, "scores"), _finite(values, "values")
    if len(chosen) != len(counted):
        raise ValueError(f"scores and values: expected one each per sample, got {len(chosen)} and {len(counted)}")
    _check_size(n, len(chosen))
    _, tied = np.unique(chosen, return_inverse=True)  # ascending; a group of equal scores shares its ranks
    counted = (np.bincount(tied, counted) / np.bincount(tied))[tied]
    total = len(chosen)
    weights = np.zeros(total)
    weights[-1] = n / total
    for rank in range(total - 1, n - 1, -1):
        weights[rank - 1] = weights[rank] * (rank + 1 - n) / rank
    return float(weights @ counted[np.argsort(chosen)])


def majority_vote(answers: Sequence[Hashable | None], values: ArrayLike) -> Floats:
    """Expected value of the most frequent answer among n samples, for every n from 1 to N: (N,), entry n - 1 for n.

    The value of an answer is the mean over its samples. None abstains; n samples that all abstain are worth 0. Ties are
    broken at random. Exact: subsets are counted by the votes of each answer (a multivariate hypergeometric law), in
    about N^2 steps on arrays of N x N / m for each number m of winning votes.

    Args:
        answers: N answers; equal ones are one answer.
        values: (N,) for example 1 for a correct sample.

    Raises:
        ValueError: different lengths, no samples, more than 1000 of them (their subsets are more than a float can
            count), or a value that is not finite.
    """
    counts, worths, samples = _votes(answers, values)
    if samples > 1000:
        raise ValueError(f"answers: expected at most 1000 samples, got {samples}")
    abstaining = samples - int(counts.sum())
    # Everything is scaled by 2^-votes of the answer, so that no number of subsets overflows.
    means = np.zeros(samples)
    for votes in range(1, int(counts.max(initial=0)) + 1):
        most_tied = samples // votes
        ways = np.zeros((samples + 1, most_tied + 1))  # [samples so far, answers with the winning number of votes]
        worth = np.zeros_like(ways)  # ways, each times the sum of the values of those answers
        ways[0, 0] = 1.0
        for count, value in zip(counts, worths, strict=True):
            fewer = _binomials(count, min(count, votes - 1))
            new_ways, new_worth = _convolve(ways, fewer), _convolve(worth, fewer)
            if count >= votes:
                share = _scaled_binomial(count, votes)
                new_ways[votes:, 1:] += share * ways[:-votes, :-1]
                new_worth[votes:, 1:] += share * (worth + value * ways)[:-votes, :-1]
            ways, worth = new_ways, new_worth
        worth = _convolve(worth, _binomials(abstaining, abstaining))
        means += worth[1:, 1:] @ (1.0 / np.arange(1, most_tied + 1))
    subsets = np.array([_scaled_binomial(samples, n) for n in range(1, samples + 1)])
    return means / subsets


def weighted_majority_vote(
    answers: Sequence[Hashable | None],
    weights: ArrayLike,
    values: ArrayLike,
    n: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    """Expected value of the answer of the largest sum of weights among n samples; otherwise like `majority_vote`.

    The mean over all subsets if there are at most `draws`, otherwise over that many random ones of a fixed seed.

    Args:
        answers: N answers, None abstains.
        weights: (N,), at least 0.
        values: (N,).
        n: size of the subsets.
        draws, seed: of the Monte Carlo mean.

    Raises:
        ValueError: different lengths, a negative weight, a number that is not finite, or not 1 <= n <= N.
    """
    counts, worths, samples = _votes(answers, values)
    weighing = _finite(weights, "weights")
    if len(weighing) != samples:
        raise ValueError(f"weights: expected one per sample, {samples}, got {len(weighing)}")
    if (weighing < 0).any():
        raise ValueError(f"weights: expected numbers of at least 0, got {weighing.min()}")
    _check_size(n, samples)
    if not len(counts):
        return 0.0
    labels = {answer: label for label, answer in enumerate(_distinct(answers))}
    ballots = np.zeros((samples, len(labels)))
    for i, answer in enumerate(answers):
        if answer is not None:
            # A sample of weight 0 votes, too: it decides where no other does.
            ballots[i, labels[answer]] = max(weighing[i], np.finfo(float).tiny)
    if math.comb(samples, n) <= draws:
        subsets = np.array(list(itertools.combinations(range(samples), n)))
    else:
        generator = np.random.default_rng(seed)
        subsets = generator.permuted(np.tile(np.arange(samples), (draws, 1)), axis=1)[:, :n]
    sums = np.stack([ballots[:, label][subsets].sum(1) for label in range(len(labels))], axis=1)
    highest = sums.max(1, keepdims=True)
    tied = (sums >= highest * (1 - 1e-12)) & (highest > 0)
    winners = tied.sum(1)
    return float(np.mean(tied @ worths / np.maximum(winners, 1)))


def mean_and_error(values: ArrayLike) -> tuple[float, float]:
    """Mean over prompts and its standard error (with Bessel's correction; NaN for a single prompt)."""
    array = _finite(values, "values")
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), float(error)


def _votes(answers: Sequence[Hashable | None], values: ArrayLike) -> tuple[NDArray[np.int64], Floats, int]:
    """Votes and mean value of each answer, and the number of samples."""
    counted = _finite(values, "values")
    if len(answers) != len(counted):
        raise ValueError(f"answers and values: expected one each per sample, got {len(answers)} and {len(counted)}")
    of_answer = [[v for a, v in zip(answers, counted, strict=True) if a == answer] for answer in _distinct(answers)]
    counts = np.array([len(group) for group in of_answer], dtype=np.int64)
    return counts, np.array([np.mean(group) for group in of_answer], dtype=np.float64), len(counted)


def _distinct(answers: Sequence[Hashable | None]) -> list[Hashable]:
    return list(dict.fromkeys(answer for answer in answers if answer is not None))


def _convolve(table: Floats, coefficients: Floats) -> Floats:
    """The table with up to len(coefficients) - 1 more samples."""
    result = coefficients[0] * table
    for more in range(1, min(len(coefficients), len(table))):
        result[more:] += coefficients[more] * table[:-more]
    return result


def _binomials(count: int, largest: int) -> Floats:
    return np.array([_scaled_binomial(count, taken) for taken in range(largest + 1)])


def _scaled_binomial(count: int, taken: int) -> float:
    return math.comb(int(count), int(taken)) / 2 ** int(count)  # exact integers; the quotient is rounded once


def _finite(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: expected one number per sample, got an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got {array[~np.isfinite(array)][0]}")
    return array


def _check_size(n: int, samples: int) -> None:
    if not 1 <= n <= samples:
        raise ValueError(f"expected between 1 and {samples} samples, got {n}")

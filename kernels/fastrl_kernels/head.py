"""What a row of logits is: the transform from the head's raw product to the logit, and the statistics kept of a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """From the raw product `hidden @ weight.T` to the logit, in the order of transformers' models.

    `z = (product + bias) * logit_scale`, then `z = softcap * tanh(z / softcap)` where a softcap is set (Gemma), then
    `z / temperature`.

    Args:
        temperature: sampling temperature, finite and above 0.
        logit_scale: multiplier of Cohere-like models (Granite divides: pass its reciprocal), finite and not 0.
        softcap: bound of the tanh soft cap, finite and above 0, or None for none.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")
        if not (self.logit_scale != 0 and math.isfinite(self.logit_scale)):
            raise ValueError(f"logit_scale must be finite and not 0, got {self.logit_scale}")
        if self.softcap is not None and not (self.softcap > 0 and math.isfinite(self.softcap)):
            raise ValueError(f"softcap must be None, or finite and above 0, got {self.softcap}")


class RowStats(NamedTuple):
    """Statistics of each row of a tile of logits; fp32 (fp64 for an fp64 tile).

    The log-sum-exp is kept as two numbers, because `z - lse` cancels where all logits share a large offset
    (pytorch #195829) while `(z - row_max) - log_sum` does not. The entropy is kept as the mean logit, because its
    gradient's `log p + H` is `(z - row_max) - mean`, which does not cancel where the distribution is flat.
    A row of logits that are all -inf has row_max and log_sum -inf, and the rest NaN.
    """

    row_max: Tensor  # (n,) max_j z_j
    log_sum: Tensor  # (n,) log sum_j exp(z_j - row_max)
    logps: Tensor  # (n,) log-probability of the row's id; -inf where the id is -1 (not in this vocabulary shard)
    mean: Tensor | None  # (n,) sum_j p_j (z_j - row_max)

    @property
    def entropy(self) -> Tensor | None:
        """(n,) -sum_j p_j log p_j, in nats."""
        return None if self.mean is None else self.log_sum - self.mean


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of `dtype` are reduced: fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32

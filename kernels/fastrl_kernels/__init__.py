"""Kernels and operators of fastrl: needs torch and numpy (and triton where there is a GPU), never transformers."""

from . import backends, reference
from .functional import TokenStats, gae, group_advantages, linear_logprobs, logprobs_from_logits
from .head import LogitTransform, RowStats, accumulation_dtype
from .objective import TokenBatch, TokenObjective, register_objective

__all__ = [
    "LogitTransform",
    "RowStats",
    "TokenBatch",
    "TokenObjective",
    "TokenStats",
    "accumulation_dtype",
    "backends",
    "gae",
    "group_advantages",
    "linear_logprobs",
    "logprobs_from_logits",
    "reference",
    "register_objective",
]

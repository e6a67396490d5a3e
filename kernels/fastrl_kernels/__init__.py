"""Kernels and operators of fastrl: needs torch and numpy (and triton where there is a GPU), never transformers."""

from . import backends, reference
from .head import LogitTransform, RowStats, accumulation_dtype
from .objective import TokenBatch, TokenObjective, register_objective

__all__ = [
    "LogitTransform",
    "RowStats",
    "TokenBatch",
    "TokenObjective",
    "accumulation_dtype",
    "backends",
    "reference",
    "register_objective",
]

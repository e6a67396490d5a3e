"""Kernels and operators of fastrl: needs torch and numpy (and triton where there is a GPU), never transformers."""

from . import backends, reference
from .divergence import linear_divergence, linear_divergence_sum
from .functional import TokenStats, gae, group_advantages, linear_logprobs, logprobs_from_logits
from .head import LogitTransform, RowStats, accumulation_dtype
from .objective import TokenBatch, TokenObjective, register_objective
from .topk import linear_topk_divergence_sum, linear_topk_logprobs

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
    "linear_divergence",
    "linear_divergence_sum",
    "linear_logprobs",
    "linear_topk_divergence_sum",
    "linear_topk_logprobs",
    "logprobs_from_logits",
    "reference",
    "register_objective",
]

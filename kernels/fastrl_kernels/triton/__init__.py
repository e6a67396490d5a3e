"""Triton kernels, the GPU backend: importing needs triton, running needs a GPU or Triton's interpreter."""

from fastrl_kernels.triton.divergence_rows import divergence_rows
from fastrl_kernels.triton.gae import gae
from fastrl_kernels.triton.group_advantages import group_advantages
from fastrl_kernels.triton.linear_stats import linear_row_stats
from fastrl_kernels.triton.policy_terms import policy_terms
from fastrl_kernels.triton.row_grad import row_grad
from fastrl_kernels.triton.row_stats import row_stats

__all__ = ["divergence_rows", "gae", "group_advantages", "linear_row_stats", "policy_terms", "row_grad", "row_stats"]

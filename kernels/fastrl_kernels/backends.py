"""Which backends there are, why one does not work, and which one a call runs on."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import Protocol

import torch
from torch import Tensor

from .head import LogitTransform, RowStats
from .objective import PolicySpec, PolicyTerms, TokenBatch

NAMES = ("reference", "cpu", "triton", "cuda")
_MODULES = {"reference": ".reference", "cpu": ".cpu", "triton": ".triton", "cuda": ".cuda"}


class Backend(Protocol):
    """What a backend provides, defined by the functions of the same names in `reference`, or by the objective."""

    def row_stats(
        self, tile: Tensor, ids: Tensor, transform: LogitTransform, bias: Tensor | None, entropy: bool
    ) -> RowStats: ...

    def row_grad(
        self,
        tile: Tensor,
        out: Tensor,
        ids: Tensor,
        transform: LogitTransform,
        bias: Tensor | None,
        row_max: Tensor,
        log_sum: Tensor,
        mean: Tensor | None,
        grad_logps: Tensor | None,
        grad_entropy: Tensor | None,
        grad_lse: Tensor | None,
        source: Tensor | None,
        target: Tensor | None,
    ) -> None: ...

    def policy_terms(
        self,
        spec: PolicySpec,
        tokens: TokenBatch,
        token_weight: Tensor,
        entropy_weight: Tensor | None,
        mask: Tensor | None = None,
        live: Tensor | None = None,
        *,
        terms: bool = True,
        gradients: bool = True,
        sums: bool = True,
    ) -> PolicyTerms: ...

    def group_advantages(self, rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, eps: float) -> Tensor: ...

    def gae(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, through_mask: bool
    ) -> tuple[Tensor, Tensor]: ...

    def divergence_rows(
        self,
        tile: Tensor,
        ref_tile: Tensor,
        kind: str,
        beta: float,
        transform: LogitTransform,
        ref_transform: LogitTransform,
        bias: Tensor | None,
        ref_bias: Tensor | None,
        token_weight: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor: ...


def triton_interpreted() -> bool:
    """True where Triton runs its kernels in Python on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def available() -> dict[str, str | None]:
    """Backend name -> None where it works on this machine, else the reason why it does not."""
    reasons: dict[str, str | None] = {"reference": None}
    try:
        extension = importlib.import_module("._C", __package__)
        reasons["cpu"] = None
        if not hasattr(extension, "cuda"):
            reasons["cuda"] = (
                "the extension was built without CUDA; `FASTRL_CUDA=on pip install .` builds it, with nvcc"
            )
        else:
            reasons["cuda"] = None if torch.cuda.is_available() else "no CUDA device"
    except ImportError as error:
        reason = f"the C++ extension is not built here ({error}); `pip install .` in the repository builds it"
        reasons["cpu"] = reasons["cuda"] = reason
    try:
        if not hasattr(importlib.import_module("triton"), "jit"):  # a folder of that name on the path
            raise ImportError("what is found under that name is another package")
        has_gpu = torch.cuda.is_available() or triton_interpreted()
        reasons["triton"] = None if has_gpu else "no CUDA device (TRITON_INTERPRET=1 runs it in Python, for tests)"
    except ImportError as error:
        reasons["triton"] = f"triton can't be imported ({error}); `pip install triton`"
    return reasons


@functools.cache
def _warn_reference(reason: str) -> None:
    warnings.warn(f"fastrl runs its eager reference, which builds all the logits: {reason}", stacklevel=4)


@torch.compiler.assume_constant_result
def choose(backend: str | None, device: torch.device) -> str:
    """The backend that serves tensors on `device`.

    `None` takes triton on a CUDA device and cpu on the CPU; where the C++ extension is not built it falls back to the
    reference and warns once. A forced name that can't serve the device raises.

    Raises:
        ValueError: unknown name, or a backend of another device.
        RuntimeError: the backend does not work on this machine; the message says why and what to do.
    """
    if backend is None:
        backend = "triton" if device.type == "cuda" else "cpu"
        reason = available()[backend] if device.type in ("cpu", "cuda") else f"there are no kernels for {device.type}"
        if reason is not None:
            _warn_reference(reason)
            return "reference"
        return backend
    if backend not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(NAMES)}, got {backend!r}")
    reason = available()[backend]
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} does not work here: {reason}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' takes CPU tensors, got tensors on {device}")
    interpreted = backend == "triton" and triton_interpreted()
    if backend in ("triton", "cuda") and device.type != "cuda" and not interpreted:
        raise ValueError(f"backend {backend!r} takes CUDA tensors, got tensors on {device}")
    return backend


@functools.cache
def load(name: str) -> Backend:
    """The module of a backend that `choose` returned."""
    return importlib.import_module(_MODULES[name], __package__)

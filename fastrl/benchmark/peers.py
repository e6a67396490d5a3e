"""The peers, each called as its own project calls it. One that can't run here is there with the reason, and nothing
stands in for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .head import ASKED, Contender, Job, eager_contender
from .problems import Problem, eager_logps, eager_logps_and_entropy

_POLICY = frozenset({"train", "live", "frozen", "kl"})
_NO_ENTROPY = ASKED - {"entropy"}
_NEEDS_GPU = "its kernels need a CUDA device"


def _import(module: str, attribute: str) -> tuple[Any, str | None]:
    """The attribute, or the reason why it can't be had. A package may fail in any way while it is imported."""
    try:
        return getattr(importlib.import_module(module), attribute), None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        return None, f"{module} can't be imported: {type(error).__name__}: {reason}"


def _import_alone(package: str, parents: tuple[str, ...], module: str, attribute: str) -> tuple[Any, str | None]:
    """`_import` of a module of a package whose own `__init__` asks for much that the module does not need.

    The package and the `parents` inside it are left unexecuted, and are gone from `sys.modules` afterwards.
    """
    if package in sys.modules:
        return _import(module, attribute)
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError) as error:
        return None, f"{package} can't be found: {error}"
    if spec is None or not spec.submodule_search_locations:
        return None, f"{package} is not installed"
    root = spec.submodule_search_locations[0]
    names = [package, *(f"{package}.{parent}" for parent in parents)]
    for name in names:
        stub = types.ModuleType(name)
        stub.__path__ = ["/".join([root, *name.split(".")[1:]])]
        sys.modules[name] = stub
    try:
        return _import(module, attribute)
    finally:
        for name in names:
            del sys.modules[name]


def compiled(device: torch.device) -> Contender:
    """`torch.compile` of the eager form, for the exact shape."""

    # A compiled function of its own for each set of contenders: past eight shapes torch stops compiling one.
    plain = torch.compile(_fresh(eager_logps), dynamic=False)
    with_entropy = torch.compile(_fresh(eager_logps_and_entropy), dynamic=False)

    def tokens(hidden: Tensor, weight: Tensor, p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        if entropy:
            return with_entropy(hidden, weight, p.ids)
        return plain(hidden, weight, p.ids), None

    return Contender("compile", "torch.compile", tokens)


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: that is what the compiler's cache and its limit belong to."""
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )


def _linear_cross_entropy(key: str, name: str, jobs: frozenset[str], chunked: dict[str, Any] | None) -> Contender:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        return Contender(key, name, absent=f"torch {torch.__version__} does not have it (2.13 does)")
    options = None if chunked is None else torch.nn.LinearCrossEntropyOptions(**chunked)

    def tokens(hidden: Tensor, weight: Tensor, p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        nll = function(hidden.flatten(0, 1), weight, p.ids.flatten(), reduction="none", options=options)
        return -nll.view(p.ids.shape), None

    def mean(hidden: Tensor, weight: Tensor, p: Problem, job: Job) -> Tensor:
        return function(hidden.flatten(0, 1), weight, p.ids.flatten(), options=options)

    return Contender(key, name, tokens, mean_nll=mean, jobs=jobs, recompute=chunked is not None)


def linear_cross_entropy(device: torch.device) -> Contender:
    """As it is called without options: all the logits."""
    return _linear_cross_entropy("torch-lce", "F.linear_cross_entropy", _NO_ENTROPY, None)


def linear_cross_entropy_chunked(device: torch.device) -> Contender:
    """In chunks of 512 rows. Per token it forms the logits twice; for a mean, once."""
    options = {"chunking_method": None, "batch_chunk_size": 512}
    return _linear_cross_entropy("torch-lce-512", "F.linear_cross_entropy, chunks of 512", _NO_ENTROPY, options)


def linear_cross_entropy_auto(device: torch.device) -> Contender:
    """With the chunks it chooses itself: a few rows each on a CPU, so it is asked for one job only there."""
    jobs = _NO_ENTROPY if device.type == "cuda" else frozenset({"nll"})
    return _linear_cross_entropy("torch-lce-auto", "F.linear_cross_entropy, its own chunks", jobs, {})


def trl(device: torch.device) -> Contender:
    """TRL's op as its GRPO trainer calls it: 32768 columns at a time; for a loss, with the entropy it logs."""
    key, name = "trl", "TRL ChunkedLogProbFunction"
    function, absent = _import("trl.kernels", "ChunkedLogProbFunction")
    if absent:
        return Contender(key, name, absent=absent)

    def tokens(hidden: Tensor, weight: Tensor, p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        outputs = ("entropy",) if torch.is_grad_enabled() else ()
        logps, entropies, *_ = function.apply(
            hidden.flatten(0, 1), weight, None, p.ids.flatten(), 1.0, 32768, None, 1.0, outputs
        )
        return logps.view(p.ids.shape), entropies.view(p.ids.shape) if entropy else None

    return Contender(key, name, tokens, recompute=True)


def _liger_grpo(key: str, name: str, compiled: bool, tokens_per_chunk: int | None) -> Contender:
    function, absent = _import("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    if absent:
        return Contender(key, name, absent=absent)

    def loss(hidden: Tensor, weight: Tensor, p: Problem, job: Job) -> Tensor:
        chunk = 1 if tokens_per_chunk is None else max(1, tokens_per_chunk // p.ids.shape[1])
        objective, with_reference = job.objective, job.objective.beta != 0
        module = function(
            beta=objective.beta, use_ref_model=with_reference, loss_type="dapo", compiled=compiled, chunk_size=chunk,
            use_bias_correction_kl=objective.kl_times_ratio,
        )  # fmt: skip
        return module(
            hidden, weight, p.ids, p.mask.long(), p.advantages, old_per_token_logps=p.old_logps,
            ref_per_token_logps=p.ref_logps if with_reference else None,
        )[0]  # fmt: skip

    return Contender(key, name, loss=loss, jobs=_POLICY, recompute=True)


def liger(device: torch.device) -> Contender:
    return _liger_grpo("liger", "Liger GRPO loss", False, None)


def liger_compiled(device: torch.device) -> Contender:
    return _liger_grpo("liger-compiled", "Liger GRPO loss, compiled", True, None)


def liger_wide(device: torch.device) -> Contender:
    """Liger's default is one sequence a chunk, and each chunk adds a whole dW; this is what it can do with fewer."""
    return _liger_grpo("liger-wide", "Liger GRPO loss, chunks of 1024 tokens", False, 1024)


def liger_scaled(device: torch.device) -> Contender:
    """Liger's SM90 op under a torch loss. Elsewhere Liger runs verl's torch form under that name, a row of its own."""
    key, name = "liger-scaled", "Liger LinearScaledCrossEntropy"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return Contender(key, name, absent="its kernel is for SM90 only (elsewhere it is verl's torch form)")
    function, absent = _import("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
    if not absent:
        _, absent = _import("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90", "__name__")
    if absent:
        return Contender(key, name, absent=absent)

    def tokens(hidden: Tensor, weight: Tensor, p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        flat = (hidden.flatten(0, 1), weight, p.ids.flatten(), 1.0, -100, 1, entropy)
        if entropy:
            nll, entropies = function.apply(*flat)
            return -nll.view(p.ids.shape), entropies.view(p.ids.shape)
        return -function.apply(*flat).view(p.ids.shape), None

    return Contender(key, name, tokens, recompute=True)


def cce(device: torch.device) -> Contender:
    """Without its gradient filter: by default it drops small gradients, which is another result."""
    key, name = "cce", "cut-cross-entropy"
    if device.type != "cuda":
        return Contender(key, name, absent=_NEEDS_GPU)
    function, absent = _import("cut_cross_entropy", "linear_cross_entropy")
    if absent:
        return Contender(key, name, absent=absent)

    def tokens(hidden: Tensor, weight: Tensor, p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        nll = function(hidden.flatten(0, 1), weight, p.ids.flatten(), reduction="none", filter_eps=None)
        return -nll.float().view(p.ids.shape), None

    return Contender(key, name, tokens, jobs=_NO_ENTROPY, recompute=True)


_VERL = ("utils",)


def verl_torch(device: torch.device) -> Contender:
    """verl's torch form: 512 tokens a chunk, entropy always, and dW for a frozen head too."""
    key, name = "verl", "verl FusedLinearForPPO"
    function, absent = _import_alone("verl", _VERL, "verl.utils.experimental.torch_functional", "FusedLinearForPPO")
    if absent:
        return Contender(key, name, absent=absent)
    module = function()

    def tokens(hidden: Tensor, weight: Tensor, p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        logps, entropies = module(hidden, weight, p.ids)
        return logps, entropies if entropy else None

    return Contender(key, name, tokens, recompute=True, skips_frozen=False)


def verl_triton(device: torch.device) -> Contender:
    key, name = "verl-triton", "verl linear_cross_entropy (Triton)"
    if device.type != "cuda":
        return Contender(key, name, absent=_NEEDS_GPU)
    function, absent = _import_alone("verl", _VERL, "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    if not absent:  # the op imports its kernels at the first call
        _, absent = _import_alone("verl", _VERL, "verl.utils.kernel.kernels", "efficient_entropy_forward")
    if absent:
        return Contender(key, name, absent=absent)

    def tokens(hidden: Tensor, weight: Tensor, p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        logps, entropies = function(hidden.flatten(0, 1), weight, p.ids.flatten(), 1.0, "none")
        return logps.view(p.ids.shape), entropies.view(p.ids.shape) if entropy else None

    return Contender(key, name, tokens, recompute=True, skips_frozen=False)


def quack(device: torch.device) -> Contender:
    """Per token quack keeps all the logits (the gradient is written in place); its chunked form is for a mean."""
    key, name = "quack", "quack linear_cross_entropy"
    if device.type != "cuda":
        return Contender(key, name, absent=_NEEDS_GPU)
    function, absent = _import("quack.linear_cross_entropy", "linear_cross_entropy_func")
    chunked, absent = (
        (None, absent) if absent else _import("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    )
    if absent:
        return Contender(key, name, absent=absent)
    chunked = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def tokens(hidden: Tensor, weight: Tensor, p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        nll = function(
            hidden.flatten(0, 1), weight, None, p.ids.flatten(), reduction="none",
            inplace_backward=torch.is_grad_enabled(),
        )  # fmt: skip
        return -nll.view(p.ids.shape), None

    def mean(hidden: Tensor, weight: Tensor, p: Problem, job: Job) -> Tensor:
        return chunked(hidden.flatten(0, 1), weight, p.ids.flatten(), chunk_size=4096)

    return Contender(key, name, tokens, mean_nll=mean, jobs=_NO_ENTROPY)


_MAKERS: dict[str, Callable[[torch.device], Contender]] = {
    "eager": lambda device: eager_contender(),
    "compile": compiled,
    "torch-lce": linear_cross_entropy,
    "torch-lce-512": linear_cross_entropy_chunked,
    "torch-lce-auto": linear_cross_entropy_auto,
    "trl": trl,
    "liger": liger,
    "liger-compiled": liger_compiled,
    "liger-wide": liger_wide,
    "liger-scaled": liger_scaled,
    "cce": cce,
    "verl": verl_torch,
    "verl-triton": verl_triton,
    "quack": quack,
}
PEERS = tuple(_MAKERS)


def peers(names: Sequence[str], device: torch.device) -> list[Contender]:
    """The named peers, each with the reason where it can't run on `device`."""
    return [_MAKERS[name](device) for name in names]

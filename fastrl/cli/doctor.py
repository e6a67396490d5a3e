"""`fastrl doctor`: versions, devices, which backends work and why others don't, and a self-test of each that does."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_NEEDED_FOR_TRAINING = ("transformers", "accelerate", "datasets", "safetensors", "rich", "pyarrow", "psutil")
_PACKAGES = ("fastrl", "torch", "triton", "numpy", *_NEEDED_FOR_TRAINING, "matplotlib", "peft")
# Rows, hidden size and vocabulary of the self-test: odd, several chunks, and a few seconds with the eager reference.
_TOKENS, _HIDDEN, _VOCABULARY = 509, 256, 32003
# Times the error of plain PyTorch in the same dtype, against fp64.
_TOLERANCE = 4.0


class Check(NamedTuple):
    """Outcome of the self-test of one backend: errors relative to the largest entry of the fp64 result."""

    backend: str
    dtype: str
    loss_error: float
    hidden_error: float
    weight_error: float
    eager_error: float  # the largest of the same three errors of plain PyTorch in the same dtype
    seconds: float
    eager_seconds: float

    @property
    def passed(self) -> bool:
        """Whether the error is at most a small multiple of plain PyTorch's."""
        floor = torch.finfo(getattr(torch, self.dtype)).eps
        return max(self.loss_error, self.hidden_error, self.weight_error) <= _TOLERANCE * (self.eager_error + floor)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor", help="what works on this machine and why the rest does not, with a self-test"
    )
    parser.add_argument("--no-test", action="store_true", help="leave out the self-test (about 20 seconds)")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure this machine's rates and keep them for the planner"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Returns 0 where the machine's native backend works and every self-test passes, otherwise 1."""
    problems = [*_print_versions(), *_print_devices(), *_print_backends(), *_print_rates(arguments.calibrate)]
    if not arguments.no_test:
        problems += _print_self_test()
    print()
    for problem in problems:
        print(f"problem: {problem}")
    print("fastrl works here." if not problems else f"{len(problems)} problem(s), see above.")
    return 1 if problems else 0


def self_test(backend: str, dtype: torch.dtype) -> Check:
    """One GRPO loss with entropy bonus, forward and backward, against autograd on fp64 logits.

    A third of the tokens is masked and every fourth sequence has no advantage, so dropped rows are tested too.
    """
    import fastrl

    device = torch.device("cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    sequences = 8
    length = _TOKENS // sequences
    hidden = torch.randn(sequences, length, _HIDDEN, generator=generator)
    weight = torch.randn(_VOCABULARY, _HIDDEN, generator=generator) / 8
    ids = torch.randint(_VOCABULARY, (sequences, length), generator=generator)
    advantages = torch.randn(sequences, generator=generator)
    advantages[::4] = 0
    mask = torch.rand(sequences, length, generator=generator) < 2 / 3
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    ids, advantages, mask = ids.to(device), advantages.to(device), mask.to(device)
    objective = fastrl.PolicyObjective(loss_type="dapo", epsilon=0.2)

    def fused(x: Tensor, w: Tensor) -> Tensor:
        out = fastrl.linear_policy_loss(x, w, ids, objective, advantages=advantages, mask=mask, backend=backend)
        return out.loss

    def eager(x: Tensor, w: Tensor) -> Tensor:
        logps = torch.log_softmax(x @ w.T, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        return fastrl.policy_loss(logps, objective, advantages=advantages.to(x.dtype), mask=mask).loss

    truth, _ = _gradients(eager, hidden.double(), weight.double())
    ours, seconds = _gradients(fused, hidden, weight)
    plain, eager_seconds = _gradients(eager, hidden, weight)
    errors = [_relative_error(a, b) for a, b in zip(ours, truth, strict=True)]
    eager_error = max(_relative_error(a, b) for a, b in zip(plain, truth, strict=True))
    name = str(dtype).removeprefix("torch.")
    return Check(backend, name, errors[0], errors[1], errors[2], eager_error, seconds, eager_seconds)


def _gradients(loss_function, hidden: Tensor, weight: Tensor) -> tuple[tuple[Tensor, ...], float]:  # type: ignore[no-untyped-def]
    x, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    seconds = []
    for _ in range(2):  # the first call compiles on a GPU
        x.grad = w.grad = None
        start = time.perf_counter()
        loss = loss_function(x, w)
        loss.backward()
        if loss.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    assert x.grad is not None and w.grad is not None
    return (loss.detach(), x.grad, w.grad), min(seconds)


def _relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max() / truth.abs().max())


def _print_versions() -> Iterator[str]:
    print("versions")
    _line("python", f"{platform.python_version()} ({sys.executable})")
    for package in _PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
            if package in _NEEDED_FOR_TRAINING:
                version += " (training needs it: pip install 'fastrl[train]')"
            elif package == "fastrl":
                version = "runs from a source tree, not installed"
        _line(package, version)
    try:
        from fastrl_kernels import _C  # type: ignore[attr-defined]
    except ImportError as error:
        _line("extension", f"not importable ({error})")
    else:
        build = f"{_C.compiler}; row kernels for {_C.instruction_set()}"
        _line("extension", f"{build}; CUDA {_C.cuda_version or 'not built in'}")
    yield from ()


def _print_devices() -> Iterator[str]:
    print("\ndevices")
    threads = torch.get_num_threads()
    memory = _memory_gib()
    _line("cpu", f"{_processor()}, {os.cpu_count()} cores, torch uses {threads} threads, {memory} memory")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            capability = f"sm_{card.major}{card.minor}"
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
            _line(f"cuda:{index}", f"{card.name}, {capability}, {total:.0f} GiB memory ({free:.0f} free)")
    else:
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        _line("cuda", f"none ({build})")
    yield from ()


def _print_backends() -> Iterator[str]:
    from fastrl_kernels import backends

    print("\nbackends")
    reasons = backends.available()
    for name, reason in reasons.items():
        _line(name, "works" if reason is None else f"no: {reason}")
    native = "triton" if torch.cuda.is_available() else "cpu"
    if reasons.get(native) is not None:
        yield f"the backend for this machine, {native}, does not work: {reasons[native]}"


def _print_rates(calibrate: bool) -> Iterator[str]:
    from fastrl_kernels import planner

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("\nrates that the planner counts with" + ("" if calibrate else " (fastrl doctor --calibrate measures them)"))
    for dtype in (torch.float32, torch.bfloat16):
        costs = planner.calibrate(device, dtype) if calibrate else planner.costs_of(device, dtype)
        rates = f"{costs.gemm / 1e9:,.0f} GFLOP/s in GEMMs, {costs.bandwidth / 1e9:,.0f} GB/s in row passes"
        _line(str(dtype).removeprefix("torch."), f"{rates}, {costs.chunk * 1e3:.2g} ms a chunk ({costs.origin})")
    yield from ()


def _print_self_test() -> Iterator[str]:
    from fastrl_kernels import backends

    tokens = _TOKENS // 8 * 8
    print("\nself-test: fused loss and its gradients against fp64, next to plain PyTorch in the same dtype")
    print(f"  ({tokens} tokens, hidden {_HIDDEN}, vocabulary {_VOCABULARY}; errors relative to the largest fp64 entry)")
    titles = ("loss", "d hidden", "d weight", "PyTorch")
    print(f"  {'backend':<10} {'dtype':<9}", *(f"{title:>9}" for title in titles), f"{'time':>10} {'PyTorch':>9}")
    start = time.perf_counter()
    for name in [name for name, reason in backends.available().items() if reason is None]:
        for dtype in (torch.float32, torch.bfloat16):
            try:
                check = self_test(name, dtype)
            except (RuntimeError, ValueError, TypeError) as error:
                print(f"  {name:<10} {str(dtype).removeprefix('torch.'):<9} failed: {error}")
                yield f"the self-test of {name} in {dtype} failed: {error}"
                continue
            print(
                f"  {name:<10} {check.dtype:<9} {check.loss_error:>9.0e} {check.hidden_error:>9.0e} "
                f"{check.weight_error:>9.0e} {check.eager_error:>9.0e} {check.seconds * 1e3:>7.0f} ms "
                f"{check.eager_seconds * 1e3:>6.0f} ms  {'ok' if check.passed else 'WRONG'}"
            )
            if not check.passed:
                yield f"{name} in {check.dtype} is further from fp64 than {_TOLERANCE:.0f} times plain PyTorch"
    print(f"  took {time.perf_counter() - start:.0f} s")


def _line(name: str, text: str) -> None:
    print(f"  {name:<12} {text}")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{size / 2**30:.0f} GiB"

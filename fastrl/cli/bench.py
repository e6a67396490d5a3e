"""`fastrl bench`: the fused losses against the bare matrix products and against the peers that are installed."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.cli.errors import UserError
from fastrl.suggestions import did_you_mean

if TYPE_CHECKING:
    from fastrl.benchmark.suite import Options, Results

_DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench",
        help="time and memory against the bare matrix products and against other libraries",
        description="Compares with fp64 first, then times everybody in turns. About 15 minutes, with --quick about 2. "
        "Writes results.json, results.md and pictures into --out.",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, no optimizer step")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="what to measure; --ops list shows the names")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="heads; --shapes list shows the names")
    parser.add_argument("--peers", nargs="*", metavar="PEER", help="whom to compare with; --peers list shows the names")
    parser.add_argument(
        "--step", nargs="+", metavar="METHOD", help="optimizer steps that op step runs (default: grpo); --step list"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder (default: %(default)s)")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--tokens", type=int, help="N (on the CPU: at SmolLM2's head; larger heads get fewer)")
    parser.add_argument("--length", type=int, help="tokens of a completion (default: 512 on a GPU, 32 on the CPU)")
    parser.add_argument("--minutes", type=float, help="time to fill (default: 15, with --quick 2)")
    parser.add_argument("--backend", help="force a backend of fastrl's: cpu, triton, cuda, reference")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures and writes. Returns 1 where a result of ours is wrong, otherwise 0."""
    from fastrl.benchmark import suite

    names: dict[str, Sequence[str]] = {
        "ops": suite.OPS,
        "shapes": tuple(suite.SHAPES),
        "peers": suite.PEERS,
        "step": suite.STEP_METHODS,
    }
    for option, valid in names.items():
        if getattr(arguments, option) == ["list"]:
            print("\n".join(valid))
            return 0
    options = _options(arguments, names)
    out: Path = arguments.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} can't be made: {error}") from error
    command = "fastrl " + shlex.join(arguments.argv)

    def say(text: str) -> None:
        _say(text)

    def changed(results: Results) -> None:
        write(results, out, command)

    results = suite.Suite(options, say, changed).run()
    _end_line()
    from fastrl.benchmark.tables import markdown

    print(markdown(results, command))
    for path in write(results, out, command):
        print(f"wrote {path}")
    return 1 if results.failures else 0


def write(results: Results, out: Path, command: str) -> list[Path]:
    """results.json, results.md and the pictures."""
    from fastrl.benchmark.tables import markdown

    content: dict[str, Any] = {"command": command, **asdict(results)}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "results.md").write_text(markdown(results, command))
    paths = [out / "results.json", out / "results.md"]
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        results.absent["pictures"] = f"matplotlib can't be imported: {error}"
        return paths
    from fastrl.benchmark import plots

    return paths + plots.write(results, out)


def _options(arguments: argparse.Namespace, names: dict[str, Sequence[str]]) -> Options:
    import torch

    from fastrl.benchmark.suite import QUICK_PEERS, Options
    from fastrl_kernels import backends

    chosen: dict[str, tuple[str, ...]] = {}
    for option, valid in names.items():
        given = getattr(arguments, option)
        for name in given or ():
            if name not in valid:
                raise UserError(
                    f"--{option}: unknown name {name!r}{did_you_mean(name, valid)}; --{option} list shows all"
                )
        chosen[option] = tuple(valid) if given is None else tuple(name for name in valid if name in given)
    if arguments.quick and arguments.peers is None:
        chosen["peers"] = QUICK_PEERS
    if arguments.step is None:
        chosen["step"] = Options.step
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: cpu or cuda, got {device.type}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here")
    if arguments.backend is not None:
        try:
            backends.choose(arguments.backend, device)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--backend: {error}") from error
    for option in ("tokens", "length", "minutes"):
        value = getattr(arguments, option)
        if value is not None and not value > 0:
            raise UserError(f"--{option}: expected a number above 0, got {value}")
    if not chosen["shapes"]:
        raise UserError("--shapes: none given")
    return Options(
        device, quick=arguments.quick, tokens=arguments.tokens, length=arguments.length, minutes=arguments.minutes,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype), backend=arguments.backend, **chosen,
    )  # fmt: skip


def _say(text: str) -> None:
    """A line that replaces itself on a terminal; elsewhere every line stays."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:158]}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def _end_line() -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)

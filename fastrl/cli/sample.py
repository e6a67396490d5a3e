"""`fastrl sample`: rejection sampling: the best of a model's own completions, as data for `fastrl sft`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastrl.cli.config import Setting, build, read_overrides, read_yaml
from fastrl.cli.errors import UserError
from fastrl.cli.runs import set_aside
from fastrl.cli.sampling import INTERRUPTED, SamplingArguments, sample_all


@dataclass
class SampleArguments(SamplingArguments):
    """Adds to `SamplingArguments`:

    Args:
        output_file: .jsonl or .parquet; the samples it is chosen from lie beside it in <name>.samples.jsonl.
        reward_weights: one per reward function, the reward model last; null: ones. What counts is the weighted sum.
        keep: "best": the best completion of each prompt, "all": every one that is accepted.
        reward_threshold: accept only completions of at least this reward.
        keep_cut_off: accept also completions that did not end within max_completion_length.
    """

    output_file: str = ""
    reward_weights: list[float] | None = None
    keep: Literal["best", "all"] = "best"
    reward_threshold: float | None = None
    keep_cut_off: bool = False


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "sample",
        help="rejection sampling: write the best of n completions as training data",
        description="Sample completions of the prompts of a dataset, reward them, and write the accepted ones as "
        "prompt-completion rows that `fastrl sft` reads. An interrupted command is continued by the same command.",
        epilog="Any key of the file can be given as --key value, which has precedence: "
        + ", ".join(SampleArguments.__dataclass_fields__)
        + ".",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="file with the settings")
    parser.add_argument("--best-of", metavar="N", help="samples per prompt: another name of --num_generations")
    parser.add_argument("--fresh", action="store_true", help="sample anew; earlier samples are kept, renamed")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
    parser.set_defaults(run=run, takes_overrides=True, interrupted=INTERRUPTED)


def run(arguments: argparse.Namespace) -> int:
    """Sample what is missing and write the accepted completions. Returns 0.

    Raises:
        UserError: a setting, the data, the model, a reward function or a file can't be used; or nothing was accepted.
    """
    settings = {**(read_yaml(arguments.config) if arguments.config else {}), **read_overrides(arguments.overrides)}
    if arguments.best_of is not None:
        (count,) = read_overrides(["--best-of", arguments.best_of]).values()
        settings["num_generations"] = Setting(count.value, "--best-of")
    (args,) = build([SampleArguments], settings, required=("model_name_or_path", "dataset_name", "output_file"))

    from fastrl.evaluation import FORMATS, WriteError, accepted, to_bytes, write_file

    output = Path(args.output_file)
    if output.suffix not in FORMATS:
        raise UserError(f"output_file: expected a file that ends in {' or '.join(FORMATS)}, got {output}")
    samples = output.with_suffix(".samples.jsonl")
    if arguments.fresh and samples.exists():
        print(f"the earlier samples are now {set_aside(samples)}", file=sys.stderr)
    sampling = sample_all(args, samples, ("train",), greedy=False)
    names = sampling.reward_names
    weights = args.reward_weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(
            f"reward_weights: expected {len(names)}, one for each of {', '.join(names)}, got {len(weights)}"
        )
    rows = accepted(
        sampling.prompts,
        dict(zip(names, weights, strict=True)),
        keep=args.keep,
        threshold=args.reward_threshold,
        keep_cut_off=args.keep_cut_off,
    )
    if not rows:
        raise UserError(
            f"none of {len(sampling.prompts) * args.num_generations} completions was accepted: lower "
            f"--reward_threshold (now {args.reward_threshold}), or --keep_cut_off true if they are too long; "
            f"the samples in {samples} are kept"
        )
    try:
        write_file(output, to_bytes(rows, output), f"the samples in {samples} are kept")
    except WriteError as error:
        raise UserError(str(error)) from error
    prompts = len({str(row["prompt"]) for row in rows})
    mean = sum(row["reward"] for row in rows) / len(rows)
    print(
        f"{len(rows)} of {len(sampling.prompts) * args.num_generations} completions accepted, for {prompts} of "
        f"{len(sampling.prompts)} prompts; mean reward {mean:.3f}"
    )
    print(f"written: {output}, {samples}", file=sys.stderr)
    return 0

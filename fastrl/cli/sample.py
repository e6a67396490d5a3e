"""`fastrl sample`: a model's own completions as training data: the best for SFT, better and worse ones as pairs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastrl.cli.config import Setting, build, read_overrides, read_yaml
from fastrl.cli.errors import UserError
from fastrl.cli.runs import set_aside
from fastrl.cli.sampling import INTERRUPTED, SamplingArguments, sample_all


@dataclass
class SampleArguments(SamplingArguments):
    """Adds to `SamplingArguments`:

    Args:
        output_file: .jsonl or .parquet; the samples it is chosen from lie beside it in <name>.samples, as JSON
            lines; `datasets` does not take a file of that name for a part of the data.
        reward_weights: one per reward function, the reward model last; null: ones. What counts is the weighted sum.
        format: "prompt-completion": the best completions (rejection sampling), for SFT; "preference": pairs of a better
            and a worse completion of a prompt, for reward models and DPO.
        keep: "best": the best completion of each prompt, or it and the worst; "all": every one that is accepted, or
            every pair of different reward.
        reward_threshold: accept only completions, or pairs whose better one is, of at least this reward.
        keep_cut_off: accept also completions that did not end within max_completion_length.
    """

    output_file: str = ""
    reward_weights: list[float] | None = None
    format: Literal["prompt-completion", "preference"] = "prompt-completion"
    keep: Literal["best", "all"] = "best"
    reward_threshold: float | None = None
    keep_cut_off: bool = False


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "sample",
        help="rejection sampling: write the best of n completions, or pairs of them, as training data",
        description="Sample completions of the prompts of a dataset, reward them, and write the best of each prompt as "
        "prompt-completion rows that `fastrl sft` reads (rejection sampling); or with --format preference the best and "
        "the worst of each prompt as pairs that `fastrl reward` and `fastrl dpo` read, with --keep all every pair of "
        "different reward. An interrupted command is continued by the same command.",
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
    """Sample what is missing and write the accepted completions or pairs. Returns 0.

    Raises:
        UserError: a setting, the data, the model, a reward function or a file can't be used; or there are no rows.
    """
    settings = {**(read_yaml(arguments.config) if arguments.config else {}), **read_overrides(arguments.overrides)}
    if arguments.best_of is not None:
        (count,) = read_overrides(["--best-of", arguments.best_of]).values()
        settings["num_generations"] = Setting(count.value, "--best-of")
    (args,) = build([SampleArguments], settings, required=("model_name_or_path", "dataset_name", "output_file"))

    from fastrl.evaluation import FORMATS, WriteError, accepted, preferences, to_bytes, write_file

    output = Path(args.output_file)
    if output.suffix not in FORMATS:
        raise UserError(f"output_file: expected a file that ends in {' or '.join(FORMATS)}, got {output}")
    samples = output.with_suffix(".samples")
    if arguments.fresh and samples.exists():
        print(f"the earlier samples are now {set_aside(samples)}", file=sys.stderr)
    sampling = sample_all(args, samples, ("train",), greedy=False)
    names = sampling.reward_names
    weights = args.reward_weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(
            f"reward_weights: expected {len(names)}, one for each of {', '.join(names)}, got {len(weights)}"
        )
    choose = accepted if args.format == "prompt-completion" else preferences
    of_prompts = [
        choose(
            [prompt],
            dict(zip(names, weights, strict=True)),
            keep=args.keep,
            threshold=args.reward_threshold,
            keep_cut_off=args.keep_cut_off,
        )
        for prompt in sampling.prompts
    ]
    rows = [row for own in of_prompts for row in own]
    given = (sample["rewards"] for prompt in sampling.prompts for sample in prompt["samples"])
    if not any(value is not None for rewards in given for value in rewards.values()):
        raise UserError(f"{', '.join(names)} gave no completion a reward; the samples in {samples} are kept")
    if not rows:
        raise UserError(f"{_nothing(args, len(of_prompts))}; the samples in {samples} are kept")
    try:
        write_file(output, to_bytes(rows, output), f"the samples in {samples} are kept")
    except WriteError as error:
        raise UserError(str(error)) from error
    print(_summary(args, rows, sum(map(bool, of_prompts)), len(of_prompts)))
    print(f"written: {output}, {samples}", file=sys.stderr)
    return 0


def _nothing(args: SampleArguments, prompts: int) -> str:
    ways = ["--keep_cut_off true if they are too long"]
    if args.reward_threshold is not None:
        ways.insert(0, f"lower --reward_threshold (now {args.reward_threshold:g})")
    if args.format == "preference":
        ways.insert(0, "raise --num_generations or --temperature")
        nothing = f"no two completions of any of {prompts} prompts make a pair, their rewards must differ"
    else:
        nothing = f"none of {prompts * args.num_generations} completions was accepted"
    return f"{nothing}: {', or '.join(ways)}"


def _summary(args: SampleArguments, rows: Sequence[Mapping[str, Any]], used: int, prompts: int) -> str:
    def mean(column: str) -> str:
        return f"{sum(row[column] for row in rows) / len(rows):.3f}"

    if args.format == "preference":
        return (
            f"{len(rows)} pairs for {used} of {prompts} prompts, {prompts - used} gave none; mean reward "
            f"{mean('chosen_reward')} chosen, {mean('rejected_reward')} rejected"
        )
    return (
        f"{len(rows)} of {prompts * args.num_generations} completions accepted, for {used} of {prompts} prompts; "
        f"mean reward {mean('reward')}"
    )

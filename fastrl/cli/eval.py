"""`fastrl eval`: what a model answers, greedily and sampled many times, and what choosing among the samples gains."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from fastrl.cli.config import build, read_overrides, read_yaml
from fastrl.cli.errors import UserError
from fastrl.cli.runs import set_aside
from fastrl.cli.sampling import INTERRUPTED, SamplingArguments, sample_all


@dataclass
class EvalArguments(SamplingArguments):
    """Adds to `SamplingArguments`:

    Args:
        output_dir: folder of samples.jsonl, results.json and accuracy.png.
        verifier: which of reward_funcs says what is correct; null: the first.
        threshold: the reward from which a sample is correct.
        greedy: also answer each prompt greedily.
    """

    output_dir: str = ""
    verifier: str | None = None
    threshold: float = 1.0
    greedy: bool = True


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "eval",
        help="accuracy of a model: greedy, pass@k, best of n, majority vote",
        description="Sample a model's answers to the prompts of a dataset and write the accuracy of greedy answers, "
        "pass@k, best of n and majority votes against n. The first of reward_funcs says what is correct; the others, "
        "and the reward model, choose. An interrupted evaluation is continued by the same command.",
        epilog="Any key of the file can be given as --key value, which has precedence: "
        + ", ".join(EvalArguments.__dataclass_fields__)
        + ".",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="file with the settings")
    parser.add_argument("--fresh", action="store_true", help="start anew; what is in output_dir is kept, renamed")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
    parser.set_defaults(run=run, takes_overrides=True, interrupted=INTERRUPTED)


def run(arguments: argparse.Namespace) -> int:
    """Sample what is missing, write results.json and accuracy.png, print the table. Returns 0.

    Raises:
        UserError: a setting, the data, the model, a reward function or output_dir can't be used.
    """
    settings = {**(read_yaml(arguments.config) if arguments.config else {}), **read_overrides(arguments.overrides)}
    required = ("model_name_or_path", "dataset_name", "reward_funcs", "output_dir")
    (args,) = build([EvalArguments], settings, required=required)
    if not args.reward_funcs:
        raise UserError("reward_funcs: expected at least one function, the verifier, got none")
    folder = Path(args.output_dir)
    if arguments.fresh and folder.exists():
        print(f"the earlier evaluation is now {set_aside(folder)}", file=sys.stderr)
    sampling = sample_all(args, folder / "samples.jsonl", ("test", "train"), greedy=args.greedy)

    from fastrl.evaluation import WriteError, plot_evaluation, summarise, write_file

    names = sampling.reward_names
    verifier = args.verifier or names[0]
    if verifier not in names:
        raise UserError(f"verifier: expected one of {', '.join(names)}, got {verifier!r}")
    try:
        evaluation = summarise(
            sampling.prompts,
            verifier,
            [name for name in names if name != verifier],
            reward_models=[sampling.reward_model] if sampling.reward_model else [],
            threshold=args.threshold,
        )
        results = json.dumps({"settings": asdict(args), **evaluation.to_json()}, indent=2).encode() + b"\n"
        kept = f"the samples in {sampling.file.path} are kept"
        title = f"{args.model_name_or_path} on {args.dataset_name}, {evaluation.prompts} prompts"
        write_file(folder / "results.json", results, kept)
        write_file(folder / "accuracy.png", plot_evaluation(evaluation, title), kept)
    except (ValueError, WriteError) as error:
        raise UserError(str(error)) from error
    print(evaluation.table())
    print(f"written: {folder / 'results.json'}, {folder / 'accuracy.png'}, {sampling.file.path}", file=sys.stderr)
    return 0

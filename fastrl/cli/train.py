"""The training commands, `fastrl sft` and so on: train from a YAML file, resume, and write the page of the run."""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.cli.errors import UserError, raised_by_fastrl
from fastrl.cli.methods import METHODS, CommandArguments, GRPOScriptArguments, Method
from fastrl.cli.sources import check_split, load_splits, model_path
from fastrl.scripts.arguments import get_dataset, get_peft_config, get_quantization_config

if TYPE_CHECKING:
    from datasets import DatasetDict

# Options of TRL's commands that go to `accelerate launch`.
_LAUNCH = ("accelerate_config", "config_file", "num_processes", "num_machines", "machine_rank", "mixed_precision")


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register a command for each method."""
    for method in METHODS:
        config = method.config.rpartition(":")[2]
        parser = subparsers.add_parser(
            method.name,
            aliases=method.aliases,
            help=method.help,
            description=f"{method.help[0].upper()}{method.help[1:]}.",
            epilog="Any key of the file can be given as --key value, which has precedence: the fields of "
            f"fastrl.{config} (TRL's names), and {', '.join(method.script.__dataclass_fields__)}.",
            allow_abbrev=False,
        )
        parser.add_argument("--config", metavar="FILE.yaml", help="file with the settings")
        parser.add_argument(
            "--resume", action="store_true", help="continue from output_dir's newest complete checkpoint"
        )
        parser.add_argument("--fresh", action="store_true", help="start anew; an earlier run in output_dir is renamed")
        parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
        hint = "; --resume continues from the newest checkpoint"
        parser.set_defaults(run=functools.partial(run, method), takes_overrides=True, interrupted=hint)


def run(method: Method, arguments: argparse.Namespace) -> int:
    """Train (or resume, or find the run finished), save the model to output_dir and write the report. Returns 0.

    Raises:
        UserError: anything wrong with the configuration, the data, or the state of output_dir.
    """
    script, args = read_arguments(method, arguments.config, arguments.overrides)
    own = script.trainer_arguments()
    from fastrl.cli.runs import choose_start, complete_from_checkpoint

    dataset = _load_data(script)
    name = "the mixture" if script.datasets else str(script.dataset_name)
    check_split(dataset, script.dataset_train_split, "dataset_train_split", name)
    if args.eval_strategy != "no":
        check_split(dataset, script.dataset_test_split, "dataset_test_split", name)
    base_model = model_path(str(script.model_name_or_path))
    output_dir = Path(str(args.output_dir))
    named = script.resume_from_checkpoint
    start = choose_start(
        output_dir,
        functools.partial(_check, method, args),
        resume=arguments.resume or named is True,
        fresh=arguments.fresh,
        checkpoint=named if isinstance(named, str) else None,
    )
    _say(start.message)
    if start.checkpoint is None or not _is_finished(start.checkpoint, args):
        _train(method, script, args, base_model, dataset, own, start.checkpoint)
    else:
        _say("this run is finished: use --fresh to train anew, or a higher max_steps to train on")
        if args.should_save:
            complete_from_checkpoint(output_dir, start.checkpoint)
    if script.report and args.should_save:
        gc.collect()  # the trainer's model, gradients and optimizer
        _report(script, args, base_model, dataset)
    return 0


def read_arguments(method: Method, config: str | None, overrides: list[str]) -> tuple[CommandArguments, Any]:
    """The configuration of a run from its file and the overrides of the command line.

    Raises:
        UserError: see `fastrl.cli.config`; or a package that training needs is missing.
    """
    from fastrl.cli.config import build, read_overrides, read_yaml

    settings = {**(read_yaml(config) if config else {}), **read_overrides(overrides)}
    for name in _LAUNCH:
        if name in settings:
            option = "config_file" if name == "accelerate_config" else name
            raise UserError(
                f"{settings[name].place}: {name} is for accelerate, fastrl starts no processes; write: accelerate "
                f"launch --{option} ... -m fastrl {method.name} ..."
            )
    if "env" in settings:  # as in TRL's files; before the imports of transformers and the hub, which read it
        variables = settings.pop("env")
        if not isinstance(variables.value, dict):
            raise UserError(f"{variables.place}: env: expected a mapping of names to values")
        os.environ.update({str(name): str(value) for name, value in variables.value.items()})
    data = "datasets" if "datasets" in settings else "dataset_name"
    script, args = build([method.script, method.config_class()], settings, required=("model_name_or_path", data))
    if not (script.datasets or script.dataset_name):
        raise UserError(f"{settings[data].place}: {data}: expected something to train on, got nothing")
    return script, args


def _load_data(script: CommandArguments) -> DatasetDict:
    if not script.datasets:
        return load_splits(str(script.dataset_name), script.dataset_config)
    for name in ("dataset_name", "dataset_config"):
        if getattr(script, name) is not None:
            _say(f"{name} is not read: datasets has precedence")
    try:
        return get_dataset(script)
    except (OSError, ValueError) as error:
        raise UserError(f"datasets: {error}") from error


def _train(
    method: Method,
    script: CommandArguments,
    args: Any,
    model: str,
    dataset: DatasetDict,
    own: dict[str, Any],
    checkpoint: Path | None,
) -> None:
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # there is no device to copy to, and torch warns of it
    try:
        init = {
            "dtype": script.dtype,
            "revision": script.model_revision,
            "attn_implementation": script.attn_implementation,
            "quantization_config": get_quantization_config(script),
            **(args.model_init_kwargs or {}),
        }
        args.model_init_kwargs = {key: value for key, value in init.items() if value is not None}
        trainer = method.trainer_class()(
            model=model,
            args=args,
            train_dataset=dataset[script.dataset_train_split],
            eval_dataset=dataset[script.dataset_test_split] if args.eval_strategy != "no" else None,
            processing_class=_tokenizer(script, args, model),
            peft_config=get_peft_config(script),
            **own,
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
    from fastrl.trainers.checkpoint_files import CheckpointWriteError

    trainer.record.settings = asdict(script)
    try:
        named = script.resume_from_checkpoint
        if not isinstance(named, str):
            named = checkpoint is not None  # an older one, if that one is of another run
        trainer.train(resume_from_checkpoint=named)
        trainer.save_model(args.output_dir)
        trainer.save_state()
    except CheckpointWriteError as error:
        raise UserError(str(error)) from error
    except (ValueError, TypeError, ConnectionError) as error:
        if not raised_by_fastrl(error):
            raise
        raise UserError(f"{error}{_place_of(error.__cause__)}") from error
    _say(f"model saved to {args.output_dir}")


def _report(script: CommandArguments, args: Any, base_model: str, dataset: DatasetDict) -> None:
    if isinstance(script, GRPOScriptArguments):
        from fastrl.report import write_report
        from fastrl.rewards import with_reward_models

        test = dataset.get(script.dataset_test_split, dataset[script.dataset_train_split])
        write_report(
            args.output_dir,
            base_model=base_model,
            args=args,
            reward_funcs=with_reward_models(script.trainer_arguments()["reward_funcs"]),
            rows=test.select(range(min(script.report_prompts, len(test)))),
            parts=script.report,
            dtype=script.dtype,
        )
    else:
        from fastrl.report import write_page

        for path in write_page(args.output_dir):
            print(path)


def _tokenizer(script: CommandArguments, args: Any, model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model, revision=script.model_revision, trust_remote_code=args.trust_remote_code
    )


def _check(method: Method, args: Any, checkpoint: Path) -> None:
    """Raises `CheckpointError` for what is seen to be of another run without its model; the trainer sees the rest."""
    from fastrl.trainers.checkpoint_files import check_run

    seeds = {"seed": args.seed, "data_seed": args.data_seed}
    check_run(checkpoint, {"trainer": method.trainer.rpartition(":")[2]}, {} if args.ignore_data_skip else seeds)


def _is_finished(checkpoint: Path, args: Any) -> bool:
    from fastrl.cli.runs import read_trainer_state

    state = read_trainer_state(checkpoint)
    if args.max_steps > 0:
        return bool(state["global_step"] >= args.max_steps)
    return bool(state["epoch"] >= args.num_train_epochs)


def _place_of(cause: BaseException | None) -> str:
    frames = traceback.extract_tb(cause.__traceback__) if cause is not None else None
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)

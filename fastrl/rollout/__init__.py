"""Engines that sample completions."""

from fastrl.rollout.engine import Completions, RolloutEngine, SamplingParams
from fastrl.rollout.transformers_engine import TransformersEngine

__all__ = ["Completions", "RolloutEngine", "SamplingParams", "TransformersEngine"]

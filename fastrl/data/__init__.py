"""Models and data for examples and tests: a real chat model from a pip package, a tiny one, procedural tasks."""

from fastrl.data.arithmetic import arithmetic_dataset
from fastrl.data.demo_model import (
    DemoModelError,
    demo_model_path,
    find_demo_gguf,
    greedy_answer,
    load_demo_model,
)
from fastrl.data.procedural import TaskError, reasoning_gym_dataset, task_verifier
from fastrl.data.tiny_model import tiny_model_path

__all__ = [
    "DemoModelError",
    "TaskError",
    "arithmetic_dataset",
    "demo_model_path",
    "find_demo_gguf",
    "greedy_answer",
    "load_demo_model",
    "reasoning_gym_dataset",
    "task_verifier",
    "tiny_model_path",
]

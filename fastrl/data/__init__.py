"""Models and prompts for examples and tests: a real chat model from a pip package, procedural tasks with verifiers."""

from fastrl.data.demo_model import (
    DemoModelError,
    demo_model_path,
    find_demo_gguf,
    greedy_answer,
    load_demo_model,
)
from fastrl.data.procedural import TaskError, reasoning_gym_dataset, task_verifier

__all__ = [
    "DemoModelError",
    "TaskError",
    "demo_model_path",
    "find_demo_gguf",
    "greedy_answer",
    "load_demo_model",
    "reasoning_gym_dataset",
    "task_verifier",
]

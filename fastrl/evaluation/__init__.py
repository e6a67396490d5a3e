"""Test-time scaling: what a model answers, sampled many times, and what choosing among the samples gains."""

from fastrl.evaluation.estimators import (
    best_of_n,
    majority_vote,
    mean_and_error,
    pass_at_k,
    powers_of_two,
    weighted_majority_vote,
)
from fastrl.evaluation.evaluation import Estimate, Evaluation, summarise
from fastrl.evaluation.plot import plot_evaluation
from fastrl.evaluation.sample_file import (
    PromptSamples,
    Sample,
    SampleFile,
    SampleFileError,
    WriteError,
    write_file,
)
from fastrl.evaluation.sampling import PromptSampler, Sampled, rewards_of, sample
from fastrl.evaluation.selection import FORMATS, accepted, preferences, to_bytes

__all__ = [
    "FORMATS",
    "Estimate",
    "Evaluation",
    "PromptSampler",
    "PromptSamples",
    "Sample",
    "SampleFile",
    "SampleFileError",
    "Sampled",
    "WriteError",
    "accepted",
    "best_of_n",
    "majority_vote",
    "mean_and_error",
    "pass_at_k",
    "plot_evaluation",
    "powers_of_two",
    "preferences",
    "rewards_of",
    "sample",
    "summarise",
    "to_bytes",
    "weighted_majority_vote",
    "write_file",
]

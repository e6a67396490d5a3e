"""Test-time scaling: what a model answers, sampled many times, and what choosing among the samples gains."""

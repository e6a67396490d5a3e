"""The stages of `bench/gpu_check.py`: each runs in a process of its own and leaves a JSON file."""

"""Generation beside the optimizer step: a thread samples the next batches while the caller trains on this one."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from fastrl.rollout.engine import Completions, RolloutEngine, SamplingParams

logger = logging.getLogger(__name__)


class TaggedCompletions(NamedTuple):
    """A batch, and how old the policy is that sampled it."""

    completions: Completions
    version: int  # `AsyncRollouts.version` when it was sampled
    staleness: int  # weight updates since then: 0 is on policy


class _Request(NamedTuple):
    prompt_ids: Sequence[Sequence[int]]
    num_generations: int
    sampling: SamplingParams


class AsyncRollouts:
    """Runs an engine's `generate` in a thread of its own. One optimizer step on a batch, `max_staleness` = 1:

        rollouts.sync_weights(model)           # waits for the generation that is running; version n
        batch = rollouts.get()                 # sampled by version n - 1 or n
        rollouts.submit(next_prompts, G, sampling)
        ...                                    # train on batch, while next_prompts are completed by version n

    `max_staleness` batches are submitted before the first step. What is trained on comes from an older policy, so
    `SamplingParams.logps` should be on and the importance correction (`fastrl.RolloutCorrection`) used with it.

    Args:
        engine: used by the thread, and by `sync_weights` when the thread is idle.
        model: the one that is trained; only to refuse an engine that samples from its very parameters, which the
            optimizer would change under it. `TransformersEngine` on a copy of the model is fine, but torch's random
            state is then used by two threads: no two runs are the same.
        max_staleness: the most batches that may be pending, and the most weight updates a batch may be behind.

    Attributes:
        version: the number of `sync_weights` so far.

    Use it in a `with` statement, or `close` it: then an exception or Ctrl-C leaves no generation behind.

    Raises:
        ValueError: max_staleness below 1, or an engine that shares its weights with the model.
    """

    def __init__(self, engine: RolloutEngine, model: nn.Module, *, max_staleness: int = 1) -> None:
        if max_staleness < 1:
            raise ValueError(f"max_staleness: expected at least 1, got {max_staleness} (0 is not asynchronous)")
        if hasattr(engine, "shares_weights_with") and engine.shares_weights_with(model):
            raise ValueError(
                f"engine: {type(engine).__name__} samples from the parameters that are trained, so it cannot run "
                "beside the optimizer; use vLLM, or an engine on a copy of the model"
            )
        self.engine = engine
        self.max_staleness = max_staleness
        self.version = 0
        self._changed = threading.Condition()
        self._requests: deque[_Request] = deque()
        self._results: deque[tuple[Completions | BaseException, int]] = deque()
        self._running = self._waiting = self._closed = False
        self._thread = threading.Thread(target=self._run, name="fastrl-rollouts", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Batches submitted and not yet taken."""
        with self._changed:
            return len(self._requests) + self._running + len(self._results)

    def submit(self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams) -> None:
        """Has a batch sampled in the background. Without a seed one is drawn here from torch's random state.

        Raises:
            RuntimeError: `max_staleness` batches are pending, or it is closed.
        """
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=int(torch.randint(2**31, ())))
        with self._changed:
            self._check_open()
            if self.pending >= self.max_staleness:
                raise RuntimeError(f"submit: {self.pending} batches are pending, all that max_staleness allows")
            self._requests.append(_Request(prompt_ids, num_generations, sampling))
            self._changed.notify_all()

    def get(self) -> TaggedCompletions:
        """The oldest batch, waited for.

        Raises:
            RuntimeError: nothing was submitted, it is closed, or the batch is more than `max_staleness` updates old
                (`sync_weights` was called more often than `get`). And whatever the engine raised for that batch.
        """
        with self._changed:
            self._check_open()
            if not self.pending:
                raise RuntimeError("get: nothing was submitted")
            self._changed.wait_for(lambda: self._results or self._closed)
            self._check_open()
            result, version = self._results.popleft()
            staleness = self.version - version
        if isinstance(result, BaseException):
            raise result
        if staleness > self.max_staleness:
            raise RuntimeError(
                f"get: the batch is {staleness} weight updates old, max_staleness is {self.max_staleness}"
            )
        return TaggedCompletions(result, version, staleness)

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams
    ) -> Completions:
        """Samples at once, between two batches: for an evaluation, say. See `RolloutEngine.generate`."""
        with self._between_batches():
            return self.engine.generate(prompt_ids, num_generations, sampling)

    def sync_weights(self, model: nn.Module) -> None:
        """Gives the engine the weights of `model`, between two batches; batches that start later sample from them."""
        with self._between_batches():
            self.engine.sync_weights(model)
            self.version += 1

    def refresh(self, model: nn.Module) -> None:
        """The same ahead of time, for a `generate` between two updates (an evaluation): no update is counted, since
        `sync_weights` with these very weights comes next."""
        with self._between_batches():
            self.engine.sync_weights(model)

    @contextmanager
    def _between_batches(self) -> Iterator[None]:
        with self._changed:
            self._check_open()
            self._waiting = True  # the thread begins nothing new
            try:
                self._changed.wait_for(lambda: not self._running)
                yield
            finally:
                self._waiting = False
                self._changed.notify_all()

    def close(self, timeout: float = 60.0) -> None:
        """Drops what is pending and ends the thread; a generation that is running gets `timeout` seconds to end."""
        with self._changed:
            self._closed = True
            self._requests.clear()
            self._results.clear()
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning("a generation is still running after %g s; it is left to end with the process", timeout)

    def __enter__(self) -> AsyncRollouts:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("AsyncRollouts is closed")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._requests and not self._waiting))
                if self._closed:
                    return
                request, version = self._requests.popleft(), self.version
                self._running = True
            result: Completions | BaseException
            try:
                result = self.engine.generate(*request)
            except BaseException as error:  # the caller's, in `get`
                result = error
            with self._changed:
                self._running = False
                if not self._closed:
                    self._results.append((result, version))
                self._changed.notify_all()

"""Rollouts that are sampled while earlier ones are trained on."""

from collections import deque
from collections.abc import Callable, Sequence

from torch import nn
from transformers import TrainerState

from fastrl.rollout import AsyncRollouts
from fastrl.trainers.prompts import Example
from fastrl.trainers.rollout_collector import RolloutCollector, Samples


class RolloutsAhead:
    """Keeps `max_staleness` rollouts of a run under way. The collector's engine is the asynchronous one until `close`.

    Args:
        collector: samples with an engine that does not share its weights with `model`.
        model: the one that is trained.
        examples_of: this process's examples of a rollout, by its number.
        first: the rollout that is next.
        last: the number after the last rollout of the run.
    """

    def __init__(
        self,
        collector: RolloutCollector,
        model: nn.Module,
        max_staleness: int,
        examples_of: Callable[[int], list[Example]],
        first: int,
        last: int,
    ) -> None:
        self.collector, self.examples_of = collector, examples_of
        self._engine = collector.engine
        self._rollouts = AsyncRollouts(self._engine, model, max_staleness=max_staleness)
        self._next, self._last = first, last
        self._announced: deque[list[int]] = deque()  # the examples of what is pending
        collector.engine = self._rollouts

    def collect(self, examples: Sequence[Example], model: nn.Module, state: TrainerState) -> Samples:
        """The next rollout, of these examples; the ones after it are sampled from the weights of now.

        Raises:
            RuntimeError: other examples than were announced.
        """
        self._rollouts.sync_weights(model)
        self._submit()
        expected = self._announced.popleft()
        if [example.position for example in examples] != expected:
            raise RuntimeError(f"the rollout was to have the examples {expected}; async_rollouts needs that order kept")
        tagged = self._rollouts.get()
        self._submit()
        self.collector.metrics.add("train", {"sampling/staleness": tagged.staleness})
        return self.collector.collect(examples, "train_dataset", "train", state, tagged.completions)

    def refresh(self, model: nn.Module) -> None:
        """What is sampled between two rollouts is sampled from the weights of now."""
        self._rollouts.refresh(model)

    def _submit(self) -> None:
        while self._next < self._last and self._rollouts.pending < self._rollouts.max_staleness:
            examples = self.examples_of(self._next)
            self._rollouts.submit(*self.collector.request(examples, "train_dataset", "train"))
            self._announced.append([example.position for example in examples])
            self._next += 1

    def close(self) -> None:
        """Drops what is pending; the collector has its own engine again."""
        self._rollouts.close()
        self.collector.engine = self._engine

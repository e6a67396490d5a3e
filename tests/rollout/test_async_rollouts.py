"""AsyncRollouts: it overlaps, keeps order and staleness, passes errors on, and ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny_runs import tiny_model
from torch import nn

from fastrl.rollout import AsyncRollouts, Completions, SamplingParams, TransformersEngine

SAMPLING = SamplingParams(max_tokens=4, seed=1)
MODEL = nn.Linear(1, 1)


class SlowEngine:
    """A completion is the engine's version and the prompt; `gate` holds generation back, `wrong` makes it fail."""

    def __init__(self) -> None:
        self.version = 0
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.wrong: Exception | None = None
        self.seeds: list[int | None] = []
        self.busy = self.synced_while_busy = False

    def generate(self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams) -> Any:
        """See RolloutEngine."""
        self.busy = True
        version = self.version
        self.seeds.append(sampling.seed)
        self.started.set()
        assert self.gate.wait(20)
        self.busy = False
        if self.wrong is not None:
            raise self.wrong
        return Completions([[version, *ids] for ids in prompt_ids])

    def sync_weights(self, model: nn.Module) -> None:
        """Counts."""
        self.synced_while_busy |= self.busy
        self.version += 1


@pytest.mark.parametrize("k", [1, 3])
def test_order_versions_and_bounded_staleness(k: int) -> None:
    engine = SlowEngine()
    with AsyncRollouts(engine, MODEL, max_staleness=k) as rollouts:
        for step in range(k):
            rollouts.submit([[step]], 1, SAMPLING)
        staleness = []
        for step in range(12):
            rollouts.sync_weights(MODEL)
            batch = rollouts.get()
            rollouts.submit([[step + k]], 1, SAMPLING)
            assert batch.completions.ids == [[batch.version, step]]
            assert batch.staleness == rollouts.version - batch.version <= k
            staleness.append(batch.staleness)
        assert rollouts.version == 12 and not engine.synced_while_busy
        if k == 1:  # what was submitted after an update waits for no other
            assert all(s <= 1 for s in staleness)


def test_generation_overlaps_the_callers_work() -> None:
    engine = SlowEngine()
    engine.gate.clear()
    with AsyncRollouts(engine, MODEL) as rollouts:
        rollouts.submit([[7]], 1, SAMPLING)
        assert engine.started.wait(10)  # it runs while this thread does something else
        assert engine.busy and rollouts.pending == 1
        syncing = threading.Thread(target=rollouts.sync_weights, args=(MODEL,))
        syncing.start()
        time.sleep(0.05)
        assert syncing.is_alive() and engine.version == 0  # an update waits for the generation to end
        engine.gate.set()
        syncing.join(10)
        batch = rollouts.get()
        assert (batch.version, batch.staleness) == (0, 1) and not engine.synced_while_busy


def test_an_update_goes_before_the_next_batch() -> None:
    engine = SlowEngine()
    engine.gate.clear()
    with AsyncRollouts(engine, MODEL, max_staleness=2) as rollouts:
        rollouts.submit([[0]], 1, SAMPLING)
        rollouts.submit([[1]], 1, SAMPLING)
        assert engine.started.wait(10)
        threading.Timer(0.1, engine.gate.set).start()
        rollouts.sync_weights(MODEL)
        assert [rollouts.get().version for _ in range(2)] == [0, 1]


def test_generate_at_once_waits_for_the_batch_that_runs_and_disturbs_none() -> None:
    engine = SlowEngine()
    engine.gate.clear()
    with AsyncRollouts(engine, MODEL, max_staleness=2) as rollouts:
        rollouts.submit([[0]], 1, SAMPLING)
        rollouts.submit([[1]], 1, SAMPLING)
        assert engine.started.wait(10)
        threading.Timer(0.1, engine.gate.set).start()
        evaluated = rollouts.generate([[9]], 1, SamplingParams(max_tokens=4, seed=77))
        assert evaluated.ids == [[0, 9]] and engine.seeds[:2] == [1, 77]  # before the batch that had not begun
        assert [rollouts.get().completions.ids for _ in range(2)] == [[[0, 0]], [[0, 1]]]


def test_errors_reach_the_caller_in_their_place() -> None:
    engine = SlowEngine()
    with AsyncRollouts(engine, MODEL, max_staleness=2) as rollouts:
        rollouts.submit([[0]], 1, SAMPLING)
        while rollouts.engine.seeds != [1] or engine.busy:  # type: ignore[attr-defined]
            time.sleep(0.001)
        engine.wrong = RuntimeError("the engine broke")
        rollouts.submit([[1]], 1, SAMPLING)
        assert rollouts.get().completions.ids == [[0, 0]]
        with pytest.raises(RuntimeError, match="the engine broke"):
            rollouts.get()
        engine.wrong = None
        rollouts.submit([[2]], 1, SAMPLING)  # and it goes on
        assert rollouts.get().completions.ids == [[0, 2]]


def test_misuse_is_refused() -> None:
    engine = SlowEngine()
    with pytest.raises(ValueError, match="max_staleness: expected at least 1, got 0"):
        AsyncRollouts(engine, MODEL, max_staleness=0)
    with AsyncRollouts(engine, MODEL) as rollouts:
        with pytest.raises(RuntimeError, match="get: nothing was submitted"):
            rollouts.get()
        rollouts.submit([[0]], 1, SAMPLING)
        with pytest.raises(RuntimeError, match="submit: 1 batches are pending"):
            rollouts.submit([[1]], 1, SAMPLING)
        while not engine.seeds or engine.busy:
            time.sleep(0.001)
        rollouts.sync_weights(MODEL)
        rollouts.sync_weights(MODEL)
        with pytest.raises(RuntimeError, match="get: the batch is 2 weight updates old, max_staleness is 1"):
            rollouts.get()
    for call in (rollouts.get, lambda: rollouts.submit([[0]], 1, SAMPLING), lambda: rollouts.sync_weights(MODEL)):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_seeds_are_drawn_where_the_random_state_is_saved() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        engine = SlowEngine()
        with AsyncRollouts(engine, MODEL) as rollouts:
            for _ in range(2):
                rollouts.submit([[0]], 1, SamplingParams(max_tokens=1))
                rollouts.get()
        drawn.append(engine.seeds)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 2 and None not in drawn[0]


def test_engine_on_the_trained_parameters_is_refused_and_one_on_a_copy_works() -> None:
    model = tiny_model()
    engine = TransformersEngine(model, eos_token_ids=[2], pad_token_id=0)
    with pytest.raises(ValueError, match="engine: TransformersEngine samples from the parameters that are trained"):
        AsyncRollouts(engine, model)
    apart = TransformersEngine(tiny_model(), eos_token_ids=[2], pad_token_id=0)
    sampling = SamplingParams(max_tokens=6, temperature=0)
    with AsyncRollouts(apart, model) as rollouts:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        rollouts.sync_weights(model)
        rollouts.submit([[6, 7]], 2, sampling)
        assert rollouts.get().completions == engine.generate([[6, 7]], 2, sampling)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that a shell starts in the background ignores SIGINT, and so does Python in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_waiting_leaves_no_thread_behind(interruptible: None) -> None:
    engine = SlowEngine()
    engine.gate.clear()
    with pytest.raises(KeyboardInterrupt), AsyncRollouts(engine, MODEL, max_staleness=2) as rollouts:
        rollouts.submit([[0]], 1, SAMPLING)
        rollouts.submit([[1]], 1, SAMPLING)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        threading.Timer(2.0, engine.gate.set).start()
        rollouts.get()
    assert not any(thread.name == "fastrl-rollouts" for thread in threading.enumerate())
    assert len(engine.seeds) == 1  # the batch that had not begun was dropped

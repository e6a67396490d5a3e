"""Calls of the user's functions, sync and async: in turn, or in parallel with a time limit for each.

A thread can't be killed. A call that runs out of its time is left behind in a daemon thread, which ends with the
process and does not hold it up; what it still returns is dropped.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

Call = Callable[[], Any]
_PATIENCE = 60.0  # seconds without a result after which a call without a limit is mentioned


class CallTimeoutError(TimeoutError):
    """A call did not return within its time limit."""


class CallRunner:
    """Runs calls and gives back, for each, its result or its exception.

    Args:
        timeout: seconds that each call may take. None: no limit, and sync functions are called in turn in the calling
            thread, so that what needs this thread (signals, a connection of sqlite) works.
        workers: calls at a time where there is a limit; each is in a thread of its own, with the calling thread's CUDA
            device and grad mode.

    Async functions run concurrently, on one event loop that lives as long as the runner (clients that keep connections
    depend on it), unless a function blocks it past its limit: from then on each call has a loop of its own.

    Raises:
        ValueError: timeout or workers is not positive.
    """

    def __init__(self, timeout: float | None, workers: int) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"reward_timeout: expected a positive number of seconds, or None, got {timeout}")
        if workers < 1:
            raise ValueError(f"reward_workers: expected at least 1, got {workers}")
        self.timeout, self.workers = timeout, workers
        self._loop: asyncio.AbstractEventLoop | None = None  # of all calls
        self._blocked = False  # a coroutine that does not yield stopped all others: one loop for each call

    def run(self, calls: Sequence[Call], what: str) -> list[Any]:
        """The result of each call, or the `Exception` that it raised; `CallTimeoutError` where its time ran out.

        What is no `Exception` (KeyboardInterrupt) is raised. `what` names the calls in a message on slow ones.
        """
        outcomes = self._in_turn(calls, what) if self.timeout is None else self._in_parallel(calls)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def _in_turn(self, calls: Sequence[Call], what: str) -> list[Any]:
        message = (
            f"{what}: no result for {_PATIENCE:.0f} s; reward_timeout (seconds) makes a call that hangs be given up"
        )
        notice = threading.Timer(_PATIENCE, logger.warning_once, args=(message,))
        notice.daemon = True
        notice.start()
        try:
            started = []
            for call in calls:
                result = _outcome(call)
                started.append(self._submit(result) if inspect.isawaitable(result) else result)
            return [_outcome(item.result) if isinstance(item, Future) else item for item in started]
        finally:
            notice.cancel()

    def _in_parallel(self, calls: Sequence[Call]) -> list[Any]:
        assert self.timeout is not None
        outcomes: list[Any] = [None] * len(calls)
        waiting = list(enumerate(calls))[::-1]
        running: dict[Future, tuple[int, float]] = {}  # with the call's number and its deadline
        while waiting or running:
            while waiting and len(running) < self.workers:
                index, call = waiting.pop()
                running[self._in_thread(call)] = (index, time.monotonic() + self.timeout)
            soonest = min(deadline for _, deadline in running.values())
            done, _ = concurrent.futures.wait(
                running, timeout=max(0.0, soonest - time.monotonic()), return_when=FIRST_COMPLETED
            )
            for future in done:
                outcomes[running.pop(future)[0]] = _outcome(future.result)
            for future, (index, deadline) in list(running.items()):
                if time.monotonic() >= deadline:
                    del running[future]
                    future.cancel()
                    outcomes[index] = CallTimeoutError(f"no result within {self.timeout:g} s")
                    self._notice_blocked_loop()
        return outcomes

    def _in_thread(self, call: Call) -> Future:
        """A future of the call; cancelling it cancels the coroutine that the call is waiting for, if any."""
        future: Future = Future()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        grad_enabled = torch.is_grad_enabled()

        def work() -> None:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.set_grad_enabled(grad_enabled):
                outcome = _outcome(call, BaseException)  # KeyboardInterrupt, too, is for the thread that waits
                if inspect.isawaitable(outcome):
                    awaited = self._submit(outcome)
                    future.add_done_callback(lambda done: awaited.cancel() if done.cancelled() else None)
                    outcome = _outcome(awaited.result, BaseException)
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # its time ran out
                future.set_result(outcome)

        threading.Thread(target=work, name="fastrl-reward", daemon=True).start()
        return future

    def _submit(self, awaitable: Awaitable[Any]) -> Future:
        loop = _running_loop() if self._blocked or self._loop is None else self._loop
        if not self._blocked:
            self._loop = loop

        async def wait() -> Any:
            try:
                return await awaitable
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # returned: SystemExit, say, would end the loop before anyone heard of it
                return error

        future = asyncio.run_coroutine_threadsafe(wait(), loop)
        if self._blocked:
            future.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
        return future

    def _notice_blocked_loop(self) -> None:
        if self._blocked or self._loop is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(timeout=1.0)
        except concurrent.futures.TimeoutError:
            self._blocked = True


def _running_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fastrl-reward-loop", daemon=True).start()
    return loop


def _outcome(call: Call, caught: type[BaseException] = Exception) -> Any:
    try:
        return call()
    except caught as error:
        return error

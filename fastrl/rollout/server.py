"""An engine behind HTTP: `RolloutServer` on its machine, `ClientEngine`s in the training processes.

    GET  /health     {"version", "model"}: the number of weight updates so far, and the model's sizes
    POST /generate   {"prompt_ids", "num_generations", "sampling", "eos_token_ids"} -> {"ids", "logps",
                     "finish_reasons", "version"}; without eos_token_ids those of the engine end a completion
    POST /weights    a chunked body, each chunk one safetensors file of some weights -> {"version"}

Answers are JSON; an error is {"error": message}, with status 400 for what the caller did wrong. There is no
authentication: whoever reaches the port may use it and replace the weights.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import safetensors.torch
from torch import Tensor

from fastrl.rollout.engine import Completions, RolloutEngine, SamplingParams

logger = logging.getLogger(__name__)


class ServableEngine(RolloutEngine, Protocol):
    """An engine that also loads weights by name."""

    eos_token_ids: list[int]  # what ends a completion of the next `generate`

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """From then on `generate` samples from these weights, all of the model's, under their checkpoint's names."""
        ...


@dataclasses.dataclass(frozen=True)
class _Request:
    prompt_ids: list[list[int]]
    num_generations: int
    sampling: SamplingParams
    eos_token_ids: list[int]
    answer: Future[tuple[Completions, int]] = dataclasses.field(default_factory=Future)

    def joins(self, other: _Request) -> bool:
        """Whether both may run as one batch. With a seed the completions must not depend on who else is there."""
        mine, theirs = ((request.num_generations, request.sampling, request.eos_token_ids) for request in (self, other))
        return mine == theirs and self.sampling.seed is None


@dataclasses.dataclass(frozen=True)
class _Update:
    weights: Iterable[tuple[str, Tensor]]
    answer: Future[int] = dataclasses.field(default_factory=Future)


class RolloutServer:
    """Serves an engine. One thread runs the engine; requests that wait together and sample alike, without a seed, run
    as one batch.

    Args:
        engine: what samples; used by that thread alone.
        host, port: where to listen; port 0: a free one, see `url`.
        sizes: of the engine's model (`model_sizes`), for a client to compare with its own, and "max_model_length".

    `serve()` runs it in the calling thread, where vLLM's engine must run that was made there.
    """

    def __init__(
        self,
        engine: ServableEngine,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        sizes: dict[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        self.sizes = sizes or {}
        self.eos_token_ids = list(engine.eos_token_ids)  # where a request does not say
        self.version = 0
        self._jobs: queue.Queue[_Request | _Update | None] = queue.Queue()
        self._half_loaded: str | None = None  # why the last weight update did not end
        self._http = ThreadingHTTPServer((host, port), type("Handler", (_Handler,), {"server_of": self}))
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._http.server_address[:2]
        return f"http://{host!s}:{port}"

    def serve(self) -> None:
        """Runs until `close` or Ctrl-C."""
        listener = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        listener.start()
        try:
            waiting: deque[_Request | _Update | None] = deque()
            while True:
                self._collect(waiting)
                job = waiting.popleft()
                if job is None:
                    break
                if isinstance(job, _Update):
                    self._answer(job.answer, partial(self._load, job))
                    continue
                together = [job]
                while waiting and isinstance(waiting[0], _Request) and waiting[0].joins(job):
                    together.append(waiting.popleft())  # type: ignore[arg-type]
                self._generate(together)
        except KeyboardInterrupt:
            logger.info("stopped")
        finally:
            self._http.shutdown()
            self._http.server_close()

    def _collect(self, waiting: deque) -> None:
        """Adds all that was asked by now; at least one thing waits afterwards."""
        while not waiting:
            with suppress(queue.Empty):  # a signal that comes just before a wait is seen only after it
                waiting.append(self._jobs.get(timeout=0.5))
        while not self._jobs.empty():
            waiting.append(self._jobs.get())

    def close(self) -> None:
        """Ends `serve` once what was asked before is done."""
        self._jobs.put(None)

    def submit(self, job: Any) -> Any:
        """Waits for the engine's thread to do a job."""
        self._jobs.put(job)
        return job.answer.result()

    @staticmethod
    def _answer(answer: Future, work: Callable[[], Any]) -> None:
        try:
            answer.set_result(work())
        except Exception as error:  # the caller's to see; the server goes on
            theirs = isinstance(error, ValueError | TypeError)
            logger.warning("a request failed: %s", error, exc_info=not theirs)
            answer.set_exception(error)

    def _load(self, job: _Update) -> int:
        self._half_loaded = "it is not over"
        try:
            self.engine.load_weights(job.weights)
        except Exception as error:
            self._half_loaded = f"{type(error).__name__}: {error}"
            raise
        self._half_loaded = None
        self.version += 1
        return self.version

    def _generate(self, together: list[_Request]) -> None:
        batch: Future[Completions] = Future()
        self._answer(batch, lambda: self._sample(together))
        start = 0
        for request in together:
            end = start + len(request.prompt_ids) * request.num_generations
            if batch.exception() is not None:
                request.answer.set_exception(batch.exception())
            else:
                part = Completions(*(None if rows is None else rows[start:end] for rows in batch.result()))  # type: ignore[arg-type]
                request.answer.set_result((part, self.version))
            start = end

    def _sample(self, requests: list[_Request]) -> Completions:
        if self._half_loaded is not None:
            raise RuntimeError(f"the last weight update did not end ({self._half_loaded}); send the weights again")
        prompts = [ids for request in requests for ids in request.prompt_ids]
        self.engine.eos_token_ids = requests[0].eos_token_ids
        return self.engine.generate(prompts, requests[0].num_generations, requests[0].sampling)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 300.0  # seconds for the next piece of a body to arrive
    server_of: RolloutServer

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, {"version": self.server_of.version, "model": self.server_of.sizes})
        else:
            self._send(404, {"error": f"no {self.path} here: GET /health, POST /generate, POST /weights"})

    def do_POST(self) -> None:
        work = {"/generate": self._generate, "/weights": self._weights}.get(self.path)
        if work is None:
            return self.do_GET()
        try:
            self._send(200, work())
        except (ValueError, TypeError, KeyError) as error:
            self._send(400, {"error": f"{type(error).__name__}: {error}"})
        except Exception as error:
            self._send(500, {"error": f"{type(error).__name__}: {error}"})

    def _generate(self) -> dict[str, Any]:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        sampling = asked["sampling"]
        sampling["stop"] = tuple(sampling["stop"])
        ends = asked.get("eos_token_ids")
        ends = self.server_of.eos_token_ids if ends is None else list(ends)
        request = _Request(asked["prompt_ids"], asked["num_generations"], SamplingParams(**sampling), ends)
        completions, version = self.server_of.submit(request)
        return {**completions._asdict(), "version": version}

    def _weights(self) -> dict[str, Any]:
        if self.headers.get("Transfer-Encoding") != "chunked":
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            raise ValueError("POST /weights takes a chunked body")
        weights = self._read_weights()
        try:
            return {"version": self.server_of.submit(_Update(weights))}
        finally:
            for _ in weights:  # what a failed update left unread: the caller reads no answer before it has sent all
                pass

    def _read_weights(self) -> Iterator[tuple[str, Tensor]]:
        while True:
            line = self.rfile.readline()
            if not line:
                raise ConnectionError("the connection was lost in the middle of the weights")
            size = int(line, 16)
            if size == 0:
                break
            body = self.rfile.read(size)
            self.rfile.readline()
            if len(body) < size:
                raise ConnectionError("the connection was lost in the middle of the weights")
            yield from safetensors.torch.load(body).items()
        self.rfile.readline()

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Connection", "close")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: a request per rollout is no news."""

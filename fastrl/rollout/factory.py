"""From TRL's arguments (`use_vllm`, `vllm_*`, `use_transformers_continuous_batching`) to an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from fastrl.rollout.client_engine import VLLMClientEngine
from fastrl.rollout.engine import RolloutEngine
from fastrl.rollout.transformers_engine import TransformersEngine
from fastrl.rollout.vllm_engine import VLLMEngine

logger = logging.get_logger(__name__)

_REFUSED: dict[str, dict[str, tuple[Any, str]]] = {  # of each mode; what is the other's has no meaning, as in TRL
    "colocate": {
        "vllm_enable_sleep_mode": (False, "vLLM's memory is not given back between rollouts"),
        "vllm_tensor_parallel_size": (1, "the engine runs on one device"),
        "vllm_model_impl": (
            "vllm",
            "vLLM would change transformers' model classes in this process, and with them the model that is trained; "
            """a server may: fastrl vllm-serve --llm-kwargs '{"model_impl": "transformers"}'""",
        ),
    },
    "server": {"vllm_group_port": (51216, "weights go to the server over HTTP, not through a process group")},
}

_ENGINES = {  # how vLLM runs, where it runs in this process; and the defaults
    "vllm_model_impl": "vllm",
    "vllm_tensor_parallel_size": 1,
    "vllm_enable_sleep_mode": False,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": None,
}


def check_engine_args(args: Any) -> None:
    """Refuses what `make_engine` could not honour; imports nothing of vLLM's. Without `use_vllm` the `vllm_*` arguments
    have no meaning and are not looked at, as in TRL. With a server, those have none that say how vLLM runs: a warning
    names them.

    Raises:
        ValueError: names the argument.
    """
    if not args.use_vllm:
        return
    if args.vllm_mode not in _REFUSED:
        raise ValueError(f"vllm_mode: expected 'colocate' or 'server', got {args.vllm_mode!r}")
    if _continuous_batching(args) is not None:
        raise ValueError("use_transformers_continuous_batching: vLLM batches in its own way; drop it or use_vllm")
    for name, (default, reason) in _REFUSED[args.vllm_mode].items():
        if getattr(args, name) != default:
            raise ValueError(f"{name}: only {default!r} is supported, got {getattr(args, name)!r}: {reason}")
    if args.vllm_mode == "server":
        given = [name for name, default in _ENGINES.items() if getattr(args, name) != default]
        if given:
            logger.warning_once(
                f"{', '.join(given)}: without effect here, as vllm_mode='server': how vLLM runs is said where the "
                "server is started (fastrl vllm-serve)"
            )


def engine_kwargs(args: Any) -> dict[str, Any]:
    """`SamplingParams.engine_kwargs` for the engine of `make_engine(args, ...)`."""
    kwargs = dict(args.generation_kwargs or {})
    if not args.use_vllm:
        return {"cache_implementation": args.cache_implementation, **kwargs} if args.cache_implementation else kwargs
    if args.vllm_structured_outputs_regex is not None:
        kwargs["structured_outputs"] = {"regex": args.vllm_structured_outputs_regex}
    return kwargs


def make_engine(
    args: Any,
    model: nn.Module | Callable[[], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
) -> RolloutEngine:
    """The engine that a config asks for: `TransformersEngine`, or vLLM in this process or behind a server.

    Args:
        args: has TRL's arguments, a `GRPOConfig` say.
        model: the policy, or a function that returns it.
        tokenizer, eos_token_ids, pad_token_id: as for `TransformersEngine`.

    Raises:
        ValueError: see `check_engine_args`. ImportError: vLLM is asked for and not installed.
        RolloutServerError: no server answers within `vllm_server_timeout` seconds, or it runs another model.
    """
    check_engine_args(args)
    if not args.use_vllm:
        return TransformersEngine(
            model,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            tokenizer=tokenizer,
            continuous_batching=_continuous_batching(args),
        )
    policy = model if isinstance(model, nn.Module) else model()
    if args.vllm_mode == "server":
        host = "127.0.0.1" if args.vllm_server_host == "0.0.0.0" else args.vllm_server_host
        url = args.vllm_server_base_url or f"http://{host}:{args.vllm_server_port}"
        client = VLLMClientEngine(url, eos_token_ids=eos_token_ids, timeout=args.vllm_server_timeout)
        client.check_model(policy)
        return client
    return VLLMEngine(
        policy,
        eos_token_ids=eos_token_ids,
        tokenizer=tokenizer,
        dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        max_model_length=args.vllm_max_model_length,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        llm_kwargs={"model_impl": args.vllm_model_impl, "trust_remote_code": args.trust_remote_code},
    )


def _continuous_batching(args: Any) -> dict[str, Any] | None:
    if not (args.use_transformers_continuous_batching or args.use_transformers_paged):
        return None
    settings = args.transformers_continuous_batching_config or {}
    return json.loads(settings) if isinstance(settings, str) else dict(settings)

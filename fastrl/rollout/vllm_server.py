"""`fastrl vllm-serve --model MODEL`: vLLM with weights that a trainer updates over HTTP."""

from __future__ import annotations

import argparse
import json
import logging
import signal
from collections.abc import Sequence

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from fastrl.rollout.engine import model_sizes
from fastrl.rollout.server import RolloutServer
from fastrl.rollout.vllm_engine import VLLMEngine


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the engine, prints where it listens, and serves until Ctrl-C or SIGTERM."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    eos_token_ids = args.eos_token_ids or _eos_token_ids(args.model)
    engine = VLLMEngine(
        args.model,
        eos_token_ids=eos_token_ids,
        dtype=args.dtype,
        max_model_length=args.max_model_length,
        gpu_memory_utilization=args.gpu_memory_utilization,
        llm_kwargs=args.llm_kwargs,
    )
    sizes = model_sizes(engine.llm.llm_engine.model_config.hf_config) | {"max_model_length": engine.max_model_length}
    server = RolloutServer(engine, args.host, args.port, sizes=sizes)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where the parent process ignored them
        signal.signal(number, signal.default_int_handler)
    print(f"serving {args.model} at {server.url}, completions end at {eos_token_ids}", flush=True)
    try:
        server.serve()
    finally:
        engine.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastrl vllm-serve", description=__doc__)
    parser.add_argument("--model", required=True, help="path or hub id")
    parser.add_argument("--host", default="127.0.0.1", help="whoever reaches it may replace the weights")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--dtype", help="float32, bfloat16, ...; default: vLLM's choice for the model")
    parser.add_argument(
        "--max-model-length", "--max_model_len", type=int, help="tokens of prompt and completion together"
    )
    parser.add_argument("--gpu-memory-utilization", "--gpu_memory_utilization", type=float, default=0.9)
    parser.add_argument(
        "--eos-token-ids",
        type=int,
        nargs="+",
        help="where a trainer does not say; default: the tokenizer's and the model's",
    )
    parser.add_argument("--llm-kwargs", type=json.loads, default={}, help="JSON, more arguments of vllm.LLM")
    return parser


def _eos_token_ids(model: str) -> list[int]:
    """What the trainers end a completion at: the tokenizer's end-of-sequence token and all that the model declares."""
    try:
        declared = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # no generation_config.json
        declared = AutoConfig.from_pretrained(model).eos_token_id
    declared = declared if isinstance(declared, list) else [] if declared is None else [declared]
    own = AutoTokenizer.from_pretrained(model).eos_token_id
    return list(dict.fromkeys([*([] if own is None else [own]), *declared]))


if __name__ == "__main__":
    main()

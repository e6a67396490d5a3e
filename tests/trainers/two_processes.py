"""What test_distributed.py starts in two processes, and in part itself; the results go into a file."""

import shutil
import sys
from pathlib import Path
from typing import Any

import distillation_runs
import dpo_runs
import ppo_runs
import reward_runs
import sft_runs
import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import GradientRecorder, ScriptedEngine, count_letters, history, make_tokenizer, tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from fastrl.integrations import LMHead, patch_model
from fastrl.trainers import GRPOConfig, GRPOTrainer

PROMPTS = ["a", "b c", "d e f", "g h i j", "k", "l m", "n o p q r", "s t"]


KINDS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "passes": {"tokens_per_pass": 10},  # another number of passes in each process
    "entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 5.0},
}

SHARDED = ("sft", "dpo", "lora", "grpo")
PREFERENCES: dict[str, dict[str, Any]] = {"pairs": {"loss_type": ["sigmoid", "sft"]}, "kto": {"loss_type": "kto"}}


def without_prefix(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the model that is not wrapped names them."""
    return {name.removeprefix("module."): gradient for name, gradient in gradients.items()}


def train(kind: str, directory: Path, batch: int, resume: bool = False) -> dict[str, Any]:
    """Four optimizer steps of 8 sequences, whatever the number of processes: gradients, weights and logs."""
    recorder = GradientRecorder()
    args = GRPOConfig(
        str(directory),
        per_device_train_batch_size=batch,
        num_generations=4,
        max_completion_length=8,
        max_steps=4,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        use_cpu=True,
        **KINDS[kind],
    )

    def unanimous_for_early_prompts(prompts: list[str], completions: list[str]) -> list[float]:
        return [1.0 if p[0] < "h" else r for p, r in zip(prompts, count_letters(completions), strict=True)]

    trainer = GRPOTrainer(
        tiny_model(),
        unanimous_for_early_prompts,
        args,
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=make_tokenizer(),
        callbacks=[recorder],
        rollout_engine=ScriptedEngine(),
    )
    trainer.train(resume_from_checkpoint=resume)
    grads = [without_prefix(step) for step in recorder.grads]
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    logs = [{k: v for k, v in log.items() if isinstance(v, float)} for log in trainer.state.log_history[:-1]]
    return {"grads": grads, "weights": weights, "logs": logs}


def rankings(directory: Path, batch: int) -> dict[str, Any]:
    """Three optimizer steps of a reward model on four rows each, and its evaluation on seven."""
    settings = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 2, "loss_type": "pairwise"}
    trainer = reward_runs.reward_trainer(directory, trainer={"eval_dataset": reward_runs.RANKED[:7]}, **settings)
    grads, logs = dpo_runs.run(trainer)
    return {"grads": [without_prefix(step) for step in grads], "logs": [*logs, trainer.evaluate()]}


def shard() -> dict[str, float]:
    """A model sharded by FSDP2, root parameters and lm_head included: outputs and gradients, in train and in eval."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ids = torch.arange(6, 30).view(4, 6)
    upstream = torch.randn(4, 6, 42, generator=torch.Generator().manual_seed(0))

    def logits(hidden: Tensor, head: LMHead) -> Tensor:
        return nn.functional.linear(hidden, head.weight)

    results: dict[str, float] = {}
    for own_head in (False, True):
        whole, sharded = tiny_model(), tiny_model()
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        if own_head:  # a group of its own: gathered by the head's hooks, not by the root's
            fully_shard(sharded.lm_head, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        with patch_model(whole), patch_model(sharded):
            for train_mode in (True, False):
                whole.train(train_mode)
                sharded.train(train_mode)
                with torch.set_grad_enabled(train_mode):
                    expected = whole(input_ids=ids, fastrl_head=logits)
                    (actual,) = sharded(input_ids=ids, fastrl_head=lambda hidden, head: (logits(hidden, head),))
                results[f"outputs own_head={own_head} train={train_mode}"] = (actual - expected).abs().max().item()
                if train_mode:  # read at once: a forward in eval mode leaves the root gathered, without gradients
                    (expected * upstream).sum().backward()
                    (actual * upstream).sum().backward()
                    wanted = {name: p.grad for name, p in whole.named_parameters()}
                    for name, parameter in sharded.named_parameters():
                        difference = (parameter.grad.full_tensor() - wanted[name]).abs().max() / wanted[
                            name
                        ].abs().max()
                        results[f"gradient own_head={own_head} {name}"] = (difference / wanted[name].abs().max()).item()
    return results


FSDP: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def pretend_gpus() -> None:
    """accelerate shards on accelerators only: tell it that these processes have some, which compute on the CPU."""
    make = PartialState.__init__

    def making(self: PartialState, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = making


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    """The parameters, gathered where they are sharded."""
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}


def sharded(kind: str, folder: Path, processes: int, **settings: Any) -> dict[str, Any]:
    """A whole run: weights and losses, and whether the parameters are shards."""
    rows_of_step = 4 if kind == "sft" else 8  # a divisor of the rows: none is repeated at the end of an epoch
    batch = {"per_device_train_batch_size": rows_of_step // processes, "max_steps": 3, "save_strategy": "no"}
    if kind == "sft":
        trainer: Any = sft_runs.train(folder, save_steps=3, **{**batch, "optim": "sgd", **settings})
    elif kind == "grpo":
        args = GRPOConfig(
            str(folder), num_generations=4, max_completion_length=8, beta=0.1, num_iterations=2, optim="sgd",
            learning_rate=0.1, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, **batch, **settings,
        )  # fmt: skip
        rows = Dataset.from_dict({"prompt": PROMPTS})
        more: dict[str, Any] = {"processing_class": make_tokenizer(), "rollout_engine": ScriptedEngine()}
        trainer = GRPOTrainer(tiny_model(), count_letters, args, rows, **more)
        trainer.train()
    else:
        peft = LoraConfig(target_modules=["q_proj", "down_proj"], r=2) if kind == "lora" else None
        trainer = dpo_runs.dpo_trainer(folder, trainer={"peft_config": peft}, **batch, **settings)
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    parts = all(isinstance(p, DTensor) for p in trainer.model.parameters())
    return {"weights": whole_weights(trainer), "losses": losses, "sharded": parts}


def refusal(folder: Path, **settings: Any) -> str:
    """What the trainer says instead of training."""
    try:
        dpo_runs.dpo_trainer(folder, **settings)
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = Path(sys.argv[1])
    found = {kind: train(kind, run / kind, batch=4) for kind in KINDS}
    if dist.get_rank() == 0:
        shutil.rmtree(run / "dapo" / "checkpoint-4")
    dist.barrier()
    found["resumed"] = train("dapo", run / "dapo", batch=4, resume=True)
    found["shard"] = shard()  # type: ignore[assignment]
    sft = sft_runs.train(run / "sft", max_steps=6, per_device_train_batch_size=2, **sft_runs.EVALUATING)
    found["sft"] = {"logs": history(sft)}
    for kind, settings in PREFERENCES.items():
        trainer = dpo_runs.dpo_trainer(run / kind, per_device_train_batch_size=2, max_grad_norm=0.0, **settings)
        grads, logs = dpo_runs.run(trainer)
        found[kind] = {"grads": [without_prefix(step) for step in grads], "logs": logs}
    found["rewards"] = rankings(run / "rewards", batch=2)
    grads, logs = ppo_runs.two_rollouts(run / "ppo", per_device_train_batch_size=4)
    found["ppo"] = {"grads": [without_prefix(step) for step in grads], "logs": logs}
    grads, logs = distillation_runs.mixed_steps(run / "distillation", batch=4)
    found["distillation"] = {"grads": [without_prefix(step) for step in grads], "logs": logs}
    pretend_gpus()
    for kind in SHARDED:
        found[f"fsdp {kind}"] = sharded(kind, run / f"fsdp_{kind}", 2, **FSDP)
    found["fsdp refusal"] = refusal(run / "refused", sync_ref_model=True, **FSDP)  # type: ignore[assignment]
    if dist.get_rank() == 0:
        torch.save(found, run / "found.pt")
    dist.destroy_process_group()

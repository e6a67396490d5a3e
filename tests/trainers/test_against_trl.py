"""TRL's own GRPOTrainer on the same completions: the same weights after four steps, the same metrics under the same
names. Run where TRL is installed; its absence is named at the end of the run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_runs import ScriptedEngine, count_letters, tiny_model
from transformers import PreTrainedTokenizerFast

from fastrl.rollout import SamplingParams
from fastrl.trainers import GRPOTrainer

trl = pytest.importorskip("trl")
NEVER_EMPTY = (5, 4, 8, 1, 3, 7, 2, 6)  # TRL cannot do with a completion of zero tokens


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "mask_truncated_completions": True},
        {"beta": 0.2, "max_grad_norm": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 2},
        {"loss_type": "sapo", "num_iterations": 2},
        {"loss_type": "cispo", "epsilon_high": 1.1, "num_iterations": 2},
        {"loss_type": "vespo", "num_iterations": 2},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "num_iterations": 2},
    ],
    ids=["default", "gspo", "dr_grpo", "kl", "sapo", "cispo", "vespo", "luspo"],
)
def test_same_weights_and_metrics(
    make_trainer: Callable[..., GRPOTrainer],
    tmp_path: Path,
    prompts: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    settings: dict[str, Any],
) -> None:
    settings = {
        "per_device_train_batch_size": 8,  # one micro-batch: TRL's metrics are means of micro-batches' means
        "max_steps": 4,
        "weight_decay": 0.1,
        **settings,
    }
    ours = make_trainer(
        skip_dead_sequences=False,  # so that `entropy`, too, is over all tokens
        trainer_arguments={"rollout_engine": ScriptedEngine(NEVER_EMPTY)},
        **settings,
    )
    engine = ScriptedEngine(NEVER_EMPTY)

    def rollout(rows: list[str], trainer: Any) -> dict[str, Any]:
        ids = tokenizer(text=rows)["input_ids"]
        sampled = engine.generate(ids, 1, SamplingParams(max_tokens=8)).ids
        return {"prompt_ids": ids, "completion_ids": sampled, "logprobs": None}

    tiny_model().save_pretrained(tmp_path / "model")  # TRL's reference is loaded from a path
    shared = {
        k: getattr(ours.args, k) for k in ("num_generations", "max_completion_length", "learning_rate", "use_cpu")
    }
    theirs = trl.GRPOTrainer(
        str(tmp_path / "model"),
        count_letters,
        args=trl.GRPOConfig(
            str(tmp_path / "trl"),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            bf16=False,
            model_init_kwargs={"dtype": "float32"},
            **shared,
            **settings,
        ),
        train_dataset=prompts,
        processing_class=tokenizer,
        rollout_func=rollout,
    )
    ours.train()
    theirs.train()
    for (name, weight), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        # four steps of up to 1e-2: where a gradient is nearly zero, AdamW makes its rounding visible
        assert float((weight - other).abs().max()) < 1e-3, name
    for mine, reference in zip(ours.state.log_history[:4], theirs.state.log_history[:4], strict=True):
        for name, value in reference.items():
            assert name in mine
            if isinstance(value, float) and not math.isnan(value) and name != "step_time":
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name

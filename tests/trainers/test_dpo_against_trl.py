"""TRL's own DPOTrainer and KTOTrainer on the same pairs: the same gradients in three steps, the same metrics under the
same names. Run where TRL is installed; its absence is named at the end of the run."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from dpo_runs import PAIRS, STEPS, assert_same_gradients, dpo_trainer, run
from tiny_runs import make_tokenizer, tiny_model

from fastrl.trainers.dpo import DPOTrainer, KTOTrainer
from fastrl.trainers.dpo_config import DPOConfig, KTOConfig

trl = pytest.importorskip("trl")

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge, cut at the start": {"loss_type": "hinge", "max_length": 6, "truncation_mode": "keep_end"},
    "nca_pair, weighted by the policy": {"loss_type": "nca_pair", "use_weighting": True},
    "ipo, length-desensitized": {"loss_type": "ipo", "ld_alpha": 0.5},
    "several": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.5]},
    "robust, js": {"loss_type": "robust", "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
    "aot": {"loss_type": "aot"},
    "apo_zero, truncated": {"loss_type": "apo_zero", "max_length": 7},
    "sigmoid_norm": {"loss_type": "sigmoid_norm"},
    "a moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "learning_rate": 0.2},
    "kto": {"loss_type": "kto", "desirable_weight": 1.5},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "undesirable_weight": 0.7},
}
NOT_IN_TRAINING = {"mean_token_accuracy"}


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode")
@pytest.mark.parametrize("loss", LOSSES)
def test_same_gradients_and_metrics(tmp_path: Path, loss: str) -> None:
    settings = LOSSES[loss]
    unpaired = "desirable_weight" in settings or "undesirable_weight" in settings
    ours = dpo_trainer(tmp_path, trainer={"eval_dataset": PAIRS}, per_device_eval_batch_size=16, **settings)
    tiny_model().save_pretrained(tmp_path / "model")  # TRL's reference is loaded from a path
    theirs = (trl.KTOTrainer if unpaired else trl.DPOTrainer)(
        str(tmp_path / "model"),
        args=(trl.KTOConfig if unpaired else trl.DPOConfig)(
            str(tmp_path / "trl"),
            model_init_kwargs={"dtype": "float32"},
            per_device_eval_batch_size=16,
            **{**STEPS, **settings},
        ),
        train_dataset=Dataset.from_list(PAIRS).remove_columns("reference"),
        eval_dataset=Dataset.from_list(PAIRS).remove_columns("reference"),
        processing_class=make_tokenizer(),
    )
    (grads, logs), (wanted, reference) = run(ours), run(theirs)
    for step, gradients in enumerate(wanted):
        assert_same_gradients(grads[step], gradients)
    evaluated = {k: v for k, v in theirs.evaluate().items() if not k.endswith(("runtime", "per_second"))}
    for mine, theirs_ in [*zip(logs, reference, strict=True), (ours.evaluate(), evaluated)]:
        for name, value in theirs_.items():
            if name not in NOT_IN_TRAINING:
                assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert any(abs(log.get("rewards/chosen") or 0.0) > 0.01 for log in logs)  # the steps have moved something


@pytest.mark.parametrize(
    "ours, theirs, trainer, its",
    [(DPOConfig, trl.DPOConfig, DPOTrainer, trl.DPOTrainer), (KTOConfig, trl.KTOConfig, KTOTrainer, trl.KTOTrainer)],
)
def test_every_argument_of_trl_is_there_with_its_default(ours: Any, theirs: Any, trainer: Any, its: Any) -> None:
    wanted, found = ({item.name: item.default for item in fields(config)} for config in (theirs, ours))
    assert wanted.keys() <= found.keys()
    # its name in transformers 5 is activation_checkpointing
    assert {name for name in wanted if wanted[name] != found[name]} <= {"gradient_checkpointing"}
    made = ours(use_cpu=True)
    assert made.activation_checkpointing is True
    assert made.loss_type == (["sigmoid"] if ours is DPOConfig else ["kto"])
    assert list(inspect.signature(trainer.__init__).parameters) == list(inspect.signature(its.__init__).parameters)

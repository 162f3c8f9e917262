# One way in for each job. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
TEST_JOBS ?= 2
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TORCH_COMPILE_DISABLE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick test-slow test-transformers test-streaming-community test-gpu test-two-gpus fuzz sanitize bench lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## make .venv from requirements.txt and check that everything imports

$(VENV)/.ready: requirements.txt pyproject.toml pipelines/compat/torchvision_guard.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"Python 3.11 or 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement requirements.txt
	DS_ACCELERATOR=cpu $(BIN)/python -W ignore -c 'import torch, streaming, transformers, deepspeed, megatron.core, sentencepiece; v = torch.__version__; assert v.startswith("2.13.0"), f"torch is {v}, not 2.13.0: something replaced it"'
	@touch $@

demo: setup  ## the whole arc in a few minutes: text to a Hugging Face model, with a kill and a resume
	$(BIN)/python -m ssa_megatron demo

test: setup  ## every test that needs neither a GPU nor more than a minute, two files at a time (TEST_JOBS=1: one)
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses $(TEST_JOBS) --dist loadfile

test-quick: setup  ## those that start no process, for the time between two edits
	$(BIN)/python -m pytest -m "not slow and not gpu and not launch" --numprocesses $(TEST_JOBS) --dist loadfile

test-slow: setup  ## the long ones, the wheel in clean environments included (3 GB each)
	$(BIN)/python -m pytest -m slow

test-transformers: setup  ## the Hugging Face side on the newest transformers 5, with its Trainer and device maps
	$(BIN)/python -m venv --clear .venv-transformers
	@find='import site; print(site.getsitepackages()[0])'; \
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$$find")')" > "$$(.venv-transformers/bin/python -c "$$find")/training.pth"
	.venv-transformers/bin/python -m pip install --disable-pip-version-check --quiet "transformers>=5" accelerate
	.venv-transformers/bin/python -m pytest tests/ssa_megatron/hf

test-streaming-community: setup  ## the data pipeline on streaming-community 0.14.2 in mosaicml-streaming's place, slow tests too
	$(BIN)/python -m venv --clear .venv-streaming
	.venv-streaming/bin/python -m pip install --disable-pip-version-check --quiet --no-deps streaming-community==0.14.2
	@find='import site; print(site.getsitepackages()[0])'; \
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$$find")')" > "$$(.venv-streaming/bin/python -c "$$find")/training.pth"
	.venv-streaming/bin/python -W ignore -c 'import streaming; assert streaming.__version__ == "0.14.2", streaming.__file__'
	.venv-streaming/bin/python -m pytest tests/pipelines tests/faults/test_data_faults.py

test-gpu:  ## the tests that need a CUDA device, in the current environment
	$(PYTHON) -m pytest -m "gpu and not two_gpus" tests/gpu

test-two-gpus:  ## those that need two: training over NCCL
	$(PYTHON) -m pytest -m two_gpus tests/gpu

fuzz:  ## ten thousand random shapes and inputs through every kernel, judged in fp64; needs a CUDA device
	$(PYTHON) -W ignore -m tests.gpu.fuzz $(FUZZ)

sanitize:  ## twenty of them under compute-sanitizer: no access outside a tensor (SANITIZE="--tool racecheck" for races)
	$(PYTHON) -W ignore -m tests.gpu.sanitize $(SANITIZE)

bench:  ## the kernels against the vendors' full attention, and which targets are met; needs a CUDA device
	TORCH_COMPILE_DISABLE=0 $(PYTHON) -W ignore -m benchmarks.attention $(BENCH)

lint: setup  ## formatter, linter and type checker, as in CI
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## apply them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the targets above made, .venv included
	rm -rf $(VENV) .venv-transformers .venv-streaming runs .pytest_cache .mypy_cache .ruff_cache

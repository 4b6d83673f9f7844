# What a person types, and what CI runs. Every target installs what it needs into .venv by itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# Two processes that take whole files: half of the tests are one thread, or wait for a launcher.
SPREAD := -n $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder
BASE   ?= HEAD^

.PHONY: help env demo test test-all test-gpu test-matrix lint format golden fuzz kernels-check bench-smoke soak study docs lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

env: $(VENV)/.done  ## make .venv from requirements.lock

$(VENV)/.done: requirements.lock setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "error: $(PYTHON) is not Python 3.11 or 3.12: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null  # uv makes a .venv without pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

demo: env  ## draw shards, pretrain on them, and see it learn (under 3 minutes on 2 CPU cores)
	$(BIN)/bevt shards demo demo-data
	PATH=$(BIN):$$PATH deepspeed bevt_ds/pretrain.py --deepspeed_config ds_configs/zero2.json

test test-all test-matrix golden: export CUDA_VISIBLE_DEVICES =  # on any machine what a CPU computes

test: env  ## every test that needs no GPU
	$(PYTEST) $(SPREAD) -m "not gpu and not slow"

test-all: env  ## the long ones too
	$(PYTEST) $(SPREAD) -m "not gpu"

test-gpu: env  ## those that need a GPU, and the kernels' tests on it
	$(PYTEST) -m gpu
	$(PYTEST) tests/kernels

test-matrix: env  ## the same tests on Python 3.12 with torch 2.11 (needs python3.12)
	tests/matrix.sh

lint: env  ## style and imports
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: env  ## rewrite the files as lint wants them
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

golden: env  ## write the golden loss curve again, where the losses are meant to change
	PATH=$(BIN):$$PATH $(BIN)/python -m tests.training.golden_curve

fuzz: env  ## the loader on tens of thousands of broken files (hours)
	$(BIN)/python -m tests.loader.fuzz --out benchmarks/results/loader_fuzz.jsonl

soak: env  ## small runs killed, stopped and frozen 260 times, which must end as if they had not been (hours; goes on with what is there)
	$(BIN)/python -m tests.training.soak --out benchmarks/results/soak.jsonl

kernels-check: env  ## compile every kernel for sm_80, sm_90 and sm_100 and compare registers and spills with the table
	$(BIN)/python -m bevt_ds.kernels.check

bench-smoke: env  ## what this commit costs on a CPU next to its parent, as ratios (BASE=commit for another; 2 minutes)
	$(BIN)/python -m benchmarks.smoke --base $(BASE)

study: env  ## what joint pretraining is worth where only motion tells classes apart (70 minutes; SMALL=1: 10 minutes)
	$(BIN)/python -m benchmarks.study $(if $(SMALL),--small)

docs: env  ## the documentation as a site in site/, from docs/ (no network needed)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "to read it, with its search: python -m http.server -d site"

lock: env  ## resolve requirements.lock again
	$(BIN)/uv pip compile pyproject.toml --extra test --extra lint --extra docs --universal --python-version 3.11 --no-header \
	  --quiet -o requirements.lock

clean:  ## remove what the demo made
	rm -rf demo-data runs

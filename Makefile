# Everything is a line or two over `spotune`, `sky` or pytest. `make setup` is part of every target that needs it.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What a machine with its own build of torch (a CPU wheel, another CUDA) wants instead:  make setup TORCH='torch==2.13.0 --index-url …'
TORCH ?= torch==2.13.0
UV := uv==0.13.9
CONFIG ?= config/runs/demo.yaml
RUN ?=
CLUSTER ?= dev
ARGS ?=

.PHONY: help setup demo demo-undisturbed test test-chaos lab lab-test lab-test-full lab-contract lab-down bench lint lock schema docs dev train queue logs cancel cost sky-dev sky-train sky-queue sky-down clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

$(VENV)/.ready: requirements.lock requirements-gpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { echo 'Python 3.11 or 3.12 is needed (make setup PYTHON=python3.11)' >&2; exit 2; }
	@# An environment that was left half made has no pip.
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	@# pip, not uv, for torch alone: pip also takes a wheel that lies on disk (find-links), and it brings the CUDA that fits.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --requirement requirements.lock
	@# QLoRA's and Liger's kernels only where there is an NVIDIA GPU to run them.
	if command -v nvidia-smi > /dev/null; then $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --no-deps --requirement requirements-gpu.lock; fi
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

setup: $(VENV)/.ready ## the environment, in .venv, from the lock

demo: setup ## the main job in miniature: dev run, preempted job, scores, cost report in .demo/
	@$(BIN)/python examples/demo/demo.py

demo-undisturbed: setup ## the same job with nothing taken away: .demo/undisturbed.json
	@$(BIN)/python examples/demo/demo.py --undisturbed

test: setup ## all tests that need no cloud
	@$(BIN)/python -m pytest

test-chaos: setup ## runs killed at every boundary and at 200 random instants; SPOTUNE_CHAOS_SEED=… for others
	@$(BIN)/python -m pytest -m chaos -s tests/chaos

lab: setup ## real SkyPilot on a real Slurm of two nodes, on this machine (Debian or Ubuntu, root)
	@$(BIN)/python -m tests.lab.up --server

lab-test: setup ## the lab's smoke part, from nothing: jobs preempted once, by sky's command line and by spotune's, and their dollars
	@$(BIN)/python -m pytest -m lab -s tests/lab/test_smoke.py tests/lab/test_cost.py $(ARGS)

lab-test-full: setup ## from nothing: all that can happen to a job, and a dev cluster's verbs
	@$(BIN)/python -m pytest -m lab -s tests/lab --ignore tests/lab/test_infra.py $(ARGS)

lab-contract: setup ## from nothing: the tests that every infrastructure passes, four at a time
	@$(BIN)/python -m pytest -m lab -n 4 tests/lab/test_infra.py $(ARGS)

lab-down: setup ## the lab goes, without a trace
	@$(BIN)/python -m tests.lab.down

bench: setup ## the figures in benchmarks/README.md but for game days; 20 minutes on an idle machine
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/first_step.py
	$(BIN)/python benchmarks/restore.py
	$(BIN)/python benchmarks/saving.py --rounds 3

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

train: setup ## CONFIG=… ARGS='--infra … -y': submit a job
	@$(BIN)/spotune train $(CONFIG) $(ARGS)

queue: setup ## what runs and what waits
	@$(BIN)/spotune queue $(ARGS)

logs: setup ## RUN=…: a run's log
	@$(BIN)/spotune logs $(RUN) $(ARGS)

cancel: setup ## RUN=…: stop a run, keep its checkpoints
	@$(BIN)/spotune cancel $(RUN) -y

cost: setup ## RUN=…: what a run cost, or all of them
	@$(BIN)/spotune cost $(RUN) $(ARGS)

dev: setup ## ARGS='--gpus L4:1 --down …': bring up a dev cluster
	@$(BIN)/spotune dev up $(ARGS)

sky-dev: setup ## CLUSTER=…: the same with sky alone
	@$(BIN)/sky launch -c $(CLUSTER) $(ARGS) tasks/dev.yaml

sky-train: setup ## CONFIG=… SPOTUNE_BUCKET=…: a managed job with sky alone
	@$(BIN)/sky jobs launch --env SPOTUNE_BUCKET --env SPOTUNE_CONFIG=$(CONFIG) $(ARGS) tasks/train.yaml

sky-queue: setup ## clusters and managed jobs, with sky alone
	@$(BIN)/sky status $(ARGS)
	@$(BIN)/sky jobs queue

sky-down: setup ## CLUSTER=…: take a cluster down, with sky alone
	@$(BIN)/sky down $(CLUSTER) $(ARGS)

RESOLVE = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --no-header --no-annotate

lock: setup ## resolve anew what pyproject.toml asks for
	$(RESOLVE) --extra launcher --extra trainer --extra dev \
	  | grep -vE '^(torch|triton|nvidia-|cuda-|setuptools|pip|#)' > requirements.lock.new
	mv requirements.lock.new requirements.lock
	$(RESOLVE) --extra gpu --constraint requirements.lock | grep -E '^(bitsandbytes|liger-kernel)=' > requirements-gpu.lock.new
	mv requirements-gpu.lock.new requirements-gpu.lock

schema: setup ## the keys of a config, from the pinned TRL
	$(BIN)/python -m spotune.sft.schema

docs: setup ## docs/cli.md, from the commands' own help
	$(BIN)/python docs/reference.py

clean: ## what targets have made, but not the environment
	rm -rf .demo

# Everything is a line or two over `spotune`, `sky` or pytest. `make setup` is part of every target that needs it.
.DEFAULT_GOAL := help
PYTHON ?= python3
# Two environments: SkyPilot and the trainer's libraries want different versions of click, see docs/explanation/technology.md.
VENV := .venv
TRAIN_VENV := .venv-train
BIN := $(VENV)/bin
TRAIN_BIN := $(TRAIN_VENV)/bin
# What a machine with its own build of torch (a CPU wheel, another CUDA) wants instead:  make setup TORCH='torch==2.13.0 --index-url …'
TORCH ?= torch==2.13.0
UV := uv==0.13.9
CONFIG ?= config/runs/demo.yaml
RUN ?=
CLUSTER ?= dev
ARGS ?=

.PHONY: help setup setup-train demo demo-undisturbed test test-slow test-stress test-chaos lab lab-test lab-test-full lab-contract lab-down bench lint lock schema docs dev train queue logs cancel cost sky-dev sky-train sky-queue sky-down clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

# $(call make-venv,FOLDER): an environment with uv in it. One that was left half made has no pip.
define make-venv
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { echo 'Python 3.11 or 3.12 is needed (make setup PYTHON=python3.11)' >&2; exit 2; }
	$(1)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
endef
# $(call uv-install,FOLDER): installs what follows, byte-compiled.
uv-install = $(1)/bin/uv pip install --quiet --python $(1)/bin/python --compile-bytecode

$(VENV)/.ready: requirements-launcher.lock pyproject.toml
	$(call make-venv,$(VENV))
	$(call uv-install,$(VENV)) --requirement requirements-launcher.lock
	$(call uv-install,$(VENV)) --no-deps --editable .
	@touch $@

$(TRAIN_VENV)/.ready: requirements-trainer.lock requirements-gpu.lock pyproject.toml
	$(call make-venv,$(TRAIN_VENV))
	@# pip, not uv, for torch alone: pip also takes a wheel that lies on disk (find-links), and it brings the CUDA that fits.
	$(TRAIN_BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(call uv-install,$(TRAIN_VENV)) --requirement requirements-trainer.lock
	@# QLoRA's and Liger's kernels only where there is an NVIDIA GPU to run them.
	if command -v nvidia-smi > /dev/null; then $(call uv-install,$(TRAIN_VENV)) --no-deps --requirement requirements-gpu.lock; fi
	$(call uv-install,$(TRAIN_VENV)) --no-deps --editable .
	@touch $@

# pytest for the trainer's tests. Machines that only train do not get it.
$(TRAIN_VENV)/.ready-test: $(TRAIN_VENV)/.ready requirements-trainer-test.lock
	$(call uv-install,$(TRAIN_VENV)) --no-deps --requirement requirements-trainer-test.lock
	@touch $@

setup: $(VENV)/.ready $(TRAIN_VENV)/.ready-test ## the environments, from the locks: .venv (launcher), .venv-train (trainer)

setup-train: $(TRAIN_VENV)/.ready ## the trainer's environment alone: all that a machine that trains needs

demo: setup ## the main job in miniature: dev run, preempted job, scores, cost report in .demo/
	@$(BIN)/python examples/demo/demo.py

demo-undisturbed: setup ## the same job with nothing taken away: .demo/undisturbed.json
	@$(BIN)/python examples/demo/demo.py --undisturbed

# Each environment runs the tests that it can import, see tests/conftest.py; two processes share them.
PYTEST = -m pytest -n 3 --dist loadgroup

test: setup ## the quick tests, in both environments; no cloud is needed
	@$(BIN)/python $(PYTEST) -m 'not slow and not chaos and not lab'
	@$(TRAIN_BIN)/python $(PYTEST) -m 'not slow and not chaos and not lab'

test-slow: setup ## the slow tests, in both environments: whole runs of real training, real servers
	@$(BIN)/python $(PYTEST) -m 'slow and not chaos and not lab'
	@$(TRAIN_BIN)/python $(PYTEST) -m 'slow and not chaos and not lab'

test-stress: setup ## `make test` beside stress-ng, each process of the tests stopped once for 5 s (needs Debian's stress-ng)
	@$(BIN)/python -m tests.stress -- $(BIN)/python $(PYTEST) -m 'not slow and not chaos and not lab'
	@$(BIN)/python -m tests.stress -- $(TRAIN_BIN)/python $(PYTEST) -m 'not slow and not chaos and not lab'

test-chaos: setup ## runs killed at every boundary and at 200 random instants; SPOTUNE_CHAOS_SEED=… for others
	@$(TRAIN_BIN)/python -m pytest -m chaos -s tests/chaos

lab: setup ## real SkyPilot on a real Slurm of two nodes, on this machine (Debian or Ubuntu, root)
	@$(BIN)/python -m tests.lab.up --server

lab-test: setup ## the lab's smoke part, from nothing: jobs preempted once, by sky's command line and by spotune's, and their dollars
	@$(BIN)/python -m pytest -m lab -n 2 tests/lab/test_smoke.py tests/lab/test_cost.py $(ARGS)

lab-test-full: setup ## from nothing: all that can happen to a job, and a dev cluster's verbs
	@$(BIN)/python -m pytest -m lab -s tests/lab --ignore tests/lab/test_infra.py $(ARGS)

lab-contract: setup ## from nothing: the tests that every infrastructure passes, four at a time
	@$(BIN)/python -m pytest -m lab -n 4 tests/lab/test_infra.py $(ARGS)

lab-down: setup ## the lab goes, without a trace
	@$(BIN)/python -m tests.lab.down

bench: setup ## the figures in benchmarks/README.md but for game days; 20 minutes on an idle machine
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/check.py
	$(TRAIN_BIN)/python benchmarks/reading.py
	$(TRAIN_BIN)/python benchmarks/finite.py
	$(TRAIN_BIN)/python benchmarks/first_step.py
	$(BIN)/python benchmarks/restore.py
	$(TRAIN_BIN)/python benchmarks/saving.py --rounds 3

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
# torch comes by pip, and brings what it needs of CUDA.
PINS = grep -vE '^(torch|triton|nvidia-|cuda-|setuptools|pip|\#)'

lock: $(VENV)/.ready ## resolve anew what pyproject.toml asks for
	$(RESOLVE) --extra launcher --extra dev | $(PINS) > requirements-launcher.lock.new
	mv requirements-launcher.lock.new requirements-launcher.lock
	$(RESOLVE) --extra trainer | $(PINS) > requirements-trainer.lock.new
	mv requirements-trainer.lock.new requirements-trainer.lock
	@# Under the trainer's lock, and without what is in it: a test tool changes no library that trains.
	$(RESOLVE) --extra test-trainer --constraint requirements-trainer.lock | $(PINS) \
	  | grep -vxFf requirements-trainer.lock > requirements-trainer-test.lock.new
	mv requirements-trainer-test.lock.new requirements-trainer-test.lock
	$(RESOLVE) --extra gpu --constraint requirements-trainer.lock | grep -E '^(bitsandbytes|liger-kernel)=' > requirements-gpu.lock.new
	mv requirements-gpu.lock.new requirements-gpu.lock

schema: setup-train ## the keys of a config, from the pinned TRL
	$(TRAIN_BIN)/python -m spotune.sft.arguments

docs: setup ## docs/reference/cli.md, from the commands' own --help
	$(BIN)/python docs/reference.py

clean: ## what targets have made, but not the environment
	rm -rf .demo

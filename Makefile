# Two commands: `make train` and `make test`. Each does its own set-up.

# The first of these that runs and is new enough. A pyenv shim answers only where .python-version names its version.
PYTHON := $(shell for p in python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
# The compiler for an H100 lies apart: within reach of every command, jax would look for the GPU that is not there.
H100 := .venv/h100

.PHONY: setup train test test-slow faults claims claims-gpu lint bench gpu clean

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.12 found (tried python3.12, python3.13, python3.14, python3); install one, or 'pyenv install 3.12'" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

$(H100): $(STAMP)
	$(BIN)/python -c "import configparser; c = configparser.ConfigParser(); c.read('setup.cfg'); \
		print(c['options.extras_require']['h100'])" | $(BIN)/python -m pip install --quiet --target $(H100) -r /dev/stdin
	@touch $(H100)

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
	$(PYTEST) -m "not slow and not h100 and not gpu"

test-slow: $(STAMP) $(H100)
	$(BIN)/python -m mypy
	$(PYTEST) -m "slow and not gpu and not h100"
	JAX_PLATFORMS=cpu PYTHONPATH=$(H100) $(BIN)/python -m pytest -m h100

# Runs that are killed, stopped, starved and spoilt, beside one that nobody disturbed; about an hour on two cores.
faults: $(STAMP)
	PYTHONPATH=.:tests $(BIN)/python tests/faults/run.py --kills=200 --output=docs/results

# The paper's claims on tiny models: 152 trainings, one after another; tables and figures under runs/claims. Stopped, it
# goes on. TEXT is what the text is made of, as `launch.prepare --input` takes it, with commas.
claims: $(STAMP)
	$(BIN)/python -m launch.claims --workdir=runs/claims $(if $(TEXT),--text=$(TEXT))

# Models of 41 to 48 M weights, and few trainings: meant for 25 minutes of one H100, and not measured yet. Python as for
# `gpu`, with grain too.
claims-gpu:
	$(GPU_PYTHON) -m launch.claims --workdir=runs/claims_gpu --budget=gpu --seeds=2 --variants=mosaic,transformer \
		--suite=language,classification,recall $(if $(TEXT),--text=$(TEXT))

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/python -m mypy

bench: $(STAMP)
	$(BIN)/python -m pallas_kernels.retrieval.bench
	$(BIN)/python -m launch.bench

# The first thing to try where there is a Hopper GPU: kernel cases, benches and a train step, in less than nine minutes.
# It runs in the Python that is there, beside its jax with CUDA 13 and torch, and installs nothing. That Python needs
# pytest, and at the versions in setup.cfg: absl-py flax optax ml-collections tensorboardX tqdm (and what they import).
# tokamax is measured where it is installed.
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) -m launch.gpu $(if $(OUT),--output=$(OUT))

clean:
	rm -rf .venv data/python runs/tiny

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test check bench full clean-exit parity

setup: $(VENV)/.installed  ## make .venv and install everything into it

# torch first and pinned: a later range would fetch a build with gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: setup  ## learn handwritten digits with two processes
	$(BIN)/accelerate launch --cpu --num_processes 2 examples/digits/train.py

check: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: check  ## everything that runs without a GPU
	$(BIN)/python -m pytest -m "not full"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test check full clean-exit faults fuzz exact metrics-grid crash crash-peer preemption bench

setup: $(VENV)/.installed  ## make .venv and install everything into it

# torch first, in the version we develop on. Where pip finds a CPU build of it, that saves gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: setup  ## learn handwritten digits with two processes
	rm -rf output/demo  # a run from the beginning needs a folder without checkpoints
	$(BIN)/accelerate launch --cpu --num_processes 2 examples/digits/train.py --folder output/demo

check: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: check  ## everything that runs without a GPU
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

full: setup  ## the exhaustive forms too
	$(BIN)/python -m pytest -m "full or not full" --timeout 0

clean-exit: setup  ## 400 runs of 2 and 4 processes, each of which must end with status 0
	$(BIN)/python -m pytest -m full tests/fault/test_clean_exit.py -s --timeout 0

faults: setup  ## every error of the kernel on every file of a checkpoint, and every bit of its manifest changed
	$(BIN)/python -m pytest -m "full or not full" tests/fault/test_disk_faults.py tests/fault/test_damage.py -s --timeout 0

FUZZ ?= --inputs 300000
fuzz: setup  ## broken files for every reader of checkpoints; FUZZ="--inputs 10000000 --seed 7" for more or others
	$(BIN)/python -m tests.fault.fuzz $(FUZZ)

exact: setup  ## every resume of the exactness suite: samplers, datasets, workers, ranks, stopped at every step
	$(BIN)/python -m pytest -m "full or not full" tests/exact -s --timeout 0

metrics-grid: setup  ## 70,000 loops whose gathered results must be the dataset
	$(BIN)/python -m pytest -m full tests/ranks/test_metrics_grid.py -s --timeout 0

crash: setup  ## cut saves off at every call, by lost power and at random, and load what is left; needs strace
	$(BIN)/python -m tests.crash.suite

crash-peer: setup .peer  ## the same on Accelerate 1.15, which fails
	-PYTHONPATH=.peer $(BIN)/python -m tests.crash.suite --modes blocking --states 500 --kills 300 --chunk 1

preemption: setup  ## runs of 1, 2 and 3 processes, told to end at every kind of place and continued on 1, 2 and 3
	$(BIN)/python -m pytest -m "full or not full" tests/ranks/test_preemption_ranks.py tests/fault/test_preempted.py -s --timeout 0

bench: setup .peer  ## time this library against hand-written PyTorch and Accelerate 1.15
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/startup.py

.peer:
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ accelerate==1.15.0

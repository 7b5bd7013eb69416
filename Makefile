PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test check full clean-exit faults fuzz exact metrics-grid crash crash-peer preemption session
.PHONY: rank-death notebook preflight two-hosts slurm mpi deepspeed-launcher ray bench

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

session: setup  ## type a first session into a real terminal, config and launch, and write its page; needs tmux
	$(BIN)/python -m tests.examples.session

RUNS ?= 96
rank-death: setup  ## one rank of 2 and 4 dies in every way, RUNS times, after 20 launches at once; then signals of all kinds
	$(BIN)/python -m pytest -m "full or not full" tests/fault/test_rank_death.py -k "not every_way" -s --timeout 0
	$(BIN)/python -m tests.fault.rank_death --runs $(RUNS)

notebook: setup  ## notebooks in a real Jupyter kernel: forks and new interpreters, failures, the stop button
	$(BIN)/python -m pytest -m "full or not full" tests/notebook tests/unit/launch/test_notebook.py --timeout 0

preflight: setup  ## the check of the links between ranks: stopped, missing and blocked ranks, 2 and 4 processes
	$(BIN)/python -m pytest -m "full or not full" tests/unit/launch/test_preflight.py tests/ranks/test_links.py tests/cli/test_preflight.py --timeout 0

# The next five need root: for network namespaces, and to install what they try.
two-hosts: setup  ## runs over two hosts, each a network namespace; one of them falls and comes back
	$(BIN)/python -m pytest -m "full or not full" tests/clusters/test_two_hosts.py tests/cli/test_several_launchers.py -rs --timeout 600

slurm: setup  ## a real SLURM of two nodes on this machine: srun and sbatch, without flags
	command -v slurmctld munged >/dev/null || (apt-get update -q && apt-get install -qy --no-install-recommends slurm-wlm munge)
	$(BIN)/python -m pytest -m full tests/clusters/test_slurm.py -rs --timeout 600

mpi: setup  ## real runs of Open MPI and MPICH
	command -v mpirun.openmpi mpirun.mpich >/dev/null || (apt-get update -q && apt-get install -qy --no-install-recommends openmpi-bin mpich)
	$(BIN)/python -m pytest -m full tests/clusters/test_mpi.py -rs --timeout 600

deepspeed-launcher: .deepspeed/.installed  ## real runs by DeepSpeed's launcher: one host, Open MPI, two hosts
	(command -v ompi_info && command -v pdsh) >/dev/null || (apt-get update -q && apt-get install -qy --no-install-recommends openmpi-bin pdsh)
	.deepspeed/bin/python -m pytest -m full tests/clusters/test_deepspeed.py -rs --timeout 600

.deepspeed/.installed: pyproject.toml
	$(PYTHON) -m venv .deepspeed
	.deepspeed/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy setuptools wheel
	.deepspeed/bin/pip install --quiet --disable-pip-version-check deepspeed==0.19.8 scikit-learn pytest pytest-timeout hypothesis -e .
	touch $@

ray: setup .ray  ## a real group of two workers of Ray Train
	PYTHONPATH=.ray $(BIN)/python -m pytest -m full tests/clusters/test_ray.py -rs --timeout 600

.ray:
	$(BIN)/pip install --quiet --disable-pip-version-check --target $@ 'ray[train]==2.60.*'

bench: setup .peer  ## time this library against hand-written PyTorch and Accelerate 1.15
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/startup.py

.peer:
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ accelerate==1.15.0

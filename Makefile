# `make demo` and `make test` are the two commands; both set up `.venv` first, once.
# PYTHON names the interpreter that the environment is made with, and VENV the environment's folder. Before a release:
# `make test-unit PYTHON=python3.12 VENV=/tmp/cai-ray-python3.12`, since the other version is what everybody runs.
PYTHON ?= $(shell for p in python3.11 python3.12; do $$p -c "" 2>/dev/null && echo $$p && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
TWO_PROCESSES := -n 2 --no-loadscope-reorder

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
unexport PYTHONPATH
# The environment is installed without compiled modules: Python writes them at their first import, and must be let.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-rest test-families test-real test-unit test-cluster test-gpu check format mutants clean

help:
	@echo "make setup         install everything into $(VENV); every other target does this first"
	@echo "make demo          run Constitutional AI on the embedded world"
	@echo "make test          run the tests that cover a first change (unit, Ray, end-to-end)"
	@echo "make test-rest     run the Ray and end-to-end tests that make test leaves out"
	@echo "make test-families check the table of model families with a small model of each; WRITE=1 renews it"
	@echo "make test-real     fetch a real model (93 MB) and take it through every stage, in 15 minutes; in no CI"
	@echo "make test-unit     run the unit tests only"
	@echo "make test-cluster  run the tests of clusters: jobs, several nodes, object storage"
	@echo "make test-gpu      run the tests that need a GPU"
	@echo "make check         check style, format and types"
	@echo "make format        fix style and format"
	@echo "make mutants       insert known faults and show that the tests find each of them"
	@echo "make clean         remove $(VENV) and all build and cache folders"

setup: $(INSTALLED)

$(INSTALLED): requirements-cpu.lock pyproject.toml scripts/setup.py
	@$(PYTHON) scripts/setup.py $(VENV)
	@touch $@

demo: setup
	$(BIN)/cai-ray demo

test: setup
	$(PYTEST) $(TWO_PROCESSES) -m "not rest" tests/unit tests/ray tests/e2e

test-rest: setup
	$(PYTEST) $(TWO_PROCESSES) -m rest tests/ray tests/e2e

test-families: setup
	$(PYTEST) $(TWO_PROCESSES) tests/families $(if $(WRITE),--write-table)
ifdef WRITE
	$(BIN)/cai-ray config models > docs/models.md
endif

test-real: setup
	$(PYTEST) tests/real

test-unit: setup
	$(PYTEST) tests/unit

test-cluster: setup
	$(PYTEST) $(TWO_PROCESSES) tests/cluster

test-gpu: setup
	$(PYTEST) tests/gpu

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mutants: setup
	$(BIN)/python tests/mutants/run.py --jobs 2

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

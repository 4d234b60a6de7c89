# One entry point for people and for continuous integration. Everything lives in .venv; nothing outside the checkout is touched.
#
#   PYTHON=python3.12        interpreter the environment is made with (3.10 or newer, with venv)
#   TORCH=torch==2.12.0      torch to install when the environment has none
#   DEMO_ARGS, TEST_ARGS, BENCH_ARGS are passed on;  TEST_WORKERS=0 runs the tests in one process

PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= all,dev

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
TEST_WORKERS ?= $(shell test $(CORES) -lt 8 && echo $(CORES) || echo 8)

READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## make .venv, install what is missing, build the extension

demo: $(READY)  ## videos to a preference-tuned captioner, end to end (DEMO_ARGS="--seed 1")
	$(BIN)/synpo demo $(DEMO_ARGS)

test: $(READY)  ## the whole test suite (TEST_ARGS="tests/kernels -k contrast")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) $(TEST_ARGS)

lint: $(READY)  ## ruff, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## benchmarks, about five minutes on a CPU (BENCH_ARGS="--shapes cpu --head frozen"); see bench/README.md
	$(BIN)/python -m bench.contrast --seconds 5
	$(BIN)/python -m bench.loss $(BENCH_ARGS)

clean:  ## remove what building and testing leave behind; .venv stays
	rm -rf build dist *.egg-info python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f synpo_kernels/*.so $(READY)
	find synpo_kernels python bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "synpo needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "Name another interpreter: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { \
	    rm -rf $(VENV); echo "making $(VENV) failed: '$(PYTHON)' needs its venv module (Debian: apt install python3-venv)" >&2; exit 1; }

# Again when dependencies, build or C++ sources change; what is already satisfied is not fetched again, torch never if present.
$(READY): pyproject.toml setup.py $(shell find csrc -type f) | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install "$(TORCH)"
	$(PIP) install --quiet "setuptools>=77" wheel "pybind11>=2.13" ninja
	$(PIP) install --quiet --no-build-isolation -e ".[$(EXTRAS)]"
	@$(BIN)/python -c 'from synpo_kernels import _ext; print(_ext.describe())'
	@touch $@

# make demo    a census of the planted world that ships with memscan, into runs/demo
# make gpu     every figure of docs/speed.md that needs a GPU, into gpu.json: eight minutes of an H200
# make test    the test suite
# make test-long   what the suite leaves out for its length: statistics, rehearsals of benchmarks, slow precisions
# make docs    the documentation as a site, into site/
# make check   format, lint, types, tests
# Everything runs in .venv. PYTHON chooses the interpreter (3.11 or newer); pip's own settings say where packages come
# from and which build of torch is taken.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SUITE := sh tests/run.sh $(BIN)/python
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.PHONY: help setup demo test test-long check browser docs format bench gpu clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(VENV)/.ready-dev

# torch comes first and by its exact version, so that no other package's range can pull another build of it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memscan needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing memscan and its dependencies into $(VENV) (several minutes the first time)"
	$(PIP) $(TORCH)
	$(PIP) -e '.[cpu]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e '.[cpu,s3,dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/memscan demo

test: setup browser
	$(SUITE)

test-long: setup
	$(BIN)/python -m pytest -m long

check: setup browser
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(SUITE)

docs: setup
	$(BIN)/mkdocs build --strict

browser:
	@sh tests/browser.sh

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# screen, recall and report need a second world and a run: their help says how.
bench: setup
	set -e; for name in $(filter-out gpu_quick screen recall report synthetic_%,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))); do $(BIN)/python -m benchmarks.$$name; done

# An installed torch for CUDA is taken as it is: make setup must have found one (CONTRIBUTING.md).
gpu: setup
	$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available() and "torch sees no GPU")'
	$(BIN)/python -m benchmarks.gpu_quick --out gpu.json

clean:
	rm -rf $(VENV) build dist site memscan.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# make demo   trains a small model on real text, then lets it write
# make test   the tests
# make lint   lint, format, types
# make check  the same and the house's rules, which make test has too

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
# A process per core, each with its own PyTorch in memory (about 1 GB), hence at most 8.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
# Not compiled: most modules of what is installed are never imported, and those that are, compile then.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_FLAGS) -c constraints.txt

.PHONY: demo test test-all check lint clean

demo: .venv/run.stamp
	$(BIN)/gsa data prepare demo/text/train --out runs/demo-data/train --overwrite
	$(BIN)/gsa data prepare demo/text/valid --out runs/demo-data/valid --overwrite
	$(BIN)/gsa train demo
	$(BIN)/gsa generate runs/demo --prompt "ROMEO:" --max-new-tokens 300 --seed 1

test: .venv/dev.stamp
	$(PYTEST)

test-all: .venv/dev.stamp
	$(PYTEST) -m "not gpu and not fla"

check: lint
	$(BIN)/python -m pytest tests/test_house.py

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv runs

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, '$(PYTHON)' is older or missing; try: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/run.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv (the first time this downloads PyTorch: see README)"
	$(PIP) -e .
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv (the first time this downloads PyTorch: see README)"
	$(PIP) -e '.[dev]'
	@touch $@

# make demo   trains a small model on real text, then lets it write
# make test   the tests
# make check  lint, format, types

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) -c constraints.txt

.PHONY: demo test test-all check clean

demo: .venv/run.stamp
	$(BIN)/gsa data prepare demo/text/train --out runs/demo-data/train --overwrite
	$(BIN)/gsa data prepare demo/text/valid --out runs/demo-data/valid --overwrite
	$(BIN)/gsa train demo
	$(BIN)/gsa generate runs/demo --prompt "ROMEO:" --max-new-tokens 300 --seed 1

test: .venv/dev.stamp
	$(BIN)/python -m pytest

test-all: .venv/dev.stamp
	$(BIN)/python -m pytest -m "not gpu and not fla"

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/test_house.py

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

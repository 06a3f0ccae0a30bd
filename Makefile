# The two commands of a fresh machine: `make demo` and `make test`. Each sets up its own virtual environment in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test matrix lint types clean

demo: .venv/ready
	$(BIN)/python examples/digits.py

test: .venv/ready
	$(BIN)/python -m pytest

matrix: .venv/ready
	$(BIN)/python tests/matrix.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	@echo "Setting up a virtual environment in .venv (torch, transformers, PEFT: some minutes the first time) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,test,dev]"
	@touch $@

clean:
	rm -rf .venv .matrix dist build .mypy_cache .ruff_cache .pytest_cache

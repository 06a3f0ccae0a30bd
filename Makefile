# The two commands of a fresh machine: `make demo` and `make test`. Each sets up what it needs in .venv, and says so.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo picture docs gpu matrix-torch test matrix conformity lint types build proof soak cost bench coverage mutants clean

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: .venv/ready  ## the main job on real digits
	$(BIN)/python examples/digits.py

picture: .venv/ready  ## the same, and draw its ranks into docs/ranks.png anew
	$(BIN)/python examples/digits.py docs/ranks.png

test: .venv/stacks  ## the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

matrix: .venv/stacks  ## the tests that face PEFT, on every supported release
	$(BIN)/python tests/matrix.py

conformity: .venv/stacks  ## PEFT's own tests of AdaLoRA, with the guard and without
	$(PIP) --editable ".[conformity]"
	$(BIN)/python tests/conformity.py

lint: .venv/ready  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready  ## mypy, strict
	$(BIN)/mypy

build: .venv/ready  ## wheel and source distribution, and what checks them
	$(PIP) --editable ".[packaging]"
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/python tests/support/long_description.py dist/*.whl
	$(BIN)/validate-pyproject pyproject.toml

proof: .venv/stacks  ## the guard against the oracle of its rules, in 20,000 random trainings
	$(BIN)/python -m pytest tests/whole/test_oracle.py -k "not release" --hypothesis-profile=long --hypothesis-show-statistics

soak: .venv/stacks  ## 50,000 steps and 200 models; 2,000 trainings in four threads; trainings killed 20 times and resumed; 2,000 healthy ones
	$(BIN)/python tests/support/soak.py
	$(BIN)/python -W ignore tests/support/soak_threads.py
	$(BIN)/python -W ignore tests/support/soak_kills.py
	$(BIN)/python -W ignore tests/support/soak_alarms.py

# Not --quiet: what it does not print, it does not count as an error either.
docs: .venv/ready  ## the docs as pages, in site/; a dead link is an error
	$(PIP) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The pages are in site/. To read and search them: $(BIN)/python -m http.server --directory site"

gpu:  ## what needs CUDA, with the torch and PEFT that python3 has (no installation)
	$(PYTHON) -m pytest tests/gpu -q -p no:cacheprovider

matrix-torch:  ## the tests that face PEFT, on torch 2.0, 2.4 and the newest (downloads gigabytes)
	$(PYTHON) tests/matrix_torch.py

cost: .venv/stacks  ## what a start of the interpreter costs
	$(BIN)/python examples/startup_cost.py 60

bench: .venv/ready  ## what an allocator step costs, with the guard and without (some 6 minutes on a quiet machine)
	$(BIN)/python tests/benchmarks/bench.py

.venv/ready: pyproject.toml constraints.txt
	@echo "Setting up a virtual environment in .venv (torch, transformers, PEFT: some minutes the first time) ..."
	$(PYTHON) -m venv .venv
	$(PIP) --editable ".[demo,test,dev]"
	@touch $@

# DeepSpeed is built against the torch that is there, without its compiled operators: the tests run on the CPU.
.venv/stacks: .venv/ready
	@echo "Adding the training stacks that the tests use (TRL, Lightning, bitsandbytes, DeepSpeed) ..."
	$(PIP) --editable ".[trl]" bitsandbytes lightning setuptools wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@touch $@

# Which test runs which line, in every process: pyproject.toml says how.
coverage: export COVERAGE_ROOT = $(CURDIR)
coverage: export COVERAGE_FILE = $(CURDIR)/.coverage
coverage: export COVERAGE_PROCESS_START = $(CURDIR)/pyproject.toml
coverage: .venv/stacks  ## the lines and branches that no test runs
	$(PIP) --editable ".[mutants]"
	$(BIN)/coverage erase
	$(BIN)/python -m pytest -n 2 --dist loadfile --junitxml=.durations.xml
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --show-missing --skip-covered

mutants: .venv/stacks coverage  ## every small change of the package: does a test notice? (hours)
	$(PIP) --editable ".[mutants]"
	$(BIN)/python tests/mutants.py

clean:  ## remove what the other targets have made
	rm -rf .venv .matrix .mutants .coverage* .durations.xml dist build site .mypy_cache .ruff_cache .pytest_cache

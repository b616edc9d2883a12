# Two commands: `make quickstart` and `make test`. Both make and reuse one environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: quickstart test check coverage clean

.venv/pyvenv.cfg:
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 15) else "make: Python 3.11 to 3.14 is needed, this is " + sys.version.split()[0] + "; say make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/pyvenv.cfg pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-test: .venv/pyvenv.cfg pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ .venv/installed

# The first run of a new environment compiles bytecode; it is not part of the training time.
quickstart: .venv/installed
	$(BIN)/trainer fit --config quickstart.yaml

test: .venv/installed-test
	scripts/check $(BIN)
	$(BIN)/python -m pytest

check: .venv/installed-test
	scripts/check $(BIN)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

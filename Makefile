# One command each. The first run makes .venv; nothing else of the machine is changed.

PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
DEST ?= file

.PHONY: demo test test-full check audit bench docs clean

demo: .venv/demo.stamp  ## the main job on the embedded defaults; DEST=vault|aws|azure|all
	@$(BIN)/keyturn demo --dest $(DEST)

test: .venv/test.stamp  ## the suite, at most 20 minutes on two cores
	@$(BIN)/python tests/run.py -q -m 'not full'

test-full: .venv/test.stamp  ## with the long versions
	@$(BIN)/python tests/run.py -q -s

check: .venv/lint.stamp  ## style, types, layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy --python-version 3.11
	@$(BIN)/mypy --python-version 3.13
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

audit: .venv/bin/python  ## known vulnerabilities of what is installed
	@$(PIP) install --group audit
	@$(BIN)/pip-audit --skip-editable --progress-spinner off --timeout 20 || \
		echo "not audited, or something was found: see the lines above"

bench: .venv/test.stamp  ## rotations per second beside the bare clients, in one run
	@$(BIN)/python benchmarks/rotations.py

docs: .venv/test.stamp  ## pages that are generated
	@$(BIN)/python -m keyturn.config.reference > docs/reference/configuration.md
	@$(BIN)/python -m keyturn.config.schema > docs/reference/keyturn.schema.json

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Keyturn needs Python 3.11 or newer with venv (Debian: apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(PIP) install --upgrade 'pip>=25.1'

.venv/demo.stamp: .venv/bin/python pyproject.toml
	@$(PIP) install -e '.[all]' --group demo
	@touch $@

.venv/test.stamp: .venv/bin/python pyproject.toml
	@$(PIP) install -e '.[all]' --group test
	@touch $@

.venv/lint.stamp: .venv/test.stamp
	@$(PIP) install --group lint
	@touch $@

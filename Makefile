# One command each. The first run makes .venv; nothing else of the machine is changed.

PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
DEST ?= file

LOCK := $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-emit-index-url --no-emit-find-links --upgrade
SBOM ?= dist/keyturn.cdx.json

.PHONY: demo test test-full check audit bench bench-verifier drill docs lock wheel sbom clean

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

bench-verifier: .venv/test.stamp  ## warm checks beside their peers, and cold herds: ten minutes
	@$(BIN)/python benchmarks/verifications.py
	@$(BIN)/python benchmarks/herd.py
	@$(BIN)/python benchmarks/herd.py --scheme hmac-sha256

drill: .venv/test.stamp  ## how long a revoke takes, by each way, under load
	@$(BIN)/python benchmarks/revocation.py

docs: .venv/test.stamp  ## pages that are generated
	@$(BIN)/python -m keyturn.config.reference > docs/reference/configuration.md
	@$(BIN)/python -m keyturn.config.schema > docs/reference/keyturn.schema.json

lock: .venv/test.stamp  ## resolve anew: requirements/*.lock, with hashes, for every Python
	@$(LOCK) --extra all -o requirements/all.lock
	@$(subst pyproject.toml,,$(LOCK)) --group build -o requirements/build.lock

wheel: .venv/test.stamp  ## dist/*.whl, the same bytes from the same commit
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --wheel --no-isolation --outdir dist

sbom: .venv/locked/stamp  ## what is in an installation from the lock, as CycloneDX 1.6
	@mkdir -p $(dir $(SBOM))
	@$(BIN)/cyclonedx-py environment .venv/locked --pyproject pyproject.toml --sv 1.6 \
		--output-reproducible --of JSON --validate -o $(SBOM)

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

.venv/locked/stamp: .venv/test.stamp requirements/all.lock
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv/locked
	@$(BIN)/uv pip install --quiet --python .venv/locked --no-deps --require-hashes -r requirements/all.lock
	@touch $@

.venv/lint.stamp: .venv/test.stamp
	@$(PIP) install --group lint
	@touch $@

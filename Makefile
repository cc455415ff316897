# Everything a developer does here. Needs Python >= 3.11 and make; the rest is fetched, pinned by hash, into .venv.

PYTHON ?= python3
SEED   ?= 0
ONLY   ?=
export TRACE ?=

SHELL        := /bin/sh
MAKEFLAGS    += --no-print-directory
.DEFAULT_GOAL := help
.SUFFIXES:

VENV := .venv
# "python -m", not the scripts in .venv/bin: their first line breaks where the path has spaces.
RUN  := $(VENV)/bin/python
READY := $(VENV)/ready

export PYTHONUNBUFFERED := 1

# Prints the first interpreter that is new enough, or a sentence and nothing else.
FIND_PYTHON = for candidate in "$(PYTHON)" python3.14 python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    found="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo 'No Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; \
	fi

.PHONY: help
help: ## list the targets (this list)
	@echo 'gpu-tenancy: rent A100 servers by the second, and mine on what is not rented'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'The first use builds .venv, and a Kubernetes control plane from source (once, six to eight minutes on 2 cores).'

$(READY): requirements.lock pyproject.toml
	@$(FIND_PYTHON); \
	if [ ! -x $(RUN) ] || ! $(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  echo "Building $(VENV) with $$found"; \
	  "$$found" -m venv --clear $(VENV) || { \
	    echo "$$found cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	@echo 'Installing what requirements.lock pins'
	@$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --requirement requirements.lock
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index --editable .
	@touch $(READY)

.PHONY: demo
demo: $(READY) ## watch leases take GPUs from miners and give them back, on a real API server (about 90 s)
	@$(RUN) -m tests.cluster demo

.PHONY: test
test: lint verify binaries ## lint, verify and every test but the exhaustive ones; SEED=n picks the samples
	$(RUN) -m pytest -n 2 --dist worksteal -m 'not exhaustive and not hardware' --seed=$(SEED)

.PHONY: test-all
test-all: lint verify binaries ## the same with every exhaustive variant (long); draws a new seed and prints it
	$(RUN) -m pytest -n 2 --dist worksteal -m 'not hardware' --hypothesis-profile=exhaustive --seed=$(if $(filter 0,$(SEED)),random,$(SEED))

.PHONY: lint
lint: $(READY) ## ruff, mypy --strict, import directions
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c 'from importlinter.cli import lint_imports_command as run; run()'

.PHONY: verify
verify: $(READY) ## regenerate CRDs, field reference and protos, check the lock; fail where anything differed
	@$(RUN) -m tests.verify

.PHONY: bench
bench: binaries ## measure, as a table and in build/bench.json; ONLY=name for one figure, TRACE=file for the replay
	@$(RUN) -m tests.bench $(ONLY)

.PHONY: up
up: $(READY) ## start the demo's world and leave it running
	@$(RUN) -m tests.cluster up

.PHONY: down
down: $(READY) ## end what `make up` started
	@$(RUN) -m tests.cluster down

.PHONY: binaries
binaries: $(READY)
	@$(RUN) -m tests.cluster build

.PHONY: format
format: $(READY) ## let ruff format and fix what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

.PHONY: lock
lock: $(READY) ## renew requirements.lock after a change of pyproject.toml; UPGRADE=1 takes the newest of everything
	@$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-bootstrap.lock
	@$(RUN) -m tests.lock $(if $(UPGRADE),--upgrade)

.PHONY: clean
clean: ## remove .venv, caches and build output (not the cached control-plane binaries)
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything from a fresh clone with python3 (3.11 or newer, with venv) and make alone: `make up`. More: `make help`.

VENV   := .venv
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
            $p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $p)))
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Set when .venv holds what the lock file of that name says; the installation for development holds both.
RUN    := $(VENV)/.requirements
DEV    := $(VENV)/.requirements-dev

.DEFAULT_GOAL := help
.PHONY: help up test lint bench clean

help: ## Show what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' Makefile
	@echo '  make up CLUSTER=3: three nats-servers that survive the loss of one'
	@echo '  ARGS="…" is passed on: make up ARGS="--port 9000", make test ARGS="-k cursor"'

up: $(RUN) ## Run everything here: broker, services and the page; Ctrl-C stops it
	@exec $(BIN)/python -m services.standalone.cli up $(if $(CLUSTER),--cluster $(CLUSTER)) $(ARGS)

test: $(DEV) ## Run the tests, files beside each other
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(DEV) ## Check style, types, the direction of imports and the lock files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python deploy/check_lock.py

bench: $(DEV) ## Measure latency, throughput and CPU on this machine
	$(BIN)/python -m bench $(ARGS)

clean: ## Remove what was installed and built; data in .tailrace stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN): requirements.lock pyproject.toml | $(VENV)
	@if [ -f $(DEV) ]; then rm -f $(DEV); fi
	$(call install,requirements.lock)
	@touch $@

$(DEV): requirements-dev.lock requirements.lock pyproject.toml | $(VENV)
	$(call install,requirements-dev.lock)
	@touch $(RUN) $@

# The lock file is complete (deploy/check_lock.py), so nothing is resolved. The project itself is built with the hatchling
# that the lock file names.
define install
	@echo "installing from $(1) into $(VENV) (the first time takes a minute) …"
	@$(PIP) install --no-deps --require-hashes --requirement $(1)
	@$(PIP) install --no-deps --no-build-isolation --editable .
endef

$(VENV):
	@if [ -z "$(PYTHON)" ]; then \
	  echo 'Python 3.11 or newer is needed and not found; name one with: make PYTHON=/path/to/python3' >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo '$(PYTHON) comes without venv and pip; on Debian and Ubuntu install them with: apt install python3-venv' >&2; \
	  exit 1; fi
	@$(PYTHON) -m venv $(VENV)

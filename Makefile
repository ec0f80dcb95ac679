# Everything runs from a checkout with Python 3.11+ and make; the first run makes .venv.
# MODEL=  another model for the demo, benches and integration tests (default: a tiny one, made here)
# WORKERS= processes that share the fast tests (default: one a core, at most 4)
# ARGS=   more arguments for the command behind a target

VENV   ?= .venv
MODEL  ?=
ARGS   ?=
ENGINE ?= auto
WORKERS ?= logical
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

BIN := $(VENV)/bin
# Each worker imports the engines once (10 s of processor time); stealing keeps a module's tests together.
SHARED := -n '$(WORKERS)' --maxprocesses 4 --dist worksteal
SGLANG := $(VENV)-sglang
# vLLM's tests take longer than SGLang's, which run beside them: these wait for SGLang's to end.
SECOND_LANE := integration_tests/test_flowkv_setups.py
ENGINE_TESTS := integration_tests --ignore=integration_tests/upstream --ignore=integration_tests/sglang
RUN := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PENSTOCK_MODEL='$(MODEL)'

.DEFAULT_GOAL := help
.PHONY: help env env-sglang demo test test-fast test-engine test-sglang test-second-lane test-upstream bench lint format types imports clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-14s %s\n' "$$name" "$$text"; done

env:  ## make or refresh the virtual environment
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer is needed: set PYTHON=' >&2; exit 1; }
	@$(PYTHON) tools/make_env.py --venv '$(VENV)' --engine '$(ENGINE)'

env-sglang:  ## make or refresh the environment with SGLang
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer is needed: set PYTHON=' >&2; exit 1; }
	@$(PYTHON) tools/make_env.py --venv '$(SGLANG)' --engine sglang

demo: env  ## two stock servers and the proxy, checked against one plain server
	@$(RUN) $(BIN)/penstock demo $(if $(MODEL),--model '$(MODEL)') $(ARGS)

test: env  ## everything that must hold before a change goes in
	@$(MAKE) --no-print-directory lint types imports
	@$(RUN) $(BIN)/python -m pytest tests $(SHARED) $(ARGS)
	@echo 'Two lanes side by side: vLLM; SGLang and what is left of vLLM. The second one reports when it ends.'
	@$(MAKE) --no-print-directory -j2 test-engine test-second-lane ENGINE_TESTS='$(ENGINE_TESTS) --ignore=$(SECOND_LANE)'

test-fast: env  ## the same without starting an engine (under two minutes)
	@$(MAKE) --no-print-directory lint types imports
	@$(RUN) $(BIN)/python -m pytest tests $(SHARED) $(ARGS)

test-engine: env  ## only the tests with real engines
	@$(RUN) $(BIN)/python -m pytest $(ENGINE_TESTS) $(ARGS)

test-sglang: env-sglang  ## only the tests with a real SGLang
	@$(RUN) $(SGLANG)/bin/python -m pytest integration_tests/sglang $(ARGS)

test-second-lane: env env-sglang
	@{ $(RUN) $(SGLANG)/bin/python -m pytest integration_tests/sglang $(ARGS); sglang=$$?; \
		$(RUN) $(BIN)/python -m pytest $(SECOND_LANE) $(ARGS); vllm=$$?; } >'$(SGLANG)/tests.log' 2>&1; \
		cat '$(SGLANG)/tests.log'; exit $$((sglang | vllm))

test-upstream: env  ## every supported engine version, each in an environment of its own
	@$(RUN) $(BIN)/python tools/upstream.py $(ARGS)

bench: env  ## the benches (ARGS="flowkv --quick" runs one)
	@$(RUN) $(BIN)/penstock bench $(ARGS)

lint: env  ## lint and format check
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: env  ## rewrite the sources in the house's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: env  ## strict types
	@$(BIN)/python tools/typecheck.py

imports: env  ## the direction of imports between the rooms
	@$(BIN)/python tools/check_imports.py

clean:  ## remove what can be made again, except the environment
	rm -rf .cache build dist results .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## remove the environment as well
	rm -rf '$(VENV)' '$(VENV).lock' '$(SGLANG)' '$(SGLANG).lock' *.egg-info

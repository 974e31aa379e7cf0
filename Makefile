# Each target makes its own .venv first (tools/make_venv.py): a ready one costs nothing, a half-made one is made anew.
# ARGS is appended to the command; PYTHON names the interpreter that .venv is made with; WORKERS is pytest's processes.
SHELL := /bin/sh
.DEFAULT_GOAL := test
ARGS ?=
WORKERS ?= 2
ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; exit; fi; done; echo python3)
endif
BIN := .venv/bin
TYPED := $(wildcard src/tessera/core src/tessera/plan src/tessera/transfer)

.PHONY: venv serve test test-faults test-fuzz lint format matrix matrix-pd bench clean distclean

venv:
	@exec $(PYTHON) tools/make_venv.py

serve: venv
	@exec $(BIN)/tessera serve --model-path abacus-hybrid $(ARGS)

test: venv
	@exec $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-faults: venv
	@HYPOTHESIS_PROFILE=faults exec $(BIN)/python -m pytest tests/plan/test_handoff_model.py tests/plan/test_handoff_faults.py --timeout 7200 $(ARGS)

test-fuzz: venv
	@HYPOTHESIS_PROFILE=faults OMP_NUM_THREADS=1 exec $(BIN)/python -m pytest tests/matrix/test_fuzz.py --timeout 14400 $(ARGS)

test-engines: venv
	@exec $(BIN)/python tools/test_engines.py $(ARGS)

lint: venv
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy $(TYPED) tools

format: venv
	@$(BIN)/ruff check --fix-only --exit-zero . && $(BIN)/ruff format .

# For both: ARGS="--minutes 60" says how long it may take; what has passed at this commit is not run again.
matrix: venv
	@PYTHONPATH=tests OMP_NUM_THREADS=1 exec $(BIN)/python -m matrix $(ARGS)

matrix-pd: venv
	@PYTHONPATH=tests OMP_NUM_THREADS=1 exec $(BIN)/python -m matrix.handover $(ARGS)

bench: venv
	@exec $(BIN)/tessera bench --model-path abacus-hybrid $(ARGS)

clean:
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	@find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@rm -rf .venv .venv.lock

# The two commands: `make serve` and `make test`. Everything else is for developers.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup model serve test test-all check format bench contracts status

help:
	@echo "make serve      set up what is missing, start two replicas, print the endpoint, stay until Ctrl-C"
	@echo "                (options in ARGS: make serve ARGS='--replicas 1 --port 8001')"
	@echo "make test       set up and run the tests (about half an hour on two cores)"
	@echo "make test-all   every test, as long as it takes"
	@echo "make check      format, lint, types, architecture, known vulnerabilities"
	@echo "make bench      compare preemption policies on this machine"
	@echo "make contracts  what we rely on in Ray and vLLM: run after raising either"

setup:
	@$(PYTHON) cluster/bootstrap.py

model: setup
	@$(BIN)/python -m cluster.models

serve: setup
	@exec $(BIN)/python -m cluster serve $(ARGS)

status: setup
	@$(BIN)/python -m cluster status $(ARGS)

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-all: setup
	$(BIN)/python -m pytest $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py
	$(BIN)/python tests/audit.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m cluster bench $(ARGS)

contracts: setup
	$(BIN)/python -m pytest -q tests/test_contracts_vllm.py tests/test_contracts_ray.py

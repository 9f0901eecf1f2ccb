PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=

.PHONY: demo test lint clean

demo: $(INSTALLED)  ## train a two-task network on MultiMNIST and compare methods
	$(BIN)/python -m benchmarks.multimnist $(ARGS)

test: lint  ## the whole suite
	$(BIN)/python -m pytest $(ARGS)
	$(if $(ARGS),,JAX_NUM_CPU_DEVICES=8 $(BIN)/python -m pytest tests/sharded)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

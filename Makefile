PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=

.PHONY: demo test peers bench cost lint clean

demo: $(INSTALLED)  ## train a two-task network on MultiMNIST and compare methods
	$(BIN)/python -m benchmarks.multimnist $(ARGS)

test: lint  ## the whole suite
	$(BIN)/python -m pytest $(ARGS)
	$(if $(ARGS),,JAX_NUM_CPU_DEVICES=8 $(BIN)/python -m pytest tests/sharded)

peers: $(VENV)/.peers  ## the methods beside TorchJD and the formulas of others
	$(BIN)/python -m pytest tests/peers $(ARGS)

bench: $(VENV)/.peers  ## solver times beside TorchJD's
	$(BIN)/python -m benchmarks.solvers $(ARGS)

cost: $(INSTALLED)  ## time and memory of training steps beside the plain step's
	$(BIN)/python -m benchmarks.cost $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/.peers: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[peers]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

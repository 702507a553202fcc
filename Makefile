# `make` lists the targets. Each one that needs packages creates .venv first; later calls find it ready.
# Works with GNU make 3.81 and later (the one of macOS included).

PYTHON ?= python3
# Test processes: one per core, at most eight, each computing on one thread.
WORKERS ?= logical
# More arguments for pip, for example PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# More arguments for pytest, for example PYTEST_ARGS="tests/data -k packing"
PYTEST_ARGS ?=

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --quiet $(PIP_ARGS)
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
PARALLEL := -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: help quickstart install test test-slow test-gpu check site release benchmarks clean

help:
	@echo "make quickstart   create .venv, train a small model and read what it writes (minutes, two cores, offline data)"
	@echo "make install      create .venv with everything that the tests and benchmarks need"
	@echo "make check        formatting, lint, types and the quick tests"
	@echo "make test         the whole test suite, without the slow tests and those that need a GPU"
	@echo "make test-slow    the slow tests"
	@echo "make test-gpu     the tests that need a CUDA device"
	@echo "make site         the documentation as a site, in site/"
	@echo "make release      build the package and try it in an empty environment"
	@echo "make benchmarks   measure again what the documentation reports, but for what needs a trained model"
	@echo "make clean        remove .venv, build products and caches; runs/ is kept"
	@echo ""
	@echo "PYTHON=python3.12 chooses the interpreter of .venv. On Linux without a GPU,"
	@echo "PIP_ARGS=\"--extra-index-url https://download.pytorch.org/whl/cpu\" makes the download much smaller."

quickstart: $(VENV)/installed
	$(VENV)/bin/llamita quickstart

install: $(VENV)/installed-dev

test: $(VENV)/installed-dev
	$(PYTEST) $(PARALLEL) $(PYTEST_ARGS)

test-slow: $(VENV)/installed-dev
	$(PYTEST) -m "slow and not gpu" --timeout 3600 $(PYTEST_ARGS)

test-gpu: $(VENV)/installed-dev
	$(PYTEST) -m gpu --timeout 3600 $(PYTEST_ARGS)

check: $(VENV)/installed-dev
	scripts/check

site: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

release: $(VENV)/installed-dev
	PIP_ARGS="$(PIP_ARGS)" scripts/release $(VENV)/bin/python

benchmarks: $(VENV)/installed-dev
	@for name in training optimizer inference products mlx_inference quantized load prepare soak; do \
		echo "== $$name"; $(VENV)/bin/python "benchmarks/$$name.py" || exit 1; done

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests scripts -name __pycache__ -prune -exec rm -rf {} +

# --- the environment ------------------------------------------------------------------------------------------------

$(VENV)/installed: pyproject.toml
	@$(PYTHON) scripts/create_venv.py $(VENV)
	@echo "installing Llamita and what it needs into $(VENV) (PyTorch is a large download) ..."
	@$(PIP) --editable ".[fast]"
	@touch $@

$(VENV)/installed-docs: pyproject.toml
	@$(PYTHON) scripts/create_venv.py $(VENV)
	@echo "installing Llamita and what its documentation needs into $(VENV) (PyTorch is a large download) ..."
	@$(PIP) --editable ".[fast,docs]"
	@touch $(VENV)/installed $@

$(VENV)/installed-dev: pyproject.toml
	@$(PYTHON) scripts/create_venv.py $(VENV)
	@echo "installing Llamita and what its tests need into $(VENV) (PyTorch is a large download) ..."
	@$(PIP) --editable ".[dev]"
	@touch $(VENV)/installed $(VENV)/installed-docs $@

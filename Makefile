# The doors of fastnas. They need Python 3.10+ with venv, a C++20 compiler and make; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?= -n auto --dist worksteal
DEMO ?= runs/demo
DEMO_ARGS ?= --epochs 5
BENCH_ARGS ?= --compile ops

BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f)
CXX_FILES = $(shell git ls-files '*.h' '*.inl' '*.cpp' '*.cu' '*.cuh')

.DELETE_ON_ERROR:
.PHONY: help build demo test bench lint format clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1: \2/p' Makefile

demo: $(DEMO)/.done ## searches an architecture on real images, once, and says where the result lies
	@echo "The searched cells: $(DEMO)/cell_normal.png, $(DEMO)/cell_reduce.png; how the search came to them:"
	@echo "$(DEMO)/alphas.png, $(DEMO)/metrics.csv, $(BIN)/tensorboard --logdir $(DEMO). To search again: rm -r $(DEMO)"

$(DEMO)/.done: $(VENV)/.built
	$(BIN)/fastnas search --space darts --method darts --data digits --out $(DEMO) --overwrite $(DEMO_ARGS)
	@touch $@

test: build ## the tests; more options for pytest in PYTEST_ARGS
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PYTEST_ARGS)

bench: build ## the benchmarks: a table, benchmarks/results/<version>/<machine>.json, what got slower; options in BENCH_ARGS
	result=$$($(BIN)/python -m benchmarks.facts) && mkdir -p "$$(dirname "$$result")" && \
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-quiet --benchmark-json="$$result.partial" $(BENCH_ARGS) && \
	mv "$$result.partial" "$$result" && echo "$$result" && $(BIN)/python -m benchmarks.regressions "$$result"

lint: build ## linters and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: build ## formats the sources in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

build: $(VENV)/.built ## the environment and the package, in place

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)" "setuptools>=77" ninja "pybind11>=3.0"
	@touch $@

# In place, so that Python files need no second install; objects that are up to date are not compiled again.
$(VENV)/.built: $(VENV)/.torch $(NATIVE) setup.py pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation --editable ".[dev]"
	@touch $@

clean: ## removes what was built; the environment in $(VENV) stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks $(VENV)/.built
	find fastnas tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f fastnas/*.so

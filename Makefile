# Everything sets itself up: `make demo` and `make test` work from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Three at a time on two cores, since many wait for processes; each goes through its share of the files
# in their order, and who is done takes half of the rest of another.
TOGETHER := --numprocesses 4 --dist worksteal

.PHONY: help setup demo check test test-all bench clean

help:
	@echo "make demo      train on real data with 2 workers, predict, verify"
	@echo "make test      the tests (minutes)"
	@echo "make test-all  the tests with full matrices"
	@echo "make check     format, lint, strict types, layers"
	@echo "make bench     all benchmarks; writes benchmarks/results.md"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; received $$($(PYTHON) --version); next: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,examples,report]'
	@touch $(READY)

setup: $(READY)

demo: $(READY)
	@$(BIN)/python examples/demo.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py

test: $(READY)
	$(BIN)/pytest $(TOGETHER) -m "not slow"

test-all: $(READY)
	$(BIN)/pytest $(TOGETHER)

bench: $(READY)
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache

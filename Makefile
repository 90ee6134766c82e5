# openemu3: every target works in a fresh clone on a machine that has Python 3.11+ and nothing else.
# The first call makes .venv and installs what that target needs; stamp files make the next call instant.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/stamps
TORCH := torch==2.13.0
# Quiet pip, no prompts; a constraint file pins every version.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --no-input

DEMO_OUTPUT ?= outputs/demo
# One thread in each of the two test processes: two cores are then used without fighting over them.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check types style layers bench clean

help:
	@echo "make demo      pictures, descriptions and films by the small model that ships here -> $(DEMO_OUTPUT)/index.html"
	@echo "make test      the tests that end within ten minutes on two cores"
	@echo "make test-all  those and the slow ones; some want Debian's chromium, postgresql and npm, and say so where they are missing"
	@echo "make check     ruff (style, undefined names), mypy (types), import-linter (who may import whom)"
	@echo "make bench     measured side by side with transformers, ratios printed"
	@echo "make clean     remove .venv and all caches"

install: $(STAMP)/run

$(STAMP)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "openemu3 needs Python 3.11 or newer, $(PYTHON) is %d.%d; say which with: make PYTHON=python3.12" % v[:2])'
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $(TORCH)"
	@$(PIP) install --constraint constraints.txt $(TORCH)
	@mkdir -p $(STAMP) && touch $@

$(STAMP)/run: $(STAMP)/torch pyproject.toml
	@echo "installing openemu3"
	@$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(STAMP)/test: $(STAMP)/torch pyproject.toml
	@echo "installing openemu3[test]"
	@$(PIP) install --constraint constraints.txt --editable '.[test,recipes]'
	@touch $@ $(STAMP)/run

$(STAMP)/test-all: $(STAMP)/test
	@echo "installing openemu3[cluster]"
	@$(PIP) install --constraint constraints.txt --editable '.[test,recipes,cluster]'
	@touch $@

$(STAMP)/dev: $(STAMP)/torch pyproject.toml
	@echo "installing openemu3[test,dev]"
	@$(PIP) install --constraint constraints.txt --editable '.[test,recipes,dev]'
	@touch $@ $(STAMP)/test $(STAMP)/run

demo: $(STAMP)/run
	@OMP_NUM_THREADS=1 $(BIN)/emu3 demo --output $(DEMO_OUTPUT)  # one thread: the matrices are too small to share

test: $(STAMP)/test
	$(PYTEST) -m "not slow"

test-all: $(STAMP)/test-all
	$(PYTEST)

check: style types layers

style: $(STAMP)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)/dev
	$(BIN)/mypy

layers: $(STAMP)/dev
	$(BIN)/lint-imports

bench: $(STAMP)/test
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache build dist

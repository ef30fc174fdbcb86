# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv once, by constraints.txt.
# PYTHON=... chooses the interpreter (3.11 or later).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt
RUN    := $(VENV)/.installed-run
DEV    := $(VENV)/.installed-dev
DOCS   := $(VENV)/.installed-docs
OUT    ?= outputs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-deepspeed lint format types docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lightning_lora needs Python 3.11 or later; got " + sys.version.split()[0] + ". Say which: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(RUN): $(INPUTS) | $(BIN)/python
	@echo "Installing the package with every extra into $(VENV) (once; some minutes)"
	$(PIP) -e ".[all]"
	@touch $@

$(DEV): $(INPUTS) $(RUN) | $(BIN)/python
	@echo "Installing the test tools into $(VENV) (once)"
	$(PIP) -e ".[all,dev]"
	@touch $@

$(DOCS): $(INPUTS) $(DEV) | $(BIN)/python
	@echo "Installing the tools of the documentation into $(VENV) (once)"
	$(PIP) -e ".[all,dev,docs]"
	@touch $@

demo: $(RUN)  ## QLoRA on the built-in base: what it learned, what it forgot, a merged model
	$(BIN)/python examples/demo/main.py --out $(OUT)

# Tiny models, and tests of two processes: more threads would only fight for the cores.
test test-slow: export OMP_NUM_THREADS ?= 1

test: $(DEV)  ## every test but the slow ones and those that need a GPU
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not gpu"

test-slow: $(DEV)  ## the slow tests
	$(BIN)/python -m pytest -m "slow and not gpu" --durations 20

test-deepspeed: export OMP_NUM_THREADS ?= 1
test-deepspeed: $(DEV)  ## the tests of DeepSpeed, on the CPU (installs it; needs a C++ compiler)
	$(PIP) deepspeed==0.19.8
	$(BIN)/python -m pytest tests/strategies/test_deepspeed.py -m "not gpu"

lint: $(DEV)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)  ## ruff: repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV)  ## mypy
	$(BIN)/mypy

docs: $(DOCS)  ## the documentation as a site in site/: strict, every link looked up
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python docs/tools/dead_links.py site
	$(BIN)/python -m pytest -q tests/docs/test_docstrings.py

clean:  ## remove the virtual environment and what runs have written
	rm -rf $(VENV) outputs site build *.egg-info .mypy_cache .ruff_cache .pytest_cache

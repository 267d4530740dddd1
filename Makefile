# `make quickstart` and `make test` create .venv if needed.
.DEFAULT_GOAL := help
BIN := .venv/bin
PYTHON_OF_VENV := $(BIN)/python
CRDS ?= ../shared/kuberay-crds
TEXT ?= ../shared/data/python_docs.jsonl
MODEL ?= smollm2-135m-instruct
GPU_PYTHON_VERSION ?= 3.12
# bench-gpu and gpu-wheels also run without an installation: with .venv's Python if there is one, else with python3.
BENCH_PYTHON = $(or $(PYTHON),$(wildcard $(PYTHON_OF_VENV)),python3)

.PHONY: help install quickstart test suite test-faults lint lock clean bench-cache bench-capture bench-student bench-evidence bench-budget bench-gpu gpu-wheels check-manifests

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

.venv/installed.txt: deploy/install deploy/uv_settings.py $(wildcard deploy/requirements-*.txt) pyproject.toml
	@deploy/install

install: .venv/installed.txt ## create .venv with all packages

quickstart: install ## distil SmolLM2-135M into a smaller student on this machine
	@$(BIN)/stillhouse run quickstart

test: install ## style, types and tests
	@$(MAKE) --no-print-directory --jobs 2 lint suite

suite: install ## tests only
	@$(BIN)/pytest -m "not faults" -n 3 --dist loadfile --no-loadscope-reorder --durations=15

test-faults: install ## long tests that kill processes
	@$(BIN)/pytest -m faults -s

lint: install ## style (ruff) and types (mypy)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

lock: install ## update the pinned requirements
	@deploy/lock

bench-cache: install ## bytes, error and speed of the cache's codecs
	@$(PYTHON_OF_VENV) tests/benchmarks/bench_cache.py --model $(MODEL) --text $(TEXT)

bench-capture: install ## capture compared with bare prefill
	@$(PYTHON_OF_VENV) tests/benchmarks/bench_capture.py --model $(MODEL) --text $(TEXT)

bench-student: install ## a distillation step compared with a plain one
	@$(PYTHON_OF_VENV) tests/benchmarks/bench_student.py

bench-evidence: install ## students trained on nine kinds of targets
	@$(PYTHON_OF_VENV) tests/benchmarks/bench_evidence.py --model $(MODEL) --text $(TEXT)

bench-budget: install ## share of the control's tokens that a student needs
	@$(PYTHON_OF_VENV) tests/benchmarks/bench_budget.py

bench-gpu: ## every measurement that needs a GPU, in eight minutes (PYTHON=python3: any with torch; no install)
	@$(BENCH_PYTHON) tests/benchmarks/bench_gpu.py

gpu-wheels: ## download the packages that a CUDA image lacks for bench-gpu into build/gpu-wheels
	@$(BENCH_PYTHON) tests/benchmarks/gpu/wheels.py --python-version $(GPU_PYTHON_VERSION)

clean: ## delete .venv and build/; runs and models stay
	@rm -rf .venv build

check-manifests: install ## validate deploy/ against KubeRay's CRDs (CRDS=folder)
	@$(PYTHON_OF_VENV) deploy/check_manifests.py $(CRDS)

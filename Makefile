# The two commands of the README are `make quickstart` and `make test`; both set .venv up by themselves.
.DEFAULT_GOAL := help
BIN := .venv/bin
PYTHON_OF_VENV := $(BIN)/python
CRDS ?= ../shared/kuberay-crds
TEXT ?= ../shared/data/python_docs.jsonl
MODEL ?= smollm2-135m-instruct
GPU_PYTHON_VERSION ?= 3.12
# These two also run where nothing is installed: the virtual environment's Python where there is one, or any other.
BENCH_PYTHON = $(or $(PYTHON),$(wildcard $(PYTHON_OF_VENV)),python3)

.PHONY: help install quickstart test suite test-faults lint lock clean bench-cache bench-capture bench-student bench-evidence bench-budget bench-gpu gpu-wheels check-manifests

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

.venv/installed.txt: deploy/install deploy/uv_settings.py $(wildcard deploy/requirements-*.txt) pyproject.toml
	@deploy/install

install: .venv/installed.txt ## set up .venv

quickstart: install ## distil SmolLM2-135M into a smaller student on this machine
	@$(BIN)/stillhouse run quickstart

test: install ## everything that must hold
	@$(MAKE) --no-print-directory --jobs 2 lint suite

suite: install ## the tests alone, without style and types
	@$(BIN)/pytest -m "not faults" -n 3 --dist loadfile --no-loadscope-reorder --durations=15

test-faults: install ## the long crash tests
	@$(BIN)/pytest -m faults -s

lint: install ## style and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

lock: install ## renew the pinned lists
	@deploy/lock

bench-cache: install ## bytes, losses and speed of the cache's codecs
	@$(PYTHON_OF_VENV) tests/benchmarks/bench_cache.py --model $(MODEL) --text $(TEXT)

bench-capture: install ## a teacher's capture beside bare prefill
	@$(PYTHON_OF_VENV) tests/benchmarks/bench_capture.py --model $(MODEL) --text $(TEXT)

bench-student: install ## a distillation step beside a plain one
	@$(PYTHON_OF_VENV) tests/benchmarks/bench_student.py

bench-evidence: install ## what students learn from each way to keep a distribution
	@$(PYTHON_OF_VENV) tests/benchmarks/bench_evidence.py --model $(MODEL) --text $(TEXT)

bench-budget: install ## the share of a control's tokens that a distilled student needs
	@$(PYTHON_OF_VENV) tests/benchmarks/bench_budget.py

bench-gpu: ## every figure that needs a GPU, in eight minutes (PYTHON=python3: any that has torch; no install)
	@$(BENCH_PYTHON) tests/benchmarks/bench_gpu.py

gpu-wheels: ## what a bare CUDA image lacks for bench-gpu, as wheels for its Python, into build/gpu-wheels
	@$(BENCH_PYTHON) tests/benchmarks/gpu/wheels.py --python-version $(GPU_PYTHON_VERSION)

clean: ## remove what was built, but no run and no model
	@rm -rf .venv build

check-manifests: install ## hold deploy/'s manifests against KubeRay's schemas (CRDS=folder)
	@$(PYTHON_OF_VENV) deploy/check_manifests.py $(CRDS)

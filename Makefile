# Everything runs in .venv, which tools/environment.sh makes on first use.
BIN := .venv/bin
CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help environment demo test test-mutations gpu-check lint format wheel clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 16

environment:  ## make or update .venv (PYTHON=... chooses the interpreter)
	@tools/environment.sh

demo: environment  ## quantize a small real model and let it answer through vLLM at widths and budgets from 8 to 2 bits
	@$(BIN)/python tools/demo.py

test: environment lint  ## check the style, then run every test, as many at once as there are processors
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-mutations: environment  ## break the kernels' sources line by line: the checks of the tests must notice each time
	@$(BIN)/python -m pytest -m mutation -n auto

# Runs where there is no network, in the Python that PYTHON names, or the one of .venv, or the machine's own.
GPU_PYTHON = $(or $(PYTHON),$(wildcard $(BIN)/python),python3)

gpu-check:  ## check and measure the CUDA kernels on this machine's GPU, in 8 minutes; writes gpu-report.json
	@$(GPU_PYTHON) tools/gpu_check.py $(GPU_OPTIONS)

lint: environment  ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: environment  ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# setuptools would pack modules that were deleted since an earlier build, so that build goes first.
wheel: environment  ## build dist/*.whl with the compiled library
	rm -rf build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## remove what was built; .venv and .cache stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -f vllm_matquant/*.so

# make setup   the environment: .venv, dependencies, the native library
# make test    set up, then run the tests, on the native op and on the fallback
# make demo    set up, then train DeepFM on MovieLens-100k
# make bench   set up, then measure the op against what it replaces (minutes)
PYTHON ?= python3
TENSORFLOW ?= tensorflow-cpu# or tensorflow, for GPUs
BIN := .venv/bin
SOURCES := $(shell find csrc -type f)

.PHONY: setup test demo bench lint format clean

setup: .venv/installed

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/dependencies: .venv/bin/python pyproject.toml setup.py deepfm_ops/_version.py
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=2.13" \
	  "$(TENSORFLOW)==$$($(BIN)/python -c 'import runpy; print(runpy.run_path("deepfm_ops/_version.py")["TENSORFLOW"])').*"
	touch $@

.venv/installed: .venv/dependencies $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

test: setup
	$(BIN)/python -m pytest -q -n 2
	DEEPFM_OPS_BACKEND=reference $(BIN)/python -m pytest -q -n 2

demo: setup
	$(BIN)/python examples/demo.py

bench: setup
	$(BIN)/python bench/op.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cc')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cc')

clean:
	rm -rf .venv build dist *.egg-info deepfm_ops/_native.so deepfm_ops/_build_info.json

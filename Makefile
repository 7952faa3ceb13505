# Set-up and all: a Python 3.10 or newer with its headers and venv, and a C compiler, are enough.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# What the extensions are built from.  Python files need no new build: the install is an editable one.
SOURCES := pyproject.toml CMakeLists.txt llmc/__init__.py \
           $(shell find llmc/_cpu -name '*.pyx' -o -name '*.pxd' -o -name '*.[ch]')
C_FILES := $(wildcard llmc/_cpu/simd/*.[ch] llmc/_cuda/*.cu llmc/_cuda/*.cuh \
             tests/simulation/*.[ch] tests/simulation/*.cpp tests/simulation/*.cuh)

.PHONY: help train test test-cuda lint format neon wheel clean
.DELETE_ON_ERROR:

help:
	@echo 'make train     set up, train a small GPT-2 on generated stories, print a sample'
	@echo 'make test      set up, run the tests'
	@echo 'make test-cuda the tests of the CUDA path, without a GPU: builds PyCUDA, loads 0.6 GB from NVIDIA'
	@echo 'make lint      set up, run ruff, mypy and clang-format'
	@echo 'make format    clang-format the kernels in place'
	@echo 'make neon      cross-build for ARM, run the op tests under QEMU (Debian; see .ci/neon)'
	@echo 'make wheel     build a wheel into dist/'
	@echo 'make clean     remove what these made (.venv, .cache, build, dist)'
	@echo
	@echo 'PYTHON=python3.12 chooses the interpreter, for a new $(VENV);'
	@echo 'ARGS="..." goes to llmc train or pytest: make test ARGS="-k linear"'

train: $(VENV)/.installed
	$(VENV)/bin/llmc train $(ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest $(ARGS)

test-cuda: $(VENV)/.installed-test $(VENV)/.installed-test-cuda $(VENV)/.installed-pycuda
	$(VENV)/bin/python -m pytest -k 'cuda or cublaslt or simulation or on_device' $(ARGS)

lint: $(VENV)/.installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(C_FILES)

format: $(VENV)/.installed-lint
	$(VENV)/bin/clang-format -i $(C_FILES)

neon:
	PYTHON="$(PYTHON)" .ci/neon

wheel: $(VENV)/bin/python
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable .
	@touch $@

# With one of the optional sets of dependencies of pyproject.toml.
$(VENV)/.installed-%: $(SOURCES) | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable '.[$*]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-pycuda: .ci/pycuda | $(VENV)/bin/python
	VENV="$(VENV)" .ci/pycuda
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'llmc needs Python 3.10 or newer; choose one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; sys_h = os.path.join(sysconfig.get_path("include"), "Python.h"); \
		raise SystemExit(not os.path.exists(sys_h))' || \
		{ echo 'The headers of Python are missing (Debian, Ubuntu: apt install python3-dev).' >&2; exit 1; }
	@command -v "$${CC:-cc}" > /dev/null || command -v gcc > /dev/null || command -v clang > /dev/null || \
		{ echo 'A C compiler is missing (Debian, Ubuntu: apt install gcc; macOS: xcode-select --install).' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

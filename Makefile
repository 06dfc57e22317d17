# Two commands on a fresh machine: `make demo` and `make test`. Each prepares .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help venv demo test bench bench-kernels bench-quick docs wheel wheel-check clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    train a small teacher and students, evaluate them, write runs/demo/report.html (about 10 minutes)'
	@echo 'make test    lint, type check and test (at most 6 minutes)'
	@echo 'make bench   measure everything next to its peers and its floor (bench-kernels: the ops; bench-quick: answers only)'
	@echo 'make docs    build the documentation: open site/index.html'
	@echo 'make wheel   build a wheel for every Python from 3.11 on into dist/ (wheel-check: use it in an empty environment)'
	@echo 'make venv    only prepare .venv: the pinned requirements and the built package'
	@echo 'make clean   remove build outputs and caches; .venv, data/ and runs/ stay'
	@echo 'Another Python: make PYTHON=python3.12 test'

venv: $(VENV)/.built

demo: venv
	$(BIN)/python -m train.demo

test: venv
	$(BIN)/ruff check .
	$(BIN)/mypy
	@echo '$(BIN)/python -m benchmarks --quick'; $(BIN)/python -m benchmarks --quick >/dev/null
	$(BIN)/pytest -q -n 2 --dist loadfile

# In 40 minutes: no case begins after 38. The results become files; the pages and README's tables follow them, also where a
# row made the run fail.
bench bench-kernels: venv
	status=0; $(BIN)/python -m benchmarks --seconds 2280 $(if $(filter bench-kernels,$@),--kernels) || status=$$?; \
		$(BIN)/python -m benchmarks.publish && exit $$status

bench-quick: venv
	$(BIN)/python -m benchmarks --quick

docs: venv
	$(BIN)/mkdocs build --strict

# Built anew from the sources: setuptools would pack what a former build left there.
wheel: venv
	rm -rf build/lib* build/bdist* dist/mvat-*.whl
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip wheel --disable-pip-version-check --no-build-isolation --no-deps -w dist .

wheel-check: wheel
	$(BIN)/python tests/wheel_check.py dist/mvat-*.whl

# The two stamps are written last, so that an interrupted step is done again.
$(VENV)/.installed: requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo 'mvat: no $(PYTHON) here: sudo apt install python3 python3-venv python3-dev'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mvat: Python 3.11 or newer is needed, this is $$($(PYTHON) --version): make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'mvat: Python lacks venv: sudo apt install python3-venv'; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
		{ echo "mvat: Python's C headers are missing: sudo apt install python3-dev"; exit 1; }
	@{ command -v "$$CXX" || command -v c++ || command -v g++ || command -v clang++; } >/dev/null || \
		{ echo 'mvat: no C++ compiler here: sudo apt install g++'; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	@touch $@

# With .venv/bin on PATH PyTorch's build helper finds ninja.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf build dist site *.egg-info mvat/_C*.so $(VENV)/.built .pytest_cache .hypothesis .ruff_cache .mypy_cache .benchmarks
	find mvat train benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

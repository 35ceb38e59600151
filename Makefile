# make quickstart    set up .venv, then train a language model on long documents (about five minutes on two cores)
# make test          set up .venv, then the quick suite (at most 15 minutes on two cores)
# make test-all      the long suite too (at most 75 minutes)
# make lint          ruff: unused names, order of imports, lines of at most 140 (pip install ruff)
# make verify        check streamed gradients against plain autograd on the quickstart's model
# make doctor        this machine: which backend serves which op, and a self-test
# make clean         remove what was built; make distclean: the environment too
#
# Needs Python 3.10 or later and make; a C++ compiler for the CPU kernels (without one, the pure-torch path runs).
# PYTHON=python3.12 chooses the interpreter, VENV=dir the environment, CXX=clang++ the compiler; pip's own settings are honoured.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/quickstart.yaml
PYTEST_ARGS ?=
# Processes of the quick suite.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# OpenMP threads that wait asleep: on a machine that does other work too, spinning ones cost several times the run.
export OMP_WAIT_POLICY ?= PASSIVE

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built

.PHONY: quickstart test test-all lint verify doctor setup clean distclean

quickstart: $(BUILT)
	$(VENV)/bin/longtrain train $(CONFIG)

test: $(BUILT)
	$(PY) -m pytest -m "not slow" -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-all: $(BUILT)
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(BUILT)
	$(PY) -m ruff check

verify: $(BUILT)
	$(VENV)/bin/longtrain verify $(CONFIG)

doctor: $(BUILT)
	$(VENV)/bin/longtrain doctor

setup: $(BUILT)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}: longtrain needs 3.10 or later; make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make environments with pip: install its venv package (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): requirements-tested.txt | $(PY)
	$(PY) -m pip install -r requirements-tested.txt
	@touch $@

# Editable, so that only changes to csrc/ and setup.py build again. Without the extension everything still runs: said, not hidden.
$(BUILT): $(INSTALLED) setup.py pyproject.toml $(wildcard csrc/*)
	$(PY) -m pip install --no-build-isolation --no-deps --editable .
	@$(PY) -c 'from longtrain._extension import MISSING as why; bar = "*" * 100; print("C++ extension: built" if why is None else \
	  f"\n{bar}\nNO C++ EXTENSION: {why}.\nEverything runs on torch alone, more slowly. Install g++ 11 or clang++ (CXX names another), then: make clean setup\n{bar}\n")'
	@touch $@

clean:
	rm -rf build dist out *.egg-info $(BUILT)
	find longtrain tests tools kernels -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	find longtrain -name '*.so' -delete

distclean: clean
	rm -rf $(VENV)

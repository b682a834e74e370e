# Verbs: demo test check bench claims docs clean.
# Needs GNU make and Python 3.11 or newer; everything else goes into $(VENV).
# Another Python: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check bench claims docs clean

help:
	@echo "make demo    install, audit a small network on faces, and write a report"
	@echo "make test    run the tests"
	@echo "make check   lint, types, layers and documentation"
	@echo "make bench   time the lifted attacks, measure Flower's mods and label rules"
	@echo "make claims  measure what the documentation claims"
	@echo "make docs    build the documentation into site/"
	@echo "make clean   remove what was built; audits stay"

demo: $(VENV)/.keyhole-all
	$(BIN)/keyhole audit faces --out audits/faces

test: $(VENV)/.keyhole-dev
	$(BIN)/python -m pytest

check: $(VENV)/.keyhole-dev docs
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.keyhole-all
	$(BIN)/python benchmarks/lifted.py
	$(BIN)/python benchmarks/evaluations.py
	$(BIN)/python benchmarks/inversion.py
	$(BIN)/python benchmarks/flower_mods.py
	$(BIN)/python benchmarks/sent_labels.py

claims: $(VENV)/.keyhole-dev
	$(BIN)/python tests/claims/measure.py
	$(BIN)/python tests/claims/cells.py --claims
	$(BIN)/python docs/generate.py

docs: $(VENV)/.keyhole-dev
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Documentation: site/index.html"

clean:
	rm -rf .venv build dist site docs/methods
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find src tests docs examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Installing. The stamps repeat it when the project's requirements change.

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "Error: there is no '$(PYTHON)' here; install Python 3.11 or newer, or name one: make PYTHON=python3.12 demo" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Error: Keyhole needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12 demo" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Error: '$(PYTHON) -m venv' failed; some systems keep it in a package of its own, such as python3-venv" >&2; exit 1; }

$(VENV)/.keyhole-all: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Keyhole into $(VENV); PyTorch is large, so that the first time may take some minutes."
	@$(PIP_INSTALL) -e ".[all]"
	@touch $@

$(VENV)/.keyhole-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Keyhole and what its tests need into $(VENV)."
	@$(PIP_INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.keyhole-all

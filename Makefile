# Every target sets up what it needs in .venv; nothing but Python >= 3.11 is expected.
#   make train PYTHON=/path/to/python3    names the interpreter to build .venv from

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help train test test-torchsim test-workflows lint format example-set wheel clean distclean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCHSIM := .venv-torchsim
WORKFLOWS := .venv-workflows
EXAMPLE := runs/example

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 22

train: $(VENV)/installed-plot ## train and evaluate on the example set; report and plots in runs/example
	rm -rf $(EXAMPLE)
	$(BIN)/fastchgnet prepare examples/prototypes.xyz --out $(EXAMPLE)/store \
	  --functional "chgnet-0.3.0, not DFT" --energy-correction MP2020
	$(BIN)/fastchgnet train examples/example.yaml
	$(BIN)/fastchgnet evaluate $(EXAMPLE)/model/best.safetensors $(EXAMPLE)/store --split test --out $(EXAMPLE)/report
	@echo "Report: $(EXAMPLE)/report/report.html. The labels are predictions of chgnet-0.3.0, not DFT."

test: lint ## lint, types and tests, in two processes
	$(BIN)/pytest -n 2 --dist loadfile

test-torchsim: $(TORCHSIM)/installed ## tests of the TorchSim interface; needs Python >= 3.12
	$(TORCHSIM)/bin/pytest tests/torchsim

test-workflows: $(WORKFLOWS)/installed ## the calculator inside matcalc and atomate2
	$(WORKFLOWS)/bin/pytest -rs tests/test_workflows.py

lint: $(VENV)/installed-test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastchgnet

format: $(VENV)/installed-test ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

example-set: $(VENV)/installed-test ## generate examples/prototypes.xyz anew (a minute)
	$(BIN)/python examples/make_prototypes.py

wheel: $(VENV)/installed-test ## build the wheel and the source archive in dist/
	$(BIN)/python -m build

clean: ## remove what the targets made, except .venv and other runs
	rm -rf $(EXAMPLE) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

distclean: clean ## remove .venv as well
	rm -rf $(VENV) $(TORCHSIM) $(WORKFLOWS)

# One stamp for each set of extras. torch goes first: whatever comes later must accept the tested one.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV), minutes the first time"
	@$(PIP) install --quiet --constraint constraints.txt torch || { \
	  echo "error: cannot install $$(grep '^torch==' constraints.txt) for $$($(BIN)/python -V); see docs/install.md" >&2; \
	  exit 1; }
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

$(BIN)/python:
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if "$$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Setting up $(VENV) with $$("$$python" -V)"; exec "$$python" -m venv $(VENV); \
	  fi; \
	done; echo "error: no Python >= 3.11 with ensurepip found; name one: make PYTHON=/path/to/python3" >&2; exit 1

$(TORCHSIM)/installed: pyproject.toml constraints.txt | $(TORCHSIM)/bin/python
	@echo "Installing into $(TORCHSIM), minutes and gigabytes the first time"
	@$(TORCHSIM)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	  pytest --editable ".[chgnet,torchsim]"
	@touch $@

$(TORCHSIM)/bin/python:
	@for python in $(PYTHON) python3.12 python3.13 python3; do \
	  if "$$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    echo "Setting up $(TORCHSIM) with $$("$$python" -V)"; exec "$$python" -m venv $(TORCHSIM); \
	  fi; \
	done; echo "error: no Python >= 3.12 with ensurepip found; name one: make test-torchsim PYTHON=/path/to/python3" >&2; exit 1

# atomate2 brings boto3, which refuses the tested python-dateutil
$(WORKFLOWS)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(WORKFLOWS), minutes the first time"
	@$(BIN)/python -m venv $(WORKFLOWS)
	@grep -v '^python-dateutil' constraints.txt > $(WORKFLOWS)/constraints.txt
	@for packages in torch "pytest matcalc==0.7.* atomate2<0.2 --editable .[pymatgen]"; do \
	  $(WORKFLOWS)/bin/python -m pip --disable-pip-version-check install --quiet \
	    --constraint $(WORKFLOWS)/constraints.txt $$packages; \
	done
	@touch $@

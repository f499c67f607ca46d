# Two commands on a fresh machine, which needs Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test slow check clean

help:
	@echo "make demo    learn a network under a budget on real data, in minutes"
	@echo "make test    run the whole suite (make slow: the tests that take longer)"
	@echo "make check   lint and types"

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "budgetnet needs Python >= 3.11, got " + sys.version.split()[0])'
	@echo "setting up .venv (once; torch is large)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[develop]'
	@touch $@

demo: setup
	$(BIN)/budgetnet search --data digits --space resnet_fabric --budget 'macs<=25%' --epochs 40

# one thread a process, as there is a process a core: threads of several that wait for each other slow all of them
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Two commands are all a newcomer needs:
#   make demo   train the attention twins on real text, compare them, write runs/demo/report.html
#   make test   lint, types and tests
# Both create .venv when it is missing, install only when pyproject.toml or constraints.txt changed, and build the CPU
# kernel again only when its sources did.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What the packages were installed from; a changed sum means install again, a touched file does not.
SUM := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
# The same for the CPU kernel, which an installation builds too.
KERNEL := src/clearhead/kernels/cpu
KERNEL_STAMP := $(VENV)/.kernel
KERNEL_SUM := $(shell cat hatch_build.py $(KERNEL)/src/* | cksum | tr ' ' '-')

.DEFAULT_GOAL := help
.PHONY: help demo test install lint types pytest format clean

help:
	@sed -n 's/^#   //p' Makefile

demo: install
	@$(BIN)/clearhead compare recipes/demo.toml --out runs/demo

test: lint types pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

pytest: install
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install:
	@test "$$(cat $(STAMP) 2>/dev/null)" = "$(SUM)" || $(MAKE) --no-print-directory venv
	@test -e $(KERNEL)/build.json && test "$$(cat $(KERNEL_STAMP) 2>/dev/null)" = "$(KERNEL_SUM)" || \
		$(MAKE) --no-print-directory kernel

.PHONY: venv kernel
kernel:
	@$(BIN)/python hatch_build.py
	@echo "$(KERNEL_SUM)" > $(KERNEL_STAMP)

venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "clearhead needs Python 3.11 or newer; say which one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing into $(VENV): about 2 GB, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt -e '.[dev]'
	@echo "$(SUM)" > $(STAMP)
	@echo "$(KERNEL_SUM)" > $(KERNEL_STAMP)

clean:
	rm -rf $(KERNEL)/build.json $(KERNEL)/libclearhead_cpu.*
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

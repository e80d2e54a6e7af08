PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

# Tests and benchmarks start many processes, which would each compile every module again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo demo-text test thorough lint parity bench bench-scaling bench-reading bench-packing fuzz clean

help:
	@echo "make demo    the digits example, from training to the table and the picture"
	@echo "make demo-text  text tasks, from your files to the table: make demo-text ARGS='a.csv b.csv'"
	@echo "make test    the whole test suite"
	@echo "make thorough  the contracts of methods and ops, on ten times as many examples"
	@echo "make lint    formatting, lint, types, import layers"
	@echo "make parity  record mergekit's, FusionBench's and WeightWatcher's outputs again, in environments of their own"
	@echo "make bench   cost of every method over the floor of the machine, and beside mergekit: make bench ARGS='--size 1GB'"
	@echo "make bench-scaling  cost against size and number of models, and what a second thread gains"
	@echo "make bench-reading  ways to read files on this disk, and what asking ahead and letting go are worth"
	@echo "make bench-packing  packed files beside bitmasks, zstd and bf16: bits and speed"
	@echo "make fuzz    fuzz one reader: make fuzz ARGS='--target header --seconds 300'"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: installed again when the versions or the dependencies change.
$(VENV)/.%: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e ".[$*]"
	@touch $@

demo: $(VENV)/.examples
	$(BIN)/python examples/digits/run.py

demo-text: $(VENV)/.peft
	$(BIN)/python examples/text_tasks/run.py $(ARGS)

# Chromium and axe-core for the tests of reports, where they are missing.
BROWSER = tests/browser/.tools/stamp
$(BROWSER): tests/browser/install.sh
	tests/browser/install.sh
	@mkdir -p $(@D) && touch $@

# One more than there are cores: some tests wait for disks, servers and other processes.
JOBS = $(shell expr $$(nproc 2>/dev/null || echo 2) + 1)

test: $(VENV)/.test $(BROWSER)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

thorough: $(VENV)/.test
	MERGEBENCH_TEST_EXAMPLES=10 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/contract $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

parity: $(BIN)/python
	$(BIN)/python tests/parity/record.py
	$(BIN)/python tests/parity/configs.py
	$(BIN)/python tests/parity/record_fusionbench.py
	$(BIN)/python tests/parity/record_weightwatcher.py

bench: $(VENV)/.test
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python tests/parity/record.py --install
	$(BIN)/python benchmarks/against_mergekit.py $(ARGS)

bench-scaling: $(VENV)/.test
	$(BIN)/python benchmarks/scaling.py size $(ARGS)
	$(BIN)/python benchmarks/scaling.py models $(ARGS)
	$(BIN)/python benchmarks/scaling.py threads $(ARGS)

bench-reading: $(VENV)/.test
	$(BIN)/python benchmarks/reading.py $(ARGS)

bench-packing: $(VENV)/.bench
	$(BIN)/python benchmarks/packing.py $(ARGS)

# In an environment of its own: atheris is no dependency, and not made for every system.
FUZZ = .fuzz-venv
$(FUZZ)/.atheris: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt \
		-e ".[gguf]" atheris==3.0.0
	@touch $@

fuzz: $(FUZZ)/.atheris
	$(FUZZ)/bin/python -W ignore benchmarks/fuzz/run.py $(ARGS)

clean:
	rm -rf $(VENV) $(FUZZ) tests/browser/.tools .ci-venv .parity-venv .parity-venv-fusionbench .parity-venv-weightwatcher .pytest_cache .mypy_cache .ruff_cache .hypothesis

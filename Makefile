# `make demo` and `make test` set up what they need in this directory. Only as root, with SLURM
# installed, do tests write elsewhere: /tmp/titans-slurm-* and lines of /etc/hosts, gone at the end.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
override DEMO := demo

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test test-full bench-data bench-decoding check format clean

help:
	@echo "make setup      create .venv with titans and all test packages"
	@echo "make demo       prepare real text, train on 2 ranks, export, generate, plot ($(DEMO)/)"
	@echo "make test       the tests, on CPU"
	@echo "make test-full  the tests and the minutes-long ones"
	@echo "make bench-data tokens per second of preparing data, beside other programs"
	@echo "make bench-decoding  cost of a token after long texts, memory of reading them"
	@echo "make check      lint, format and type checks"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python {v[0]}.{v[1]} is not supported; run make PYTHON=python3.11 (or python3.12)" if v not in ((3, 11), (3, 12)) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(DEMO)/data/manifest.json $(DEMO)/run/.trained $(DEMO)/model/config.json
	$(BIN)/titans generate $(DEMO)/model "The following example shows how to" --max-new-tokens 48 --temperature 0.7 --seed 1
	$(BIN)/titans report $(DEMO)/run

$(DEMO)/corpus.jsonl: | $(READY)
	@mkdir -p $(DEMO)
	$(BIN)/python -m data_prep.stdlib_text $@

$(DEMO)/tokenizer.model: $(DEMO)/corpus.jsonl
	$(BIN)/titans data tokenizer --input $< --vocab-size 4096 --output $@

$(DEMO)/data/manifest.json: $(DEMO)/tokenizer.model $(DEMO)/corpus.jsonl
	$(BIN)/titans data prepare --input $(DEMO)/corpus.jsonl --tokenizer $< --output $(DEMO)/data

$(DEMO)/run/.trained: $(DEMO)/data/manifest.json configs/demo.yaml
	$(BIN)/titans train configs/demo.yaml --ranks 2 --resume
	@touch $@

$(DEMO)/model/config.json: $(DEMO)/run/.trained
	@rm -rf $(DEMO)/model
	$(BIN)/titans export $(DEMO)/run $(DEMO)/model

test: $(READY)
	$(BIN)/pytest -m "not slow" -n 3 --durations 40

test-full: $(READY)
	$(BIN)/pytest -n 2
	$(BIN)/titans bench wavefront --forward-ms 40 --backward-ms 80 --check 1.1
	$(BIN)/python tests/benchmarks/long_sequence.py --check 1.3

bench-data: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,fast]"
	$(BIN)/python tests/benchmarks/prepare_data.py --json build/bench-data/result.json $(OPTIONS)

bench-decoding: $(READY)
	mkdir -p build/bench-decoding
	$(BIN)/python tests/benchmarks/decoding.py --check --json build/bench-decoding/result.json $(OPTIONS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(DEMO)

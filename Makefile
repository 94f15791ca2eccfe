# One command each, on a fresh machine with Python 3.10 or newer: the environment is made first, in .venv.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: bench test docs readme prepare newest clean
.DEFAULT_GOAL := help

help:
	@echo "make bench    train the heads on cluttered digits, show the table, write runs/report.html (ARGS='--heads all' to change it)"
	@echo "make test     notebooks, tests, and whether the modules and README.md are in step with the notebooks"
	@echo "make docs     build the site: site/index.html"
	@echo "make prepare  after editing a notebook: export, clean, rebuild README.md"
	@echo "make newest   the tests with the newest fastai and fastcore, as a user may have them"
	@echo "make clean    remove environments and everything built"

.venv/.made:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

.venv/.bench: .venv/.made settings.ini setup.py
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/.dev: .venv/.made settings.ini setup.py
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

.venv/.docs: .venv/.made settings.ini setup.py
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

bench: .venv/.bench
	$(BIN)/attnpool bench digits $(ARGS)

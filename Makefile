# One command each, on a fresh machine with Python 3.10 or newer. An environment is made first: .venv for test, pages and
# prepare, one of its own for each other target, so that none leans on what another has installed.
# TORCH=cpu takes PyTorch's small build for machines without a GPU, from PyTorch's own index (or TORCH=cu128, ...).
PYTHON ?= python3
TORCH ?=
BIN := .venv/bin
PIP := -m pip --disable-pip-version-check install --quiet
PIP += $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))
.PHONY: help bench test in-step pages docs readme prepare newest clean
.DEFAULT_GOAL := help

help:
	@echo "make bench    train the heads on cluttered digits, show the table, write runs/report.html (ARGS='--heads all' to change it)"
	@echo "make test     whether modules, README.md and what the pages show are in step with the notebooks; the tests"
	@echo "make pages    run every page, write those that show something else than before (ARGS=--all: every one)"
	@echo "make docs     build the site: site/index.html"
	@echo "make prepare  after editing a notebook: export, clean, rebuild README.md"
	@echo "make newest   the tests with the newest fastai and fastcore, as a user may have them"
	@echo "make clean    remove environments and everything built"
	@echo "Each makes its own environment the first time, 6.5 GB of which most is PyTorch with CUDA. TORCH=cpu takes the build without."

.venv/.dev: EXTRA = [dev]
.venv-docs/.docs: EXTRA = [docs]
.venv/.dev .venv-docs/.docs .venv-bench/.bench: settings.ini setup.py
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) --upgrade pip
	$(@D)/bin/python $(PIP) -e '.$(EXTRA)'
	touch $@

bench: .venv-bench/.bench
	.venv-bench/bin/attnpool bench digits $(ARGS)

readme: .venv/.dev
	$(BIN)/python docs/readme.py

prepare: .venv/.dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python docs/readme.py

# Export, cleaning and README must change nothing.
in-step: .venv/.dev
	rm -rf .venv/before && mkdir -p .venv/before/docs
	cp -r attnpool nbs README.md .venv/before && cp -r docs/readme .venv/before/docs
	$(MAKE) --no-print-directory prepare
	@for f in attnpool nbs README.md docs/readme; do \
	  diff -r -q -x __pycache__ -x .ipynb_checkpoints -x .last_checked .venv/before/$$f $$f \
	  || { echo "The modules, notebooks or README.md were not in step. They are now: look at git diff and commit."; exit 1; }; done

# A page is written where its outputs differ in more than numbers and pictures. ARGS may name pages: ARGS='heads fold'.
pages: .venv/.dev
	$(BIN)/python -W ignore::FutureWarning docs/pages.py $(ARGS)

# One thread for each of several workers: two workers with two threads each take four times as long on two cores.
test: export OMP_NUM_THREADS = 1
test: .venv/.dev in-step
	$(BIN)/python -W ignore::FutureWarning docs/pages.py --check
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

# nbdev_proc_nbs would first install quarto with sudo, and this package into whatever pip is on the PATH; the function
# behind it does neither. Not with --quiet: it keeps --strict from counting warnings.
docs: .venv-docs/.docs
	rm -rf site
	.venv-docs/bin/python -W ignore -c "from nbdev.serve import proc_nbs; proc_nbs(force=True)"
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# Made anew each time: newest is what it is for.
newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP) --upgrade pip
	.venv-newest/bin/python $(PIP) --upgrade -e . pytest hypothesis
	.venv-newest/bin/python -m pytest

clean:
	rm -rf .venv .venv-bench .venv-docs .venv-newest _proc _docs site build dist *.egg-info

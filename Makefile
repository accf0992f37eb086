# make book     environment and site          make execute [CHAPTER="polyak atlas"]   re-run notebooks
# make test     everything CI checks          make record  record the long runs again
# make nbval    notebooks against their stored outputs [THREADS=2] [CAPABILITY=default]
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: book test nbval execute record clean

PYTHON     ?= python3
THREADS    ?= 1
CAPABILITY ?=
CHAPTER    ?=
RUN        ?=
BIN   := .venv/bin
STAMP := .venv/installed
PAGES = $(shell sed -nE 's/^[ -]*(root|file): *//p' _toc.yml)
THREAD_ENV = OMP_NUM_THREADS=$(THREADS) OMP_WAIT_POLICY=passive $(if $(CAPABILITY),ATEN_CPU_CAPABILITY=$(CAPABILITY))

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "This book needs Python 3.11 or newer; $(PYTHON) is not: try 'make PYTHON=python3.12'." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	touch $@

# The old site is removed first: Sphinx repeats no warning for a page it has cached.
book: $(STAMP)
	rm -rf _build
	$(BIN)/jupyter-book build -W --keep-going -n .
	@for page in index $(PAGES); do \
	  test -s "_build/html/$$page.html" || { echo "The build left no _build/html/$$page.html." >&2; exit 1; }; done
	@echo "$(CURDIR)/_build/html/index.html"

test: book
	$(BIN)/python book/_tools/notebooks.py check
	OMP_NUM_THREADS=1 SITE_REQUIRED=1 $(BIN)/python -m pytest -q -n 2
	$(MAKE) nbval

nbval: $(STAMP)
	$(THREAD_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile -p no:cacheprovider \
	  --nbval $(wildcard book/*.ipynb) --nbval-cell-timeout=300 --nbval-sanitize-with tests/nbval-sanitize.cfg

execute: $(STAMP)
	$(BIN)/python book/_tools/notebooks.py execute $(CHAPTER)

record: $(STAMP)
	$(BIN)/python -m pslib.experiments run $(RUN)

clean:
	rm -rf _build .pytest_cache .hypothesis

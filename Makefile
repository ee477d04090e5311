# Bessemer. `make help` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help install test test-cluster lint quickstart clean

PYTHON ?= python3
DATA ?=
# Written by scripts/install when it ends well; everything is installed again when what it depends on changes.
INSTALLED := .venv/.installed

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED)  ## Make .venv with Bessemer and everything it needs.

$(INSTALLED): pyproject.toml constraints.txt scripts/install
	@PYTHON=$(PYTHON) scripts/install

quickstart: $(INSTALLED)  ## Train a small BigGAN in minutes; DATA=path/to/images takes your own.
	@.venv/bin/bessemer quickstart $(if $(DATA),"$(DATA)")

test: $(INSTALLED)  ## Style, types and all tests, as CI runs them.
	@scripts/test

test-cluster: $(INSTALLED)  ## Break a cluster of network namespaces in all ways; root, half an hour.
	@.venv/bin/pytest -m cluster tests/cluster

lint: $(INSTALLED)  ## Style, format and types only.
	@scripts/lint

clean:  ## Delete the environment and caches; runs and data sets stay.
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

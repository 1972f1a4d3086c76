PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
WORKERS ?= 2

.PHONY: help run talk test invariants lint format bench fuzz clean

help:  ## print this list
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

run: $(VENV)/.installed  ## install what is needed and speak (ARGS='prompt="Once upon a time" ticks=100')
	@$(BIN)/brain $(ARGS)

# Tests start many short multi-threaded jobs; threads that spin while they wait would fight over few
# cores.
talk: $(VENV)/.installed  ## talk with the model (ARGS='talk.name=bern')
	@$(BIN)/brain task=talk $(ARGS)

test: $(VENV)/.installed-test  ## run the tests in WORKERS=2 processes (ARGS="tests/compiled -k patch")
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

invariants: $(VENV)/.installed-test  ## run the tests of the invariants alone
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m invariant $(ARGS)

lint: $(VENV)/.installed-test  ## check with ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test  ## format the code with ruff
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test  ## time this machine beside transformers, and llama.cpp where installed
	@$(BIN)/brain task=bench $(ARGS)

fuzz: $(VENV)/.installed-test  ## damage files and see what is made of them (ARGS="--cases 1000")
	$(BIN)/python tests/fuzz/fuzz.py $(ARGS)

# Without a GPU the CPU build of torch is asked for first: where pip knows of one, it saves
# gigabytes. Its exact version also keeps pip from replacing it later.
$(VENV)/.torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch $(TORCH) into $(VENV) ..." >&2
	@if command -v nvidia-smi >/dev/null 2>&1; \
		then $(BIN)/pip install --quiet "torch==$(TORCH)"; \
		else $(BIN)/pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null || \
			$(BIN)/pip install --quiet "torch==$(TORCH)"; fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "installing positronic-brain ..." >&2
	@$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need ..." >&2
	@$(BIN)/pip install --quiet --editable ".[test]"
	@touch $@

clean:  ## remove the environment
	rm -rf $(VENV) build *.egg-info

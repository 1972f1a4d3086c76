# make run    installs what is needed and lets the brain speak (ARGS="prompt=... ticks=100")
# make test   runs the whole test suite (ARGS="tests/compiled -k patch")
# make lint   ruff and mypy
# make bench  times this machine beside transformers, and llama.cpp where it is installed

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0

.PHONY: run test lint bench clean

run: $(VENV)/.installed
	@$(BIN)/brain $(ARGS)

test: $(VENV)/.installed-test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	@$(BIN)/brain task=bench $(ARGS)

# Tests start many short multi-threaded jobs; threads that spin while they wait would fight over few
# cores.

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

clean:
	rm -rf $(VENV) build *.egg-info

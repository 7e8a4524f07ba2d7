# Needs make and Python 3.11 or newer, nothing else. Everything is installed into .venv/.
#
#   make serve    install, and serve the embedded model; ARGS="--model FILE.gguf --port 9000"
#   make test     install, and run the tests; kernels are compiled, which needs no GPU; ARGS="-k cache"
#   make check    what must be green before a commit: static, then test
#   make test-agents   install real coding agents into .agents/ (needs node), and drive them
#   make static   ruff, mypy --strict, and the architecture test; a few seconds
#   make clean    remove .venv/ and everything that was built

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=

# Where there is an NVIDIA driver, `serve` takes the GPU, which needs this extra.
CUDA := $(if $(wildcard /dev/nvidiactl),[cuda])

# The first of these that is 3.11 or newer and can make an environment.
PYTHONS := $(PYTHON) python3.13 python3.12 python3.11 python3 python
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

.PHONY: serve test test-agents check static clean

serve: $(VENV)/installed-serve
	$(BIN)/qwend serve $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(ARGS)

# The agents are the newest that the registries have; ARGS="-k codex" drives one of them.
test-agents: $(VENV)/installed-test | .agents/installed
	$(BIN)/python -m pytest -m agents tests/agents $(ARGS)

check: static test

static: $(VENV)/installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/python -m pytest -q tests/test_architecture.py

clean:
	rm -rf $(VENV) .agents build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find daemon clients tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed as links to this folder, so that only a change of pyproject.toml installs anew.
$(VENV)/installed-serve: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) --editable '.$(CUDA)'
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) --editable '.[test,cuda]'
	@touch $@

$(VENV)/installed-check: pyproject.toml | $(BIN)/python
	$(PIP_INSTALL) --editable '.[test,check,cuda]'
	@touch $@

.agents/installed:
	mkdir -p .agents
	npm install --prefix .agents --no-fund --no-audit --silent \
		@qwen-code/qwen-code @openai/codex @anthropic-ai/claude-code opencode-ai
	$(BIN)/python -m venv .agents/aider
	.agents/aider/bin/python -m pip install --quiet --disable-pip-version-check aider-chat
	@touch $@

$(BIN)/python:
	@for python in $(PYTHONS); do \
		if $$python -c '$(SUITABLE)' 2>/dev/null; then \
			echo "$$($$python --version) -> $(VENV)/"; \
			exec $$python -m venv $(VENV); \
		fi; \
	done; \
	echo "qwend needs Python 3.11 or newer with its venv module (Debian: apt install python3-venv)." >&2; \
	echo "Name another one with: make PYTHON=/path/to/python ..." >&2; \
	exit 1

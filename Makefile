# Every target sets up what it needs by itself, once. Nothing but Python 3.11 or 3.12 has to be installed.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-memory parameters golden bench peer lint manifests compile ir docs lock lock-images images test-containers push clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Make the virtual environment (about 3 GB, from hashed pins)

$(READY): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 13) else \
	  f"Python 3.11 or 3.12 is needed, {sys.executable} is {v.major}.{v.minor}; say make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY) ## Run the whole DAG on drawn shapes: dataset in, promoted ONNX model out (10 minutes)
	@test -d runs/demo-data || $(BIN)/python -m rfdetr_core data sample --out runs/demo-data
	$(BIN)/rfdetr-pipeline run --config examples/demo.yaml --run-id demo

test: $(READY) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-long: demo ## Run the demo and check it, the DAG on real images, and the full-size reference cases
	$(BIN)/python -m pytest -m long

test-memory: $(READY) ## Prove the safe batch within memory limits of several sizes (root; 4 minutes)
	$(BIN)/python -m pytest -n 0 -m memory tests/training/test_memory_limits.py

parameters: $(READY) ## Run the tests of every training parameter, a line per parameter
	$(BIN)/python -m tests.parameters

golden: $(READY) ## Compare with the reference numbers, a line per golden file
	$(BIN)/python -m tests.models.golden_report

bench: $(READY) ## Measure the model beside the reference package (needs make peer)
	$(BIN)/python -m benchmarks.model

# The reference package, in an environment of its own: for comparisons only, never a dependency.
PEER := .peer
peer: $(PEER)/.ready ## Install the reference package beside us, for comparisons
$(PEER)/.ready:
	$(PYTHON) -m venv --clear $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check torch torchvision "rfdetr[train,loggers,onnx]==1.11.2"
	@touch $@

lint: $(READY) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ir: $(READY) ## Write the reviewed KFP IR of every profile anew (tests/golden/ir): look at the difference
	$(BIN)/python -m tests.pipelines.golden_ir

compile: $(READY) ## Write the pipeline as KFP IR YAML to build/retrain.yaml
	$(BIN)/rfdetr-pipeline compile --output build/retrain.yaml

manifests: $(READY) ## Render manifests/ with kubectl into manifests/rendered/
	$(BIN)/rfdetr-pipeline argo compile --profile single-gpu --output manifests/argo/workflow-template.yaml
	for folder in base argo multi-node overlays/minio overlays/aws-irsa overlays/aws-irsa-argo overlays/spot; do \
	  kubectl kustomize manifests/$$folder > manifests/rendered/$$(basename $$folder).yaml || exit; \
	done

docs: $(READY) ## Write docs/parameters.md anew from the configuration classes
	$(BIN)/python -m rfdetr_core.config.table > docs/parameters.md.new
	mv docs/parameters.md.new docs/parameters.md

UV_COMPILE = $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet
REQUIREMENTS := images/requirements
lock: $(READY) ## Pin all dependencies anew, with hashes: requirements-dev.txt and those of the images
	$(BIN)/python -m pip install --quiet uv
	$(UV_COMPILE) pyproject.toml --extra dev --upgrade --output-file requirements-dev.txt
	$(MAKE) lock-images

lock-images: $(READY) ## Pin what the images hold, and what submitting needs, at the versions of requirements-dev.txt
	$(BIN)/python -m pip install --quiet uv
	$(UV_COMPILE) pyproject.toml -c requirements-dev.txt --output-file $(REQUIREMENTS)/base.txt
	for image in torch train export-onnx submit; do \
	  $(UV_COMPILE) pyproject.toml --extra image-$$image -c requirements-dev.txt --output-file $(REQUIREMENTS)/$$image.txt || exit; \
	done
	sed -n '/^  "kfp==/s/[ ",]//gp' pyproject.toml | \
	  $(UV_COMPILE) - --no-deps --no-annotate -c requirements-dev.txt --output-file $(REQUIREMENTS)/kfp.txt
	$(UV_COMPILE) pyproject.toml --extra pipelines -c requirements-dev.txt --output-file requirements-submit.txt

images: ## Build the image of every stage, with docker, podman or buildah (BASE_IMAGE=... for another base)
	$(PYTHON) -m pipelines.containers build --base "$(BASE_IMAGE)"

test-containers: $(READY) ## Build the images and run the DAG in them (on Debian as root it installs podman first)
	base="$(or $(BASE_IMAGE),$$(images/prepare-debian.sh))" && $(MAKE) images BASE_IMAGE="$$base"
	$(BIN)/python -m pytest -m containers --durations=10 tests/containers

push: ## Push the images to REGISTRY=... and write images/digests.json, for compile --pinned
	$(PYTHON) -m pipelines.containers push "$(REGISTRY)"

clean: ## Remove the virtual environment and what demo and tests left
	rm -rf $(VENV) $(PEER) runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

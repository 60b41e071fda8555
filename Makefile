# `make demo` and `make test` are all the set-up there is: both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-quick test-gpu lint prove-layouts bench-quick bench-initialize

$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

datasets/demo/dataset.json: | $(VENV)/.installed
	trireme prepare --source python-stdlib --out datasets/demo --vocab-size 4096 --seq-len 256

demo: $(VENV)/.installed datasets/demo/dataset.json
	trireme train configs/demo.yaml
	trireme evaluate runs/demo
	trireme plot runs/demo
	trireme generate runs/demo --prompt 'def main(' --max-new-tokens 96
	@echo
	@echo 'The run is in runs/demo: config.yaml, metrics.jsonl, curves.png, checkpoints/, tensorboard/.'
	@echo 'Its data are in datasets/demo. Watch it: $(BIN)/tensorboard --logdir runs'

lint: $(VENV)/.installed
	ruff check .
	ruff format --check .
	mypy

# two at a time, as many tests start processes of their own; a file's tests share what they set up
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	pytest $(SIDE_BY_SIDE)

test-quick: $(VENV)/.installed
	pytest $(SIDE_BY_SIDE) -m 'not slow'

# all other tests are of CPUs, and see no GPU
test-gpu: $(VENV)/.installed
	TEST_GPU=1 pytest tests/gpu

prove-layouts: $(VENV)/.installed
	pytest tests/parallel/test_layouts.py tests/parallel/test_compile.py tests/parallel/test_zero.py \
		-o junit_family=xunit1 --junitxml=runs/layouts.xml
	python -m tests.parallel.proved runs/layouts.xml

bench-quick: $(VENV)/.installed
	python -m benchmarks.quick

bench-initialize: $(VENV)/.installed
	python -m benchmarks.initialize

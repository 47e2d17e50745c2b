# The two commands are `make demo` and `make test`. Both make .venv at first, and find it the second time.

PYTHON ?= python3
PIP_INSTALL ?= pip install
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test test-all gpu lint schema clean

demo: .venv/ready
	rm -rf $(DEMO)
	$(BIN)/python tools/train.py configs/shapes/mask_rcnn_r18_fpn.yaml --out $(DEMO)

# A process for each core, each with one thread; threads that wait in a test with more sleep.
test: .venv/ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto

test-all: .venv/ready  ## also what takes long, and what needs a GPU
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto -m ''

gpu: .venv/ready  ## what needs a GPU: first that the host never waits for it, then all tests, then the speed
	$(BIN)/python -m pytest -x -m 'gpu and not slow' -k 'not triton' tests/test_gpu.py
	$(BIN)/python -m pytest -m 'gpu and not slow'
	$(BIN)/python tools/benchmark.py gpu

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

schema: .venv/ready  ## what editors complete and check the YAML with
	$(BIN)/python tools/show_config.py --schema > configs/schema.json

# The file stands for a finished installation: one that was interrupted starts again.
.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m $(PIP_INSTALL) --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs

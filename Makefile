# Every target makes .venv by itself from the pinned versions; nothing else has to be typed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# threads that wait do not spin, also where torch is imported before dq
export OMP_WAIT_POLICY := passive
# two processes with a thread each: tiny models gain nothing from a second thread
RANDOM_PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
PYTEST := $(RANDOM_PYTEST) -p no:randomly

.PHONY: demo test test-random test-slow test-long test-all test-gpu test-fake-gpu test-vision gpu faults fuzz lint docs bench clean

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip
	# torch first and pinned: a later package would pull the newest build with its CUDA packages
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.done
	$(BIN)/dq demo

test: $(VENV)/.done
	$(PYTEST)

# the quick tests in random order; -p randomly prints the seed that repeats it
test-random: $(VENV)/.done
	$(RANDOM_PYTEST)

# faults, fuzzing, launches, kills, and other tests of many seconds
test-slow: $(VENV)/.done
	$(PYTEST) --dist worksteal -m "slow and not long and not gpu"

# rehearsals of measurements, launchers and other tests that take long and that few changes can break
test-long: $(VENV)/.done
	$(PYTEST) --dist worksteal -m "long and not gpu"

test-all: $(VENV)/.done
	$(PYTEST) --dist worksteal -m "not gpu"

test-gpu: $(VENV)/.done
	$(BIN)/python -m pytest -m gpu

# the same tests on a device that is not there, and what that device counts; needs a C++ compiler
test-fake-gpu: $(VENV)/.done
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -p no:randomly --fake-cuda -m gpu

# part 1, 2 or 3 of the measurements on a GPU, in less than ten minutes, with the machine's own torch;
# see docs/how-to/measure-on-a-gpu.md
PART ?= 1
OUT ?= runs/gpu
gpu:
	$(PYTHON) pipelines/gpu_session.py --part $(PART) --budget 560 --output $(OUT)

# a hundred faults at random points of whole runs; the slow tests have fourteen
faults: $(VENV)/.done
	$(BIN)/python tests/robustness/faults.py --faults 100

# 20,000 damaged and hostile inputs; the slow tests have two thousand
fuzz: $(VENV)/.done
	$(BIN)/python tests/robustness/fuzz.py --inputs 20000

# torchvision does not import beside the CPU build of torch that .venv pins, so networks and teachers of torchvision and
# timm have an environment of their own
test-vision:
	$(PYTHON) -m venv .venv-vision
	.venv-vision/bin/python -m pip install -q --disable-pip-version-check -e ".[dev,vision]"
	.venv-vision/bin/python -m pytest tests/networks tests/refine/test_refine_statistics.py

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python benchmarks/structure.py

# the site, into build/site; warnings such as a link to nowhere are errors
docs: $(VENV)/.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.done
	for b in import cluster encode memory files student sample refine frepo; do $(BIN)/python benchmarks/$$b.py || exit 1; done

clean:
	rm -rf $(VENV) .venv-vision runs build *.egg-info

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-bench chaos check bench clean
export OMP_NUM_THREADS ?= 1

BIN := .venv/bin
STAMP := .venv/.complete
EXTRAS := dev,transformers,accelerate
# Many tests wait for processes of their own, so that two cores serve three of them at once.
WORKERS ?= 3

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv once, with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@for PYTHON in python3.11 python3 ''; do \
		$${PYTHON:-break} -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done; \
	[ "$$PYTHON" ] || { echo "make: Python 3.11 or later is needed, as python3.11 or python3 on PATH"; exit 1; }; \
	$$PYTHON -m venv .venv || { echo "make: this Python cannot make a venv; on Debian: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel ninja py-cpuinfo
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install --quiet -c constraints.txt scipy psutil matplotlib
	@# Of all that torchtitan asks for (datasets and wandb, which want an older fsspec), its checkpointing imports these.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt torchtitan tyro docstring_parser typeguard spmd_types
	@touch $@

demo: setup ## train a small GPT on real text on two ranks: plain, fully checkpointed, under gradckpt
	$(BIN)/python launch/demo.py

test: setup ## all tests but the slow ones and the benches' quick runs
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not bench and not slow"

test-slow: setup ## every way in and every mesh as a whole
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m slow

test-bench: setup ## the benches' quick runs, one after the other
	$(BIN)/python -m pytest -q -m bench

chaos: setup ## 306 short runs with faults: kills, delays, wrong statistics, full disks; prints counts
	PYTHONPATH=.:tests/chaos $(BIN)/python tests/chaos/driver.py --runs 306

check: setup ## formatting, lint, types and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## the plugin's own cost on this machine; and against its peers, which takes the better part of an hour
	$(BIN)/gradckpt bench overhead --output runs/bench/overhead.json
	$(BIN)/gradckpt bench frontier --output runs/bench/frontier.json

clean: ## remove what was built and run
	rm -rf .venv runs build *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

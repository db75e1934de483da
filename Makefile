# `make demo` and `make test` set up .venv themselves; both do nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test lint kernels-aot clean

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/deepspeed launch/stage2.py --ds ds_configs/z3.json
	$(BIN)/python launch/demo.py

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

kernels-aot: $(VENV)/installed
	$(BIN)/python benchmarks/logps_aot.py

clean:
	rm -rf $(VENV) runs build *.egg-info

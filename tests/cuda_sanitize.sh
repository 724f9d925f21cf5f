#!/bin/sh
# Runs the device tests under every tool of compute-sanitizer. Needs a GPU and the CUDA toolkit.
# racecheck and synccheck watch shared memory and barriers: the things the emulator only samples.
set -e
cd "$(dirname "$0")/.."
for tool in memcheck initcheck racecheck synccheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider tests/test_cuda_index.py \
    -k "not device_shapes or 1000-1-1 or 999-3-7 or 5000-31" "$@"
done

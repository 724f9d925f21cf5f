#!/bin/sh
# A few small device tests under every tool of compute-sanitizer; minutes. Needs a GPU and the CUDA
# toolkit. racecheck and synccheck watch shared memory and barriers: what the emulator only samples.
# The tests use arrays of the host, so that no kernel but ours runs. Each tool has SANITIZE_SECONDS
# (140); racecheck, which as a rule takes longest, is the last. It leaves out the one kernel whose
# shared memory bulk copies fill and barriers of theirs guard: racecheck before 2026.3 does not know
# these and reports what it reads then. Exit code 77: the tool does not support this device (a
# virtual machine's, say).
cd "$(dirname "$0")/.." || exit 1
limit=${SANITIZE_SECONDS:-140}
probe=$(timeout -k 5 55 compute-sanitizer --tool memcheck "${PYTHON:-python3}" -c "
import knnfast
knnfast.Index(8, device='cuda')" 2>&1)
if echo "$probe" | grep "Device not supported"; then exit 77; fi
failed=
for tool in memcheck synccheck initcheck racecheck; do
  options=
  # torch probes for what a driver may not have
  [ "$tool" = memcheck ] && options="--report-api-errors no"
  [ "$tool" = racecheck ] && options="--kernel-name-exclude kns=sm90_topk_kernel"
  echo "== $tool"
  timeout -k 10 "$limit" compute-sanitizer --tool "$tool" $options --error-exitcode 1 \
    --target-processes all "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider -W default \
    -m compute_sanitizer tests/test_cuda_index.py "$@"
  case $? in
    0) ;;
    124 | 137) failed="$failed $tool"; echo "$tool: not done after $limit s" ;;
    *) failed="$failed $tool" ;;
  esac
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }

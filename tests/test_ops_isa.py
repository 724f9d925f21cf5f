"""The fused ops' own tests under each set of kernels that this machine has, not its best alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from knnfast import _C

SETS = ("portable", "avx2", "avx512")
TESTS = {  # what of each file runs kernels that are compiled for every set
    "test_neighbour_attention.py": "(matches_reference or large_mean or strided) and not triton",
    "test_transition_step.py": "(matches_reference or lower_types or noise or tails or bad_rows "
                               "or strided_views or purity) and not triton",
    "test_transition_loss.py": "(matches_reference or lower_types or ends_of or strided or "
                               "gradcheck or extreme) and not triton",
    "test_sample_head.py": "(matches_reference or equals_dense or logits_within or "
                           "do_not_depend) and not triton",
    "test_packed.py": "torch or threads",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("file", TESTS)
@pytest.mark.parametrize("isa", SETS)
def test_instruction_sets(isa, file):
    if SETS.index(isa) >= SETS.index(_C.ops_isa()):
        pytest.skip(f"this machine has {_C.ops_isa()} at best: the file itself runs it")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         str(Path(__file__).with_name(file)), "-k", TESTS[file]],
        env={**os.environ, "KNNFAST_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout

"""The fused ops' tests marked `isa` under every set of kernels of this machine but its best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from knnfast import _C

SETS = ("portable", "avx2", "avx512")
OPS = ("neighbour_attention", "transition_step", "transition_loss", "sample_head", "packed")


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("isa", SETS)
def test_instruction_sets(isa, op):
    if SETS.index(isa) >= SETS.index(_C.ops_isa()):
        pytest.skip(f"this machine has {_C.ops_isa()} at best: its tests themselves run it")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         str(Path(__file__).with_name(f"test_{op}.py")), "-m", "isa", "-k", "not triton"],
        env={**os.environ, "KNNFAST_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout

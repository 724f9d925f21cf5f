"""The CUDA kernels' logic without a GPU: on the emulator of tests/cuda_emu, same bits demanded."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "cuda_emu"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="the emulator switches x86-64 stacks"
    ),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The test programs, built once."""
    folder = tmp_path_factory.mktemp("cuda_emu")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(["cmake", "-S", HERE, "-B", folder, *generator], check=True, capture_output=True)
    built = subprocess.run(["cmake", "--build", folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def run(program, *args):
    done = subprocess.run([program, *map(str, args)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_emulator_catches_planted_errors(build):
    out = run(build / "test_emu")
    assert out.count("ok   planted") >= 10


@pytest.mark.parametrize("seed", [1, 2])
def test_topk_kernels_match_the_definition(build, seed):
    """Every kernel, metric and scan; odd sizes, ties, filters, k beyond the rows; random orders."""
    out = run(build / "test_topk", seed)
    cases, failures = (int(word) for word in out.split() if word.isdigit())
    assert failures == 0
    assert cases >= 100


def test_device_index_keeps_its_contract(build):
    """Adds, removals, filters, plans, compaction, refusals; every allocation is given back."""
    run(build / "test_index", 1)

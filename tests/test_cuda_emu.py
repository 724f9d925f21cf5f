"""The CUDA kernels' logic without a GPU: on the emulator of tests/cuda_emu, same bits demanded."""

import platform
import re
import shutil
import subprocess
import sys
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


def test_python_index_on_the_emulated_device(tmp_path):
    """The extension with an emulated device runs tests/test_cuda_index.py, in its own process."""
    pybind11 = pytest.importorskip("pybind11")
    configure = ["cmake", "-S", HERE.parent.parent, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Release",
                 "-DKNNFAST_CUDA=EMULATED", f"-DKNNFAST_MODULE_DIR={tmp_path / 'module'}",
                 f"-DPython_EXECUTABLE={sys.executable}",
                 f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]  # fmt: skip
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(configure, check=True, capture_output=True)
    built = subprocess.run(
        ["cmake", "--build", tmp_path, "--target", "_C"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (module,) = (tmp_path / "module").glob("_C*.so")
    script = f"""
import importlib.util, sys, pytest
spec = importlib.util.spec_from_file_location("knnfast._C", {str(module)!r})
sys.modules["knnfast._C"] = core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
import knnfast
knnfast._C = core
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {str(HERE.parent / "test_cuda_index.py")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-500:]
    assert int(passed[1]) >= 40

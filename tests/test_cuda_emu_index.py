"""The Python index on a device without a GPU: tests/test_cuda_index.py on the emulator.

A file of its own, so that it runs beside test_cuda_emu.py: both build and run for minutes.
"""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.machine() != "x86_64", reason="the emulator switches x86-64 stacks"
    ),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake"),
]


def test_python_index_on_the_emulated_device(tmp_path):
    """The extension with an emulated device runs tests/test_cuda_index.py, in its own process."""
    pybind11 = pytest.importorskip("pybind11")
    configure = ["cmake", "-S", HERE.parent, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Release",
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
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {str(HERE / "test_cuda_index.py")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-500:]
    assert int(passed[1]) >= 40

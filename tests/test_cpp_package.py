"""The C++ library as a CMake package."""

import shutil
import subprocess
from pathlib import Path

import pytest

from knnfast.search import Index


@pytest.mark.slow
def test_cpp_package(tmp_path):
    """find_package(knnfast) from an install tree, embedded by examples/cpp."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    root = Path(__file__).resolve().parent.parent

    def cmake(*args):
        subprocess.run(["cmake", *map(str, args)], check=True, capture_output=True)

    options = ["-DKNNFAST_CUDA=OFF", "-DKNNFAST_INSTALL=ON", "-DCMAKE_BUILD_TYPE=Release"]
    prefix = tmp_path / "prefix"
    cmake("-S", root, "-B", tmp_path / "lib", *options, f"-DCMAKE_INSTALL_PREFIX={prefix}")
    cmake("--build", tmp_path / "lib", "--target", "knnfast", "-j2")
    cmake("--install", tmp_path / "lib")
    cmake("-S", root / "examples/cpp", "-B", tmp_path / "app", f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", tmp_path / "app")
    done = subprocess.run(
        [tmp_path / "app" / "nearest", tmp_path / "saved"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert " 42 (1.0000)" in done.stdout
    assert len(Index.open(tmp_path / "saved")) == 10_000

"""Builds `knnfast._C` with CMake; everything else about the package is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """CMakeLists.txt is the one build list; `KNNFAST_CUDA=AUTO|ON|OFF` is handed through.

    CMake itself reads CUDAARCHS and CUDACXX.
    """

    def build_extension(self, ext: Extension) -> None:
        """Configure once, build incrementally, and leave the module where setuptools wants it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(Path(__file__).resolve().parent), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DKNNFAST_CUDA=" + os.environ.get("KNNFAST_CUDA", "AUTO"),
            "-DKNNFAST_SANITIZE=" + os.environ.get("KNNFAST_SANITIZE", ""),
            f"-DKNNFAST_MODULE_DIR={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C"], check=True)


setup(ext_modules=[Extension("knnfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})

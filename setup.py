"""Builds the C++ library with CMake; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt in the temporary folder of the build."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DLIBRARY_FOLDER={library.parent}",
        ]
        for option in ("MATQUANT_CUDA", "MATQUANT_CUDA_ARCHITECTURES"):  # OFF; such as "80;90", or "native"
            if value := os.environ.get(option):
                configure.append(f"-D{option}={value}")
        subprocess.run(configure, check=True)
        # Without a number make would start every compiler at once, each with up to 1.5 GB.
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)


setup(
    # Not a Python module, so it depends on no version of Python: py_limited_api names the file _C.abi3.so.
    ext_modules=[Extension("vllm_matquant._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

"""Builds the C++ extension; everything else is declared in pyproject.toml."""

import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

windows = sys.platform == "win32"
flags = ["/O2"] if windows else ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]


def extension(name: str, folder: str) -> Pybind11Extension:
    """Every source file in a folder makes one module."""
    return Pybind11Extension(
        name,
        sorted(glob(f"{folder}/*.cpp")),
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        cxx_std=17,
        extra_compile_args=flags,
    )


setup(
    ext_modules=[
        extension("fastgpt._bpe", "csrc"),
        # Written with the vector types of GCC and Clang; elsewhere the decoder does without.
        *([] if windows else [extension("fastgpt._attend", "csrc/attend")]),
    ],
    cmdclass={"build_ext": build_ext},
)

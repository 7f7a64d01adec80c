"""Builds the C++ extension with torch's own build tools. Everything declarative is in pyproject.toml."""

import os
import shutil
import sys
from glob import glob

import setuptools
from setuptools import setup

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"fastopt: setuptools {setuptools.__version__} is too old to build it; pip install 'setuptools>=77'")

NO_COMPILER = (
    "fastopt: no working C++ compiler ({why}); install one "
    "(Debian/Ubuntu: apt-get install g++, macOS: xcode-select --install), or install without the extension, on torch's "
    "own slower step: FASTOPT_NO_EXTENSION=1 pip install --no-build-isolation ."
)
REQUIRES = ["numpy"]
# at::parallel_for is serial without OpenMP. torch's wheels have the library; Apple's clang lacks even the header.
OPENMP = ["-fopenmp"], ["-fopenmp"]
if sys.platform == "darwin":
    prefix = os.environ.get("OMP_PREFIX", "/opt/homebrew/opt/libomp")
    OPENMP = ["-Xclang", "-fopenmp", f"-I{prefix}/include"], []  # not linked: torch has loaded its library before us
COMPILE_ARGS = [
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the bits of a step are a contract: docs/numerics.md
    "-fno-math-errno",  # with errno, sqrt does not vectorise
    "-fno-trapping-math",
    "-Wno-psabi",  # vectors wider than the processor's are passed only inline
]


def extension():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit(
            "fastopt: torch is not installed where the build runs; install torch first, then "
            "pip install --no-build-isolation ."
        )

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.force = True  # without ninja, setuptools would install what build/ has of another torch or other flags

        def build_extensions(self):
            compiler = os.environ.get("CXX", "c++").split()[0]
            if shutil.which(compiler) is None:
                sys.exit(NO_COMPILER.format(why=f"'{compiler}' not found"))
            try:
                super().build_extensions()
            except Exception as error:
                sys.exit(NO_COMPILER.format(why=str(error).strip().splitlines()[-1]))

    version = torch.__version__.split("+")[0]
    minor = ".".join(version.split(".")[:2])
    return dict(
        install_requires=[f"torch=={minor}.*", *REQUIRES],  # what is compiled fits one minor version of torch
        ext_modules=[
            cpp_extension.CppExtension(
                "fastopt._C",
                sorted(glob("csrc/*/*.cpp")),
                include_dirs=[os.path.abspath("csrc")],
                define_macros=[("FASTOPT_TORCH_VERSION", f'"{version}"')],
                extra_compile_args=COMPILE_ARGS + OPENMP[0] + os.environ.get("FASTOPT_CXXFLAGS", "").split(),
                extra_link_args=OPENMP[1],
                depends=sorted(glob("csrc/*/*.h")),
            )
        ],
        cmdclass={"build_ext": Build},
    )


NO_EXTENSION = dict(install_requires=["torch>=2.10", *REQUIRES])
setup(**(NO_EXTENSION if os.environ.get("FASTOPT_NO_EXTENSION") == "1" else extension()))

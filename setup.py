"""Builds the C++ extension: against the torch at hand, or once for each torch in FASTOPT_TORCHES (`make wheel`).

Everything declarative is in pyproject.toml. An extension fits one minor version of torch and is named after it, as in
`fastopt._C_torch2_13`; fastopt/backends.py takes the one that fits.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from glob import glob
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"fastopt: setuptools {setuptools.__version__} is too old to build it; pip install 'setuptools>=77'")

CSRC = os.path.abspath("csrc")  # ninja compiles in a folder of its own
STEP, PLAN = sorted(glob("csrc/step/*.cpp")), ["csrc/plan.cpp"]  # without torch, and with it

NO_TORCH = (
    "fastopt: torch is not installed where the build runs; install torch first, then repeat this command with "
    "pip's --no-build-isolation"
)
NO_COMPILER = "fastopt: no C++ compiler: '{compiler}' not found; {remedy}{or_without}"
BUILD_FAILED = "fastopt: the C++ compiler '{compiler}' failed: {error}; {remedy}{or_without}"
OR_WITHOUT = (
    "; or install without the extension, on torch's own slower step: "
    "FASTOPT_NO_EXTENSION=1 pip install --no-build-isolation ."
)
INSTALL_COMPILER = "install one (Debian/Ubuntu: apt-get install g++, macOS: xcode-select --install)"
# What the compiler's first error says, and what helps.
REMEDIES = [
    (
        r"omp\.h|-lomp|fopenmp|OpenMP",
        "OpenMP is missing: on Linux build with g++, which has it and shares torch's threads (apt-get install g++; "
        "CXX=g++), or give clang its own (apt-get install libomp-dev); on macOS: brew install libomp",
    ),
    (r"Python\.h", "Python's headers are missing (Debian/Ubuntu: apt-get install python3-dev)"),
    (r"std=|[Cc]\+\+ ?[12]\d|concept|requires", "torch's headers want a newer compiler: gcc 11 or clang 14, or newer"),
    (r"[Kk]illed|memory", "the compiler ran out of memory: set MAX_JOBS=1"),
    ("", "if this compiler builds nothing else either, " + INSTALL_COMPILER),
]

REQUIRES = ["numpy"]
# at::parallel_for is serial without OpenMP. torch's wheels have the library; Apple's clang lacks even the header.
OPENMP = ["-fopenmp"], ["-fopenmp"]
if sys.platform == "darwin":
    prefix = os.environ.get("OMP_PREFIX", "/opt/homebrew/opt/libomp")
    OPENMP = ["-Xclang", "-fopenmp", f"-I{prefix}/include"], []  # not linked: torch has loaded its library before us
elif shutil.which("g++"):
    os.environ.setdefault("CXX", "g++")  # torch's own: clang's OpenMP would start threads beside those of torch
COMPILER = os.environ.get("CXX", "c++").split()[0]
COMPILE_ARGS = [
    "-O3",
    "-g0",  # Python's own flags ask for symbols, which take a third of the time
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the bits of a step are a contract: docs/numerics.md
    "-fno-math-errno",  # with errno, sqrt does not vectorise
    "-fno-trapping-math",
    *OPENMP[0],
    *os.environ.get("FASTOPT_CXXFLAGS", "").split(),
]


@contextlib.contextmanager
def recorded():
    """What is written to stdout and stderr, also by the processes of the block: shown, and given to read, after it."""
    sys.stdout.flush(), sys.stderr.flush()
    own, lines = [os.dup(1), os.dup(2)], []
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for number, descriptor in enumerate(own, start=1):
                os.dup2(descriptor, number), os.close(descriptor)
            file.seek(0)
            lines += file.read().splitlines()
            print("\n".join(lines))


def minor(version):
    return ".".join(version.split(".")[:2])


def name_for(version):
    return "fastopt._C_torch" + minor(version).replace(".", "_")


class BuildModules(build_py):
    """A build_py that leaves no module of a build before it: setuptools installs whatever lies in build/."""

    def run(self):
        super().run()
        for old in {*Path(self.build_lib, "fastopt").rglob("*.py")} - {Path(path) for path in self.get_outputs()}:
            old.unlink()


def says_why(command):
    """A build_ext that leaves nothing of a build before it, and whose failure is one sentence with cause and remedy."""

    class Build(command):
        def finalize_options(self):
            super().finalize_options()
            self.force = True  # without ninja, setuptools would install what build/ has of another torch or other flags

        def run(self):
            for folder in [Path(self.build_lib, "fastopt"), *([Path("fastopt")] if self.inplace else [])]:
                for old in folder.glob("_C*.so"):  # of other sources, perhaps of another torch
                    old.unlink()
            super().run()

        def build_extensions(self):
            if shutil.which(COMPILER) is None:
                sys.exit(NO_COMPILER.format(compiler=COMPILER, remedy=INSTALL_COMPILER, or_without=OR_WITHOUT))
            lines = []
            try:
                with recorded() as lines:
                    super().build_extensions()
            except Exception as failure:
                errors = [line for line in lines if re.search(r"\berror\b|not found|cannot find", line)]
                error = (errors or [str(failure)])[0]
                remedy = next(remedy for pattern, remedy in REMEDIES if re.search(pattern, error))
                parts = dict(compiler=COMPILER, error=error.strip(), remedy=remedy, or_without=OR_WITHOUT)
                sys.exit(BUILD_FAILED.format(**parts))

    return Build


def for_this_torch():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit(NO_TORCH)

    version = torch.__version__.split("+")[0]
    extension = cpp_extension.CppExtension(
        name_for(version),
        STEP + PLAN,
        include_dirs=[CSRC],
        define_macros=[("FASTOPT_TORCH_VERSION", f'"{version}"')],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=OPENMP[1],
    )
    return dict(
        install_requires=[f"torch=={minor(version)}.*", *REQUIRES],  # what is compiled fits one minor version of torch
        ext_modules=[extension],
        cmdclass={"build_ext": says_why(cpp_extension.BuildExtension)},
    )


def for_many_torches(folders):
    """Folders of unpacked torch wheels (tools/unpack_torch.py), named by minor version. torch is not imported."""

    linux = sys.platform != "darwin"
    link_args = [*OPENMP[1]]
    if linux:
        link_args += ["-Wl,-s", "-Wl,-z,now", "-Wl,-rpath,$ORIGIN"]  # now: what is undefined is so at import

    class Build(build_ext):
        def build_extensions(self):
            arguments = dict(output_dir=self.build_temp, include_dirs=[CSRC])
            step = self.compiler.compile(STEP, extra_postargs=[*COMPILE_ARGS, "-std=c++17"], **arguments)
            if linux:  # a library beside the extensions; macOS, where it is small, has it in each
                library = Path(self.build_lib, "fastopt", "_C_step.so")
                named = [*link_args, f"-Wl,-soname,{library.name}"]
                self.compiler.link_shared_object(step, str(library), extra_postargs=named, target_lang="c++")
                step = [str(library)]
            for extension in self.extensions:
                extension.extra_objects = step
            super().build_extensions()  # one after the other: their objects have the same names

    extensions = [
        Extension(
            name_for(folder.name),
            PLAN,
            language="c++",
            include_dirs=[CSRC, *(str(folder / "include" / sub) for sub in ("", "torch/csrc/api/include"))],
            library_dirs=[str(folder / "lib")],
            libraries=["c10", "torch_cpu", "torch_python"],
            define_macros=[
                ("FASTOPT_TORCH_VERSION", f'"{folder.name}"'),
                ("TORCH_EXTENSION_NAME", name_for(folder.name).rpartition(".")[2]),
                ("TORCH_API_INCLUDE_EXTENSION_H", None),
            ],
            extra_compile_args=[*COMPILE_ARGS, "-std=c++20"],
            extra_link_args=link_args,
        )
        for folder in folders
    ]
    return dict(
        install_requires=["torch>=2.10", *REQUIRES],
        ext_modules=extensions,
        cmdclass={"build_ext": says_why(Build)},
    )


if os.environ.get("FASTOPT_NO_EXTENSION") == "1":
    options = dict(install_requires=["torch>=2.10", *REQUIRES])
elif torches := os.environ.get("FASTOPT_TORCHES"):
    options = for_many_torches([Path(folder) for folder in torches.split()])
else:
    options = for_this_torch()
options["cmdclass"] = {"build_py": BuildModules, **options.get("cmdclass", {})}
setup(**options)

"""Installing: with and without a compiler, from a wheel and an sdist; for one torch and for many; builds that fail."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SITE = sysconfig.get_paths()["purelib"]
MINOR = ".".join(torch.__version__.split(".")[:2])
STEP = """
import torch, fastopt
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
fastopt.Adam([param], lr=0.1, fused=True).step()
assert torch.allclose(param, torch.tensor(0.9)), param
import fastopt.kernels
print(fastopt.__file__, fastopt.backend_info())
"""


def pip(*args, check=True, **env):
    command = [sys.executable, "-m", "pip", *args, "--no-build-isolation", "--no-deps"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, text=True, capture_output=True, check=check)


def run(target, code, tmp_path):
    """Code in a process that sees torch, and fastopt only in `target`: -S leaves out the editable install."""
    paths = f"import sys; sys.path[:0] = [{str(target)!r}, {SITE!r}]\n"
    return subprocess.run([sys.executable, "-S", "-c", paths + code], cwd=tmp_path, text=True, capture_output=True)


def test_without_extension(tmp_path):
    """And without a module that was there when it was built before: here one that never was."""
    before = ROOT / "build" / "lib" / "fastopt"
    before.mkdir(parents=True, exist_ok=True)
    (before / "of_a_build_before.py").touch()
    pip("install", "--target", str(tmp_path / "site"), ".", FASTOPT_NO_EXTENSION="1")
    done = run(tmp_path / "site", STEP, tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout and "'cpu': 'torch'" in done.stdout
    assert done.stderr.count("installed without its C++ extension") == 1
    assert done.stdout.count("installed without its C++ extension") == 1  # in backend_info()
    installed = {path.name for path in (tmp_path / "site" / "fastopt").glob("*.py")}
    assert installed == {path.name for path in (ROOT / "fastopt").glob("*.py")}


def compiler_that_fails(path):
    """Which compiles nothing and says what is in the variable SAID, but tells which compiler it is."""
    path.write_text(f"""#!/bin/sh
case "$*" in *-o*) echo "$SAID" >&2; exit 1;; *) exec {shutil.which("c++")} "$@";; esac
""")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "error, remedy",
    [
        (None, "no C++ compiler: 'no-such-compiler' not found; install one"),
        ("x.h:12:10: fatal error: 'omp.h' file not found", "OpenMP is missing: on Linux build with g++"),
        ("/usr/bin/ld: cannot find -lomp: No such file", "OpenMP is missing: on Linux build with g++"),
        ("x.h:13:10: fatal error: Python.h: No such file", "Python's headers are missing"),
        ("c++: error: unrecognized command-line option '-std=c++20'", "torch's headers want a newer compiler"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "out of memory: set MAX_JOBS=1"),
        ("x.cpp:1:1: error: expected unqualified-id before 'nonsense'", "if this compiler builds nothing else either"),
    ],
)
def test_a_failed_build_says_why_and_what_helps(tmp_path, error, remedy):
    """In one sentence, with the first error of the compiler, here one that says it for every file."""
    compiler = compiler_that_fails(tmp_path / "fails")
    env = {"CXX": str(compiler) if error else "no-such-compiler", "SAID": f"a note\n{error}\nanother error: the second"}
    done = pip("install", "--target", str(tmp_path / "site"), ".", check=False, **env)
    assert done.returncode != 0
    (said,) = {line.strip() for line in (done.stdout + done.stderr).splitlines() if "fastopt: " in line}
    assert remedy in said and "FASTOPT_NO_EXTENSION=1" in said
    assert error is None or f"the C++ compiler '{compiler}' failed: {error}; " in said


@pytest.mark.skipif(sys.platform == "darwin", reason="Apple's clang, with torch's OpenMP")
def test_gcc_is_taken_where_it_is_there(tmp_path, monkeypatch):
    """Its OpenMP is torch's own. Here all compilers fail, and the error names the one that was taken."""
    for name in ("g++", "c++", "clang++"):
        compiler_that_fails(tmp_path / name)
    monkeypatch.delenv("CXX", raising=False)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": "error: not today"}
    done = pip("install", "--target", str(tmp_path / "site"), ".", check=False, **environment)
    assert "fastopt: the C++ compiler 'g++' failed: error: not today; " in done.stdout + done.stderr


def test_a_build_without_torch_says_what_to_do(tmp_path):
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'egg_info', '-e', sys.argv[1]]\n"
    command = [sys.executable, "-c", code + "runpy.run_path('setup.py')", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == (
        "fastopt: torch is not installed where the build runs; install torch first, then repeat this command with "
        "pip's --no-build-isolation"
    )


def installed_for(target, tmp_path, builds):
    """The installed package with other files as its extensions, and a step with it."""
    shutil.copytree(ROOT / "fastopt", target / "fastopt", ignore=shutil.ignore_patterns("_C_torch*", "__pycache__"))
    shutil.copytree(ROOT / "kernels", target / "fastopt" / "kernels")
    shutil.copytree(next(Path(SITE).glob("fastopt-*.dist-info")), target / "fastopt-0.dist-info")
    for minor, file in builds.items():
        name = f"_C_torch{minor.replace('.', '_')}{sysconfig.get_config_var('EXT_SUFFIX')}"
        shutil.copy(file, target / "fastopt" / name)
    return run(target, STEP, tmp_path)


def test_no_build_for_this_torch_is_torchs_own_step_and_a_warning(tmp_path):
    """What has a build for other versions names them, and how to get one for this."""
    done = installed_for(tmp_path / "site", tmp_path, {"2.9": __file__, "2.100": __file__})
    assert done.returncode == 0, done.stderr
    assert "'cpu': 'torch'" in done.stdout
    assert done.stderr.startswith("<string>:"), done.stderr  # the line that imports fastopt
    for text in (done.stdout, done.stderr):  # in backend_info() and in the warning
        assert text.count(f"has no build for torch {torch.__version__}, only for 2.9, 2.100: every step is") == 1
        assert "pip install --no-build-isolation --force-reinstall --no-deps --no-binary fastopt fastopt" in text


def test_a_build_that_does_not_load_is_torchs_own_step_and_a_warning(tmp_path):
    """A torch whose symbols are not those of the release: never an undefined symbol. Here the file is no library."""
    done = installed_for(tmp_path / "site", tmp_path, {MINOR: __file__})
    assert done.returncode == 0, done.stderr
    assert "'cpu': 'torch'" in done.stdout
    for text in (done.stdout, done.stderr):
        assert f"build for torch {MINOR} does not load with this torch {torch.__version__}: " in text
        assert "Every step is torch.optim's own" in text and "--no-binary fastopt fastopt" in text


@pytest.mark.parametrize("name, said", [("nonsense", "'nonsense' is not available here"), ("", None)])
def test_isa_of_the_environment(tmp_path, name, said):
    env = os.environ | {"FASTOPT_ISA": name}
    command = [sys.executable, "-c", "import fastopt"]
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    if said:
        assert done.returncode != 0 and "ValueError" in done.stderr and said in done.stderr
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_wheel_and_sdist(tmp_path, kind):
    if kind == "sdist":
        build = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    else:
        pip("wheel", "--wheel-dir", str(tmp_path), ".")
    (package,) = [path for path in tmp_path.iterdir() if path.suffix in (".whl", ".gz")]
    pip("install", "--target", str(tmp_path / "site"), str(package))
    done = run(tmp_path / "site", STEP, tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout and "'cpu': 'torch'" not in done.stdout and "extension" not in done.stderr
    (metadata,) = (tmp_path / "site").glob("fastopt-*/METADATA")
    assert f"Requires-Dist: torch=={MINOR}.*\n" in metadata.read_text()


@pytest.mark.slow
def test_one_wheel_for_many_torches(tmp_path):
    """As `make wheel` builds it, from headers and libraries in folders: here two names of the torch at hand."""
    folders = [tmp_path / MINOR, tmp_path / "2.999"]
    for folder in folders:
        folder.symlink_to(Path(torch.__file__).parent)
    pip("wheel", "--wheel-dir", str(tmp_path), ".", FASTOPT_TORCHES=" ".join(map(str, folders)))
    (wheel,) = tmp_path.glob("*.whl")
    pip("install", "--target", str(tmp_path / "site"), str(wheel))
    site = tmp_path / "site"
    sizes = {path.name.split(".")[0]: path.stat().st_size for path in (site / "fastopt").glob("_C_*")}
    builds = {f"_C_torch{MINOR.replace('.', '_')}", "_C_torch2_999"}
    assert set(sizes) - {"_C_step"} == builds  # nothing of a build before it
    assert sum(sizes.values()) < 3_500_000, sizes  # stripped, and the kernels once
    (metadata,) = site.glob("fastopt-*/METADATA")
    assert "Requires-Dist: torch>=2.10\n" in metadata.read_text()
    for version, built in [(torch.__version__, MINOR), ("2.999.1+cpu", "2.999")]:
        check = f"import torch; torch.__version__ = {version!r}\n{STEP}\nassert fastopt._C.torch_version == {built!r}"
        done = run(site, check, tmp_path)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert str(site) in done.stdout and "'cpu': 'torch'" not in done.stdout

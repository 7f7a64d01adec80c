"""Installing: with and without a compiler, from a wheel and an sdist; an extension built for another torch."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SITE = sysconfig.get_paths()["purelib"]
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
    pip("install", "--target", str(tmp_path / "site"), ".", FASTOPT_NO_EXTENSION="1")
    done = run(tmp_path / "site", STEP, tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout and "'cpu': 'torch'" in done.stdout
    assert done.stderr.count("installed without its C++ extension") == 1
    assert done.stdout.count("installed without its C++ extension") == 1  # in backend_info()


def test_no_compiler_is_one_sentence(tmp_path):
    done = pip("install", "--target", str(tmp_path / "site"), ".", check=False, CXX="no-such-compiler")
    assert done.returncode != 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if "fastopt:" in line]
    assert said and "no working C++ compiler" in said[0] and "FASTOPT_NO_EXTENSION=1" in said[0]


def test_extension_for_another_torch_says_rebuild(tmp_path):
    code = "import torch; torch.__version__ = '9.9.0'\nimport fastopt"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode != 0
    assert "ImportError" in done.stderr and "this is torch 9.9.0; rebuild it, in its clone: pip install" in done.stderr


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
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"Requires-Dist: torch=={minor}.*\n" in metadata.read_text()

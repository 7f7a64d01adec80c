"""Downloads torch's wheel of one minor version and keeps what an extension is compiled and linked with.

    python tools/unpack_torch.py 2.13 build/torch/2.13

torch itself is not installed, nor anything that it needs. The headers are the same for every Python: one wheel will do.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PYTHON = "3.12"  # there is a wheel of every supported torch for it
KEPT = re.compile(r"torch/(include/.*|lib/lib(c10|torch_cpu|torch_python|torch)\.(so|dylib))")


def unpack(minor: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        choice = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--python-version", PYTHON, "--dest", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *choice, f"torch=={minor}.*"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if KEPT.fullmatch(name)])
        shutil.rmtree(target, ignore_errors=True)
        Path(folder, "torch").rename(target)  # last: what is there is whole


if __name__ == "__main__":
    unpack(sys.argv[1], Path(sys.argv[2]))

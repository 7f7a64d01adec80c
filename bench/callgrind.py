"""Instructions a step executes, counted by valgrind: a figure without noise, for the paths that Python and C++ share.

    python -m bench.callgrind [--candidates fastopt ...] [--json FILE]

Counting is off while Python and torch load (about a minute under valgrind) and on for some steps on one thread.
Valgrind knows AVX2 and not AVX-512, so the counts are of the AVX2 code on any machine.
"""

import argparse
import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .candidates import CANDIDATES, OPTIMIZERS, Problem, Unavailable, make
from .measure import environment
from .report import environment_text, instructions_text
from .run import save
from .workloads import WORKLOADS

CASES = list(product(("Adam", "SGD"), ("two scalars", "465 groups", "1000 x 256")))
STEPS = 5
# Requests to valgrind are macros.
REQUESTS = """
#include <valgrind/callgrind.h>
extern "C" void start() { CALLGRIND_START_INSTRUMENTATION; }
extern "C" void stop() { CALLGRIND_STOP_INSTRUMENTATION; }
extern "C" void zero() { CALLGRIND_ZERO_STATS; }
extern "C" void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""


def count(candidates: list[str], library: str) -> None:
    """Runs under valgrind: dumps the counts of 1 step and of 1 + STEPS steps, so that what is not the step cancels."""
    requests = ctypes.CDLL(library)
    torch.set_num_threads(1)
    gc.disable()  # a collection would fall into one of the counts
    for optimizer, workload in CASES:
        row, problem = OPTIMIZERS[optimizer], Problem(WORKLOADS[workload], torch.float32)
        for name in candidates:
            try:
                step = make(name, row, problem).step
            except Unavailable as why:
                print(why, file=sys.stderr)
                continue
            for _ in range(3):
                step()
            requests.start()
            for steps in (1, 1 + STEPS):
                requests.zero()
                for _ in range(steps):
                    step()
                requests.dump(f"{optimizer}, {workload}, {name}/{steps}".encode())
            requests.stop()


def instructions(candidates: list[str], folder: Path) -> dict[str, float]:
    """Instructions a step, by optimizer, workload and candidate."""
    source, library, counts = folder / "requests.cpp", folder / "requests.so", folder / "counts"
    source.write_text(REQUESTS)
    subprocess.run([os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-O1", source, "-o", library], check=True)
    valgrind = ["valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={counts}"]
    child = [sys.executable, "-m", "bench.callgrind", "--under-valgrind", str(library), "--candidates", *candidates]
    subprocess.run([*valgrind, *child], check=True, env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"})
    totals: dict[str, dict[int, int]] = {}
    for dump in folder.glob("counts.*"):
        text = dump.read_text()
        if name := re.search(r"Client Request: (.*)/(\d+)$", text, re.M):
            total = re.search(r"^summary: (\d+)", text, re.M)
            assert total, f"callgrind wrote no summary: {dump}"
            totals.setdefault(name[1], {})[int(name[2])] = int(total[1])
    return {name: (of[1 + STEPS] - of[1]) / STEPS for name, of in sorted(totals.items())}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=["fastopt"])
    options.add_argument("--json", type=Path)
    options.add_argument("--under-valgrind", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.under_valgrind:
        count(arguments.candidates, arguments.under_valgrind)
        return 0
    if not shutil.which("valgrind"):
        print("skipped: valgrind is not installed")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        document: dict[str, Any] = {
            "environment": environment(),
            "instructions": instructions(arguments.candidates, Path(folder)),
        }
    save(arguments.json, document)
    print(environment_text(document["environment"]))
    print(instructions_text(document["instructions"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

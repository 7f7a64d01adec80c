"""Measuring: candidates checked, then timed against one another round by round; and the machine this was on.

Machines drift (frequency, neighbours), so no time is compared with one taken minutes before: every round times every
candidate, in an order that changes from round to round, and what counts is the median over rounds of the ratio within a
round.
"""

import datetime
import gc
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .candidates import CANDIDATES, OPTIMIZERS, Problem, Unavailable, check, make, module_or_none, reference
from .roof import LEAST_ELEMENTS, isa, roof_step
from .workloads import Workload

CACHE_BYTES = 512 << 20  # a step that moves more finds nothing of its own in the caches


@dataclass(frozen=True)
class Effort:
    """How long to measure a set of candidates: between min_rounds and max_rounds, about `seconds` in all."""

    seconds: float
    min_rounds: int
    max_rounds: int
    batch: float  # seconds of steps between two readings of the clock


FULL = Effort(seconds=5.0, min_rounds=5, max_rounds=41, batch=5e-3)
QUICK = Effort(seconds=0.3, min_rounds=3, max_rounds=21, batch=1e-3)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def summary(numbers: list[float]) -> dict[str, float]:
    """Median and the 20 % and 80 % quantiles."""
    low, _, _, high = statistics.quantiles(numbers, n=5, method="inclusive")
    return {"median": statistics.median(numbers), "q20": low, "q80": high}


def batch_size(timer: timeit.Timer, seconds: float) -> int:
    """So many steps that they take about this long."""
    n = 1
    while (took := timer.timeit(n)) < seconds:
        n = math.ceil(n * min(10.0, 1.2 * seconds / max(took, 1e-9)))
    return n


def rounds(names: Iterable[str], effort: Effort) -> Iterator[list[str]]:
    """The candidates in the order of each round, which changes: none has always the same predecessor."""
    order, began = list(names), time.perf_counter()
    for round_ in range(effort.max_rounds):
        if round_ >= effort.min_rounds and time.perf_counter() - began > effort.seconds:
            return
        order = order[1:] + order[:1]
        yield order if round_ % 2 else order[::-1]


def interleave(
    steps: dict[str, Callable[[], Any]], effort: Effort, prepare: dict[str, Callable[[], Any]]
) -> dict[str, list[float]]:
    """Seconds a step of each candidate, round by round; `prepare` is called before a candidate's turn and not timed.

    timeit switches the garbage collector off meanwhile. The cost of its loop, about 10 ns a step, is included.
    """
    timers = {name: timeit.Timer(step) for name, step in steps.items()}
    sizes = {}
    for name, timer in timers.items():
        prepare[name]()
        timer.timeit(1)  # a first step makes state and compiles kernels
        sizes[name] = batch_size(timer, effort.batch)
    gc.collect()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for order in rounds(steps, effort):
        for name in order:
            prepare[name]()
            times[name].append(timers[name].timeit(sizes[name]) / sizes[name])
    return times


def compare_times(times: dict[str, list[float]], unit: str = "fastopt") -> dict[str, Any]:
    """The part of a result that says how long: seconds of each candidate, and each one's time in units of `unit`'s."""
    result: dict[str, Any] = {"rounds": len(next(iter(times.values()))), "unit": unit, "seconds": {}, "ratio": {}}
    for name, numbers in times.items():
        result["seconds"][name] = summary(numbers)
        if unit in times:
            result["ratio"][name] = summary([a / b for a, b in zip(numbers, times[unit], strict=True)])
    return result


def measure(
    workload: Workload,
    optimizer: str,
    dtype: str,
    effort: Effort,
    candidates: Iterable[str] = tuple(CANDIDATES),
    problem: Problem | None = None,
) -> dict[str, Any]:
    """One result, with the current number of threads. `refused` says which candidate was wrong and how."""
    row, problem = OPTIMIZERS[optimizer], problem or Problem(workload, DTYPES[dtype])
    moved = workload.elements * row.bytes_per_element(problem.dtype.itemsize)
    result: dict[str, Any] = {
        "workload": workload.name, "optimizer": optimizer, "dtype": dtype, "threads": torch.get_num_threads(),
        "groups": len(workload.groups), "tensors": len(workload.shapes), "elements": workload.elements,
        "bytes": moved, "refused": {}, "absent": {},
    }  # fmt: skip
    expected, right = reference(row, problem), {}
    for name in candidates:
        try:
            candidate = make(name, row, problem)
            if wrong := check(name, candidate, expected, row, problem):
                result["refused"][name] = wrong
            else:
                right[name] = candidate
        except Unavailable as why:
            result["absent"][name] = str(why)
    del expected
    steps: dict[str, Callable[[], Any]] = {name: candidate.step for name, candidate in right.items()}
    if steps:
        # On fastopt's own tensors. DeepSpeed's states have other names, so it can't be the one to lend them.
        owner = next(iter(right))
        if owner != "deepspeed" and workload.elements >= LEAST_ELEMENTS:
            steps["roof"] = roof_step(right[owner], row)
        # Small steps run from the caches: one step brings back what the candidate before evicted.
        nothing = partial(int)
        prepare = {name: step if moved < CACHE_BYTES else nothing for name, step in steps.items()}
        result |= compare_times(interleave(steps, effort, prepare))
    return result


# ---- where it was measured


def command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    fastopt = module_or_none("fastopt")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": re.sub(r" --json \S+", "", " ".join(["python -m bench." + Path(sys.argv[0]).stem, *sys.argv[1:]])),
        "commit": command("git", "describe", "--always", "--dirty"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "fastopt": fastopt.backend_info() if fastopt else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("fastopt", "torch", "deepspeed")},
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }

"""What surrounds a step on a GPU: bench.loop's iterations part by part, whole steps, and functions against torch's.

    python -m bench.gpu_loop [--quick] [--seconds 80] [--what iterations whole functions] [--tasks NAME ...]
                             [--workloads NAME ...] [--json FILE]

A part of an iteration takes the host some time, the launches among it, and later the device, and neither waits for the
other. So there are three figures: the host's time of each part, in an iteration that begins with an idle device; the
device's, between events, behind a wait that is longer than the host needs; and how long an iteration in a row of them
takes, which is what a user sees. Whole steps and functions have the first two, the device's with cold caches.

A scaler reads whether there were infinities, and an AveragedModel how many models it has averaged: both wait for the
device, which is in both of their times.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .candidates import Problem, Unavailable
from .gpu import CYCLES, DEVICE, Clock, event, where
from .gpu_all import loop as text
from .loop import CHECKED, FOLDED, LOSS_TOLERANCE, OWN, PARTS, TASKS, WHOLES, Task, Training, functions, off, wholes
from .measure import FULL, QUICK, Effort, compare_times, environment, rounds, summary
from .run import save
from .workloads import WORKLOADS, Workload

CANDIDATES = (FOLDED, "fastopt", "default", "fused")  # torch's default is foreach
OF_WORKLOADS = ("two scalars", "mlp", "1000 x 256", "gpt2")
IN_A_ROW = 20e-3  # seconds of iterations between two readings of the clock
NOISE = 10  # times what torch's losses are off from its own, as sums of its backward have no fixed order: not wrong yet


# ---- iterations, part by part


def on_device(training: Training, host: float) -> list[float]:
    """The device's seconds of each part of an iteration, which has all been launched before the first begins."""
    events: list[Any] = []

    def clock() -> float:
        events.append(event())
        events[-1].record()
        return 0.0

    torch.cuda._sleep(int((2 * host + 1e-4) * CYCLES))
    training.run(1, clock)
    torch.cuda.synchronize()
    return [float(start.elapsed_time(stop)) / 1e3 for start, stop in pairwise(events)]


def in_a_row(training: Training, iterations: int) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    training.run(iterations)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / iterations


def measure_iterations(task: Task, effort: Effort) -> dict[str, Any]:
    """`seconds` and `ratio` are of iterations in a row; `host` and `device` the seconds of each part, and of `own`."""
    expected, trained = Training(task, "default", DEVICE), dict[str, Training]()
    expected.run(CHECKED)
    result: dict[str, Any] = {
        "task": task.name, "refused": {}, "absent": {}, "losses_off": {},
        "tensors": len(list(expected.model.parameters())),
        "elements": sum(param.numel() for param in expected.model.parameters()),
    }  # fmt: skip
    for name in CANDIDATES:
        try:
            training = Training(task, name, DEVICE)
        except Unavailable as why:
            result["absent"][name] = str(why)
            continue
        training.run(CHECKED)
        result["losses_off"][name], trained[name] = off(training.losses, expected.losses), training
    allowed = max(LOSS_TOLERANCE, NOISE * result["losses_off"]["default"])
    for name, difference in result["losses_off"].items():
        if difference > allowed:
            result["refused"][name] = f"losses differ by {difference:.1e} of their value, more than {allowed:.1e}"
            del trained[name]

    sizes = {name: max(1, round(IN_A_ROW / in_a_row(training, 3))) for name, training in trained.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trained}
    parts: dict[str, dict[str, list[list[float]]]] = {
        kind: {name: [] for name in trained} for kind in ("host", "device")
    }
    gc.collect()
    gc.disable()
    try:
        for order in rounds(trained, effort):
            for name in order:
                training = trained[name]
                seconds[name].append(in_a_row(training, sizes[name]))
                host = training.run(1)
                torch.cuda.synchronize()
                parts["host"][name].append(host)
                parts["device"][name].append(on_device(training, sum(host)))
    finally:
        gc.enable()
    own = [PARTS.index(part) for part in OWN]
    for kind, of_kind in parts.items():
        result[kind] = {
            name: {part: summary([found[i] for found in of]) for i, part in enumerate(PARTS)}
            | {"own": summary([sum(found[i] for i in own) for found in of])}
            for name, of in of_kind.items()
        }
    return result | (compare_times(seconds, FOLDED) if seconds else {})


# ---- whole steps and functions


def measure_calls(
    calls: dict[str, Callable[[], Any]], prepare: Callable[[str], Any], effort: Effort, clock: Clock, unit: str
) -> dict[str, Any]:
    """Of one call at a time, each right after `prepare`: `seconds` and `ratio` of the device, `host` of the host."""
    host: dict[str, list[float]] = {name: [] for name in calls}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        prepare(name), call()  # compiles
    gc.collect()
    gc.disable()
    try:
        for order in rounds(calls, effort):
            for name in order:
                prepare(name)
                torch.cuda.synchronize()
                began = time.perf_counter()
                calls[name]()
                host[name].append(time.perf_counter() - began)
                prepare(name)
                seconds[name].append(clock(calls[name], host[name][-1]))
    finally:
        gc.enable()
    return compare_times(seconds, unit) | {"host": {name: summary(numbers) for name, numbers in host.items()}}


def measure_whole(workload: Workload, effort: Effort, clock: Clock) -> Iterator[dict[str, Any]]:
    problem = Problem(workload, torch.float32).to(DEVICE)
    for title, parts in WHOLES.items():
        calls = wholes(problem, parts)
        found = measure_calls(dict(calls), lambda name, of=calls: of[name].prepare(), effort, clock, FOLDED)
        del calls
        gc.collect()
        yield {"function": title, "workload": workload.name} | found


def measure_functions(workload: Workload, effort: Effort, clock: Clock) -> Iterator[dict[str, Any]]:
    for function, calls, prepare in functions(Problem(workload, torch.float32).to(DEVICE)):
        found = measure_calls(calls, prepare or (lambda name: None), effort, clock, "fastopt")
        del calls
        gc.collect()
        yield {"function": function, "workload": workload.name} | found


WHAT = ("iterations", "whole", "functions")


def main() -> int:
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu_loop: no CUDA or ROCm device that torch could use")
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="less time")
    options.add_argument("--seconds", type=float, default=80, help="begin nothing after these")
    options.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    options.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME")
    options.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(OF_WORKLOADS), metavar="NAME")
    options.add_argument("--json", type=Path, default=Path("build/gpu-loop.json"), help="write the results here")
    arguments = options.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.allow_tf32 = False  # whose rounding would hide by how much losses differ
    effort, began, clock = QUICK if arguments.quick else FULL, time.perf_counter(), Clock()
    document: dict[str, Any] = {"environment": environment() | where(), "left_out": []}

    def wanted() -> Iterator[tuple[str, str, Callable[[], Any]]]:
        if "iterations" in arguments.what:
            for name in arguments.tasks:
                yield "iterations", name, lambda name=name: [measure_iterations(TASKS[name], effort)]
        for kind, measure in (("whole", measure_whole), ("functions", measure_functions)):
            for name in arguments.workloads if kind in arguments.what else ():
                yield kind, name, lambda name=name, measure=measure: measure(WORKLOADS[name], effort, clock)

    for kind, name, measured in wanted():
        if time.perf_counter() - began > arguments.seconds:
            document["left_out"].append(f"{kind} of {name}")
            continue
        for result in measured():
            document.setdefault(kind, []).append(result)
            save(arguments.json, document)
        print(f"{kind}: {name}", flush=True)
    save(arguments.json, document)
    print("\n" + text({"loop": document}))
    return int(any(result["refused"].keys() & {FOLDED, "fastopt"} for result in document.get("iterations", ())))


if __name__ == "__main__":
    raise SystemExit(main())

"""What a step costs before it touches memory: empty tensors, one-element tensors, the first step, the import.

python -m bench.host [--quick] [--threads N] [--candidates fastopt ...] [--json FILE]
"""

import gc
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch

from .candidates import OPTIMIZERS, Problem, Unavailable, make
from .measure import FULL, QUICK, Effort, environment, interleave, measure, summary
from .report import environment_text, host_text, workload_table
from .run import parser, save
from .workloads import WORKLOADS, one_group

MANY = 1000


def fixed_and_per_param(candidates: list[str], effort: Effort) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A step on 1 and on 1000 tensors of no elements: the line through both times."""
    host: dict[str, Any] = {}
    results = []
    for optimizer in ("SGD", "Adam"):
        one, many = (
            measure(one_group(f"{count} x 0", [(0,)] * count), optimizer, "fp32", effort, candidates)
            for count in (1, MANY)
        )
        results += [one, many]
        for name in candidates:
            if name in one.get("seconds", {}) and name in many.get("seconds", {}):
                low, high = one["seconds"][name], many["seconds"][name]
                # The spread is that of the longer and of the shorter time: of a difference it is not known.
                slope = {key: (high[key] - low["median"]) / (MANY - 1) for key in low}
                fixed = {key: low[key] - slope["median"] for key in low}
                host[f"{optimizer}, {name}: for each parameter"] = slope | {"unit": "s"}
                host[f"{optimizer}, {name}: for the step itself"] = fixed | {"unit": "s"}
    return host, results


def two_threads(name: str, effort: Effort) -> dict[str, Any]:
    """1000 tensors of one element on 1 and 2 threads: more than 1 x is false sharing or a region not worth opening."""
    problem, row = Problem(one_group("1000 x 1", [(1,)] * MANY), torch.float32), OPTIMIZERS["Adam"]
    threads = torch.get_num_threads()
    try:
        optimizer = make(name, row, problem)
    except Unavailable:
        return {}
    optimizer.step()
    times = interleave(
        {str(n): optimizer.step for n in (1, 2)}, effort, {str(n): partial(torch.set_num_threads, n) for n in (1, 2)}
    )
    torch.set_num_threads(threads)
    ratio = summary([two / one for one, two in zip(times["1"], times["2"], strict=True)])
    return {f"Adam, {name}: 1000 x 1 element, 2 threads in units of 1": ratio | {"unit": "x"}}


def first_step(workload: str, candidates: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of an optimizer's first step, which makes its state, and the ratio to fused's in the same round."""
    problem, row = Problem(WORKLOADS[workload], torch.float32), OPTIMIZERS["Adam"]
    times: dict[str, list[float]] = {}
    order = list(candidates)
    for round_ in range(rounds + 1):
        order = order[1:] + order[:1]
        for name in order:
            try:
                optimizer = make(name, row, problem)
            except Unavailable:
                continue
            gc.collect()
            began = time.perf_counter()
            optimizer.step()
            if round_:  # the very first step of a process loads code
                times.setdefault(name, []).append(time.perf_counter() - began)
    host: dict[str, Any] = {}
    for name, numbers in times.items():
        host[f"{workload}, {name}: first step of Adam"] = summary(numbers) | {"unit": "s"}
        if "fused" in times and name != "fused":
            ratio = summary([a / b for a, b in zip(numbers, times["fused"], strict=True)])
            host[f"{workload}, {name}: first step in units of fused's"] = ratio | {"unit": "x"}
    return host


def import_time(rounds: int) -> dict[str, Any]:
    """Seconds `import fastopt` adds to `import torch`, each in a new process."""
    program = "import time, torch; began = time.perf_counter(); import fastopt; print(time.perf_counter() - began)"
    run = partial(subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True)
    if run().returncode:  # also fills the cache of compiled Python files
        return {}
    return {"import fastopt after torch": summary([float(run().stdout) for _ in range(rounds)]) | {"unit": "s"}}


def main() -> int:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    effort = QUICK if arguments.quick else FULL
    document: dict[str, Any] = {"environment": environment()}
    host, results = fixed_and_per_param(arguments.candidates, effort)
    for name in arguments.candidates:
        host |= two_threads(name, effort)
    for workload in ("two scalars", "mlp", "1000 x 256", "resnet50"):
        host |= first_step(workload, arguments.candidates, 3 if arguments.quick else 11)
    host |= import_time(3 if arguments.quick else 7)
    document |= {"results": results, "host": host}
    save(arguments.json, document)
    print(environment_text(document["environment"]))
    for result in results:
        print(workload_table([result]))
    print(host_text(host))
    return int(any("fastopt" in result["refused"] for result in results))


if __name__ == "__main__":
    raise SystemExit(main())

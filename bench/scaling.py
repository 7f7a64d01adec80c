"""How step time grows: with the number of elements, of tensors, of param groups and of threads.

    python -m bench.scaling [--quick] [--axes elements tensors groups threads] [--optimizers Adam] [--dtype fp32]
                            [--threads N] [--candidates fastopt ...] [--json FILE]

bench.report draws the curves.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch

from .candidates import OPTIMIZERS
from .measure import FULL, QUICK, environment, measure
from .report import environment_text, workload_table
from .run import add_dtype, parser, save
from .workloads import WORKLOADS, Workload, one_group

AXES = ("elements", "tensors", "groups", "threads")


def points(axis: str, quick: bool) -> Iterator[tuple[int, Workload, int | None]]:
    """Value on the axis, workload, number of threads (None: as set)."""
    if axis == "elements":
        for power in range(1, 8 if quick else 9):
            yield 10**power, one_group(f"one tensor of 10^{power}", [(10**power,)]), None
    elif axis == "tensors":
        for power in range(4 if quick else 5):
            yield 10**power, one_group(f"10^{power} tensors of 100", [(100,)] * 10**power), None
    elif axis == "groups":
        for groups in (1, 10, 100, 1000):
            group = ((100,),) * (1000 // groups)
            yield groups, Workload(f"1000 tensors of 100 in {groups} groups", (group,) * groups), None
    elif axis == "threads":
        for threads in range(1, (os.cpu_count() or 1) + 1):
            yield threads, WORKLOADS["10 x 1M"], threads


def main() -> int:
    options = parser(__doc__)
    add_dtype(options)
    options.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    options.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["Adam"], metavar="NAME")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    effort = QUICK if arguments.quick else FULL

    document: dict[str, Any] = {"environment": environment(), "results": []}
    print(environment_text(document["environment"]))
    for optimizer in arguments.optimizers:
        for dtype in arguments.dtype:
            for axis in arguments.axes:
                for x, workload, threads in points(axis, arguments.quick):
                    torch.set_num_threads(threads or arguments.threads)
                    result = measure(workload, optimizer, dtype, effort, arguments.candidates) | {"axis": axis, "x": x}
                    document["results"].append(result)
                    save(arguments.json, document)
                    print(workload_table([result]), flush=True)
    return int(any("fastopt" in result["refused"] for result in document["results"]))


if __name__ == "__main__":
    raise SystemExit(main())

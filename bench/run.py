"""The benchmark: every workload x optimizer x candidate, checked, then timed in turns.

    python -m bench.run [--quick] [--workloads mlp gpt2 ...] [--optimizers Adam ...] [--dtype fp32 bf16]
                        [--candidates fastopt ...] [--threads N] [--json FILE]

Prints a table for each workload as it goes: fastopt's time, the others' in units of it (above 1, fastopt is faster),
the bytes a step must move by its time, and the same for the roof, a kernel with the same traffic and no arithmetic to
speak of. Exits with 1 where fastopt was wrong.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .candidates import CANDIDATES, OPTIMIZERS, Problem
from .measure import DTYPES, FULL, QUICK, environment, measure
from .report import environment_text, summary_table, workload_table
from .workloads import QUICK as QUICK_WORKLOADS
from .workloads import WORKLOADS


def parser(description: str | None, candidates: Iterable[str] = CANDIDATES) -> argparse.ArgumentParser:
    """The options that every measuring command has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="less time, fewer workloads")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--candidates", nargs="+", choices=candidates, default=list(candidates), metavar="NAME")
    options.add_argument("--json", type=Path, help="write the results here")
    return options


def add_dtype(options: argparse.ArgumentParser) -> None:
    options.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])


def save(path: Path | None, document: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    options = parser(__doc__)
    add_dtype(options)
    options.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME", help=", ".join(WORKLOADS))
    options.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    effort = QUICK if arguments.quick else FULL
    names = arguments.workloads or (QUICK_WORKLOADS if arguments.quick else WORKLOADS)

    document: dict[str, Any] = {"environment": environment(), "results": []}
    print(environment_text(document["environment"]))
    for name in names:
        for dtype in arguments.dtype:
            problem = Problem(WORKLOADS[name], DTYPES[dtype])
            results = [
                measure(WORKLOADS[name], optimizer, dtype, effort, arguments.candidates, problem)
                for optimizer in arguments.optimizers
            ]
            document["results"] += results
            save(arguments.json, document)
            print(workload_table(results), flush=True)
    print("fastopt against the fastest of the others\n\n" + summary_table(document["results"]))
    return int(any("fastopt" in result["refused"] for result in document["results"]))


if __name__ == "__main__":
    raise SystemExit(main())

"""What got slower from one JSON file to the next: a regression check that compares ratios, not times.

    python -m bench.compare OLD.json NEW.json [--tolerance 0.10]

Times of two runs are not comparable, ratios within a run are: fastopt's time in units of each other candidate's, the
median over candidates. Something is slower where that grew by more than the tolerance and, for half of the candidates
or more, the quantiles of the two runs do not overlap. Instruction counts (bench.callgrind) are exact and compared
within 1 %. Exits with 1 where something is slower, where OLD has a timing of fastopt and NEW has refused it, or where
the files have nothing in common.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from .report import OTHERS, Result, table

INSTRUCTIONS_TOLERANCE = 0.01


def key(result: Result) -> tuple[str, ...]:
    return tuple(str(result[name]) for name in ("workload", "optimizer", "dtype", "threads"))


def change(old: Result, new: Result) -> tuple[float, bool] | None:
    """fastopt's time now in units of then, measured by the others' times; and whether the quantiles say so too."""
    shared = [name for name in OTHERS if name in old.get("ratio", {}) and name in new.get("ratio", {})]
    if not shared:
        return None
    # ratio is the other's time in units of fastopt's: it falls when fastopt gets slower
    factors = [old["ratio"][name]["median"] / new["ratio"][name]["median"] for name in shared]
    apart = [new["ratio"][name]["q80"] < old["ratio"][name]["q20"] for name in shared]
    return statistics.median(factors), 2 * sum(apart) >= len(apart)


def slower(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[tuple[str, ...]]:
    """A line for each thing that got slower: what, by how much."""
    lines = []
    before = {key(result): result for result in old.get("results", ())}
    for result in new.get("results", ()):
        name = key(result)
        if name not in before:
            continue
        if "fastopt" in result["refused"] and "fastopt" in before[name].get("seconds", {}):
            lines.append((*name, "wrong: " + result["refused"]["fastopt"]))
        elif (changed := change(before[name], result)) and changed[1] and changed[0] > 1 + tolerance:
            lines.append((*name, f"{changed[0]:.2f} x the time"))
    counts = new.get("instructions", {})
    for workload, count in old.get("instructions", {}).items():
        if workload in counts and counts[workload] > count * (1 + INSTRUCTIONS_TOLERANCE):
            lines.append((workload, "", "", "", f"{counts[workload] / count:.3f} x the instructions"))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.10)
    arguments = parser.parse_args()
    old, new = (json.loads(path.read_text()) for path in (arguments.old, arguments.new))
    for what in ("cpu", "isa", "cores"):
        if old["environment"][what] != new["environment"][what]:
            print(f"not the same {what}: {old['environment'][what]}, {new['environment'][what]}")
    lines = slower(old, new, arguments.tolerance)
    compared = len({key(r) for r in old.get("results", ())} & {key(r) for r in new.get("results", ())})
    compared += len(old.get("instructions", {}).keys() & new.get("instructions", {}).keys())
    print(f"{compared} things compared, {len(lines)} slower")
    if lines:
        print(table(("workload", "optimizer", "dtype", "threads", "change"), lines))
    return int(bool(lines) or not compared)


if __name__ == "__main__":
    raise SystemExit(main())

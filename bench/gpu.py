"""The benchmark on a GPU: every workload x optimizer, checked, then timed in turns with torch's default and fused.

    python -m bench.gpu [--quick] [--workloads mlp gpt2 ...] [--optimizers Adam ...] [--dtype fp32 bf16 fp32+bf16]
                        [--json FILE]

fastopt must have the bits of its CPU step, everyone be near torch's for-loop; only then is a step timed. Of the dtypes,
fp32+bf16 is float32 with state_dtype=bfloat16, which torch does not have: beside it torch's of float32. A time is
the device's, between two events, behind a write of more than the L2 cache holds and behind a wait that is longer than
the host needs: nothing is warm, and no launch comes late. The host's time is that of the call alone. Exits with 1 where
fastopt was wrong, and at once where there is no GPU.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastopt import backends

from .candidates import CHECK_STEPS, OPTIMIZERS, Problem, Row, Unavailable, check, make, reference, values
from .measure import DTYPES, FULL, QUICK, Effort, compare_times, environment, rounds, summary
from .report import count, duration, median, table, times
from .run import save
from .workloads import QUICK as QUICK_WORKLOADS
from .workloads import WORKLOADS, Workload

DEVICE = torch.device(backends._C.gpu_type() if backends._C else "cuda")  # a dry run's is the CPU
CANDIDATES = ("fastopt", "default", "fused")  # torch's default is foreach
BF16_STATE = "fp32+bf16"
CYCLES = 2.5e9  # of a GPU in a second, rather too many
HOST_STEPS = 20  # whose launches fit into a stream's queue together

Step = Callable[[], Any]


def other_bits_than_cpu(optimizer: torch.optim.Optimizer, row: Row, problem: Problem) -> str:
    """Compares fastopt after the check's steps with its CPU step: "", or what is wrong."""
    on_cpu = make("fastopt", row, problem)
    for _ in range(CHECK_STEPS):
        on_cpu.step()
    for (name, value, _), (_, right, _) in zip(
        values(optimizer, row, problem), values(on_cpu, row, problem), strict=True
    ):
        if wrong := int((value.cpu() != right).sum()):
            return f"{name}: {wrong} of {right.numel()} elements are not those of the CPU step"
    return ""


# ---- time


def event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def host_seconds(step: Step) -> float:
    """Of a call, the device being busy with the ones before it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(HOST_STEPS):
        step()
    took = time.perf_counter() - began
    torch.cuda.synchronize()
    return took / HOST_STEPS


class Clock:
    """Seconds of a step on the device, with cold caches and without waiting for the host."""

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        self.cold = torch.empty(max(4 * l2, 64 << 20), dtype=torch.uint8, device=DEVICE)

    def __call__(self, step: Step, host: float) -> float:
        start, stop = event(), event()
        torch.cuda._sleep(int((2 * host + 1e-4) * CYCLES))
        self.cold.zero_()
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


def copy_bandwidth(rounds: int = 21) -> dict[str, float]:
    """Bytes a second, read and written, of torch's copy of 1 GiB: what a step is measured against."""
    source = torch.ones(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    clock = Clock()
    seconds = [clock(lambda: target.copy_(source), 1e-4) for _ in range(rounds + 1)]
    return summary([2 * source.nbytes / number for number in seconds[1:]])


def launches(step: Step) -> int:
    """How many kernels a step launches, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [found for found in profile.events() if found.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not found.name.startswith(("Memcpy", "Memset", "Optimizer.step")) for found in on_device)


def measure(
    workload: Workload, optimizer: str, dtype: str, effort: Effort, clock: Clock, problem: Problem, bandwidth: float
) -> dict[str, Any]:
    """One result. `refused` says which candidate was wrong and how; seconds and ratio are the device's."""
    row, on_device = OPTIMIZERS[optimizer], problem.to(DEVICE)
    own_row, own_state = row, problem.dtype  # fastopt's
    if dtype == BF16_STATE:
        own_row, own_state = replace(row, options={**row.options, "state_dtype": torch.bfloat16}), torch.bfloat16
    moved = dict.fromkeys(CANDIDATES, workload.elements * row.bytes_per_element(problem.dtype.itemsize))
    moved["fastopt"] = workload.elements * row.bytes_per_element(problem.dtype.itemsize, own_state.itemsize)
    result: dict[str, Any] = {
        "workload": workload.name, "optimizer": optimizer, "dtype": dtype, "threads": torch.get_num_threads(),
        "groups": len(workload.groups), "tensors": len(workload.shapes), "elements": workload.elements,
        "bytes": moved["fastopt"], "moved": moved, "refused": {}, "absent": {}, "host": {}, "launches": {},
    }  # fmt: skip
    expected, steps = reference(row, on_device), {}
    for name in CANDIDATES:
        try:
            candidate = make(name, own_row if name == "fastopt" else row, on_device)
            wrong = check(name, candidate, expected, row, on_device, own_state if name == "fastopt" else problem.dtype)
            if name == "fastopt" and not wrong:
                wrong = other_bits_than_cpu(candidate, own_row, problem)
        except (Unavailable, torch.cuda.OutOfMemoryError) as why:
            result["absent"][name] = str(why)
            continue
        if wrong:
            result["refused"][name] = wrong
        else:
            steps[name] = candidate.step
    del expected
    if not steps:
        return result

    gc.collect()
    for name, step in steps.items():
        result["launches"][name] = launches(step)
        result["host"][name] = summary([host_seconds(step) for _ in range(effort.min_rounds)])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for order in rounds(steps, effort):
        for name in order:
            seconds[name].append(clock(steps[name], result["host"][name]["median"]))
    result |= compare_times(seconds)
    result["of_copy"] = {name: moved[name] / statistics.median(of) / bandwidth for name, of in seconds.items()}
    return result


def where() -> dict[str, Any]:
    """What environment() does not know of."""
    return {"device": torch.cuda.get_device_name(DEVICE), "cuda": torch.version.cuda, "hip": torch.version.hip}


def result_table(results: list[dict[str, Any]]) -> str:
    """The results of one workload and dtype, a line for each optimizer and candidate."""
    first = results[0]
    title = (
        f"### {first['workload']}, {first['dtype']}: {count(first['groups'], 'group')}, "
        f"{count(first['tensors'], 'tensor')}, {first['elements']:,} elements\n\n"
    )
    header = ("optimizer", "", "step on the device", "its ratio", "GB/s", "of a copy", "host", "launches")
    lines = []
    for result in results:
        for name in CANDIDATES:
            seconds = median(result, "seconds", name)
            if seconds is None:
                refused = result["refused"].get(name)
                why = f"WRONG: {refused}" if refused else result["absent"].get(name, "")
                lines.append((result["optimizer"], name, why, *[""] * 5))
                continue
            ratio = median(result, "ratio", name)
            lines.append(
                (
                    result["optimizer"], name, duration(seconds), times(ratio) if ratio else "-",
                    f"{result['moved'][name] / seconds / 1e9:.1f}", f"{result['of_copy'][name]:.0%}",
                    duration(result["host"][name]["median"]), str(result["launches"][name]),
                )
            )  # fmt: skip
    return title + table(header, lines) + "\n"


def main() -> int:
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: no CUDA or ROCm device that torch could use, so there is nothing to measure")
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="less time, fewer workloads and dtypes")
    options.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME", help=", ".join(WORKLOADS))
    options.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    options.add_argument("--dtype", nargs="+", choices=[*DTYPES, BF16_STATE], default=[*DTYPES, BF16_STATE])
    options.add_argument("--json", type=Path, default=Path("build/bench-gpu.json"), help="write the results here")
    arguments = options.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    names = arguments.workloads or (QUICK_WORKLOADS if arguments.quick else WORKLOADS)
    effort = QUICK if arguments.quick else FULL

    bandwidth = copy_bandwidth()
    here = environment() | where() | {"copy_bandwidth": bandwidth}
    document: dict[str, Any] = {"environment": here, "results": []}
    print(f"{here['device']}, {here['date']}, commit {here['commit']}, {here['versions']}")
    print(f"a copy of 1 GiB: {bandwidth['median'] / 1e9:.1f} GB/s read and written\n")
    clock = Clock()
    for name in names:
        for dtype in arguments.dtype:
            problem = Problem(WORKLOADS[name], DTYPES.get(dtype, torch.float32))
            in_haste = arguments.quick and dtype == BF16_STATE
            results = [
                measure(WORKLOADS[name], optimizer, dtype, effort, clock, problem, bandwidth["median"])
                for optimizer in (["Adam"] if in_haste else arguments.optimizers)
            ]
            document["results"] += results
            save(arguments.json, document)
            print(result_table(results), flush=True)
    print(f"saved: {arguments.json}")
    return int(any("fastopt" in result["refused"] for result in document["results"]))


if __name__ == "__main__":
    raise SystemExit(main())

"""One step of fp32 Adam on 2^26 elements, for ncu to look at, and what it found as a table.

    ncu --csv --kernel-name multi_tensor_update --metrics ... python -m bench.gpu_profile > ncu.csv
"""

import csv
from collections.abc import Iterable

# what is asked of ncu, and what a person calls it
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum.per_second": "bandwidth of the memory",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of its peak, %",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sectors a load",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": "sectors a store",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy reached, %",
    "sm__maximum_warps_per_active_cycle_pct": "occupancy possible, %",
    "launch__registers_per_thread": "registers a thread",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "cycles that issue, %",
    **{
        f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio": f"warps stalled an issue: {name}"
        for why, name in {
            "long_scoreboard": "memory",
            "lg_throttle": "queue of loads and stores",
            "short_scoreboard": "shared memory, special functions",
            "wait": "fixed latency",
            "math_pipe_throttle": "arithmetic",
            "not_selected": "another was chosen",
            "barrier": "barrier",
        }.items()
    },
}
COMMAND = ["--csv", "--clock-control", "none", "--kernel-name", "regex:multi_tensor_update", "--launch-skip", "2",
           "--launch-count", "1", "--metrics", ",".join(METRICS)]  # fmt: skip


def parse(output: str) -> dict[str, str]:
    """What ncu's CSV says of the last kernel, by a person's names: each metric with its unit."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    rows: Iterable[dict[str, str]] = csv.DictReader(line for line in lines[start:] if line.startswith('"'))
    found = {}
    for row in rows:
        if row.get("Metric Name") in METRICS and row.get("Metric Value"):
            found[METRICS[row["Metric Name"]]] = f"{row['Metric Value']} {row.get('Metric Unit', '')}".strip()
    return found


def main() -> None:
    import torch

    import fastopt

    params = [torch.nn.Parameter(torch.randn(1 << 24, device="cuda")) for _ in range(4)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = fastopt.Adam(params)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

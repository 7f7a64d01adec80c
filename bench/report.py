"""Results as a person reads them: markdown tables and plots from the JSON files of the measuring commands.

python -m bench.report RESULTS.json ... [--plots FOLDER] > report.md
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .candidates import CANDIDATES, OPTIMIZERS
from .workloads import WORKLOADS

Result = dict[str, Any]
OTHERS = [name for name in CANDIDATES if name != "fastopt"]
EQUAL = 0.97  # fastopt within 3 % of the best counts as equal: the limit of the memory, not of a program


UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


def duration(seconds: float) -> str:
    unit, size = next(((unit, size) for unit, size in UNITS if abs(seconds) >= size), UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def times(ratio: float) -> str:
    return f"{ratio:.2f} x" if ratio < 9.95 else f"{ratio:,.0f} x"


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table whose columns line up in a terminal too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def median(result: Result, kind: str, name: str) -> float | None:
    return result.get(kind, {}).get(name, {}).get("median")


def best_other(result: Result) -> tuple[float, str] | None:
    """The fastest candidate that is not fastopt: its time in units of fastopt's, and its name."""
    found = [(result["ratio"][name]["median"], name) for name in OTHERS if name in result.get("ratio", {})]
    return min(found, default=None)


def of_roof(result: Result) -> float | None:
    return median(result, "ratio", "roof")


def cell(result: Result, name: str) -> str:
    """A candidate's column: the time of the unit, as a rule fastopt's; another's in units of it, or its time."""
    seconds, ratio = median(result, "seconds", name), median(result, "ratio", name)
    if name in result.get("refused", {}):
        return "WRONG"
    if seconds is None:
        return "-"
    if name == result.get("unit", "fastopt") or ratio is None:
        spread = result["seconds"][name]
        return f"{duration(seconds)} ({spread['q20'] / seconds - 1:+.0%} {spread['q80'] / seconds - 1:+.0%})"
    return times(ratio)


def workload_table(results: list[Result]) -> str:
    """The results of one workload, dtype and number of threads: a line for each optimizer."""
    first = results[0]
    title = (
        f"### {first['workload']}, {first['dtype']}, {count(first['threads'], 'thread')}: "
        f"{count(first['groups'], 'group')}, {count(first['tensors'], 'tensor')}, {first['elements']:,} elements\n\n"
    )
    header = ["optimizer", *CANDIDATES, "GB/s", "roof GB/s", "of the roof"]
    lines = []
    for result in results:
        rate = [
            f"{result['bytes'] / seconds / 1e9:.1f}" if (seconds := median(result, "seconds", name)) else "-"
            for name in ("fastopt", "roof")
        ]
        share = of_roof(result)
        lines.append(
            [result["optimizer"], *(cell(result, name) for name in CANDIDATES), *rate, f"{share:.0%}" if share else "-"]
        )
    notes = "".join(
        f"\n{result['optimizer']}, {name}: WRONG, not timed ({why})"
        for result in results
        for name, why in result["refused"].items()
    )
    return title + table(header, lines) + ("\n" + notes if notes else "") + "\n"


def summary_table(results: list[Result]) -> str:
    """fastopt against the fastest of the others, a line for each workload; what is slower is in bold."""
    cells: dict[tuple, dict[str, str]] = {}
    for result in results:
        key = (result["workload"], result["dtype"], result["threads"])
        if best := best_other(result):
            ratio, name = best
            text = f"{times(ratio)} {name}"
            cells.setdefault(key, {})[result["optimizer"]] = text if ratio >= EQUAL else f"**{text}**"
    header = ["workload", "dtype", "threads", *OPTIMIZERS]
    return table(header, ([*map(str, key), *(row.get(name, "-") for name in OPTIMIZERS)] for key, row in cells.items()))


def grouped(results: list[Result], *keys: str) -> dict[tuple, list[Result]]:
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return groups


def environment_text(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return (
        "`{command}`, {date}: {cpu}, {cores} cores, {threads} threads, {isa}, load {load} at the start; "
        "Python {python}, {packages}; commit {commit}\n"
    ).format(packages=versions, **environment)


def host_text(host: dict[str, Any]) -> str:
    """bench.host's figures that are not results of workloads."""
    lines = []
    for name, figure in host.items():
        text = duration if figure["unit"] == "s" else times
        lines.append((name, *(text(figure[key]) for key in ("median", "q20", "q80"))))
    return "## Host\n\n" + table(("what", "median", "20 %", "80 %"), lines)


def instructions_text(counts: dict[str, float]) -> str:
    header = ("optimizer, workload, candidate", "instructions")
    return "## Instructions a step, one thread, AVX2\n\n" + table(header, ((k, f"{v:,.0f}") for k, v in counts.items()))


def iteration_table(result: Result) -> str:
    """bench.loop's iterations of one task: a line for each candidate, a column for each part."""
    title = (
        f"### {result['task']}: {count(result['tensors'], 'tensor')}, {result['elements']:,} elements, "
        f"{count(result['threads'], 'thread')}\n\n"
    )
    parts = list(next(iter(result["parts"].values()), {}))
    lines = []
    for name in result.get("seconds", {}):
        of_parts = (duration(result["parts"][name][part]["median"]) for part in parts)
        whole = cell({"seconds": result["seconds"]}, name)
        own = duration(result["own"][name]["median"])
        ratio = median(result, "ratio", name)
        lines.append([name, *of_parts, own, whole, times(ratio) if ratio else "-", f"{result['losses_off'][name]:.0e}"])
    notes = "".join(f"\n{name}: WRONG, not timed ({why})" for name, why in result["refused"].items())
    header = ["", *parts, "all but the model", "iteration", "in units of fastopt's", "losses off by"]
    return title + table(header, lines) + ("\n" + notes if notes else "") + "\n"


def loop_text(document: dict[str, Any]) -> str:
    """bench.loop's tables."""
    text = []
    if results := document.get("iterations"):
        text += ["## Training iterations, part by part\n", *map(iteration_table, results)]
    if results := document.get("cold"):
        names = [name for name in CANDIDATES if any(name in result["cold"]["seconds"] for result in results)]
        text += ["## A step of Adam with cold caches, and in a row of steps\n"]
        lines = [
            [result["workload"], kind, *(cell(result[kind], name) for name in names)]
            for result in results
            for kind in ("cold", "warm")
        ]
        text += [table(["workload", "caches", *names], lines), ""]
    if results := document.get("functions"):
        text += ["## Functions against torch's, warm\n"]
        lines = [[r["function"], r["workload"], cell(r, "fastopt"), cell(r, "torch")] for r in results]
        text += [table(["function", "workload", "fastopt", "torch"], lines), ""]
    if results := document.get("whole"):
        text += ["## What surrounds a step, and the step: inside it, and one by one\n"]
        names = ("folded", "fastopt", "torch", "roof")
        lines = [[r["function"], r["workload"], r["grads"], *(cell(r, name) for name in names)] for r in results]
        text += [table(["what", "workload", "gradients", *names], lines), ""]
    return "\n".join(text)


def low_precision_table(result: Result) -> str:
    """bench.low_precision's ways to keep the weights, a line for each.

    Ratios are the median over rounds and, behind it, that of the two 20 % quantiles, which neighbours disturb less.
    """
    lines = []
    for name, moved in result["bytes"].items():
        seconds = result["seconds"][name]
        ratios = [
            f"{ratio['median']:{form}}, {ratio['quick']:{form}}" if (ratio := result[key].get(name)) else "-"
            for key, form in (("of_roof", ".0%"), ("gain", ".2f"))
        ]
        kept = str(result["kept"][name])
        lines.append([name, kept, str(moved), duration(seconds["median"]), duration(seconds["q20"]), *ratios])
    title = (
        f"### {result['workload']}, Adam: {count(result['tensors'], 'tensor')}, {result['elements']:,} elements, "
        f"{count(result['threads'], 'thread')}, {count(result.get('rounds', 0), 'round')}\n\n"
    )
    header = ["", "bytes kept", "moved", "median", "20 %", "of its roof", "times as fast as torch's fused fp32"]
    notes = "".join(f"\n{name}: WRONG, not timed ({why})" for name, why in result["refused"].items())
    return title + table(header, lines) + ("\n" + notes if notes else "") + "\n"


# ---- plots

COLOURS = {"fastopt": "#d62728", "default": "#7f7f7f", "foreach": "#1f77b4", "fused": "#2ca02c", "deepspeed": "#9467bd",
           "roof": "#000000"}  # fmt: skip


def plot_ratios(results: list[Result], path: Path) -> None:
    """A panel for each workload: how many times as long each candidate takes as fastopt."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    panels = grouped(results, "workload", "dtype", "threads")
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (4.2 * columns, 3.1 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((workload, dtype, threads), panel) in zip(axes.flat, panels.items(), strict=False):
        names = [name for name in OTHERS if any(name in result["ratio"] for result in panel)]
        for i, name in enumerate(names):
            width = 0.8 / len(names)
            places = [x + (i + 0.5) * width - 0.4 for x in range(len(panel))]
            ratios = [median(result, "ratio", name) or float("nan") for result in panel]
            axis.bar(places, [ratio - 1 for ratio in ratios], width, bottom=1, color=COLOURS[name], label=name)
        axis.axhline(1, color=COLOURS["fastopt"], linewidth=1.5)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g} x")
        decades = axis.get_ylim()[1] / axis.get_ylim()[0] > 8
        axis.yaxis.set_minor_formatter(NullFormatter() if decades else "{x:g} x")
        axis.set_ylim(0.92 * axis.get_ylim()[0])  # or the line hides below the frame
        axis.set_xticks(range(len(panel)), [result["optimizer"] for result in panel], rotation=30, fontsize=8)
        axis.set_title(f"{workload} ({dtype}, {count(threads, 'thread')})", fontsize=10)
    legends = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes.flat]
    seen = {label: handle for legend in legends for handle, label in legend}
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=len(seen), frameon=False)
    figure.suptitle("Step time in units of fastopt's (red line); higher is slower")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_scaling(results: list[Result], path: Path) -> None:
    """A panel for each axis of bench.scaling: seconds a step of each candidate."""
    import matplotlib.pyplot as plt

    panels = grouped(results, "axis", "optimizer", "dtype")
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, ((name, optimizer, dtype), panel) in zip(axes.flat, panels.items(), strict=True):
        for candidate in (*CANDIDATES, "roof"):
            points = [(r["x"], median(r, "seconds", candidate)) for r in panel if median(r, "seconds", candidate)]
            if points:
                style = ":" if candidate == "roof" else "-"
                axis.plot(*zip(*points, strict=True), style, marker=".", color=COLOURS[candidate], label=candidate)
        if name != "threads":
            axis.set_xscale("log")
        else:
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_yscale("log")
        axis.set_xlabel(name)
        axis.set_title(f"{optimizer}, {dtype}", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("seconds a step")
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(documents: list[dict[str, Any]], plots: Path | None) -> str:
    results = [result for document in documents for result in document.get("results", ())]
    curves = [result for result in results if "axis" in result]
    # A cell that several files have is taken from the last.
    cells = {tuple(r[k] for k in ("workload", "optimizer", "dtype", "threads")): r for r in results if "axis" not in r}
    results = list(cells.values())
    text = ["# fastopt benchmark\n", *(environment_text(document["environment"]) for document in documents)]
    if any(best_other(result) for result in results):
        text.append("## fastopt against the fastest of the others\n")
        text.append(f"Median of per-round ratios; above 1, fastopt is faster; below {EQUAL} it is slower, in bold.\n")
        text += [summary_table(results), ""]
    if results:
        text.append("## Every candidate\n")
        text.append("fastopt: time of a step (20 % and 80 % quantiles). Others: their time in units of fastopt's.\n")
        text += [workload_table(group) for group in grouped(results, "workload", "dtype", "threads").values()]
    for document in documents:
        if "host" in document:
            text += [host_text(document["host"]), ""]
        text += map(low_precision_table, document.get("low_precision", ()))
        if loops := loop_text(document):
            text.append(loops)
        if "instructions" in document:
            text += [instructions_text(document["instructions"]), ""]
    if plots:
        plots.mkdir(parents=True, exist_ok=True)
        named = [result for result in results if result["workload"] in WORKLOADS and result.get("ratio")]
        for name, draw, data in (("ratios", plot_ratios, named), ("scaling", plot_scaling, curves)):
            if data:
                draw(data, plots / f"{name}.png")
                text += [f"![{name}]({name}.png)\n"]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--plots", type=Path, help="also draw plots into this folder")
    arguments = parser.parse_args()
    print(report([json.loads(path.read_text()) for path in arguments.results], arguments.plots))


if __name__ == "__main__":
    main()

"""Everything that a GPU has to say about fastopt, in one run: tests, speed, what limits it, and a page that sums it up.

    make gpu PYTHON=python3 [FULL=1]        the torch and Triton of that Python; nothing is fetched from a network
    python -m bench.gpu_all --out FOLDER [--full] [--dry]

Each part is a command of its own under a limit of time; one that fails or hangs does not stop the next. All of them
take less than nine minutes, or with --full as long as it takes. FOLDER has summary.md, results.json, log.txt and
plots, and after every part what there is so far. --dry is for machines without a GPU: the kernels run in an
interpreter on tiny tensors, and no time means anything.

Only Python's own library is imported here: a machine on which nothing else works shall still say so.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECONDS = 520  # of all parts together
LOG_BYTES = 400_000  # of each part, the beginning and the end
BAD = ("failed", "out of time")
KEPT_LINES = 12  # of a part that failed, on the page


@dataclass
class Part:
    """A command, and how long it may take; `needs` is a program without which it is left out."""

    name: str
    command: list[str]
    seconds: float
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    name: str
    status: str  # "ok", "nothing ran", "left out", or one of BAD
    seconds: float
    why: str
    output: str


def run_part(part: Part, left: float) -> Outcome:
    """Never raises, and leaves no process behind."""
    if part.needs and shutil.which(part.needs) is None:
        return Outcome(part.name, "left out", 0, f"{part.needs} is not installed", "")
    limit = min(part.seconds, left)
    if limit < 1:
        return Outcome(part.name, "left out", 0, "no time was left", "")
    began, status, why = time.monotonic(), "ok", ""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
    with tempfile.TemporaryFile() as output:  # not a pipe, which a process that outlives the part would keep open
        try:
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(part.name, "failed", 0, str(error), "")
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status, why = "out of time", f"stopped after {limit:.0f} s"
        output.seek(0)
        text = output.read().decode(errors="replace")
    if status == "ok" and process.returncode:
        status, why = "failed", f"exit status {process.returncode}"
    if status == "ok" and re.search(r"^\d+ skipped", text, re.M):  # and none passed
        status, why = "nothing ran", "every test was skipped"
    if len(text) > LOG_BYTES:
        text = text[: LOG_BYTES // 2] + "\n[... shortened ...]\n" + text[-LOG_BYTES // 2 :]
    return Outcome(part.name, status, time.monotonic() - began, why, text)


# ---- the parts


def make_python(folder: Path) -> str:
    """A Python that sees the packages of this one and into which fastopt can be installed without touching them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    own = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *filter(is_packages, sys.path)}
    (site / "of_the_machine.pth").write_text("\n".join(sorted(own)) + "\n")
    return str(python)


def is_packages(path: str) -> bool:
    return Path(path).name in ("site-packages", "dist-packages")


def parts(python: str, out: Path, full: bool, dry: bool) -> list[Part]:
    work = out / "parts"
    small = ["--workloads", "two scalars", "--optimizers", "Adam", "--dtype", "fp32", "fp32+bf16"] if dry else []
    module = [python, "-m", *(["bench.gpu_dry"] if dry else [])]
    effort = [] if full else ["--quick"]
    long = 20 if full else 1
    limits = ["--seconds", "25" if dry else str(70 * long), "--elements", "3000" if dry else str(1 << 26)]
    around = ["--seconds", "120" if dry else str(60 * long)]
    around += ["--tasks", "linear regression", "--workloads", "two scalars"] if dry else []
    tests = [python, "-m", "pytest", "-m", "gpu", "--tb=short", "tests/test_gpu_hardware.py"]
    at_once = ["-n", "4"] if importlib.util.find_spec("xdist") else []  # most of the time Triton compiles
    some = [*tests, "-k", "Adam and (float32-float32 or queued or in_a_graph or with_a_scaler)"]
    cache = {"TRITON_CACHE_DIR": str(work / "triton")}
    install = "-m pip install --no-build-isolation --no-deps --no-index --quiet -e .".split()
    sanitize = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all"]
    profile = ["ncu", *profile_options(), python, "-m", "bench.gpu_profile"]
    path = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    return [
        Part("versions", [python, "-c", VERSIONS], 60),
        Part("build", [python, *install], 200, environment=path),
        Part("tests", [*tests, *at_once], 130 * long, environment=cache),
        Part("speed", [*module, "bench.gpu", *effort, *small, "--json", str(work / "speed.json")], 170 * long,
             environment=cache),
        Part("limits", [*module, "bench.gpu_limits", *limits, "--json", str(work / "limits.json")], 110 * long,
             environment=cache),
        Part("profile", profile, 60, needs="ncu", environment=cache),
        Part("loop", [*module, "bench.gpu_loop", *effort, *around, "--json", str(work / "loop.json")],
             180 if dry else 90 * long, environment=cache),
        Part("sanitizer", [*sanitize, *some], 90 * long, needs="compute-sanitizer", environment=cache),
        Part("plots", [python, "-m", "bench.report", str(work / "speed.json"), "--plots", str(out)], 40),
    ]  # fmt: skip


def profile_options() -> list[str]:
    from bench.gpu_profile import COMMAND

    return COMMAND


VERSIONS = """
import platform, torch
print("Python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
try:
    import triton
    print("Triton", triton.__version__)
finally:
    print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch could use")
"""


# ---- what they found


def gather(outcomes: Sequence[Outcome], work: Path) -> dict[str, Any]:
    """Everything in one document; a file that was cut off is left out."""
    from bench.gpu_profile import parse

    found: dict[str, Any] = {"parts": {o.name: [o.status, round(o.seconds, 1), o.why] for o in outcomes}}
    for name in ("speed", "limits", "loop"):
        try:
            found[name] = json.loads((work / f"{name}.json").read_text())
        except (OSError, ValueError):
            continue
    found["profile"] = next((parse(o.output) for o in outcomes if o.name == "profile"), {})
    return found


def page(outcomes: Sequence[Outcome], found: dict[str, Any]) -> str:
    """For a person with a minute."""
    bad = [o for o in outcomes if o.status in BAD]
    absent = [f"{o.name} {o.status}" for o in outcomes if o.status != "ok"]
    head = ", ".join(absent) or "everything ran"
    lines = [f"# fastopt on a GPU: {head}", ""]
    lines += [o.output.strip().replace("\n", ", ") + "\n" for o in outcomes if o.name == "versions"]
    lines += ["| part | | seconds | |", "|---|---|---|---|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:.0f} | {o.why or last_line(o)} |" for o in outcomes]
    lines += [""]
    sections = {"Speed": speed, "What surrounds a step": loop, "Limits": limits, "ncu, fp32 Adam": profile}
    for title, section in sections.items():
        try:
            text = section(found)
        except Exception as error:  # of results that another version wrote, or half of them
            text = f"(could not be read: {type(error).__name__}: {error})"
        lines += [f"## {title}", "", text or "(nothing)", ""]
    for o in bad:
        last = o.output.strip().splitlines()[-KEPT_LINES:]
        lines += [f"## {o.name}: {o.status}, {o.why}", "", "```", *last, "```", ""]
    return "\n".join(lines)


def last_line(outcome: Outcome) -> str:
    lines = [line for line in outcome.output.strip().splitlines() if line.strip()]
    return lines[-1].replace("|", "/")[:120] if outcome.name in ("tests", "sanitizer") and lines else ""


def speed(found: dict[str, Any]) -> str:
    """For each workload and dtype: Adam; and of all optimizers the worst against torch."""
    results = found.get("speed", {}).get("results", [])
    if not results:
        return ""
    copy = found["speed"]["environment"]["copy_bandwidth"]["median"]
    lines = [f"{found['speed']['environment']['device']}; a copy moves {copy / 1e9:.0f} GB/s read and written.", ""]
    wrong = [f"{r['workload']}, {r['dtype']}, {r['optimizer']}: {r['refused']}" for r in results if r["refused"]]
    lines += [f"WRONG: {text}\n" for text in wrong]
    lines += ["| workload | dtype | Adam | GB/s | of a copy | foreach | fused | host | launches | worst of all |",
              "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for key in dict.fromkeys((r["workload"], r["dtype"]) for r in results):
        timed = [r for r in results if (r["workload"], r["dtype"]) == key and "fastopt" in r.get("seconds", {})]
        if not timed:
            lines.append(f"| {key[0]} | {key[1]} | not timed" + " |" * 8)
            continue
        shown = next((r for r in timed if r["optimizer"] == "Adam"), timed[0])
        seconds, ratio = shown["seconds"]["fastopt"]["median"], shown["ratio"]
        others = [
            (r["ratio"][name]["median"], f"{r['optimizer']} {name}")
            for r in timed
            for name in ("default", "fused")
            if name in r["ratio"]
        ]
        worst = min(others, default=(0.0, "-"))
        cells = [f"{ratio[name]['median']:.2f} x" if name in ratio else "-" for name in ("default", "fused")]
        host, launches = shown["host"]["fastopt"]["median"], shown["launches"]["fastopt"]
        lines.append(
            f"| {key[0]} | {key[1]} | {1e6 * seconds:.1f} us | {shown['bytes'] / seconds / 1e9:.0f} "
            f"| {shown['of_copy']['fastopt']:.0%} | {cells[0]} | {cells[1]} | {1e6 * host:.1f} us | {launches} "
            f"| {worst[0]:.2f} x {worst[1]} |"
        )
    return "\n".join(lines) + "\n\nOthers are in units of fastopt's time: below 1 they are faster."


def limits(found: dict[str, Any]) -> str:
    document = found.get("limits", {})
    lines = []
    for name, part in document.get("limits", {}).items():
        if "settings" not in part:
            lines.append(f"- {name}: " + "; ".join(f"{k} {1e6 * v:.1f} us" for k, v in part["seconds"].items()))
            continue
        for kind in next(iter(part["settings"].values())):
            setting, best = min(part["settings"].items(), key=lambda item: item[1][kind]["ratio"])
            ratio, count = best[kind]["ratio"], len(part["settings"])
            lines.append(f"- sweep, {kind}: best of {count} is {setting}, {ratio:.3f} of the time as it is")
    if document.get("left_out"):
        lines.append("- left out for lack of time: " + ", ".join(document["left_out"]))
    return "\n".join(lines)


def loop(found: dict[str, Any]) -> str:
    """What bench.gpu_loop found: a line for each task, whole step and function."""
    document = found.get("loop", {})
    names = {"iterations": ("folded", "fastopt", "default", "fused"), "whole": ("folded", "fastopt", "torch"),
             "functions": ("fastopt", "torch")}  # fmt: skip
    titles = {
        "iterations": "iterations in a row; host and device: of what is not the model's",
        "whole": "around a step of Adam",
        "functions": "function",
    }
    lines = []
    for kind, columns in names.items():
        if not (results := document.get(kind)):
            continue
        for r in results:
            for name, why in r.get("refused", {}).items():
                lines += [f"WRONG: {r['task']}, {name}: {why}", ""]
        of = " / ".join(columns)
        lines += [f"| {titles[kind]} | {' | '.join(columns)} | host, us: {of} | device, us: {of} |",
                  "|---" * (len(columns) + 3) + "|"]  # fmt: skip
        for r in results:
            ratios = r.get("ratio", {})
            cells = [f"{ratios[name]['median']:.2f} x" if name in ratios else "-" for name in columns]
            if columns[0] in ratios:
                cells[0] = f"{1e6 * r['seconds'][columns[0]]['median']:.1f} us"
            if kind == "iterations":
                host, device = ({name: parts["own"] for name, parts in r[at].items()} for at in ("host", "device"))
            else:
                host, device = r["host"], r["seconds"]
            cells += [
                " / ".join(f"{1e6 * of_kind[name]['median']:.1f}" if name in of_kind else "-" for name in columns)
                for of_kind in (host, device)
            ]
            lines.append(f"| {r.get('task') or r['function'] + ', ' + r['workload']} | {' | '.join(cells)} |")
        lines.append("")
    if lines:
        lines += ["Folded: by options of the optimizer, and fastopt.GradScaler. Others are in units of the first.", ""]
    if document.get("left_out"):
        lines.append("Left out for lack of time: " + ", ".join(document["left_out"]))
    return "\n".join(lines).strip()


def profile(found: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in found.get("profile", {}).items())


def run_all(todo: Sequence[Part], out: Path, seconds: float) -> list[Outcome]:
    out.mkdir(parents=True, exist_ok=True)
    began, outcomes = time.monotonic(), list[Outcome]()
    with (out / "log.txt").open("w") as log:
        for part in todo:
            print(f"{part.name} ...", end=" ", flush=True)
            outcome = run_part(part, seconds - (time.monotonic() - began))
            outcomes.append(outcome)
            print(f"{outcome.status}, {outcome.seconds:.0f} s {outcome.why}", flush=True)
            log.write(f"==== {part.name}: {' '.join(part.command)}\n{outcome.output}\n==== {outcome.status}\n\n")
            log.flush()
            found = gather(outcomes, out / "parts")
            (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
            (out / "summary.md").write_text(page(outcomes, found))
    return outcomes


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("build/gpu"), help="the folder of the results")
    options.add_argument("--full", action="store_true", help="all workloads, without haste")
    options.add_argument("--dry", action="store_true", help="without a GPU, to see that it runs")
    arguments = options.parse_args()
    out = arguments.out.resolve()
    shutil.rmtree(out / "parts", ignore_errors=True)
    (out / "parts").mkdir(parents=True)
    python = make_python(out / "parts" / "python")
    outcomes = run_all(parts(python, out, arguments.full, arguments.dry), out, 1e5 if arguments.full else SECONDS)
    shutil.rmtree(out / "parts")
    print("\n" + (out / "summary.md").read_text() + f"\n{out}")
    return int(any(outcome.status in BAD for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())

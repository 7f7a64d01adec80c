"""`make gpu` without a GPU: a part that fails, hangs or is missing does not stop the next, and the page says so."""

import json
import shutil
import sys
import time

import pytest

from bench import gpu_all, gpu_profile
from bench.gpu_all import Part, page, run_all

NAMES = [part.name for part in gpu_all.parts("python", gpu_all.ROOT / "build" / "gpu", full=False, dry=False)]

RESULT_BYTES = 16 << 20


def says(text, status=0, seconds=0):
    """A command that prints, sleeps and exits."""
    return [sys.executable, "-c", f"import sys, time; print({text!r}); time.sleep({seconds}); sys.exit({status})"]


def test_parts_and_their_time():
    parts = gpu_all.parts("python", gpu_all.ROOT / "build" / "gpu", full=False, dry=False)
    assert NAMES == ["versions", "build", "tests", "speed", "limits", "profile", "loop", "sanitizer", "plots"]
    assert gpu_all.SECONDS < 9 * 60 and all(part.seconds < gpu_all.SECONDS / 2 for part in parts)
    assert len(parts) * gpu_all.LOG_BYTES < RESULT_BYTES / 2  # the other half is for numbers and plots
    assert [part.needs for part in parts if part.needs] == ["ncu", "compute-sanitizer"]


@pytest.mark.parametrize("fault", ["fails", "hangs", "is missing", "does not start"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_in_each_part(name, fault, tmp_path):
    """The others run, all before are in the files, and the page begins with what is wrong."""
    parts = [Part(each, says(f"{each} was here"), 60) for each in NAMES]
    bad = parts[NAMES.index(name)]
    if fault == "fails":
        bad.command = says("the reason", status=3)
    elif fault == "hangs":
        bad.command, bad.seconds = says("the reason", seconds=600), 1.5
    elif fault == "is missing":
        bad.needs = "no-such-program"
    else:
        bad.command = [str(tmp_path / "nothing")]
    began = time.monotonic()
    outcomes = run_all(parts, tmp_path / "out", 60)
    assert time.monotonic() - began < 40
    status = {"fails": "failed", "hangs": "out of time", "is missing": "left out", "does not start": "failed"}[fault]
    assert {outcome.name: outcome.status for outcome in outcomes} == {each: "ok" for each in NAMES} | {name: status}
    text = (tmp_path / "out" / "summary.md").read_text()
    assert text.startswith(f"# fastopt on a GPU: {name} {status}\n")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(f"{each} was here\n" in log for each in NAMES if each != name)
    if fault in ("fails", "hangs"):
        assert "the reason" in text and "the reason" in log
    assert json.loads((tmp_path / "out" / "results.json").read_text())["parts"][name][0] == status


def test_time_runs_out(tmp_path):
    """What is left is named; a part gets no more than what remains of the whole."""
    outcomes = run_all([Part("a", says("", seconds=600), 60), Part("b", says("here"), 60)], tmp_path, 1.9)
    assert [outcome.status for outcome in outcomes] == ["out of time", "left out"]
    assert outcomes[1].why == "no time was left"


def test_long_output_is_shortened_and_skipped_tests_are_no_success(tmp_path):
    talks = [sys.executable, "-c", "print('first'); print('x' * 3_000_000); print('last')"]
    outcomes = run_all([Part("a", talks, 60), Part("tests", says("s [100%]\n12 skipped in 0.1s"), 60)], tmp_path, 60)
    assert outcomes[0].output.startswith("first") and outcomes[0].output.endswith("last\n")
    assert len(outcomes[0].output) < gpu_all.LOG_BYTES + 100
    assert outcomes[1].status == "nothing ran"


NCU = '''==PROF== Connected to process 7
==PROF== Profiling "multi_tensor_update": 0%....100% - 4 passes
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","multi_tensor_update","dram__bytes.sum.per_second","Tbyte/s","3.9"
"0","7","multi_tensor_update","launch__registers_per_thread","register/thread","62"
"0","7","multi_tensor_update","of another version","","1"
'''


def loop_results():
    """A result of each kind, one of them wrong."""

    def times(*names):
        return {
            "seconds": {name: {"median": 1e-3} for name in names}, "ratio": {name: {"median": 2.0} for name in names},
            "host": {name: {"median": 2e-5} for name in names},
        }  # fmt: skip

    timed = ("folded", "fastopt", "default")
    parts = {at: {name: {"own": {"median": took}} for name in timed} for at, took in (("host", 8e-6), ("device", 3e-6))}
    return {
        "iterations": [{"task": "GPT", "refused": {"fused": "losses differ"}, **times(*timed), **parts}],
        "whole": [{"function": "clip, step", "workload": "mlp", **times("folded", "fastopt", "torch")}],
        "functions": [{"function": "clip_grad_norm_", "workload": "mlp", **times("fastopt", "torch")}],
        "left_out": ["functions of gpt2"],
    }


def test_page_of_results():
    """What a person looks for is there, whatever of the results is missing or broken."""
    spread = {"median": 2.0, "q20": 1.9, "q80": 2.1}
    result = {
        "workload": "gpt2", "optimizer": "Adam", "dtype": "fp32", "bytes": 4e9, "refused": {},
        "of_copy": {"fastopt": 0.97}, "seconds": {"fastopt": {"median": 1e-3}},
        "ratio": {"default": spread, "fused": {**spread, "median": 0.9}},
        "host": {"fastopt": {"median": 2e-5}}, "launches": {"fastopt": 1},
    }  # fmt: skip
    refused = {**result, "dtype": "bf16", "refused": {"fastopt": "param 0"}, "seconds": {}}
    settings = {"CHUNK 8192": {"4 tensors": {"ratio": 0.95}, "291 tensors": {"ratio": 1.1}}}
    found = {
        "speed": {"environment": {"device": "a GPU", "copy_bandwidth": {"median": 4e12}}, "results": [result, refused]},
        "limits": {"limits": {"zeros": {"seconds": {"zero": 1e-4}}, "sweep": {"settings": settings}}},
        "profile": gpu_profile.parse(NCU),
        "loop": loop_results(),
    }
    found["limits"]["left_out"] = ["graph"]
    text = page([], found)
    for words in (
        "| gpt2 | fp32 | 1000.0 us | 4000 | 97% | 2.00 x | 0.90 x | 20.0 us | 1 | 0.90 x Adam fused |",
        "WRONG: gpt2, bf16, Adam: {'fastopt': 'param 0'}",
        "- zeros: zero 100.0 us",
        "- sweep, 4 tensors: best of 1 is CHUNK 8192, 0.950 of the time as it is",
        "- left out for lack of time: graph",
        "- bandwidth of the memory: 3.9 Tbyte/s",
        "- registers a thread: 62 register/thread",
        "WRONG: GPT, fused: losses differ",
        "| GPT | 1000.0 us | 2.00 x | 2.00 x | - | 8.0 / 8.0 / 8.0 / - | 3.0 / 3.0 / 3.0 / - |",
        "| clip, step, mlp | 1000.0 us | 2.00 x | 2.00 x | 20.0 / 20.0 / 20.0 | 1000.0 / 1000.0 / 1000.0 |",
        "| clip_grad_norm_, mlp | 1000.0 us | 2.00 x | 20.0 / 20.0 | 1000.0 / 1000.0 |",
        "Left out for lack of time: functions of gpt2",
    ):
        assert words in text
    assert gpu_profile.parse("==ERROR== ERR_NVGPUCTRPERM") == {}
    assert "could not be read" in page([], {"speed": {"results": [{}]}})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_whole_of_it_without_a_gpu(tmp_path):
    """Builds, skips the tests, runs both benchmarks in the interpreter, and writes the page."""
    import subprocess

    pytest.importorskip("triton")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "bench.gpu_all", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu_all.ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "ratios.png", "results.json", "summary.md"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < RESULT_BYTES
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(result["refused"] == {} for result in results["speed"]["results"])
    assert [result["bytes"] for result in results["speed"]["results"]] == [2 * 28, 2 * 20]  # of two numbers
    (iterations,) = results["loop"]["iterations"]
    assert iterations["refused"] == {} and set(iterations["device"]) == {"folded", "fastopt", "default", "fused"}
    assert results["loop"]["whole"] and results["loop"]["functions"] and not results["loop"]["left_out"]
    assert "a dry run on the PTX interpreter" in (tmp_path / "summary.md").read_text()

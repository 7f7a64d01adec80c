"""What limits a step on a GPU: alignment, values, graphs, compiling, and the numbers that were chosen without hardware.

    python -m bench.gpu_limits [--seconds 80] [--elements 67108864] [--json FILE]

Times are bench.gpu's: of the device, with cold caches. Each part is saved as it is done, and what no time was left for
is listed as left out:

    first      seconds of the first step, compiling and not; and the same again from Triton's cache
    alignment  one tensor aligned; off by one element; its gradient alone off by one
    zeros      gradients and state of zeros, where square root and division take other ways
    graph      a replay of a captured step of 291 small tensors, beside the same step without a graph, and torch's fused
    sweep      CHUNK, THREADS and THREAD_BYTES of kernels/multi_tensor.py, and hints of eviction, with 4 and 291 tensors
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fastopt.kernels import multi_tensor

import fastopt

from .gpu import DEVICE, Clock, where
from .measure import environment
from .report import duration, table, times
from .run import save

ALGORITHM, USED = "adam", 0b011
SMALL = 4096  # elements of each of 291 tensors
ROUNDS = 7
# The numbers as they are come first; the others change one of them, or two that go together.
GEOMETRIES = [
    dict(CHUNK=chunk, THREADS=threads, THREAD_BYTES=size)
    for threads, size in ((128, 32), (256, 32), (128, 16), (256, 16), (128, 64), (64, 32))
    for chunk in (4096, 8192, 16384, 2048)
]
HINTS = [dict(EVICTION=policy) for policy in ("evict_first", "evict_last")]


def turns(clock: Clock, steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each step on the device, medians of rounds in which they take turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(ROUNDS + 1):
        for name, step in steps.items():
            seconds = clock(step, 1e-3)
            if round_:  # the first compiles
                found[name].append(seconds)
    return {name: statistics.median(numbers) for name, numbers in found.items()}


def adam(params: list[torch.Tensor], grads: list[torch.Tensor], **options: Any) -> torch.optim.Optimizer:
    leaves = [torch.nn.Parameter(param) for param in params]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad
    return fastopt.Adam(leaves, **options)


def shifted(elements: int, by: int, dtype: torch.dtype, value: float | None = None) -> torch.Tensor:
    """A view of a flat buffer that begins so many elements behind an aligned address."""
    flat = torch.randn(elements + by, device=DEVICE) if value is None else torch.full((elements + by,), value)
    return flat.to(DEVICE, dtype)[by:]


def first(clock: Clock, elements: int) -> dict[str, Any]:
    """With an empty cache of Triton's, and again with what that left there."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        before, os.environ["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR"), cache
        try:
            for name in ("compiled", "from the cache"):
                multi_tensor.update_launcher.cache_clear()
                multi_tensor.multi_tensor_update.device_caches.clear()
                optimizer = adam([shifted(1000, 0, torch.float32)], [shifted(1000, 0, torch.float32)])
                torch.cuda.synchronize()
                began = time.perf_counter()
                optimizer.step()
                torch.cuda.synchronize()
                found[name] = time.perf_counter() - began
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before
    return {"seconds": found}


def alignment(clock: Clock, elements: int) -> dict[str, Any]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        steps = {}
        for name, param_by, grad_by in (("aligned", 0, 0), ("all off by one", 1, 1), ("gradient off by one", 0, 1)):
            optimizer = adam([shifted(elements, param_by, dtype)], [shifted(elements, grad_by, dtype)])
            (param,) = optimizer.param_groups[0]["params"]
            for slot in ("exp_avg", "exp_avg_sq"):
                optimizer.state[param][slot] = shifted(elements, param_by, dtype, 0.0)
            optimizer.state[param]["step"] = torch.tensor(0.0)
            steps[name] = optimizer.step
        kind = str(dtype).removeprefix("torch.")
        found |= {f"{kind}, {name}": seconds for name, seconds in turns(clock, steps).items()}
    return {"seconds": found}


def zeros(clock: Clock, elements: int) -> dict[str, Any]:
    steps = {}
    for name, value in (("random", None), ("zero", 0.0)):
        grad = shifted(elements, 0, torch.float32, value)
        steps[name] = adam([shifted(elements, 0, torch.float32)], [grad]).step
    return {"seconds": turns(clock, steps)}


def graph(clock: Clock, elements: int) -> dict[str, Any]:
    params = [shifted(SMALL, 0, torch.float32) for _ in range(291)]
    steps = {}
    for name, make in (("fastopt", fastopt.Adam), ("torch fused", torch.optim.Adam)):
        leaves = [torch.nn.Parameter(param.clone()) for param in params]
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        fused = {"fused": True} if make is torch.optim.Adam else {}
        optimizer = make(leaves, capturable=True, **fused)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        steps[name] = optimizer.step
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            optimizer.step()
        steps[f"{name}, replayed"] = captured.replay
    return {"seconds": turns(clock, steps)}


class Direct:
    """A launch of the kernel without the plan, whose chunks have one size: on tensors and arrays of its own."""

    def __init__(self, tensors: int, elements: int) -> None:
        size = max(1, elements // tensors)
        self.tensors = [[shifted(size, 0, torch.float32) for _ in range(4)] for _ in range(tensors)]
        for row in self.tensors:
            row[3].square_()
        self.size = size

    def step(self, **geometry: Any) -> Callable[[], Any]:
        before = {name: getattr(multi_tensor, name) for name in geometry}
        for name, value in geometry.items():
            setattr(multi_tensor, name, value)
        try:
            launcher = multi_tensor.update_launcher.__wrapped__(
                ALGORITHM, USED, torch.float32, torch.float32, DEVICE.index or 0
            )
            chunk = multi_tensor.CHUNK
        finally:
            for name, value in before.items():
                setattr(multi_tensor, name, value)
        work = [row << 32 | at for row in range(len(self.tensors)) for at in range(-(-self.size // chunk))]
        table = [
            [self.size, 0, *(tensor.data_ptr() for tensor in row), 0][: multi_tensor.table_columns(ALGORITHM)]
            for row in self.tensors
        ]
        arrays = [torch.tensor(array, device=DEVICE) for array in (work, table)]
        # no weight decay, lr 1e-3, betas 0.9 and 0.999, far from the first step
        scalars = torch.tensor([1, 0, 1, 0.1, 0, 0.999, 1e-3, 1, 1, 0, 1e-8, -1e-3], device=DEVICE)
        addresses = [array.data_ptr() for array in (*arrays, scalars)]
        words = multi_tensor.scalars_words(ALGORITHM, torch.float32) * (0,)

        def step(keep: Any = (arrays, scalars)) -> None:
            stream = multi_tensor.driver.active.get_current_stream(DEVICE.index or 0)
            launcher.launch(len(work), stream, *addresses, words)

        return step


def sweep(clock: Clock, elements: int) -> Iterator[dict[str, Any]]:
    """A result after each setting; every one is timed beside the numbers as they are."""
    found: dict[str, Any] = {}
    for setting in [*HINTS, *GEOMETRIES]:
        name = ", ".join(f"{key} {value}" for key, value in setting.items())
        found[name] = {}
        for tensors, size in ((4, elements), (291, elements)):
            direct = Direct(tensors, size)
            seconds = turns(clock, {"as it is": direct.step(), name: direct.step(**setting)})
            found[name][f"{tensors} tensors"] = {"seconds": seconds[name], "ratio": seconds[name] / seconds["as it is"]}
        yield {"settings": found}


PARTS: dict[str, Callable[[Clock, int], Any]] = {
    part.__name__: part for part in (first, alignment, zeros, graph, sweep)
}


def text(name: str, part: dict[str, Any]) -> str:
    """One part as a person reads it."""
    if "settings" in part:
        settings = part["settings"].items()
        kinds = list(next(iter(part["settings"].values())))
        best = {kind: min(settings, key=lambda setting: setting[1][kind]["ratio"]) for kind in kinds}
        lines = [
            f"best with {kind}: {setting}, {found[kind]['ratio']:.3f} of the time as it is"
            for kind, (setting, found) in best.items()
        ]
        rows = [(setting, *(f"{found[kind]['ratio']:.3f}" for kind in kinds)) for setting, found in settings]
        return "\n".join(lines) + "\n\n" + table(("setting", *kinds), rows)
    shortest = min(part["seconds"].values())
    rows = [(what, duration(seconds), times(seconds / shortest)) for what, seconds in part["seconds"].items()]
    return table((name, "seconds", "of the shortest"), rows)


def main() -> int:
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu_limits: no CUDA or ROCm device that torch could use")
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=80, help="begin nothing after these")
    options.add_argument("--elements", type=int, default=1 << 26, help="of the large tensors together")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME")
    options.add_argument("--json", type=Path, default=Path("build/gpu-limits.json"), help="write the results here")
    arguments = options.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"environment": environment() | where(), "limits": {}, "left_out": []}
    began, clock = time.perf_counter(), Clock()
    for name in arguments.parts:
        if time.perf_counter() - began > arguments.seconds:
            document["left_out"].append(name)
            continue
        result = PARTS[name](clock, arguments.elements)
        for found in [result] if isinstance(result, dict) else result:
            document["limits"][name] = found
            save(arguments.json, document)
            if time.perf_counter() - began > arguments.seconds and not isinstance(result, dict):
                document["left_out"].append(f"{name} after {len(found['settings'])} settings")
                break
        print(text(name, document["limits"][name]) + "\n", flush=True)
    save(arguments.json, document)
    if document["left_out"]:
        print("left out for lack of time:", ", ".join(document["left_out"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

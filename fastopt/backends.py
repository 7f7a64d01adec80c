"""Loads the C++ extension that fits this torch, chooses its instruction set, and tells what runs where."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NO_EXTENSION = (
    "fastopt was installed without its C++ extension: every step is torch.optim's own. "
    "For the fused step, install a C++ compiler and reinstall: {rebuild}"
)
NOT_FOR_THIS_TORCH = (
    "fastopt has no build for torch {torch}, only for {built}: every step is torch.optim's own. "
    "For the fused step, build one: {rebuild}"
)
NOT_LOADED = (
    "fastopt's build for torch {minor} does not load with this torch {torch}: {error}. "
    "Every step is torch.optim's own. For the fused step, build one: {rebuild}"
)
REBUILD = (
    "pip install --no-build-isolation --force-reinstall --no-deps --no-binary fastopt fastopt "
    "(in a clone, '.' for the last three words)"
)
SOURCE_TREE = (
    "fastopt was imported from its source tree, {tree}, which has no C++ extension: every step is torch.optim's own. "
    "Run from another directory to use the installed fastopt, or build the one here: "
    "pip install --no-build-isolation -e ."
)


def _builds() -> list[str]:
    """The minor versions of torch for which there is an extension, as in "2.13"."""
    names = (path.name.split(".")[0] for path in Path(__file__).parent.glob("_C_torch*"))
    versions = {name.removeprefix("_C_torch").replace("_", ".") for name in names}
    return sorted(versions, key=lambda version: [int(part) for part in version.split(".")])


def _load() -> ModuleType | str:
    """The extension, or why there is none and what helps."""
    version = torch.__version__
    minor = ".".join(version.split(".")[:2])
    try:
        return import_module("fastopt._C_torch" + minor.replace(".", "_"))
    except ModuleNotFoundError:
        if built := _builds():
            return NOT_FOR_THIS_TORCH.format(torch=version, built=", ".join(built), rebuild=REBUILD)
        tree = Path(__file__).parent.parent
        return SOURCE_TREE.format(tree=tree) if (tree / "setup.py").exists() else NO_EXTENSION.format(rebuild=REBUILD)
    except ImportError as error:  # a torch of other symbols than the released one of this version
        return NOT_LOADED.format(minor=minor, torch=version, error=error, rebuild=REBUILD)


_loaded = _load()
_C: Any = None
if isinstance(_loaded, str):
    warnings.warn(_loaded, RuntimeWarning, stacklevel=3)  # of backends, fastopt, and who imports it
else:
    _C = _loaded
    if isa := os.environ.get("FASTOPT_ISA"):
        try:
            _C.set_isa(isa)
        except ValueError as error:
            raise ValueError(f"FASTOPT_ISA: {error}") from None

# Steps that torch's own code did, by reason.
torch_steps: Counter[str] = Counter()


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured by this thread."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def count_left_to_torch(what: str, answer: Any) -> None:
    torch_steps[f"{what}: {answer.reason}"] += 1


def left_to_torch(function: Callable[..., Any], answer: Any, *args: Any) -> Any:
    """Torch's own function, for the reason that the extension answered."""
    count_left_to_torch(function.__name__.lstrip("_"), answer)  # torch wraps some of them
    return function(*args)


def on_gpu(answer: Any, *args: Any) -> Any:
    """The extension's answer, or what comes of the pass over GPU tensors that it leaves to fastopt/gpu_passes.py."""
    if type(answer) is not _C.GpuPass:
        return answer
    try:
        from .gpu_passes import run
    except ImportError:
        return _C.LeftToTorch(("a GPU without the package `triton`",))
    return run(answer, *args)


def backend_info() -> dict[str, Any]:
    """What runs the steps of this process, and why.

    Returns a dict with:

    - ``fastopt``, ``torch``: versions.
    - ``cpu``: the instruction set of the CPU step (``"avx512"``, ``"avx2"``, ``"baseline"``), or ``"torch"`` without
      extension. The environment variable ``FASTOPT_ISA`` forces one.
    - ``cpu_available``: the instruction sets that this processor can run.
    - ``threads``: ``torch.get_num_threads()``; the step honours it.
    - ``torch_steps``: how many steps torch's own code did, by the reason (sparse gradients, complex parameters, ...).
      Without extension, why there is none and what helps.

    Include it in bug reports.

    >>> import fastopt
    >>> fastopt.backend_info()["threads"] >= 1
    True
    """
    return {
        "fastopt": metadata.version("fastopt"),
        "torch": torch.__version__,
        "cpu": _C.isa() if _C else "torch",
        "cpu_available": _C.isas() if _C else [],
        "threads": torch.get_num_threads(),
        "torch_steps": dict(torch_steps) if _C else _loaded,
    }

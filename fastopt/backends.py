"""Loads the C++ extension, chooses its instruction set, and tells what runs where."""

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

REBUILD = (
    "fastopt's extension was built for {built}, but this is torch {torch}; rebuild it, in its clone: "
    "pip install --no-build-isolation --force-reinstall --no-deps ."
)
NO_EXTENSION = (
    "fastopt was installed without its C++ extension: every step is torch.optim's own. "
    "For the fused step, install a C++ compiler and reinstall, in its clone: "
    "pip install --no-build-isolation --force-reinstall --no-deps ."
)

SOURCE_TREE = (
    "fastopt was imported from its source tree, {tree}, which has no C++ extension: every step is torch.optim's own. "
    "Run from another directory to use the installed fastopt, or build the one here: "
    "pip install --no-build-isolation -e ."
)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _no_extension() -> str:
    tree = Path(__file__).parent.parent
    return SOURCE_TREE.format(tree=tree) if (tree / "setup.py").exists() else NO_EXTENSION


def _load() -> ModuleType | None:
    try:
        extension = import_module("fastopt._C")
    except ModuleNotFoundError:
        warnings.warn(_no_extension(), RuntimeWarning, stacklevel=2)
        return None
    except ImportError as error:
        raise ImportError(f"{REBUILD.format(built='another torch', torch=torch.__version__)} ({error})") from error
    built = extension.torch_version
    if _minor(built) != _minor(torch.__version__):
        raise ImportError(REBUILD.format(built=f"torch {built}", torch=torch.__version__))
    if isa := os.environ.get("FASTOPT_ISA"):
        try:
            extension.set_isa(isa)
        except ValueError as error:
            raise ValueError(f"FASTOPT_ISA: {error}") from None
    return extension


_C: Any = _load()

# Steps that torch's own code did, by reason.
torch_steps: Counter[str] = Counter()


def count_left_to_torch(what: str, answer: Any) -> None:
    torch_steps[f"{what}: {answer.reason}"] += 1


def left_to_torch(function: Callable[..., Any], answer: Any, *args: Any) -> Any:
    """Torch's own function, for the reason that the extension answered."""
    count_left_to_torch(function.__name__, answer)
    return function(*args)


def backend_info() -> dict[str, Any]:
    """What runs the steps of this process, and why.

    Returns a dict:
        fastopt, torch: versions.
        cpu: the instruction set of the CPU step (``"avx512"``, ``"avx2"``, ``"baseline"``), or ``"torch"`` without
            extension. The environment variable ``FASTOPT_ISA`` forces one.
        cpu_available: the instruction sets that this processor can run.
        threads: ``torch.get_num_threads()``; the step honours it.
        torch_steps: how many steps torch's own code did, by the reason (sparse gradients, complex parameters, ...).

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
        "torch_steps": dict(torch_steps) if _C else _no_extension(),
    }

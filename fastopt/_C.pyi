"""The C++ extension: csrc/plan/bind.cpp; csrc/plan/answer.h says what a step answers."""

from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

class Launch(NamedTuple):
    image: int
    programs: int
    table_at: int
    scalars_at: int
    changed_from: int
    changed_to: int
    address: int
    prepared: int
    hypers_at: int

class Want(NamedTuple):
    image: int
    device: int
    used: int
    param: int
    state: int
    capturable: bool
    words: int

class Done(NamedTuple): ...

class Launches(NamedTuple):
    launches: tuple[Launch, ...]

class Wants(NamedTuple):
    wants: tuple[Want, ...]

class Missing(NamedTuple):
    params: list[tuple[dict[str, Any], Tensor]]

class TorchStep(NamedTuple):
    reason: str

Answer: TypeAlias = Done | Launches | Wants | Missing | TorchStep
DONE: Done

torch_version: str
gpu_chunk: int
dtypes: list[str]

def step(optimizer: Any, fresh: list[Any] = ...) -> Answer: ...
def set_buffer(optimizer: Any, image: int, words: int, address: int) -> None: ...
def take_back(optimizer: Any, image: int) -> None: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> str: ...
def gpu_type() -> str: ...
def set_gpu_type(type: str) -> None: ...
def counters() -> dict[str, int]: ...
def algorithms() -> dict[str, list[str]]: ...

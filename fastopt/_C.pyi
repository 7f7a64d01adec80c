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
    averages: bool
    grad: int
    companions: bool
    draws: bool
    words: int

class Done(NamedTuple): ...

class Launches(NamedTuple):
    launches: tuple[Launch, ...]

class Wants(NamedTuple):
    wants: tuple[Want, ...]

class Missing(NamedTuple):
    params: list[tuple[dict[str, Any], Tensor]]

class Shards(NamedTuple):
    params: list[Tensor]

class GpuPart(NamedTuple):
    dtype: int
    first: int
    programs: int

class GpuPass(NamedTuple):
    image: int
    device: int
    parts: list[GpuPart]
    programs: int
    table_at: int
    words: int
    changed_from: int
    changed_to: int
    version: int
    address: int
    number: int
    norm: int
    order: float

class LeftToTorch(NamedTuple):
    reason: str

Answer: TypeAlias = Done | Launches | Wants | Missing | Shards | LeftToTorch
DONE: Done

torch_version: str
gpu_chunk: int
dtypes: list[str]

def watched() -> bool: ...
def step(optimizer: Any, fresh: list[Any] | None = ..., extras: tuple[Any, ...] | None = ...) -> Answer: ...
def grad_norm(optimizer: Any) -> Tensor | None: ...
def norm_of(optimizer: Any, places: list[int]) -> float: ...
def take_only_averaged(optimizer: Any) -> list[Tensor] | None: ...
def set_buffer(optimizer: Any, image: int, words: int, address: int) -> None: ...
def take_back(optimizer: Any, image: int) -> None: ...
def clip_grad_norm_(
    parameters: Any, max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor | GpuPass | LeftToTorch: ...
def total_norm(tensors: Any, norm_type: float, error_if_nonfinite: bool) -> Tensor | GpuPass | LeftToTorch: ...
def norm(tensors: Any, norm_type: float) -> float | LeftToTorch: ...
def search(parameters: Any, inverse_scale: float) -> tuple[float, bool] | LeftToTorch: ...
def scale_(tensors: Any, factor: float) -> Done | LeftToTorch: ...
def scale_grads_(parameters: Any, number: float, norm: Tensor | None) -> Done | GpuPass | LeftToTorch: ...
def clip_grad_value_(parameters: Any, clip_value: float) -> Done | GpuPass | LeftToTorch: ...
def average_(averages: Any, values: Any, number: float, is_count: bool) -> Done | GpuPass | LeftToTorch: ...
def zero_grad(optimizer: Any, set_to_none: bool) -> Done | LeftToTorch: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> str: ...
def gpu_type() -> str: ...
def set_gpu_type(type: str) -> None: ...
def counters() -> dict[str, int]: ...
def algorithms() -> dict[str, list[str]]: ...

"""What an optimizer does in its step beside torch's: the options that torch's optimizers do not have.

They are options of the object and no keys of its groups, so that its checkpoints are torch's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import clip_dtensors
from .averages import all_params
from .backends import _C, is_capturing

KEPT = (torch.float32, torch.bfloat16, torch.float16)  # what the arithmetic for every parameter holds
_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"

NO_EXTENSION = (
    "max_grad_norm, ema_decay, state_dtype, master_weights and stochastic_rounding need fastopt's C++ extension, which "
    "this installation lacks"
)
BOTH = (
    "master_weights and stochastic_rounding exclude each other: with master weights nothing is lost that random "
    "rounding could make up for"
)
NOT_IN_A_GRAPH = (
    "error_if_nonfinite=True looks at the norm before anything is written, which a captured CUDA graph cannot: make "
    "the optimizer without it, and look at optimizer.grad_norm after a replay"
)


class Extras(NamedTuple):
    """Of one step: what csrc/plan/extras.h reads. None is without."""

    max_norm: float | None = None  # the norm of all gradients together is clipped to this
    error_if_nonfinite: bool = False
    # The gradients are multiplied by this first, and their norm then, where it is known; tensors if they are on a GPU.
    inverse_scale: float | Tensor | None = None
    norm: float | Tensor | None = None
    ema_decay: float | None = None  # how much of the running averages is kept
    masters: bool = False  # 16-bit parameters have master weights
    draws: bool = False  # or are rounded with random bits
    # A number on a GPU, where the update of a step that is not 0 writes nothing; and whether the step finds it itself,
    # which is 1 if some gradient, multiplied, is not finite.
    found_inf: Tensor | None = None
    searches: bool = False


def _number(name: str, value: Any, wanted: str, good: Callable[[float], bool]) -> float:
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a list; a tensor of two; 10**400
        number = math.nan
    if not good(number):
        raise ValueError(f"Invalid {name} value: {value}; it must be {wanted}")
    return number


def _max_grad_norm(value: Any) -> float:
    return _number("max_grad_norm", value, "> 0, or None for no clipping", lambda number: number > 0)


def _ema_decay(value: Any) -> float:
    return _number("ema_decay", value, "in [0, 1], or None for no average", lambda number: 0 <= number <= 1)


def seed_of(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"Invalid rounding_seed value: {value!r}; it must be an integer in [0, 2**64)")
    return value


_UNSEEN: tuple[Any, Any] = object(), object()


class Options:
    """Of an optimizer: ``_fastopt_options``, made with it or when a scaler sets one; kept by copies and pickles.

    The values that may change between steps are attributes of the optimizer, where they were given: ``given`` has their
    names.
    """

    # The optimizer's attributes of these names, while they are set.
    grad_scale: Tensor | float | None = None
    found_inf: Tensor | float | None = None
    may_be_open = False  # whether there may be averages that are only there to be loaded

    def __init__(
        self,
        error_if_nonfinite: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        max_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ):
        self.error_if_nonfinite, self.state_dtype = error_if_nonfinite, state_dtype
        self.masters, self.draws = bool(master_weights), bool(stochastic_rounding)
        changing = {"max_grad_norm": max_grad_norm, "ema_decay": ema_decay}
        self.given = {name: value for name, value in changing.items() if value is not None}
        self.clips, self.averages = (name in self.given for name in changing)
        # What was made of the changing values, and of which: those of the last step.
        self.extras, self.values = self._extras(max_grad_norm, ema_decay), _UNSEEN
        if state_dtype is not None and state_dtype not in KEPT:
            names = ", ".join(map(str, KEPT))
            raise ValueError(f"Invalid state_dtype: {state_dtype!r}; it must be one of {names}, or None")
        if self.masters and self.draws:
            raise ValueError(BOTH)
        self.rounding_seed = seed_of(rounding_seed)
        if error_if_nonfinite and not self.clips:
            raise ValueError("error_if_nonfinite=True needs max_grad_norm; float('inf') clips nothing")
        if self.any() and _C is None:
            raise RuntimeError(NO_EXTENSION)
        if self.clips and _is_made_by_zero() and _are_several():
            raise RuntimeError(
                "max_grad_norm: ZeroRedundancyOptimizer gives each process a part of the parameters; leave the option "
                "out and call fastopt.clip_grad_norm_ with the parameters of the model before the step"
            )
        self.norm: Tensor | None = None  # of the last step, if it was not the plan's
        self.left_out = False  # whether the last step was, for infinities
        # By fastopt.GradScaler: the inverse scale, and the norm; or found_inf, which the step is to find.
        self.searched: tuple[float | Tensor, float | Tensor] | None = None
        self.searches: tuple[Tensor, Tensor] | None = None

    def refuse_parts(self, optimizer: Any) -> None:
        """The plan asks before it clips parameters that it has not seen yet."""
        if "torch.distributed.fsdp" not in sys.modules or not _are_several():
            return
        for g, group in enumerate(optimizer.param_groups):
            for i, param in enumerate(group["params"]):
                if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
                    raise RuntimeError(
                        f"max_grad_norm: this process may have only a part of parameter {i} of param group {g}, which "
                        "FullyShardedDataParallel flattened; leave the option out and call the model's clip_grad_norm_ "
                        "before the step, or shard the model by fully_shard"
                    )

    def any(self) -> bool:
        """Whether there is anything that torch's optimizers do not do."""
        return bool(self.given) or self.state_dtype is not None or self.keeps_more()

    def keeps_more(self) -> bool:
        """Whether 16-bit parameters get more out of a step than rounding to nearest leaves."""
        return self.masters or self.draws

    def skips(self, optimizer: Any) -> bool:
        """Whether the step is to be left out: a scaler found infinities. The host waits for a number on a GPU."""
        found, self.left_out = self.found_inf, False
        if found is None or optimizer._step_supports_amp_scaling or self._found_on_gpu(optimizer) is not None:
            return False  # its own step, or the update, looks at it
        if (found != 0).any() if isinstance(found, Tensor) else found != 0:
            self.leave_out()
        return self.left_out

    def leave_out(self) -> None:
        """A step, or until it begins."""
        self.norm, self.left_out = None, True

    def _found_on_gpu(self, optimizer: Any) -> Tensor | None:
        """found_inf where the update reads it, and nothing waits."""
        found = self.found_inf
        if not isinstance(found, Tensor) or found.device.type != _C.gpu_type() or optimizer._step_supports_amp_scaling:
            return None
        if self.error_if_nonfinite or not counts_on_gpu(optimizer):  # the host looks at a norm, or counts
            return None
        return found if found.numel() == 1 else (found != 0).any()

    def of_step(self, optimizer: Any) -> Extras | None:
        """For the step that begins; None if it is the update alone."""
        self.norm, self.left_out = None, False
        max_norm = getattr(optimizer, "max_grad_norm", None) if self.clips else None
        ema_decay = getattr(optimizer, "ema_decay", None) if self.averages else None
        if max_norm is not self.values[0] or ema_decay is not self.values[1]:
            self.values = _UNSEEN
            self.extras = self._extras(max_norm, ema_decay)
            if {type(max_norm), type(ema_decay)} <= {float, int, type(None)}:  # a tensor may change and stay itself
                self.values = max_norm, ema_decay
        scaled = self.searched or self.searches or self.grad_scale is not None or self.found_inf is not None
        return self._scaled(optimizer) if scaled or self.error_if_nonfinite else self.extras

    def _extras(self, max_norm: Any, ema_decay: Any) -> Extras | None:
        if max_norm is not None:
            max_norm = _max_grad_norm(max_norm)
        if ema_decay is not None:
            ema_decay = _ema_decay(ema_decay)
        if max_norm is None and ema_decay is None and not self.keeps_more():
            return None
        return Extras(max_norm, self.error_if_nonfinite, None, None, ema_decay, self.masters, self.draws)

    def _scaled(self, optimizer: Any) -> Extras | None:
        """The same with what belongs to one step alone."""
        extras, inverse_scale, norm, found_inf = self.extras or Extras(), None, None, None
        if self.searched is not None:
            inverse_scale, norm = self.searched
        elif self.searches is not None:
            inverse_scale, found_inf = self.searches
        elif self.grad_scale is not None and not optimizer._step_supports_amp_scaling:  # else its own step unscales
            inverse_scale = _inverse(self.grad_scale)
        if self.error_if_nonfinite and extras.max_norm is not None and norm is None:
            norm = _refuse_nonfinite_on_gpu(optimizer, inverse_scale)
        if found_inf is None:
            found_inf = self._found_on_gpu(optimizer)
        if inverse_scale is None and norm is None and found_inf is None:
            return self.extras
        searches = self.searches is not None
        return extras._replace(inverse_scale=inverse_scale, norm=norm, found_inf=found_inf, searches=searches)

    def state_dtype_of(self, param: Tensor) -> torch.dtype | None:
        """What the state of a parameter shall be; None: as torch makes it, also of float64 and complex ones."""
        return self.state_dtype if param.dtype in KEPT else None

def counts_on_gpu(optimizer: Any) -> bool:
    """Whether a GPU counts the steps, so that it may leave one out."""
    return all(group.get("capturable") for group in optimizer.param_groups)


def _are_several() -> bool:
    """Whether there are other processes."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_made_by_zero() -> bool:
    """Whether an optimizer is being constructed as the one of a process inside torch's ZeroRedundancyOptimizer.

    Which leaves no other sign of it.
    """
    frame = sys._getframe(1) if _ZERO in sys.modules else None
    while frame is not None and frame.f_globals.get("__name__") != _ZERO:
        frame = frame.f_back
    return frame is not None


def _inverse(scale: Tensor | float) -> float | Tensor:
    """The factor with which torch.amp.GradScaler.unscale_ multiplies; on a GPU it stays there."""
    inverse = torch.as_tensor(scale).detach().double().reciprocal().float()
    return inverse if isinstance(scale, Tensor) and scale.device.type == _C.gpu_type() else float(inverse)


def _refuse_nonfinite_on_gpu(optimizer: Any, inverse_scale: float | Tensor | None) -> Tensor | None:
    """The norm where all gradients are on GPUs; it is waited for. Elsewhere the plan refuses, and this answers None."""
    params = (param for group in optimizer.param_groups for param in group["params"] if param.grad is not None)
    if next(params, _ON_CPU).device.type != _C.gpu_type():
        return None  # at the first, as a rule
    grads = [param.grad for param in all_params(optimizer) if param.grad is not None]
    if any(grad.device.type != _C.gpu_type() for grad in grads) or clip_dtensors.any_dtensor(all_params(optimizer)):
        return None
    from . import gpu_passes

    if is_capturing(grads[0].device):
        raise RuntimeError(NOT_IN_A_GRAPH)
    if (found := gpu_passes.search(grads, inverse_scale)) is None:
        return None
    gpu_passes.refuse_nonfinite(found[0], 2.0)
    return found[0]


_ON_CPU = torch.empty(0)


class GradNorm:
    """`optimizer.grad_norm`: the norm of all gradients before clipping, at the last step; None if it did not clip.

    A tensor without dimensions, of its own each time it is asked for. Only where the optimizer was made with
    ``max_grad_norm``; and no more than a default: a subclass's attribute of this name hides it.
    """

    def __get__(self, optimizer: Any, cls: type) -> Any:
        if optimizer is None:
            return self
        options = optimizer._fastopt_options
        if options is None or not options.clips:
            raise AttributeError(f"'{cls.__name__}' object has no attribute 'grad_norm': it has no max_grad_norm")
        return options.norm if options.norm is not None or options.left_out else _C.grad_norm(optimizer)


class SetByScaler:
    """`optimizer.grad_scale` and `found_inf`: set by whoever scales the loss, as on torch's fused optimizers."""

    def __set_name__(self, cls: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: Any, cls: type) -> Any:
        if optimizer is None:
            return self
        if self.name not in vars(optimizer._fastopt_options or self):
            raise AttributeError(f"'{cls.__name__}' object has no attribute '{self.name}'")
        return getattr(optimizer._fastopt_options, self.name)

    def __set__(self, optimizer: Any, value: Tensor | float | None) -> None:
        if optimizer._fastopt_options is None:
            optimizer._fastopt_options = Options()
        setattr(optimizer._fastopt_options, self.name, value)

    def __delete__(self, optimizer: Any) -> None:
        self.__get__(optimizer, type(optimizer))
        delattr(optimizer._fastopt_options, self.name)

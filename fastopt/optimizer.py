"""The one step() of all optimizers, as a mixin in front of torch's classes; everything but the step is theirs.

    param_groups -> plan -> backend -> kernel machinery -> update function

The plan and the CPU machinery are C++ (csrc/plan/answer.h says what a plan answers). Here is what happens around them:
hooks, closures, and torch's own step for whatever is not a plain strided tensor of a floating dtype. State is made in
state.py and loaded in loading.py.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from . import averages, clip_dtensors
from .algorithm import Algorithm
from .aside import is_left_out, refuse_torchs_step, step_with_changed_grads
from .backends import _C, torch_steps
from .extras import Extras, GradNorm, Options, SetByScaler
from .loading import load
from .state import make_state, refuse_capture, remake_state, unmake_state

Closure = Callable[[], Any]
Class = TypeVar("Class", bound=Optimizer)

if TYPE_CHECKING:
    from ._C import Answer, Want

    _Base = Optimizer
else:
    _Base = object


class FusedStep(_Base):
    """Mixin: ``class Adam(FusedStep, torch.optim.Adam)`` is torch's Adam with a fused step.

    What it adds to torch's names begins with ``_fastopt``: all others are free for a user's subclass.
    """

    _fastopt: ClassVar[Algorithm]
    _fastopt_plan: Any = None  # made by the extension at the first step; like _fastopt_gpu, never pickled or copied
    _fastopt_gpu: Any = None
    _fastopt_unscales: bool = False
    _fastopt_options: Options | None = None

    if not TYPE_CHECKING:  # for a subclass's super(Adam, self).__init__(params, defaults), which is not torch's Adam's
        __init__ = Optimizer.__init__
        __setstate__ = Optimizer.__setstate__

    grad_norm = GradNorm()
    grad_scale, found_inf = SetByScaler(), SetByScaler()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self._fastopt_options is not None:
            state["_fastopt_options"] = copy.copy(self._fastopt_options)
            state |= {name: getattr(self, name, None) for name in self._fastopt_options.given}
        return state

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False, also with ``fused=True``: torch.amp.GradScaler unscales, and skips the whole step on overflow.

        A subclass whose own step unscales sets it; what it leaves of that to our step is then torch's.
        """
        return self._fastopt_unscales

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._fastopt_unscales = value
        self._fastopt_plan = self._fastopt_gpu = None  # the next ones; the plan asks why torch's step should run

    # ---- loading

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` of this optimizer or of torch's returned.

        As in torch.optim, except that state of float32, bfloat16 or float16 keeps its dtype (torch casts it to the
        parameter's), or gets ``state_dtype`` if this optimizer was given one, that master weights are kept, and that
        ``foreach``, ``fused``, ``capturable`` and ``differentiable`` keep the values of this optimizer (torch takes the
        file's). With ``master_weights``, a parameter whose state has none (it is from an optimizer without, or torch
        has cast it) begins with those that it stands for, and a warning says so.

        Raises:
            ValueError: the state of a parameter is incomplete or of another shape; nothing was loaded.
        """
        load(self, super().load_state_dict, state_dict)

    # ---- zeroing

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters, as torch.optim.Optimizer.zero_grad does.

        Args:
            set_to_none: drop them instead of filling them with zeros. Default True.
        """
        if is_dynamo_compiling():
            _untraced_zero_grad(self, set_to_none)
        elif _C.zero_grad(self, set_to_none):
            super().zero_grad(set_to_none)

    # ---- the step

    def step(self, closure: Closure | None = None) -> Any:
        """Performs a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The loss, if a closure was given.

        Raises:
            RuntimeError: a gradient, parameter or state tensor cannot be stepped (shape, dtype, device).
            KeyError: state of a parameter is incomplete.
            Nothing was changed then.
        """
        return _untraced_step(self, closure) if is_dynamo_compiling() else _step(self, closure)

    @staticmethod
    def profile_hook_step(func: Any) -> Any:
        """What torch puts around a class's step when it makes an object: the profiler's range and the hooks."""
        return _step_if_unwatched if func is FusedStep.step else Optimizer.profile_hook_step(func)


@functools.wraps(FusedStep.step)
def _step_if_unwatched(self: Any, closure: Closure | None = None) -> Any:
    """torch's wrapper of the step, entered where there is something to do in it: it costs more than a small step."""
    if is_dynamo_compiling():
        return _untraced_step_if_unwatched(self, closure)
    if (
        self._optimizer_step_pre_hooks
        or self._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or _watched()
    ):
        return _step_with_hooks(self) if closure is None else _step_with_hooks(self, closure)
    if closure is not None or self._fastopt_gpu is not None:
        return _step(self, closure)
    options = self._fastopt_options  # from here on what `_step` would do, without the call
    if options is not None:
        return _step_with_options(self, options)
    answer = _C.step(self)  # DONE is empty
    return _follow(self, answer) if answer else None


def is_ours(step: Any) -> bool:
    """Whether a step, as an object has it, is this library's; perhaps in a scheduler's wrapper."""
    if getattr(step, "_wrapped_by_lr_sched", False):
        step = getattr(step, "__wrapped__", step)
    return getattr(step, "__func__", step) in (FusedStep.step, _step_if_unwatched)


def drop_in(cls: type[Class]) -> type[Class]:
    """Gives a class the constructor and the `__setstate__` of torch's of the same name as its own.

    But for what the constructor says with ``fused=True``, that the step unscales gradients, and for the options that
    torch does not have.
    """
    torchs: Any = getattr(torch.optim, cls.__name__)
    init = torchs.__init__

    def __init__(
        self: Any,
        *args: Any,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
        ema_decay: float | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        said_by_subclass = self._step_supports_amp_scaling
        rounding = master_weights, stochastic_rounding, rounding_seed
        options = Options(error_if_nonfinite, state_dtype, *rounding, max_grad_norm=max_grad_norm, ema_decay=ema_decay)
        init(self, *args, **kwargs)
        if options.any():
            self._fastopt_options = options
            for name, value in options.given.items():
                setattr(self, name, value)
            remake_state(self)
        if self._step_supports_amp_scaling != said_by_subclass:
            self._step_supports_amp_scaling = said_by_subclass

    signature, parameters = inspect.signature(init), inspect.signature(__init__).parameters.values()
    own = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    functools.update_wrapper(__init__, init)
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *own]
    )
    cls.__init__ = __init__  # type: ignore[method-assign]
    cls.__setstate__ = torchs.__setstate__  # type: ignore[method-assign]
    return cls


def _step(self: Any, closure: Closure | None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if self._fastopt_gpu is not None:
        self._fastopt_gpu.begin(self)
    options = self._fastopt_options
    if options is None:
        if answer := _C.step(self):
            _follow(self, answer)
    else:
        _step_with_options(self, options)
    return loss


def _step_with_options(self: Any, options: Options) -> None:
    if options.found_inf is None or not options.skips(self):
        _step_with(self, options.of_step(self))


def _step_with(self: Any, extras: Extras | None) -> None:
    if self._fastopt_gpu is not None:
        self._fastopt_gpu.make_ready(extras)
    if answer := _C.step(self, None, extras):
        _follow(self, answer, extras)
    if extras is not None and extras.ema_decay is not None:
        if params := _C.take_only_averaged(self):
            averages.update(self, params, extras.ema_decay, extras.found_inf)
        if self._fastopt_options.may_be_open:
            averages.begin_open(self)


def _follow(self: Any, answer: Answer, extras: Extras | None = None) -> None:
    """Does what the plan could not: launches, new state, GPU kernels and buffers, torch's own step for a reason."""
    made: list[tuple[Tensor, dict[str, Any] | None]] = []  # parameters and what their state was before
    first = False  # whether running averages begin
    fresh: list[Tensor | None] = []  # those of them whose slots were made, and a None; until the plan writes
    try:
        while isinstance(answer, (_C.Missing, _C.Wants, _C.Shards)):
            if isinstance(answer, _C.Wants):
                _prepare_gpu(self, answer.wants, extras)
            elif isinstance(answer, _C.Shards):
                assert extras is not None
                if (norm := clip_dtensors.norm_of_step(self, answer.params, extras)) is None:
                    answer = _C.LeftToTorch(("a norm of DTensors that are neither sharded nor replicated",))
                    break
                extras = extras._replace(norm=norm)
                if self._fastopt_gpu is not None:
                    self._fastopt_gpu.make_ready(extras)
            elif made:
                raise RuntimeError("state could not be made for a parameter: its step count must be a number")
            else:
                refuse_capture(answer.params)
                if is_left_out(self, extras):
                    return
                first = extras is not None and extras.ema_decay is not None and averages.is_first_update(self)
                params = dict.fromkeys(param for _, param in answer.params)
                made = [(param, dict(self.state[param]) if param in self.state else None) for param in params]
                fresh = [None]
                fresh += make_state(self, answer.params, extras)
            answer = _C.step(self, fresh or None, extras)
    except BaseException:
        if fresh:
            unmake_state(self, made)
        elif first:  # it was written
            averages.copy_first(self, [param for param, _ in made])
        raise
    if isinstance(answer, _C.LeftToTorch):
        unmake_state(self, made)  # torch makes its own
        refuse_torchs_step(self, answer.reason)
        if is_left_out(self, extras, answer.reason):
            return
        if extras is None:
            _torchs_step(self, answer.reason)
        elif extras.max_norm is None and extras.inverse_scale is None:
            first = averages.is_first_update(self)
            _torchs_step(self, answer.reason)
            if extras.ema_decay is not None:
                averages.update_after_torchs_step(self, extras.ema_decay, first)
        else:
            step_with_changed_grads(self, answer.reason, extras, _step_with)
        return
    if isinstance(answer, _C.Launches):
        try:
            norm = self._fastopt_gpu.run(self, answer.launches, extras)
        except BaseException:
            if first:  # the averages begin with another step
                for param, _ in made:
                    self.state[param].pop(averages.EMA, None)
            raise
        if norm is not None:
            self._fastopt_options.norm = norm
    elif extras is not None and isinstance(extras.norm, Tensor):  # of other processes: there is no gradient here
        self._fastopt_options.norm = extras.norm
    if first:
        averages.copy_first(self, [param for param, _ in made])


def _prepare_gpu(self: Any, wants: tuple[Want, ...], extras: Extras | None) -> None:
    from .gpu import Gpu

    if self._fastopt_gpu is None:
        gpu = Gpu(self._fastopt.update)
        gpu.begin(self)
        self._fastopt_gpu = gpu
    self._fastopt_gpu.prepare(self, wants, extras)


def _torchs_step(self: Any, reason: str) -> None:
    """torch's own step, as a for-loop or foreach: its fused kernels have other bits."""
    if self._fastopt.torchs_step_because(self) is None:  # else its parts may take what torch's refuse
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None and (error := self._fastopt.refusal(self, group, param)):
                    error.args = (f"{error} (parameter {i} of param group {g})",)
                    raise error
    self._fastopt.before_torchs_step(self)
    own_step = super(FusedStep, self).step.__func__
    if getattr(own_step, "hooked", False):
        own_step = own_step.__wrapped__
    unscales = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
    fused = [group for group in self.param_groups if group.get("fused") and not unscales]  # only its kernels unscale
    for group in fused:
        group["fused"] = False
    try:
        own_step(self)
    finally:
        for group in fused:
            group["fused"] = True
    torch_steps[f"{type(self).__name__}: {reason}"] += 1


_step_with_hooks = Optimizer.profile_hook_step(FusedStep.step)
_untraced_step, _untraced_step_if_unwatched = _disable_dynamo(_step), _disable_dynamo(_step_if_unwatched)
_untraced_zero_grad = _disable_dynamo(FusedStep.zero_grad)

if _C is None:  # without the extension, torch's own are inherited
    del FusedStep.step, FusedStep.zero_grad, FusedStep.profile_hook_step
else:
    _watched = _C.watched

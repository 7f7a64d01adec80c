"""The one step() of all optimizers, as a mixin in front of torch's classes; everything but the step is theirs.

    param_groups -> plan -> backend -> kernel machinery -> update function

The plan and the CPU machinery are C++ (csrc/plan/answer.h says what a plan answers). Here is what happens around them:
hooks, closures, making state at a parameter's first step, and torch's own step for whatever is not a plain strided
tensor of a floating dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.autograd.profiler as profiler
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

from .backends import _C, torch_steps

Group = dict[str, Any]
_KEPT = (torch.float32, torch.bfloat16, torch.float16)  # what the arithmetic for every parameter holds
_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
Closure = Callable[[], Any]

if TYPE_CHECKING:
    from ._C import Answer, Want

    _Base = Optimizer
else:
    _Base = object


class FusedStep(_Base):
    """Mixin: ``class Adam(FusedStep, torch.optim.Adam)`` is torch's Adam with a fused step."""

    _update: ClassVar[str]  # the name of the update in csrc/step/algorithms.h and kernels/
    _takes_sparse: ClassVar[bool] = False
    _plan: Any = None  # made by the extension at the first step; like _gpu, never pickled or copied
    _gpu: Any = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False, also with ``fused=True``: torch.amp.GradScaler unscales, and skips the whole step on overflow."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        pass  # torch's constructors set it

    # ---- state

    def _slots(self, group: Group) -> dict[str, float]:
        """Names and initial values of a parameter's state tensors under the options of ``group``, in torch's order."""
        raise NotImplementedError

    def _has_step(self) -> bool:
        return True

    def _new_state(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        state = {}
        if self._has_step():
            state["step"] = _step_count(0.0, group, param)
        for name, value in self._slots(group).items():
            state[name] = torch.full_like(param, value, memory_format=torch.preserve_format, requires_grad=False)
        return state

    @_disable_dynamo
    @torch.no_grad()
    def _make_state(self, missing: list[tuple[Group, Tensor]]) -> None:
        """Makes the state of parameters at their first step, or a step count that was a number or elsewhere."""
        if any(param.device.type == "cuda" for _, param in missing) and torch.cuda.is_current_stream_capturing():
            from .gpu import NOT_WARM

            raise RuntimeError(NOT_WARM)  # a replay would make it again
        for group, param in missing:
            state = self.state[param]
            if self._has_step() and state:
                state["step"] = _step_count(float(state["step"]), group, param)
            else:
                new = self._new_state(group, param)
                state.update({name: value for name, value in new.items() if state.get(name) is None})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` of this optimizer or of torch's returned.

        As in torch.optim, except that state of float32, bfloat16 or float16 keeps its dtype (torch casts it to the
        parameter's) and that ``foreach``, ``fused``, ``capturable`` and ``differentiable`` keep the values of this
        optimizer (torch takes the file's).

        Raises:
            ValueError: the state of a parameter is incomplete or of another shape; nothing was loaded.
        """
        own = [{name: group[name] for name in _IMPLEMENTATION if name in group} for group in self.param_groups]
        loaded: list[tuple[Tensor, dict[str, Any]]] = []

        def check(_: Optimizer, final: dict[str, Any]) -> None:
            for group, saved in zip(self.param_groups, final["param_groups"], strict=False):
                for param, key in zip(group["params"], saved["params"], strict=False):
                    if entry := final["state"].get(key):
                        self._check_loaded({**self.defaults, **saved}, param, key, entry)
                        loaded.append((param, entry))

        def restore(_: Optimizer) -> None:
            for group, values in zip(self.param_groups, own, strict=True):
                group.update(values)
            capturable = {param: group.get("capturable") for group in self.param_groups for param in group["params"]}
            for param, entry in loaded:
                for name, value in entry.items():
                    if not torch.is_tensor(value):
                        continue
                    if name == "step":
                        value = value.to(param.device, torch.float32) if capturable[param] else value.cpu()
                    elif value.dtype in _KEPT and param.is_floating_point():
                        value = value.to(param.device)
                    else:
                        continue
                    self.state[param][name] = value

        handles = [
            self.register_load_state_dict_pre_hook(check),  # the last: it sees what the user's hooks made of the file
            self.register_load_state_dict_post_hook(restore, prepend=True),  # and the first
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _check_loaded(self, group: Group, param: Tensor, key: Any, entry: dict[str, Any]) -> None:
        for name in ["step"] * self._has_step() + list(self._slots(group)):
            value = entry.get(name)
            if value is None and not self._has_step():
                continue  # as torch: made at the next step
            if value is None:
                found = sorted(str(key) for key, value in entry.items() if value is not None)
                raise ValueError(f"loaded state of parameter {key} has no {name!r}, only {found}")
            if name == "step":
                if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
                    raise ValueError(f"loaded 'step' of parameter {key} is no number: {value!r}")
            elif not isinstance(value, Tensor):
                raise ValueError(f"loaded {name!r} of parameter {key} is no tensor: {value!r}")
            elif value.shape != param.shape:
                shapes = f"shape {list(value.shape)}, the parameter {list(param.shape)}"
                raise ValueError(f"loaded {name!r} of parameter {key} has {shapes}")

    # ---- zeroing

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters, as torch.optim.Optimizer.zero_grad does.

        Args:
            set_to_none: drop them instead of filling them with zeros. Default True.
        """
        if profiler._is_profiler_enabled or _C.zero_grad(self, set_to_none):
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
        if is_dynamo_compiling():
            return _untraced_step(self, closure)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or profiler._is_profiler_enabled
        ) and type(self).step is FusedStep.step:  # a subclass's own step is wrapped by torch, and runs the hooks
            return _step_with_hooks(self) if closure is None else _step_with_hooks(self, closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch shall not wrap it: that costs more than the step of a small model

    def _step(self, closure: Closure | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._gpu is not None:
            self._gpu.begin(self)
        answer = _C.step(self)
        if answer:  # DONE is empty
            self._follow(answer)
        return loss

    def _follow(self, answer: Answer) -> None:
        """Does what the plan could not: launches, new state, GPU kernels and buffers, torch's own step for a reason."""
        made: list[tuple[Tensor, dict[str, Any] | None]] = []  # parameters and what their state was before
        fresh: list[Tensor] = []  # the same parameters, until the plan writes
        try:
            while isinstance(answer, (_C.Missing, _C.Wants)):
                if isinstance(answer, _C.Wants):
                    self._prepare_gpu(answer.wants)
                elif made:
                    raise RuntimeError("state could not be made for a parameter: its step count must be a number")
                else:
                    fresh = list(dict.fromkeys(param for _, param in answer.params))
                    made = [(param, dict(self.state[param]) if param in self.state else None) for param in fresh]
                    self._make_state(answer.params)
                answer = _C.step(self, fresh)
        except BaseException:
            if fresh:
                self._unmake_state(made)
            raise
        if isinstance(answer, _C.LeftToTorch):
            self._unmake_state(made)  # torch makes its own
            self._torch_step(answer.reason)
        elif isinstance(answer, _C.Launches):
            self._gpu.run(self, answer.launches)

    def _unmake_state(self, made: list[tuple[Tensor, dict[str, Any] | None]]) -> None:
        for param, before in made:
            if before is None:
                self.state.pop(param, None)
            else:
                self.state[param].clear()
                self.state[param].update(before)

    def _prepare_gpu(self, wants: tuple[Want, ...]) -> None:
        from .gpu import Gpu

        if self._gpu is None:
            gpu = Gpu(self._update)
            gpu.begin(self)
            self._gpu = gpu
        self._gpu.prepare(self, wants)

    def _torch_step(self, reason: str) -> None:
        """torch's own step, as a for-loop or foreach: its fused kernels have other bits."""
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None and (error := self._refusal(group, param)):
                    error.args = (f"{error} (parameter {i} of param group {g})",)
                    raise error
        bound: Any = super().step
        own_step = bound.__func__
        if getattr(own_step, "hooked", False):
            own_step = own_step.__wrapped__
        fused = [group for group in self.param_groups if group.get("fused")]
        for group in fused:
            group["fused"] = False
        try:
            own_step(self)
        finally:
            for group in fused:
                group["fused"] = True
        torch_steps[f"{type(self).__name__}: {reason}"] += 1

    def _refusal(self, group: Group, param: Tensor) -> Exception | None:
        """The error that torch's own step would raise half-way, after stepping other parameters."""
        grad = param.grad
        assert grad is not None
        if grad.shape != param.shape:
            return RuntimeError(f"grad has shape {list(grad.shape)}, the parameter {list(param.shape)}")
        if grad.device != param.device:
            return RuntimeError(f"grad is on {grad.device}, the parameter on {param.device}")
        if grad.is_sparse and not self._takes_sparse:
            return RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        if grad.is_sparse and group["weight_decay"] != 0:
            return RuntimeError("weight_decay option is not compatible with sparse gradients")
        if group.get("capturable") and param.device.type == "cpu":
            return AssertionError(
                "If capturable=True, params and state_steps must be on supported devices: cuda, xpu, hpu, ...; not cpu"
            )
        return None


_step_with_hooks = Optimizer.profile_hook_step(FusedStep._step)
_untraced_step = _disable_dynamo(FusedStep.step)  # not step itself: that would cost every step of a small model 1 us

if _C is None:
    del FusedStep.step, FusedStep.zero_grad  # without the extension, torch's own are inherited


def _step_count(value: float, group: Group, param: Tensor) -> Tensor:
    """As torch makes them: read by the host, or by a captured graph."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(value, dtype=dtype, device=param.device if group.get("capturable") else "cpu")


def same_dtype(param: Tensor) -> Exception | None:
    """For updates with a lerp, which torch does not promote."""
    assert param.grad is not None
    if param.grad.dtype == param.dtype:
        return None
    return RuntimeError(f"expected dtype {param.dtype} for grad but got dtype {param.grad.dtype}")

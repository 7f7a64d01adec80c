"""torch.amp.GradScaler, whose unscaling and search for infinities cost our optimizers one read of the gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from .averages import all_params
from .backends import _C, count_left_to_torch
from .clip_dtensors import any_dtensor
from .extras import Options, counts_on_gpu
from .optimizer import FusedStep, is_ours


class GradScaler(torch.amp.GradScaler):
    """Scales losses so that small gradients of float16 do not vanish.

    torch.amp.GradScaler, with its scale, its skipped steps and the bits of its parameters; for any optimizer. With one
    of this library's, ``step`` reads the gradients once, to find infinities and the norm for ``max_grad_norm``, and the
    optimizer's step unscales them where it loads them. ``.grad`` is not rewritten then: it stays scaled. On a GPU, with
    ``capturable`` in all groups of the optimizer, its step also looks for the infinities and leaves itself out: nobody
    waits, and a CUDA graph can have all of it.

    As torch's own it first unscales in memory where somebody could see the difference: after ``unscale_``, with hooks
    on the optimizer's step, and for an optimizer whose step is not this library's alone.

    Args:
        device: of the scale. Default "cuda".
        init_scale: the first scale, > 0. Default 65536.0.
        growth_factor: by what the scale grows, > 1. Default 2.0.
        backoff_factor: by what it is multiplied after an overflow, in (0, 1). Default 0.5.
        growth_interval: steps without overflow after which it grows, > 0. Default 2000.
        enabled: False makes everything pass through. Default True.

    >>> import torch, fastopt
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = fastopt.SGD(model.parameters(), lr=0.1, max_grad_norm=1.0)
    >>> scaler = fastopt.GradScaler("cpu")
    >>> scaler.scale(model(torch.ones(4)).sum()).backward()
    >>> scaler.step(optimizer)
    >>> scaler.update()
    """

    _fastopt_optimizer: Optimizer | None = None  # whose step is under way and unscales

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """``optimizer.step()`` with unscaled gradients, unless one of them is infinite or NaN.

        Args:
            optimizer: whose gradients were made of a scaled loss.
            args, kwargs: for the optimizer's step; a closure is refused as in torch.

        Returns:
            What the optimizer's step returned, or None.

        Raises:
            RuntimeError: ``step`` was called before, since the last ``update``.
        """
        if not self._enabled or args or kwargs or not _unscales(optimizer):
            return super().step(optimizer, *args, **kwargs)
        if optimizer._fastopt_options is None:  # type: ignore[attr-defined]
            optimizer._fastopt_options = Options()  # type: ignore[attr-defined]
        self._fastopt_optimizer = optimizer
        try:
            return super().step(optimizer)
        finally:
            del self._fastopt_optimizer
            options = optimizer._fastopt_options  # type: ignore[attr-defined]
            options.searched = options.searches = None

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """What torch's `step` and `unscale_` call."""
        if self._fastopt_optimizer is optimizer:
            options = cast(Any, optimizer)._fastopt_options
            if inv_scale.device.type == _C.gpu_type():
                grads = _gpu_grads(optimizer)
                if grads and _can_search(optimizer, grads):
                    options.searches = inv_scale, found_inf
                    return {found_inf.device: found_inf}
                if grads and (found := _search_on_gpu(grads, inv_scale)):
                    options.norm, found_inf = found  # if the step will be left out
                    options.searched = inv_scale, options.norm
                    return {found_inf.device: found_inf}
            elif inv_scale.device.type == "cpu":
                scale = inv_scale.item()
                answer = _C.search(all_params(optimizer), scale)
                if type(answer) is tuple:
                    norm, infinite = answer
                    options.searched = scale, norm
                    options.norm = torch.tensor(norm) if infinite else None  # the step will be left out
                    return {found_inf.device: found_inf.fill_(infinite)}
                count_left_to_torch("GradScaler", answer)
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)

    def _maybe_opt_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """What torch's `step` does last, looking at what was found."""
        options: Any = getattr(optimizer, "_fastopt_options", None)
        if self._fastopt_optimizer is optimizer and options.searches:
            return cast("float | None", optimizer.step())
        if options is not None and options.searched is None:
            options.leave_out()  # until the step begins
        return super()._maybe_opt_step(optimizer, *args, **kwargs)


def _gpu_grads(optimizer: Optimizer) -> list[Tensor]:
    """All gradients, if they are on GPUs, of this process alone and of dtypes that a scaler unscales; else none."""
    params = all_params(optimizer)
    grads = [param.grad for param in params if param.grad is not None]
    ours = all(grad.device.type == _C.gpu_type() and grad.dtype != torch.float16 for grad in grads)
    return grads if ours and not any_dtensor(params) else []


def _can_search(optimizer: Any, grads: list[Tensor]) -> bool:
    """Whether its step searches, and leaves itself out, without the host: see Extras."""
    options = optimizer._fastopt_options
    by_hand = options.grad_scale is not None or options.found_inf is not None
    plain = all(type(grad) is Tensor and grad.layout is torch.strided for grad in grads)
    return plain and counts_on_gpu(optimizer) and not by_hand and not options.error_if_nonfinite


def _search_on_gpu(grads: list[Tensor], inverse_scale: Tensor) -> tuple[Tensor, Tensor] | None:
    from .gpu_passes import search  # and Triton with it

    return search(grads, inverse_scale)


def _unscales(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step can unscale and nobody sees the gradients before or after it."""
    return (
        isinstance(optimizer, FusedStep)
        and _C is not None
        and is_ours(optimizer.step)
        and not optimizer._step_supports_amp_scaling
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and not torch_optimizer._global_optimizer_pre_hooks
        and not torch_optimizer._global_optimizer_post_hooks
    )

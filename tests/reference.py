"""What fastopt is compared with, and how: torch.optim's own for-loop with a correctly rounded square root, bit by bit.

torch's CPU `sqrt` is MKL's and misses correct rounding on some inputs; numpy's is the processor's instruction. That one
replacement is the whole difference between `torch.optim` and the contract for float32 and float64 parameters. For
anything that is stored narrower than it is computed, `step` runs the same for-loop on widened copies and rounds every
tensor once when storing it.
"""

import contextlib
import itertools

import numpy as np
import torch

import fastopt

INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


if torch.__version__ < "2.13":  # Adagrad may make state in its constructor only; the contract is what it does since
    _init_group = torch.optim.Adagrad._init_group

    def _init_group_with_state(self, group, *lists):
        if not isinstance(self, fastopt.Adagrad):  # which has to do without
            initial = self.defaults["initial_accumulator_value"]
            for param in group["params"]:
                if param.grad is not None and not self.state[param]:
                    self.state[param] = torch.optim.Adagrad([param], initial_accumulator_value=initial).state[param]
        return _init_group(self, group, *lists)

    torch.optim.Adagrad._init_group = _init_group_with_state


@contextlib.contextmanager
def correctly_rounded_sqrt():
    """`sqrt`, `sqrt_` and `torch.sqrt` of CPU tensors are numpy's while this is open."""
    originals = torch.Tensor.sqrt, torch.Tensor.sqrt_, torch.sqrt

    def sqrt_into(out, x):
        with np.errstate(invalid="ignore"):
            np.sqrt(x.detach().numpy(), out=out.detach().numpy())
        return out

    torch.Tensor.sqrt = torch.sqrt = lambda x: sqrt_into(torch.empty_like(x), x)
    torch.Tensor.sqrt_ = lambda x: sqrt_into(x, x)
    try:
        yield
    finally:
        torch.Tensor.sqrt, torch.Tensor.sqrt_, torch.sqrt = originals


def step(optimizer, state_dtype=None):
    """One step of `optimizer`, a torch.optim one with foreach=False, as the contract asks for it.

    `state_dtype` is that of state which the step makes, but for float64 parameters; None: the parameter's.
    """
    with correctly_rounded_sqrt():
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if state_dtype is None and all(_stored_as_computed(optimizer, param) for param in params):
            optimizer.step()
        else:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        _step_widened(optimizer, group, param, state_dtype)


def _stored_as_computed(optimizer, param):
    stored = [param, *_tensors(optimizer.state.get(param, {})).values()]
    return param.dtype in (torch.float32, torch.float64) and all(t.dtype == param.dtype for t in stored)


def _tensors(state):
    """The tensors of one parameter's state, without its step."""
    return {name: t for name, t in state.items() if isinstance(t, torch.Tensor) and name != "step"}


def _step_widened(optimizer, group, param, state_dtype=None):
    """Steps a widened copy of one parameter of `group` alone, then rounds it and its state to their own dtypes."""
    made_as = param.dtype if param.dtype == torch.float64 or state_dtype is None else state_dtype
    compute = torch.float64 if param.dtype == torch.float64 else torch.float32
    wide = param.detach().to(compute, copy=True)
    wide.grad = param.grad.to(compute)
    state = optimizer.state.get(param, {})
    stored = _tensors(state)

    alone = object.__new__(type(optimizer))  # all of optimizer's attributes, another parameter
    alone.__dict__.update(optimizer.__dict__)
    alone.__dict__.pop("step", None)  # a scheduler's, bound to optimizer
    alone.param_groups = [{**group, "params": [wide]}]
    alone.state = {wide: {**state, **{name: t.to(compute, copy=True) for name, t in stored.items()}}}
    alone.step()

    param.detach().copy_(wide)
    for name, value in alone.state[wide].items():
        if name in stored:
            stored[name].copy_(value)
        else:
            state[name] = value if name == "step" or value is None else value.to(made_as)
    if state:
        optimizer.state[param] = state


@torch.no_grad()
def snapshot(optimizer):
    """Copies of every parameter and every state entry of `optimizer`.

    A dict: by name and dtype, [(index or name of the parameter, shape), ...] and all their elements in one flat tensor;
    by name, a list of (index or name of the parameter, value) of what is no tensor.
    """
    found = {}
    counter = itertools.count()
    for group in optimizer.param_groups:
        for index, param in zip(group.get("param_names", counter), group["params"], strict=False):
            for name, value in (("param", param), *optimizer.state.get(param, {}).items()):
                if isinstance(value, torch.Tensor):
                    shapes, parts = found.setdefault((name, value.dtype), ([], []))
                    shapes.append((index, value.shape))
                    parts.append(value if value.dim() == 1 else value.reshape(-1))
                elif value is not None:  # as SGD without momentum may have it
                    found.setdefault(name, []).append((index, value))
    return {key: (value[0], torch.cat(value[1])) if isinstance(value, tuple) else value for key, value in found.items()}


def fresh(params):
    """New Parameters with the values and strides of `params`; or what `params()` makes."""
    if callable(params):
        return params()
    return [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]


def drive(optimizer, grads_per_step, step=None):
    """Steps `optimizer` once for every item of `grads_per_step` and returns the snapshots after each step.

    An item is a list with a gradient or None per parameter, or a function that makes it from the list of parameters.
    `step` is the function that does one step, by default the optimizer's own.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    snapshots = []
    for grads in grads_per_step:
        for param, grad in zip(params, grads(params) if callable(grads) else grads, strict=True):
            param.grad = grad
        optimizer.step() if step is None else step(optimizer)
        snapshots.append(snapshot(optimizer))
    return snapshots


def run(make_optimizer, params, grads_per_step, step=None, prepare=None):
    """`drive` for an optimizer over copies of `params`; `prepare(optimizer)` is called half-way."""
    optimizer = make_optimizer(fresh(params))
    half = len(grads_per_step) // 2
    snapshots = drive(optimizer, grads_per_step[:half], step)
    if prepare is not None:
        prepare(optimizer)
    return snapshots + drive(optimizer, grads_per_step[half:], step)


def assert_same_bits(actual, expected, what=""):
    """Raises AssertionError unless both hold the same bits; every NaN is the same.

    Takes tensors, snapshots, and dicts and lists of them. `what` says where this is, for the message.
    """
    if isinstance(expected, list):
        assert len(actual) == len(expected), f"{what}: {len(actual)} items, expected {len(expected)}"
        for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(a, e, f"{what} [{number}]")
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), f"{what}: there are {[*actual]}, expected {[*expected]}"
        for key, value in expected.items():
            if isinstance(value, tuple):
                (shapes, a), (expected_shapes, e) = actual[key], value
                assert shapes == expected_shapes, f"{what}: shapes of {key[0]} are {shapes}, expected {expected_shapes}"
                _assert_same_tensor(a, e, f"{what} {key[0]}", shapes)
            elif isinstance(value, dict | torch.Tensor):
                assert_same_bits(actual[key], value, f"{what} {key}")
            else:
                assert actual[key] == value, f"{what}: {key} is {actual[key]}, expected {value}"
    else:
        assert actual.shape == expected.shape, f"{what}: shape {[*actual.shape]}, expected {[*expected.shape]}"
        _assert_same_tensor(actual.detach().reshape(-1), expected.detach().reshape(-1), what, [(0, expected.shape)])


def _assert_same_tensor(actual, expected, what, shapes):
    """Two flat tensors; `shapes` tells which parameters they are made of."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual).reshape(-1), torch.view_as_real(expected).reshape(-1)
    integer = INTEGER[actual.element_size()]
    if torch.equal(actual.view(integer), expected.view(integer)):
        return
    differs = (actual.view(integer) != expected.view(integer)) & ~(actual.isnan() & expected.isnan())
    if not differs.any():
        return
    first = int(differs.nonzero()[0])
    ends = itertools.accumulate(shape.numel() for _, shape in shapes)
    (index, shape), end = next(pair for pair in zip(shapes, ends, strict=True) if first < pair[1])
    a, e = actual[first], expected[first]
    raise AssertionError(
        f"{what}: {int(differs.sum())} of {differs.numel()} elements differ, the first is element "
        f"{first - end + shape.numel()} of parameter {index} {[*shape]}: "
        f"{a.item()!r}, expected {e.item()!r} ({ulp_distance(a, e)} ulp)"
    )


def ulp_distance(a, b):
    """How many floating-point numbers of their dtype lie between two scalars; the zeros count as one number."""

    def position(x):
        bits = int(x.view(INTEGER[x.element_size()]))
        return bits if bits >= 0 else -(bits & (2 ** (8 * x.element_size() - 1) - 1))

    return abs(position(a) - position(b))

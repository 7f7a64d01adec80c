"""The numerics contract on CPU: every parameter and state bit by bit, over options, dtypes, sizes, layouts, ISAs."""

import ast
import contextlib
import functools
import itertools
import math
import os
import pathlib
from fractions import Fraction

import numpy as np
import pytest
import torch

import fastopt

from . import reference
from .optimizers import ROWS
from .reference import assert_same_bits, drive, fresh, run

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that state can be asked to be
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)


def special_values(dtype):
    """Twenty, so that all pairs fill whole vectors: torch's lerp has another sign of zero in its scalar tail."""
    info = torch.finfo(dtype)
    denormal = info.smallest_normal * info.eps
    smallest, largest_denormal = info.smallest_normal, info.smallest_normal - denormal
    positive = [0.0, denormal, largest_denormal, smallest, 0.01, 1.0, 3.0, info.max, math.inf]
    return torch.tensor([*positive, *(-x for x in positive), math.nan, 0.1], dtype=torch.float64).to(dtype)


def problem(dtype):
    """Parameters, and gradients for 12 steps: missing now and then, magnitudes apart, every pair of special values."""
    special = special_values(dtype)
    params = [normal(dtype=dtype), normal(3, 7, dtype=dtype) * 0.01, special.repeat_interleave(len(special))]
    grads_per_step = []
    for t in range(12):
        grads = [normal(*p.shape, dtype=dtype) * 10 ** (t % 5 - 2) for p in params]
        grads[-1] = special.roll(t).repeat(len(special))
        missing = range(len(params)) if t == 3 else (t % 5,)
        grads_per_step.append([None if index in missing else grad for index, grad in enumerate(grads)])
    return params, grads_per_step


@contextlib.contextmanager
def instruction_set(name):
    previous = fastopt._C.set_isa(name)
    try:
        yield
    finally:
        fastopt._C.set_isa(previous)


def check(row, options, params, grads_per_step, prepare=None, threads=(1,), state_dtype=None):
    """Compares fastopt on every ISA with the reference after every step; the arguments are those of `run`."""
    step = functools.partial(reference.step, state_dtype=state_dtype)
    expected = run(row.make_reference(options, state_dtype), params, grads_per_step, step, prepare)
    for number, isa in itertools.product(threads, fastopt._C.isas()):
        torch.set_num_threads(number)
        with instruction_set(isa):
            make = row.make_ours({**options, "state_dtype": state_dtype})
            actual = run(make, params, grads_per_step, None, prepare)
        assert_same_bits(actual, expected, f"{row.name} {options}, {state_dtype}, {isa}, {number} threads: step")


def test_every_class_has_a_row_a_functor_and_a_kernel():
    classes = {name for name in fastopt.__all__ if isinstance(getattr(fastopt, name), type)} - {"GradScaler"}
    assert classes == {row.name for row in ROWS}
    functors = fastopt._C.algorithms()
    assert functors.keys() == {row.module for row in ROWS}
    for row in ROWS:
        assert functors[row.module] == list(row.slots)
        source = pathlib.Path(__file__).parents[1] / "kernels" / f"{row.module}.py"
        body = ast.parse(source.read_text()).body  # not imported: that takes Triton
        (slots,) = (node.value for node in body if isinstance(node, ast.Assign) and node.targets[0].id == "SLOTS")
        assert ast.literal_eval(slots) == row.slots
        assert "update" in [node.name for node in body if isinstance(node, ast.FunctionDef)]
        tried = row.axes.keys() | row.tensors.keys()
        assert tried | {"decoupled_weight_decay"} >= row.defaults() >= tried  # every option is in the table


def test_reference_square_root_is_correctly_rounded():
    x = torch.cat([special_values(torch.float32), torch.rand(100_000) * 4])
    with reference.correctly_rounded_sqrt():
        through_float64 = x.double().sqrt().float()  # rounding twice is innocuous for a square root
        for root in (x.sqrt(), torch.sqrt(x), x.clone().sqrt_()):
            assert_same_bits(root, through_float64)
        values = torch.rand(1000, dtype=torch.float64)
        for value, root in zip(values.tolist(), values.sqrt().tolist(), strict=True):
            below, above = ((Fraction(root) + Fraction(math.nextafter(root, end))) / 2 for end in (0, 2))
            assert below**2 < Fraction(value) < above**2


def groups_of(values, combinations):
    """A function that makes a param group for each combination of options, over copies of `values` and named by it."""
    names = [[f"{index} {options}" for index, _ in enumerate(values)] for options in combinations]

    def groups():
        return [
            {**options, "params": [*zip(group, fresh(values), strict=True)]}
            for options, group in zip(combinations, names, strict=True)
        ]

    return groups


def numbers_only(options):
    values = [*options.values(), *options.get("betas", ())]
    return not any(isinstance(value, torch.Tensor) for value in values)


def promotes(options):
    """With a float64 tensor among the options, torch computes a 0-dim parameter in float64: type promotion."""
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in options.values())


@every_dtype
@every_row
def test_every_combination_of_options(row, dtype):
    """All of the table and all that torch's own tests list, each combination a param group of one optimizer."""
    values, grads_per_step = problem(dtype)
    combinations = [*row.combinations(), *row.listed_by_torch()]
    if dtype in (torch.bfloat16, torch.float16):  # computed with the scalars of float32
        combinations = [options for options in combinations if numbers_only(options)]
    optimizers = {}  # by the options that count in the constructor alone
    for options in combinations:
        key = (promotes(options), *((name, options[name]) for name in row.constructor_only if name in options))
        optimizers.setdefault(key, []).append(options)
    for (without_first, *options), group_options in optimizers.items():
        grads = [step_grads[without_first:] * len(group_options) for step_grads in grads_per_step]
        check(row, dict(options), groups_of(values[without_first:], group_options), grads)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@every_row
def test_every_combination_of_options_with_state_of_a_dtype(row, state_dtype):
    """Rounded once in a step, to nearest even; of float64 parameters it stays float64."""
    for dtype in DTYPES:
        values, grads_per_step = problem(dtype)
        optimizers = {}
        for options in filter(numbers_only, row.combinations()):
            key = tuple((name, options[name]) for name in row.constructor_only if name in options)
            optimizers.setdefault(key, []).append(options)
        for options, group_options in optimizers.items():
            grads = [step_grads * len(group_options) for step_grads in grads_per_step[:6]]
            check(row, dict(options), groups_of(values, group_options), grads, state_dtype=state_dtype)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@every_row
def test_state_of_a_dtype_at_every_size_and_stride(row, state_dtype):
    """On one and two threads; contiguous gradients of parameters that are not."""
    for dtype in DTYPES:
        sizes = [*range(70), 511, 513, 4097]
        params = [*normal(sum(sizes), dtype=dtype).split(sizes), normal(40, 30, dtype=dtype).t()]
        params.append(normal(200_003, dtype=dtype))
        grads_per_step = [[normal(*p.shape, dtype=dtype) for p in params] for _ in range(3)]
        check(row, row.plain, params, grads_per_step, threads=(1, 2), state_dtype=state_dtype)


@every_dtype
@every_row
def test_every_size(row, dtype):
    """From 0 to 4097, or past a block of memory converted at once; gradients side by side, so at every alignment."""
    sizes = list(range(4098 if dtype == torch.float32 else 600))
    params = normal(sum(sizes), dtype=dtype).split(sizes)
    check(row, row.plain, params, [normal(sum(sizes), dtype=dtype).split(sizes) for _ in range(2)])


@every_row
def test_a_million_elements(row):
    """Large enough for threads to share a tensor, small ones and other dtypes and strides among them."""
    params = [
        *(normal(*shape) for shape in ((1_000_003,), (3,), (101, 997), (4097,), ())),
        *(normal(30_001, dtype=dtype) for dtype in DTYPES),
        normal(211, 509).t(),  # its gradient is contiguous
    ]
    grads_per_step = [[normal(*p.shape, dtype=p.dtype) for p in params] for _ in range(6)]
    check(row, row.plain, params, grads_per_step, threads=(2,))


LAYOUTS = {
    "contiguous": lambda t: t.new_full(t.shape, 7),
    "channels_last": lambda t: t.new_full(t.shape, 7).to(memory_format=torch.channels_last),
    "transposed": lambda t: t.new_full(t.shape[::-1], 7).permute(3, 2, 1, 0),
    "offset": lambda t: t.new_full((t.numel() + 1,), 7)[1:].view(t.shape),
    "every second": lambda t: t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 7)[..., ::2],
    "inner block": lambda t: t.new_full([n + 2 for n in t.shape], 7)[1:-1, 1:-1, 1:-1, 1:-1],
    "gaps": lambda t: t.new_full([2 * n for n in t.shape[::-1]], 7)[::2, ::2, ::2, ::2].permute(3, 2, 1, 0),
}


def with_layout(name, values):
    """`values` in a view of memory that is otherwise filled with sevens; the new tensor's strides are the layout's."""
    view = LAYOUTS[name](values)
    return view.copy_(values)


def memory(tensor):
    """All of the storage behind a view, as one flat tensor."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@every_row
def test_every_layout_of_param_grad_and_state(row, dtype):
    """Walked in the same element order whatever the strides; nothing beside the elements is written."""
    cases = [
        (shape, *layouts)
        for shape in ((3, 4, 2, 5), (1, 9, 1, 4))
        for layouts in itertools.product(LAYOUTS, repeat=3)
    ]
    values = [normal(*shape, dtype=dtype) for shape, *_ in cases]
    grads_per_step = [[normal(*v.shape, dtype=dtype) for v in values] for _ in range(3)]
    expected = run(row.make_reference(row.plain), values, grads_per_step, reference.step)

    params = [torch.nn.Parameter(with_layout(case[1], value)) for case, value in zip(cases, values, strict=True)]
    optimizer = row.ours(params, **row.plain)
    for t, grads in enumerate(grads_per_step):
        (actual,) = drive(optimizer, [[with_layout(c[2], g) for c, g in zip(cases, grads, strict=True)]])
        assert_same_bits(actual, expected[t], f"{row.name} step {t}")
        for case, param in zip(cases, params, strict=True):
            tensors = {name: optimizer.state[param][name] for name in row.slots}
            if t == 0:  # as torch makes it; from now on as case says
                for name, state in tensors.items():
                    assert state.stride() == torch.zeros_like(param).stride(), f"{case} {name}"
                    optimizer.state[param][name] = with_layout(case[3], state)
            else:
                assert param.stride() == with_layout(case[1], param.detach()).stride()
                for name, tensor in {"param": param.detach(), **tensors}.items():
                    layout = case[1] if name == "param" else case[3]
                    assert_same_bits(memory(tensor), memory(with_layout(layout, tensor)), f"memory of {name} {case}")


@every_row
def test_gradients_expanded_shared_or_the_parameter_itself(row):
    """A gradient is only read, before its parameter is written. (Decoupled weight decay in torch writes first.)"""
    shared = normal(1000)
    params = [normal(6, 5), normal(4), normal(1000), normal(1000), normal(5000)]
    grads = [normal(1, 5).expand(6, 5), normal().expand(4), shared, shared]
    check(row, {**row.plain, "weight_decay": 0.0}, params, [lambda params: [*grads, params[-1].detach()]] * 4)


def share(views):
    """A function that makes Parameters out of `views` of one piece of memory, the same piece on each call."""
    values = normal(30_000)

    def params():
        return [torch.nn.Parameter(view) for view in views(values.clone())]

    return params


SHARED_MEMORY = {
    "one storage": share(lambda m: [m, m]),
    "overlap": share(lambda m: [m[:20_000], m[10_000:], m[5_000:6_000]]),
    "side by side": share(lambda m: [m[:9_999], m[9_999:]]),
    "interleaved": share(lambda m: [m[::2], m[1::2]]),
    "transposed": share(lambda m: [m.view(100, 300), m.view(100, 300).t()]),
}


@pytest.mark.parametrize("name", SHARED_MEMORY)
@every_row
def test_parameters_on_one_storage(row, name):
    """Parameters are stepped as if one after the other, whichever thread works on them."""
    params = SHARED_MEMORY[name]
    check(row, row.plain, params, [[normal(*p.shape) for p in params()] for _ in range(3)], threads=(1, 2))


@every_dtype
@every_row
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_listed_twice_is_stepped_twice(row, dtype):
    """Also where both are its first step; not so in SGD, where torch would give the momentum two beginnings."""
    values = [normal(100, dtype=dtype), normal(7, dtype=dtype)]

    def params():
        first, second = (torch.nn.Parameter(value.clone()) for value in values)
        return [first, second] if row.name == "SGD" else [first, second, first]

    def list_again(optimizer):
        params = optimizer.param_groups[0]["params"]
        params.append(params[1])

    check(row, row.plain, params, [lambda params: [torch.ones_like(p) for p in params]] * 6, prepare=list_again)


@every_row
def test_dtypes_of_param_and_state_in_one_optimizer(row):
    """Arithmetic in float64 for float64 parameters, else float32; each tensor is rounded once to its own dtype.

    The state gets other dtypes half-way, as a checkpoint or `.to(dtype)` leaves them.
    """
    cases = [
        (dtype, *state_dtypes)
        for dtype, *state_dtypes in itertools.product(DTYPES, repeat=1 + len(row.slots))
        if dtype == torch.float64 or torch.float64 not in state_dtypes  # wider than the arithmetic: refused
    ]

    def convert(optimizer):
        for param, (_, *dtypes) in zip(optimizer.param_groups[0]["params"], cases, strict=True):
            state = optimizer.state[param]
            for name, dtype in zip(row.slots, dtypes, strict=True):
                state[name] = state[name].to(dtype)

    params = [normal(n % 50, dtype=dtype) for n, (dtype, *_) in enumerate(cases)]
    grads_per_step = [[normal(*p.shape, dtype=p.dtype) for p in params] for _ in range(8)]
    check(row, row.plain, params, grads_per_step, prepare=convert)


@every_dtype
@every_row
def test_special_values_in_states(row, dtype):
    """As training alone does not bring them together: NaN in one state and a number in another, negative squares."""
    special = special_values(dtype)

    def spoil(optimizer):
        for shift, param in enumerate(optimizer.param_groups[0]["params"]):
            for place, name in enumerate(row.slots):
                values = special.roll(shift * place).repeat(len(special)).roll(place)
                optimizer.state[param][name].copy_(values)

    params = [special.repeat_interleave(len(special)) for _ in special]
    grads = [special.roll(shift).repeat(len(special)) for shift in range(len(special))]
    check(row, row.plain, params, [grads] * 4, prepare=spoil)


@every_row
def test_every_step_count(row):
    """Parameters of one group with their own step, up to where float32 cannot count further."""
    steps = [*range(100), *range(1000, 100_000, 1999), 2**24 - 2, 2**24 - 1, 2**24, 10**9]

    def set_steps(optimizer):
        for param, step in zip(optimizer.param_groups[0]["params"], steps, strict=True):
            if "step" in optimizer.state[param]:
                optimizer.state[param]["step"].fill_(step)

    params = [normal(5) for _ in steps]
    for options in (row.plain, {**row.plain, "lr": torch.tensor(0.1)}):
        check(row, options, params, [[normal(5) for _ in steps] for _ in range(4)], prepare=set_steps)


@every_row
def test_hyper_parameters_of_other_number_types(row):
    """int, bool and numpy's double are numbers, as in torch; betas may be a list."""

    def change(optimizer):
        (group,) = optimizer.param_groups
        group["lr"], group["weight_decay"] = 1, np.float64(0.1)
        group["maximize"] = 1
        if "betas" in group:
            group["betas"] = [0.8, 0.9]

    params = [normal(5), normal(11)]
    check(row, row.plain, params, [[normal(5), normal(11)]] * 6, prepare=change)


@pytest.mark.parametrize("row", [row for row in ROWS if row.has_fused], ids=lambda row: row.name)
def test_torch_fused_kernels(row):
    """float32, where their scalar tail and their vectors agree: multiples of 8 elements."""
    values = [normal(*shape) for shape in ((8,), (24,), (16, 9), (1000,))]
    combinations = [options for options in row.combinations() if numbers_only(options)]
    grads_per_step = [[normal(*v.shape) for v in values] * len(combinations) for _ in range(12)]
    groups = groups_of(values, combinations)
    expected = run(lambda params: row.theirs(params, fused=True), groups, grads_per_step)
    assert_same_bits(run(row.ours, groups, grads_per_step), expected, f"{row.name} step")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_row
def test_torch_as_it_is(row, dtype):
    """Where MKL's square root has no say, torch's for-loop has the same bits; elsewhere it is a few ulp away."""
    values = [normal(*shape, dtype=dtype) for shape in ((1000,), (3, 5))]

    def feeds_back(options):
        """Whether the square root reaches the states, through the parameter and its weight decay."""
        decoupled = options.get("decoupled_weight_decay") or row.name == "AdamW"
        return bool(options["weight_decay"]) and not decoupled and row.name != "SGD"

    exact = {"step", *row.slots}
    if row.name == "SGD":
        exact.add("param")
    if row.name == "RMSprop":
        exact.remove("momentum_buffer")
    for fed_back in (False, True):
        combinations = [o for o in row.combinations() if numbers_only(o) and feeds_back(o) == fed_back]
        if not combinations:
            continue
        grads_per_step = [[normal(*v.shape, dtype=dtype) for v in values] * len(combinations) for _ in range(12)]
        groups = groups_of(values, combinations)
        actual = run(row.ours, groups, grads_per_step)
        expected = run(row.make_reference({}), groups, grads_per_step)
        for t in range(1 if fed_back else 12):
            for key in expected[t]:
                if key[0] in exact:
                    assert_same_bits(actual[t][key][1], expected[t][key][1], f"{row.name} step {t} {key[0]}")
        before = torch.cat([v.reshape(-1) for v in values] * len(combinations))
        ours, theirs = actual[0]["param", dtype][1], expected[0]["param", dtype][1]
        few_ulp = 4 * torch.finfo(dtype).eps * torch.maximum(before.abs(), theirs.abs())
        assert ((ours - theirs).abs() <= few_ulp)[theirs.isfinite()].all(), row.name


def in_torch(row, options, params, grads_per_step):
    """Compares with torch.optim where fastopt lets torch's own step do it."""

    def step(optimizer):
        with reference.correctly_rounded_sqrt():
            optimizer.step()

    expected = run(row.make_reference(options), params, grads_per_step, step)
    assert_same_bits(run(row.make_ours(options), params, grads_per_step, step), expected, f"{row.name} {options}")


@every_row
def test_complex_parameters(row):
    params = [torch.randn(9, dtype=torch.complex64), torch.randn(3, 2, dtype=torch.complex128), normal(5)]
    grads_per_step = [[torch.randn(p.shape, dtype=p.dtype) for p in params] for _ in range(4)]
    in_torch(row, row.plain, params, grads_per_step)


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ("SGD", "Adagrad")], ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients(row):
    """Where torch takes them, beside dense ones, with indices that repeat."""
    grads_per_step = [
        [torch.sparse_coo_tensor(torch.tensor([[0, 3, 3]]), normal(3, 2), (8, 2), check_invariants=True), normal(8)]
        for _ in range(4)
    ]
    in_torch(row, {"lr": 0.1}, [normal(8, 2), normal(8)], grads_per_step)
    in_torch(row, {"lr": 0.1, "maximize": True}, [normal(8, 2), normal(8)], grads_per_step)


@every_row
def test_differentiable_steps(row):
    """Autograd goes through the step, to the gradient that was given."""
    derivatives = []
    for make in (row.make_ours, row.make_reference):
        torch.manual_seed(0)
        param, grad = torch.rand(5), torch.rand(5, requires_grad=True)
        optimizer = make({**row.plain, "differentiable": True})([param])
        param.grad = torch.rand(5)
        optimizer.step()  # SGD begins with a detached copy of the gradient
        param.grad = grad
        optimizer.step()
        derivatives.append(torch.autograd.grad(param.sum(), grad)[0])
    assert derivatives[0].any()
    assert_same_bits(*derivatives, row.name)


@every_row
def test_parameters_of_a_tensor_subclass(row):
    class Tagged(torch.Tensor):
        """With torch's default __torch_function__."""

    params = [normal(9).as_subclass(Tagged), normal(5)]
    in_torch(row, row.plain, params, [[normal(9), normal(5)] for _ in range(3)])


def test_elements_farther_apart_than_32_bits(tmp_path):
    """A parameter whose rows lie 2**31 elements apart, in a sparse file of which a few pages are touched."""
    distance = 2**31 + 7
    values, grads_per_step = normal(3, 1000), [[normal(3, 1000)] for _ in range(3)]
    for row in ROWS:
        expected = run(row.make_reference(row.plain), [values], grads_per_step, reference.step)
        with open(tmp_path / row.name, "wb") as file:
            file.truncate(4 * (2 * distance + 1000))
        mapped = torch.from_file(str(tmp_path / row.name), shared=True, size=2 * distance + 1000, dtype=torch.float32)
        param = torch.nn.Parameter(mapped.as_strided((3, 1000), (distance, 1)).copy_(values))
        assert_same_bits(drive(row.make_ours(row.plain)([param]), grads_per_step), expected, row.name)


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    """Four gigabytes of bfloat16; the gradient is one element, expanded."""
    numel = 2**31 + 4097
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 6e9:
        pytest.skip("takes 4.3 GB of memory")
    param = torch.zeros(numel, dtype=torch.bfloat16)
    param.grad = torch.ones(1, dtype=torch.bfloat16).expand(numel)
    torch.set_num_threads(2)
    fastopt.SGD([param], lr=1.0).step()
    assert param[0] == param[2**31] == param[-1] == -1
    assert all(bool((part == -1).all()) for part in param.split(2**28))

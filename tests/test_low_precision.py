"""16-bit parameters that train as float32 ones: master weights, stochastic rounding, and gradients of float32."""

import copy
import io
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch

import fastopt
from fastopt.backends import torch_steps

from .optimizers import ROWS
from .reference import assert_same_bits, snapshot
from .test_clip_grad import everywhere
from .test_extras import give_gradients

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
HALVES = (torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)
COMPANION = {torch.bfloat16: "remainder", torch.float16: "master"}


def rounded(master, dtype):
    """To bfloat16 with ties away from zero, to float16 with ties to even."""
    if dtype == torch.float16:
        return master.half()
    bits = (master.reshape(-1).view(torch.int32).long() & 0xFFFFFFFF) + 0x8000 >> 16
    near = torch.from_numpy(bits.numpy().astype(np.uint16).view(np.int16)).view(torch.bfloat16).view(master.shape)
    return torch.where(master.isnan(), torch.tensor(math.nan, dtype=dtype), near)


class Training:
    """Parameters in every layout, and a param group for each combination of a row's options.

    All gradients are numbers of `dtype`, whatever the dtype of parameters and gradients.
    """

    def __init__(self, row, dtype, param_dtype, grad_dtype=None, **options):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(1)
        start = torch.Generator().manual_seed(0)
        given = [
            {k: v for k, v in combination.items() if k not in row.constructor_only}
            for combination in row.combinations()
        ]
        numbers = [torch.randn(110, generator=start).to(dtype).to(param_dtype) for _ in given]
        layouts = lambda t: t[:31], lambda t: t[31:43].view(4, 3).t(), lambda t: t[50:].view(5, 6, 2)[::2, 1:4]
        self.params = [torch.nn.Parameter(layout(t)) for t in numbers for layout in layouts]
        self.params += [torch.nn.Parameter(torch.ones(7)), torch.nn.Parameter(torch.ones((), dtype=param_dtype))]
        for i, param in enumerate(self.params):
            own = param.dtype if param.dtype == torch.float32 or grad_dtype is None else grad_dtype
            if own != param.dtype:
                param.grad_dtype = own
            memory_format = torch.preserve_format if i % 2 else torch.contiguous_format
            param.grad = torch.empty_like(param, dtype=own, memory_format=memory_format)
        groups = [{"params": self.params[3 * i : 3 * i + 3], **options} for i, options in enumerate(given)]
        groups.append({"params": self.params[-2:]})
        constructor = {name: row.axes[name][-1] for name in row.constructor_only}
        self.optimizer = row.ours(groups, **constructor, **options)

    def step(self):
        numels = [param.numel() for param in self.params]
        numbers = torch.randn(sum(numels), generator=self.generator).to(self.dtype)
        for param, part in zip(self.params, numbers.split(numels), strict=True):
            if param.grad is not None:
                param.grad.copy_(part.view(param.shape))
        self.optimizer.step()

    def weights(self):
        masters = fastopt.master_weights(self.optimizer) if self.optimizer._fastopt_options.masters else {}
        return [masters[param] if param in masters else param.detach().clone() for param in self.params]

    def state(self):
        names = {*COMPANION.values(), "step", "rounding_seed"}
        return [
            value.clone()
            for param in self.params
            for name, value in self.optimizer.state[param].items()
            if torch.is_tensor(value) and name not in names
        ]


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
@every_row
@every_dtype
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masters_are_what_float32_parameters_are(row, dtype, state_dtype, steps):
    """Bit for bit over many steps, and so is the state; a parameter is its master, rounded."""

    def train(*args, **options):
        training = Training(row, dtype, *args, state_dtype=state_dtype, **options)
        found = []
        for step in range(steps):
            training.step()
            if step in (0, 1, 19, 199):
                found += [training.weights(), training.state()]
        return training, found

    _, expected = train(torch.float32)
    for where, (training, found) in everywhere(lambda: train(dtype, master_weights=True)):
        assert_same_bits(found, expected, where)
        for param, weights in zip(training.params, training.weights(), strict=True):
            if param.dtype == dtype:
                assert_same_bits(param.detach(), rounded(weights, dtype), where)
    _, found = train(dtype, torch.float32, master_weights=True)
    assert_same_bits(found, expected, "gradients of float32")


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(size, generator=generator).to(dtype) for size in ((), (0,), (5,), (600, 3), (20000,))]
    return [torch.nn.Parameter(t) for t in [*numbers, torch.randn(40, 30, generator=generator).to(dtype).t()]]


@every_row
@every_dtype
def test_gradients_of_float32(row, dtype):
    """Without masters: the update in float32, rounded once to nearest even. The norm and its factor are in float32."""
    for options in ({}, {"max_grad_norm": 0.5}):

        def train(options=options):
            wide, narrow = parameters(torch.float32), parameters(dtype)
            ours = row.ours(narrow, **row.plain, state_dtype=torch.float32, **options)
            for step in range(4):
                for param, source in zip(wide, narrow, strict=True):
                    param.data = source.detach().float()
                theirs = row.ours(wide, **row.plain, **options)
                theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
                give_gradients(wide, step)
                for param, source in zip(narrow, wide, strict=True):
                    param.grad_dtype = None
                    param.grad = source.grad.clone()
                theirs.step()
                ours.step()
                assert_same_bits([p.detach() for p in narrow], [p.detach().to(dtype) for p in wide], f"{step}")
            return [param.detach() for param in narrow]

        before = sum(torch_steps.values())
        results = everywhere(train)
        assert sum(torch_steps.values()) == before
        assert all(len(result) == 6 for _, result in results)


# ---- parameters that are changed from outside


@every_row
@every_dtype
def test_parameter_changed_from_outside_is_followed(row, dtype):
    """Of bfloat16 beside the remainder that there is; of float16 what was changed begins anew, the rest goes on."""
    params = [torch.nn.Parameter(torch.linspace(-3, 3, 77).to(dtype))]
    wide = [torch.nn.Parameter(params[0].detach().float())]
    options = {**row.plain, "state_dtype": torch.float32}
    ours, theirs = row.ours(params, **options, master_weights=True), row.ours(wide, **options)
    for step in range(6):
        give_gradients(params, step)
        wide[0].grad = params[0].grad.float()
        if step in (2, 4):
            with torch.no_grad():
                before = fastopt.master_weights(ours)[params[0]]
                params[0][10:40] = torch.linspace(5, 7, 30).to(dtype)
                params[0][50] = math.inf if step == 4 else -0.0
                after = fastopt.master_weights(ours)[params[0]]
                assert_same_bits(rounded(after, dtype), params[0].detach())
                assert torch.equal(after[40:50], before[40:50])
                if dtype == torch.float16:
                    changed = params[0] != before.half()
                    assert torch.equal(after[changed], params[0].detach().float()[changed])
                wide[0].copy_(after)
        ours.step()
        theirs.step()
        assert_same_bits(fastopt.master_weights(ours)[params[0]], wide[0].detach(), f"step {step}")


# ---- averages, clipping, weights for others


@every_row
@every_dtype
def test_averages_are_of_the_masters(row, dtype):
    def train(param_dtype, **options):
        training = Training(row, dtype, param_dtype, ema_decay=0.9, state_dtype=torch.float32, **options)
        for step in range(6):
            grads = [param.grad for param in training.params]
            if step in (1, 3):  # some have none
                for param in training.params[::3]:
                    param.grad = None
            training.step()
            for param, grad in zip(training.params, grads, strict=True):
                param.grad = grad
        return [training.optimizer.state[param]["ema"] for param in training.params]

    expected = train(torch.float32)
    for where, found in everywhere(lambda: train(dtype, master_weights=True)):
        assert_same_bits(found, expected, where)


@every_row
@every_dtype
@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_clipping_in_the_step_is_clipping_before_it(row, dtype, option):
    both = []
    for folded in (False, True):
        params = parameters(dtype)
        optimizer = row.ours(params, **row.plain, **{option: True}, **({"max_grad_norm": 1.0} if folded else {}))
        for step in range(3):
            give_gradients(params, step)
            if not folded:
                fastopt.clip_grad_norm_(params, 1.0)
            optimizer.step()
        both.append(snapshot(optimizer))
    assert_same_bits(*both)


@every_dtype
def test_a_nan_from_outside_is_in_the_master(dtype):
    params = [torch.nn.Parameter(torch.ones(2, dtype=dtype))]
    optimizer = fastopt.SGD(params, lr=0.1, master_weights=True)
    give_gradients(params, 0)
    optimizer.step()
    params[0].data[1] = math.nan
    assert fastopt.master_weights(optimizer)[params[0]].isnan().tolist() == [False, True]


@pytest.mark.parametrize("option", ["master_weights", "ema_decay", "stochastic_rounding"])
def test_a_state_without_step_is_refused_also_where_it_lacks_more(option):
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    plain = fastopt.Adam([param])
    param.grad = torch.ones_like(param)
    plain.step()
    optimizer = fastopt.Adam([param], **{option: 0.9 if option == "ema_decay" else True})
    optimizer.state[param] = {name: value for name, value in plain.state[param].items() if name != "step"}
    before = param.detach().clone()
    with pytest.raises(KeyError, match=r"state\['step'\] of parameter 0"):
        optimizer.step()
    assert torch.equal(param, before) and optimizer.state[param].keys() == {"exp_avg", "exp_avg_sq"}


def test_a_model_in_float32_of_the_masters():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).bfloat16()
    model[2].float()
    model[0].bias.requires_grad_(False)
    optimizer = fastopt.AdamW(model.parameters(), lr=1e-4, master_weights=True)
    for function in (fastopt.master_weights, lambda it: fastopt.fp32_copy(model, it)):
        with pytest.raises(ValueError, match="no optimizer has master weights"):
            function(optimizer)
    for step in range(3):
        give_gradients([param for param in model.parameters() if param.requires_grad], step)
        optimizer.step()
    masters = fastopt.master_weights(optimizer)
    assert masters.keys() == {model[0].weight, model[1].weight, model[1].bias}
    before = copy.deepcopy(model.state_dict())
    full = fastopt.fp32_copy(model, optimizer)
    assert {t.dtype for t in full.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(full[0].weight, masters[model[0].weight]) and torch.equal(full[2].weight, model[2].weight)
    assert torch.equal(full[0].bias, model[0].bias.float()) and full[2].weight is not model[2].weight
    assert not torch.equal(full[0].weight, model[0].weight.float())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---- stochastic rounding


def philox_halves(seed, step, position, count):
    """16 bits for each element, by numpy's integers: csrc/step/philox.h says of what."""
    block = np.arange((count + 7) // 8, dtype=np.uint64)
    low, mask, shift = np.uint64(0xFFFFFFFF), np.uint64(0xFFFFFFFF), np.uint64(32)
    words = [block & low, (block >> shift) + np.uint64(step >> 32 << 16)]
    words += [np.full_like(block, word) for word in (step & 0xFFFFFFFF, position)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (b >> shift) ^ words[1] ^ np.uint64(key[0]),
            b & mask,
            (a >> shift) ^ words[3] ^ np.uint64(key[1]),
            a & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    halves = np.stack([word >> np.uint64(s) & np.uint64(0xFFFF) for word in words for s in (0, 16)], axis=1)
    return halves.reshape(-1)[:count].astype(np.int64)


def stochastically(wide, dtype, randoms):
    """Between the two neighbours, by how much of their distance is cut off, in 2^-16 of it."""
    if dtype == torch.bfloat16:
        bits = (wide.view(torch.int32).long() & 0xFFFFFFFF).numpy() + randoms >> 16
        near = torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    else:
        number = wide.double().abs().numpy()
        unit = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(number, 2.0**-30))) - 10, -24)
        parts = np.floor(number / unit * 2.0**16)
        random = np.where(number >= 2.0**-14, randoms >> 3 << 3, randoms)
        near = torch.from_numpy(np.floor((parts + random) / 2.0**16) * unit).copysign(wide.double()).half()
    return torch.where(wide.isfinite(), near, wide.to(dtype))


@every_row
@every_dtype
def test_stochastic_rounding_is_of_the_update_in_float32(row, dtype):
    """By the published generator's bits: key the seed, counter the element, the step and the parameter's position."""
    seed = 2**63 + 12345
    rounding = {"stochastic_rounding": True, "rounding_seed": seed, "state_dtype": torch.float32}

    def train():
        narrow, wide = parameters(dtype), parameters(torch.float32)
        ours = row.ours(narrow[:2], **row.plain, **rounding)
        ours.add_param_group({"params": narrow[2:]})
        for step in range(1, 5):
            for param, source in zip(wide, narrow, strict=True):
                param.data = source.detach().float()
            theirs = row.ours(wide[:2], **row.plain)
            theirs.add_param_group({"params": wide[2:]})
            theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
            give_gradients(narrow, step)
            for param, source in zip(wide, narrow, strict=True):
                param.grad = source.grad.float()
            theirs.step()
            ours.step()
            for position, (param, source) in enumerate(zip(narrow, wide, strict=True)):
                flat = source.detach().t() if source.dim() == 2 and position == 5 else source.detach()
                expected = stochastically(
                    flat.reshape(-1), dtype, philox_halves(seed, step, position, param.numel())
                ).view(flat.shape)
                actual = param.detach().t() if position == 5 else param.detach()
                assert_same_bits(actual, expected, f"step {step}, parameter {position}")
        return snapshot(ours)

    results = everywhere(train)
    for where, result in results:
        assert_same_bits(result, results[0][1], where)


@every_row
@every_dtype
def test_stochastic_rounding_goes_on_where_it_was(row, dtype):
    """A resumed run has the bits of one that was not interrupted, whatever seed its optimizer was given."""

    def make(params, **options):
        return row.ours(params, **row.plain, stochastic_rounding=True, **options)

    def steps(optimizer, params, which):
        for step in which:
            give_gradients(params, step)
            optimizer.step()

    params = parameters(dtype)
    whole = make(params, rounding_seed=7)
    steps(whole, params, range(3))
    file = io.BytesIO()
    torch.save([copy.deepcopy(whole.state_dict()), [p.detach().clone() for p in params]], file)
    file.seek(0)
    state, values = torch.load(file)
    pickled = pickle.loads(pickle.dumps(whole))
    steps(whole, params, range(3, 6))
    again = [torch.nn.Parameter(value) for value in values]
    resumed = make(again, rounding_seed=8)
    resumed.load_state_dict(state)
    steps(resumed, again, range(3, 6))
    assert_same_bits(snapshot(resumed), snapshot(whole), "resumed")
    steps(pickled, [p for group in pickled.param_groups for p in group["params"]], range(3, 6))
    assert_same_bits(snapshot(pickled), snapshot(whole), "pickled")
    other = parameters(dtype)
    steps(make(other, rounding_seed=8), other, range(6))
    assert not torch.equal(other[4], params[4])
    # torch's takes the checkpoint and goes on, and ours without the option; and with it, what those have saved
    for cls in (row.theirs, row.ours):
        theirs = cls([torch.nn.Parameter(p.detach().clone()) for p in params], **row.plain)
        theirs.load_state_dict(whole.state_dict())
        mine = theirs.param_groups[0]["params"]
        steps(theirs, mine, [6])
        back = make(mine)
        back.load_state_dict(theirs.state_dict())
        steps(back, mine, [7])
        assert all(entry["rounding_seed"] == 7 for entry in back.state.values())


@every_dtype
def test_stochastic_rounding_is_unbiased(dtype):
    """The mean of 10^6 draws is the number, within 4 sigma."""
    for value in (1 + 2**-12, -3.3, 2**-16 * 1.37, 1 + 2**-20):
        param = torch.nn.Parameter(torch.zeros(10**6, dtype=dtype))
        optimizer = fastopt.SGD([param], lr=1.0, stochastic_rounding=True)
        param.grad_dtype = None
        param.grad = torch.full((10**6,), -value)
        optimizer.step()
        value = float(np.float32(value))
        found = param.detach().double()
        below, above = sorted(set(found.tolist()))[:: max(1, len(set(found.tolist())) - 1)]
        assert below <= value <= above and len(set(found.tolist())) == 2
        sigma = math.sqrt((value - below) * (above - value) / 10**6)
        assert abs(float(found.mean()) - value) <= 4 * sigma


# ---- options, checkpoints, refused steps


@every_row
def test_bad_options(row):
    params = parameters(torch.bfloat16)
    with pytest.raises(ValueError, match="exclude each other"):
        row.ours(params, **row.plain, master_weights=True, stochastic_rounding=True)
    for seed in (-1, 2**64, 0.5, None):
        with pytest.raises(ValueError, match="Invalid rounding_seed value"):
            row.ours(params, **row.plain, stochastic_rounding=True, rounding_seed=seed)
    optimizer = row.ours(params, **row.plain, stochastic_rounding=True)
    give_gradients(params, 1)
    optimizer.step()
    for seed in ("x", 0.5, -1, 2**64, torch.ones(2)):
        optimizer.state[params[3]]["rounding_seed"] = seed
        before = copy.deepcopy([param.detach() for param in params])
        with pytest.raises(ValueError, match=re.escape(f"Invalid rounding_seed value: {seed!r}")):
            optimizer.step()
        assert_same_bits([param.detach() for param in params], before)
    optimizer.state[params[3]]["rounding_seed"] = torch.tensor(7)
    optimizer.step()
    assert optimizer.state[params[3]]["rounding_seed"] == 7


@every_row
@every_dtype
def test_masters_in_checkpoints(row, dtype):
    """Kept by ours; after torch's, or of an optimizer without, they are the parameters, and it is said once."""

    def make(params):
        return row.ours(params, **row.plain, master_weights=True)

    params = parameters(dtype)
    optimizer = make(params)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    name = COMPANION[dtype]
    saved = copy.deepcopy(optimizer.state_dict())
    assert all(entry[name].dtype in (torch.int16, torch.float32) for entry in saved["state"].values())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = make(copies)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.load_state_dict(saved)
    twins = [loaded, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    give_gradients(params, 3)
    optimizer.step()
    for twin in twins:
        give_gradients([p for group in twin.param_groups for p in group["params"]], 3)
        twin.step()
        assert_same_bits(snapshot(twin), snapshot(optimizer))

    theirs = row.theirs([torch.nn.Parameter(p.detach().clone()) for p in params], **row.plain)
    theirs.load_state_dict(saved)
    plain = row.ours([torch.nn.Parameter(p.detach().clone()) for p in params], **row.plain)
    give_gradients(plain.param_groups[0]["params"], 1)
    plain.step()
    for other in (theirs, plain):
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        loaded = make(copies)
        with pytest.warns(UserWarning, match="the loaded state of 6 bfloat16 or float16 parameters has no master"):
            loaded.load_state_dict(copy.deepcopy(other.state_dict()))
        anew = make([torch.nn.Parameter(p.detach().clone()) for p in params])
        without = other.state_dict()
        without["state"] = {k: {n: v for n, v in e.items() if n != name} for k, e in without["state"].items()}
        with pytest.warns(UserWarning):
            anew.load_state_dict(without)
        for it in (loaded, anew):
            give_gradients(it.param_groups[0]["params"], 4)
            it.step()
        assert_same_bits(snapshot(loaded), snapshot(anew))
        assert any(entry[name].any() for entry in loaded.state.values())

    cast = {param: entry[name].to(dtype) for param, entry in loaded.state.items()}
    expected = make([torch.nn.Parameter(p.detach().clone()) for p in loaded.param_groups[0]["params"]])
    with pytest.warns(UserWarning):
        expected.load_state_dict(copy.deepcopy(torchs_load(row.theirs, loaded).state_dict()))
    for param, value in cast.items():
        loaded.state[param][name] = value
    for it in (loaded, expected):
        give_gradients(it.param_groups[0]["params"], 5)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if it is expected else "ignore")
            it.step()
    assert_same_bits(snapshot(loaded), snapshot(expected), "cast in place")

    before = copy.deepcopy(snapshot(loaded))
    saved["state"][3][name] = saved["state"][3][name][:5]
    with pytest.raises(ValueError, match=f"loaded '{name}' of parameter 3 has shape"):
        loaded.load_state_dict(saved)
    assert_same_bits(snapshot(loaded), before)


@every_row
@every_dtype
def test_refused_steps_change_nothing(row, dtype):
    for option in ("master_weights", "stochastic_rounding"):
        for steps in (0, 2):
            params = parameters(dtype)
            optimizer = row.ours(params, **row.plain, **{option: True})
            for step in range(steps):
                give_gradients(params, step)
                optimizer.step()
            give_gradients(params, 5)
            before, entries = copy.deepcopy(snapshot(optimizer)), len(optimizer.state)
            params[-1].data = params[-1].data[:10]
            with pytest.raises(RuntimeError, match="has shape"):
                optimizer.step()
            params[-1].data = torch.randn(40, 30).to(dtype).t()
            params[-1].data.copy_(dict_of(before)[5])
            assert_same_bits(snapshot(optimizer), before)
            assert len(optimizer.state) == entries
            complex_one = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
            complex_one.grad = torch.ones_like(complex_one)
            optimizer.add_param_group({"params": [complex_one]})
            with pytest.raises(RuntimeError, match=f"{option}: torch's own step would have to run.*complex"):
                optimizer.step()
            assert torch.equal(complex_one, torch.ones(3)) and not optimizer.state.get(complex_one, {}).get("step")
    if steps:
        name = COMPANION[dtype]
        params = parameters(dtype)
        optimizer = row.ours(params, **row.plain, master_weights=True)
        give_gradients(params, 0)
        optimizer.step()
        optimizer.state[params[3]][name] = optimizer.state[params[3]][name][:5]
        before = copy.deepcopy(snapshot(optimizer))
        with pytest.raises(RuntimeError, match=rf"state\['{name}'\] of parameter 3 of param group 0 has shape"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)


def torchs_load(cls, optimizer):
    """torch's optimizer of copies of the parameters, with the state."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    made = cls(params)
    made.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return made


def dict_of(snapshot):
    """The parameters in a snapshot of parameters of one dtype."""
    ((shapes, flat),) = (value for key, value in snapshot.items() if key[0] == "param")
    parts = flat.split([shape.numel() for _, shape in shapes])
    return {index: part.view(shape) for (index, shape), part in zip(shapes, parts, strict=True)}


@every_row
@every_dtype
@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
@pytest.mark.parametrize("grad_dtype", [None, torch.float32], ids=str)
def test_hot_step_allocates_nothing_and_is_only_compared(row, dtype, option, grad_dtype):
    params = [*parameters(dtype), *parameters(torch.float32)]
    for param in params:
        param.grad_dtype = grad_dtype if grad_dtype is not None else param.dtype
    optimizer = row.ours(params, **row.plain, **{option: True}, max_grad_norm=1.0, ema_decay=0.99)
    grads = [torch.randn_like(param, dtype=param.grad_dtype) for param in params]
    for step in range(6):
        if step == 2:
            before = fastopt._C.counters()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    assert fastopt._C.counters() == before


@every_row
def test_state_of_parameters_that_need_none_is_torchs(row):
    params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float64, torch.bfloat16)]
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for option in ("master_weights", "stochastic_rounding"):
        ours, theirs = row.ours(params, **row.plain, **{option: True}), row.ours(plain, **row.plain)
        for it in (params, plain):
            give_gradients(it, 1)
        ours.step()
        theirs.step()
        for param, other in zip(params[:2], plain, strict=False):
            assert ours.state[param].keys() == theirs.state[other].keys()
            assert torch.equal(param, other)
        own = ours.state[params[2]].keys() - theirs.state[plain[2]].keys()
        assert own - {"step"} == {"remainder" if option == "master_weights" else "rounding_seed"}


def test_an_update_too_small_for_bfloat16():
    """What this is for: 1000 steps of 2^-12 move a 1 by a quarter; bfloat16 alone stays where it is."""
    ends = {}
    for option in (None, "master_weights", "stochastic_rounding"):
        param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = fastopt.SGD([param], lr=2**-12, **({} if option is None else {option: True}))
        for _ in range(1024):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends[option] = param.detach().float().mean().item()
    assert ends[None] == 1 and ends["master_weights"] == 0.75 and abs(ends["stochastic_rounding"] - 0.75) < 2e-3

"""Checkpoints that change hands between torch.optim and fastopt in mid-training, and those that are refused."""

import copy
import functools
import io
import warnings

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from fastopt.swa_utils import averaged_copy, averaged_parameters

from . import reference
from .optimizers import ROWS
from .reference import assert_same_bits, drive, fresh, snapshot

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def relay(legs, values, grads_per_step, edit=None):
    """Trains in turns: each (make, step) of `legs` takes over parameters and state from the one before through a file.

    `edit` changes every file on its way. Returns the snapshots of all legs.
    """
    share = len(grads_per_step) // len(legs)
    snapshots, saved = [], None
    for number, (make, step) in enumerate(legs):
        optimizer = make(fresh(values if saved is None else saved["params"]))
        if saved is not None:
            if edit is not None:
                edit(saved["optimizer"])
            optimizer.load_state_dict(saved["optimizer"])
        snapshots += drive(optimizer, grads_per_step[number * share : (number + 1) * share], step)
        params = [p.detach() for p in optimizer.param_groups[0]["params"]]
        saved = through_a_file({"params": params, "optimizer": optimizer.state_dict()})
    return snapshots


def some_values():
    """None of no dimension: with a float64 tensor lr torch computes those in float64."""
    return [torch.randn(shape) for shape in ((33,), (4, 3), (1,))]


@every_row
def test_there_and_back(row):
    """torch -> fastopt -> torch, and the other way, for every combination of options: as if torch had done it all."""
    values = some_values()
    for options in row.combinations():
        grads_per_step = [[torch.randn(v.shape) for v in values] for _ in range(6)]
        ours = (row.make_ours(copy.deepcopy(options)), None)
        theirs = (row.make_reference(copy.deepcopy(options)), reference.step)
        expected = relay([theirs] * 3, values, grads_per_step)
        assert_same_bits(relay([theirs, ours, theirs], values, grads_per_step), expected, f"{row.name} {options}")
        assert_same_bits(relay([ours, theirs, ours], values, grads_per_step), expected, f"{row.name} {options}")


@every_row
def test_checkpoint_of_fused_and_capturable_torch(row):
    """`fused=True, capturable=True` on a GPU, loaded with map_location="cpu": what the flags say is for there."""
    values = some_values()
    grads_per_step = [[torch.randn(v.shape) for v in values] for _ in range(6)]

    def as_from_a_gpu(saved):
        for group in saved["param_groups"]:
            group.update({"fused": True, "foreach": False}, **({"capturable": True} if "capturable" in group else {}))
        for entry in saved["state"].values():
            if "step" in entry:
                entry["step"] = entry["step"].to(torch.float32)

    ours = (row.make_ours(row.plain), None)
    theirs = (row.make_reference(row.plain), reference.step)
    expected = relay([theirs] * 2, values, grads_per_step)
    assert_same_bits(relay([theirs, ours], values, grads_per_step, as_from_a_gpu), expected, row.name)


@pytest.mark.parametrize("how", ["fused", "foreach"])
@every_row
def test_checkpoint_of_torchs_other_implementations(row, how):
    """Written by torch with fused or foreach; fastopt goes on with the bits of torch's for-loop from there."""
    if how == "fused" and not row.has_fused:
        pytest.skip("torch has no fused kernel of it")
    (param,) = fresh([torch.randn(33)])
    optimizer = row.theirs([param], **row.plain, **{how: True})
    drive(optimizer, [[torch.randn(33)] for _ in range(3)])
    saved = through_a_file({"value": param.detach(), "optimizer": optimizer.state_dict()})
    grads_per_step = [[torch.randn(33)] for _ in range(3)]
    runs = []
    for make, step in ((row.make_ours(row.plain), None), (row.make_reference(row.plain), reference.step)):
        other = make(fresh([saved["value"]]))
        other.load_state_dict(copy.deepcopy(saved["optimizer"]))
        other.param_groups[0].update(foreach=False, **({"fused": None} if "fused" in other.param_groups[0] else {}))
        runs.append(drive(other, grads_per_step, step))
    assert_same_bits(*runs, row.name)


@every_row
def test_how_it_runs_keeps_this_optimizers_values(row):
    """Whatever the file says, and whatever this optimizer has; torch, given our file, takes ours."""
    file = row.theirs(fresh(some_values()), **row.plain).state_dict()
    how = [key for key in ("foreach", "fused", "capturable", "differentiable") if key in file["param_groups"][0]]
    assert "foreach" in how and "differentiable" in how
    for own in ({}, {"foreach": True}, *[{"fused": True}] * row.has_fused, {"differentiable": True}):
        optimizer = row.ours(fresh(some_values()), **row.plain, **own)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "foreach": False})
        before = [{key: group[key] for key in how} for group in optimizer.param_groups]
        for value in (True, False, None):
            saved = copy.deepcopy(optimizer.state_dict())
            for group in saved["param_groups"]:
                group.update(dict.fromkeys(how, value), lr=0.75)
            optimizer.load_state_dict(saved)
            assert [{key: group[key] for key in how} for group in optimizer.param_groups] == before
            assert [group["lr"] for group in optimizer.param_groups] == [0.75, 0.75]


STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)


@pytest.mark.parametrize("saved", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("stored", STATE_DTYPES[:4], ids=str)
@every_row
def test_state_of_every_dtype_loads_and_steps(row, stored, saved):
    """State keeps the file's dtype where the arithmetic holds it, and is torch's cast where not."""
    (param,) = fresh([torch.randn(9).to(stored)])
    optimizer = row.ours([param], **row.plain)
    drive(optimizer, [[torch.randn(9).to(stored)]])
    file = through_a_file(optimizer.state_dict())
    for name in row.slots:
        file["state"][0][name] = file["state"][0][name].to(saved)
    optimizer.load_state_dict(file)
    kept = saved in STATE_DTYPES[:3] or saved == stored
    for name in row.slots:
        assert optimizer.state[param][name].dtype == (saved if kept else stored)
        assert torch.equal(
            optimizer.state[param][name].double(), file["state"][0][name].to(stored if not kept else saved).double()
        )
    before = param.detach().clone()
    drive(optimizer, [[torch.randn(9).to(stored)]] * 2)
    assert not torch.equal(param, before) and param.isfinite().all()


@pytest.mark.parametrize("state_dtype", STATE_DTYPES[:3], ids=str)
@pytest.mark.parametrize("stored", STATE_DTYPES[:4], ids=str)
@every_row
def test_state_dtype_converts_what_is_loaded(row, stored, state_dtype):
    """From torch's file and from ours of any dtype, rounded to nearest even; torch casts ours to its parameter's."""
    values, grads = [torch.randn(9).to(stored)], [[torch.randn(9).to(stored)] for _ in range(2)]
    for make in (row.theirs, row.ours, functools.partial(row.ours, state_dtype=torch.float16)):
        other = make(fresh(values), **row.plain)
        drive(other, grads)
        file = through_a_file(other.state_dict())
        file["state"][0]["another"] = torch.ones(9)
        optimizer = row.ours(fresh(values), **row.plain, state_dtype=state_dtype)
        optimizer.load_state_dict(file)
        (entry,), ours = optimizer.state.values(), torch.float64 if stored == torch.float64 else state_dtype
        assert entry["another"].dtype == torch.float32  # of somebody else
        for name in row.slots:
            kept = file["state"][0][name].dtype == ours or stored != torch.float64
            assert_same_bits(entry[name], file["state"][0][name].to(ours if kept else entry[name].dtype), name)
        drive(optimizer, grads)
        back = row.theirs(fresh(values), **row.plain)
        back.load_state_dict(through_a_file(optimizer.state_dict()))
        for name in row.slots:
            assert_same_bits(back.state[back.param_groups[0]["params"][0]][name], entry[name].to(stored), name)


def without(saved, name):
    saved["state"][1].pop(name)


def of_none(saved, name):
    saved["state"][1][name] = None


def of_another_shape(saved, name):
    saved["state"][1][name] = torch.ones(2, 2) if name != "step" else torch.ones(2)


def of_one_element_less(saved, name):
    saved["state"][1][name] = torch.ones(11) if name != "step" else torch.ones(0)


def of_no_tensor(saved, name):
    saved["state"][1][name] = "lost"


@pytest.mark.parametrize("spoil", [without, of_none, of_another_shape, of_one_element_less, of_no_tensor])
@every_row
def test_incomplete_and_misshapen_state_is_refused(row, spoil):
    """With the parameter's index and the entry's name in the text, and nothing loaded by half."""
    for name in (*row.slots, *["step"] * (row.name != "SGD")):
        if row.name == "SGD" and spoil in (without, of_none):
            continue  # SGD makes a new buffer, as torch does
        optimizer = row.ours(fresh(some_values()), **row.plain)
        drive(optimizer, [[torch.randn(p.shape) for p in optimizer.param_groups[0]["params"]]])
        saved = copy.deepcopy(optimizer.state_dict())
        drive(optimizer, [[torch.randn(p.shape) for p in optimizer.param_groups[0]["params"]]])
        saved["param_groups"][0]["lr"] = 0.75
        spoil(saved, name)
        before, groups = snapshot(optimizer), [dict(group) for group in optimizer.param_groups]
        identities = [id(value) for entry in optimizer.state.values() for value in entry.values()]
        with pytest.raises(ValueError, match=rf"'{name}'.*parameter 1|parameter 1.*'{name}'"):
            optimizer.load_state_dict(saved)
        assert_same_bits(snapshot(optimizer), before)
        assert [{**group, "params": None} for group in optimizer.param_groups] == [
            {**g, "params": None} for g in groups
        ]
        assert [id(value) for entry in optimizer.state.values() for value in entry.values()] == identities


@every_row
def test_torchs_own_refusals(row):
    """Another number of groups or parameters: torch's error, and nothing changed."""
    optimizer = row.ours(fresh(some_values()), **row.plain)
    drive(optimizer, [[torch.randn(p.shape) for p in optimizer.param_groups[0]["params"]]])
    before = snapshot(optimizer)
    for params in (some_values()[:2], [{"params": fresh(some_values())}, {"params": fresh(some_values())}]):
        other = row.theirs(fresh(params) if isinstance(params[0], torch.Tensor) else params, **row.plain)
        errors = []
        for target in (optimizer, row.theirs(fresh(some_values()), **row.plain)):
            with pytest.raises(ValueError) as caught:
                target.load_state_dict(other.state_dict())
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
        assert_same_bits(snapshot(optimizer), before)


@every_row
def test_absent_entries_and_group_keys(row):
    """A parameter without state starts anew, and options that the file's version did not have get torch's defaults."""
    values = some_values()
    runs = []
    for make, step in ((row.make_ours(row.plain), None), (row.make_reference(row.plain), reference.step)):
        torch.manual_seed(3)
        optimizer = make(fresh(values))
        drive(optimizer, [[torch.randn(v.shape) for v in values]], step)
        saved = through_a_file(optimizer.state_dict())
        saved["state"].pop(1, None)
        for group in saved["param_groups"]:
            for key in ("foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
                group.pop(key, None)
        other = make(fresh(values))
        other.load_state_dict(saved)
        keys = sorted(other.param_groups[0])
        other.param_groups[0]["foreach"] = False
        if row.name == "Adagrad":  # has no entry but from its constructor
            other.state[other.param_groups[0]["params"][1]] = copy.deepcopy(
                make(fresh(values[1:2])).state_dict()["state"][0]
            )
        runs.append([*drive(other, [[torch.randn(v.shape) for v in values]] * 2, step), {"keys": keys}])
    assert_same_bits(*runs, row.name)


@every_row
def test_a_file_is_not_changed_by_loading(row):
    """Also its flags and step counts stay, so that it can be loaded once more, elsewhere."""
    optimizer = row.ours(fresh(some_values()), **row.plain)
    drive(optimizer, [[torch.randn(p.shape) for p in optimizer.param_groups[0]["params"]]])
    saved = through_a_file(optimizer.state_dict())
    saved["param_groups"][0]["foreach"] = True
    untouched = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    assert saved["param_groups"] == untouched["param_groups"]
    assert_same_bits(saved["state"], untouched["state"])


# ---- torch.distributed.checkpoint, which loads what is in the state already


class Params(torch.nn.Module):
    """Parameters of each dtype in a model, whose names are those in the checkpoint."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [((33,), torch.bfloat16), ((4, 3), torch.float16), ((5, 7), torch.float32), ((1,), torch.float64)]
        values = [torch.randn(size, generator=generator).to(dtype) for size, dtype in sizes]
        self.list = torch.nn.ParameterList(values)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        optimizer.step()


def save(model, optimizer, path, options):
    parts = get_state_dict(model, optimizer, options=options)
    checkpoint.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=path, no_dist=True)


def load(model, optimizer, path, options, partial=False):
    parts = get_state_dict(model, optimizer, options=options)
    state = dict(zip(("model", "optimizer"), parts, strict=True))
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=partial)
    checkpoint.load(state, checkpoint_id=path, planner=planner, no_dist=True)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )


# What a step adds to the state, together.
ALL_OPTIONS = (
    {"ema_decay": 0.9, "master_weights": True, "state_dtype": torch.float32, "max_grad_norm": 1.0},
    {"ema_decay": 0.9, "stochastic_rounding": True, "rounding_seed": 3, "state_dtype": torch.bfloat16},
)
every_option = pytest.mark.parametrize("options", ALL_OPTIONS, ids=["master_weights", "stochastic_rounding"])
alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
flattened = pytest.mark.parametrize("how", [StateDictOptions(flatten_optimizer_state_dict=f) for f in (False, True)])


@alone
@flattened
@every_option
@every_row
def test_distributed_checkpoint_goes_on_with_the_same_bits(row, options, how, tmp_path):
    """Of all that the options keep in the state; the optimizer that loads it is new, and has another seed."""
    whole = Params(0)
    optimizer = row.ours(whole.parameters(), **row.plain, **options)
    train(whole, optimizer, range(3))
    save(whole, optimizer, tmp_path, how)
    train(whole, optimizer, range(3, 6))
    again = Params(1)
    resumed = row.ours(again.parameters(), **row.plain, **{**options, "rounding_seed": 8})
    load(again, resumed, tmp_path, how)
    train(again, resumed, range(3, 6))
    assert_same_bits(snapshot(resumed), snapshot(optimizer), row.name)


@alone
@flattened
@every_option
@every_row
def test_distributed_checkpoint_of_torchs(row, options, how, tmp_path):
    """With DCP's allow_partial_load, what torch's lacks begins as after load_state_dict: the average too."""
    model = Params(0)
    theirs = row.theirs(model.parameters(), foreach=False, **row.plain)
    train(model, theirs, range(3))
    save(model, theirs, tmp_path, how)

    expected = row.ours(model.parameters(), **row.plain, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected.load_state_dict(copy.deepcopy(theirs.state_dict()))
    again = Params(1)
    optimizer = row.ours(again.parameters(), **row.plain, **options)
    with pytest.raises(BaseException, match="Missing key in checkpoint state_dict: optimizer.state.list.0"):
        load(again, optimizer, tmp_path, how)
    load(again, optimizer, tmp_path, how, partial=True)
    with pytest.raises(ValueError, match="no optimizer has running averages"):
        averaged_copy(again, optimizer)
    if row.name == "SGD":  # torch's has no count, and DCP lets an optimizer step once to make state
        for entry in optimizer.state.values():
            entry.pop("step", None)
    for step in range(3, 6):
        train(model, expected, [step])
        train(again, optimizer, [step])
        assert_same_bits(snapshot(optimizer), snapshot(expected), f"{row.name}, step {step}")


@every_option
@every_row
def test_a_flattened_state_dict_of_torchs(row, options):
    """set_optimizer_state_dict fills in an empty dict for what it lacks."""
    how = StateDictOptions(flatten_optimizer_state_dict=True)
    model = Params(0)
    theirs = row.theirs(model.parameters(), foreach=False, **row.plain)
    train(model, theirs, range(3))
    again, expected = Params(0), row.ours(model.parameters(), **row.plain, **options)
    again.load_state_dict(model.state_dict())
    optimizer = row.ours(again.parameters(), **row.plain, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if "master_weights" in options else "error", UserWarning)
        expected.load_state_dict(copy.deepcopy(theirs.state_dict()))
        set_optimizer_state_dict(again, optimizer, get_optimizer_state_dict(model, theirs, options=how), options=how)
    train(model, expected, range(3, 6))
    train(again, optimizer, range(3, 6))
    assert_same_bits(snapshot(optimizer), snapshot(expected), row.name)


@every_row
def test_averages_begin_with_the_first_step_that_trains(row):
    """Not with that by which DCP makes state; whether something is loaded then or not."""
    model = Params(0)
    optimizer = row.ours(model.parameters(), **row.plain, ema_decay=0.9)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = Params(0)
    loaded = row.ours(other.parameters(), **row.plain, ema_decay=0.9)
    set_optimizer_state_dict(other, loaded, saved)
    plain = row.ours(other.parameters(), **row.plain)
    plain.load_state_dict(copy.deepcopy(loaded.state_dict()))
    with pytest.raises(ValueError, match="no optimizer has running averages"), averaged_parameters(plain):
        pass
    for it in (optimizer, loaded, copy.deepcopy(loaded)):
        params = [param for group in it.param_groups for param in group["params"]]
        with pytest.raises(ValueError, match="no optimizer has running averages"), averaged_parameters(it):
            pass
        params[2].grad, whole = torch.ones(5, 7), params[2].data
        params[2].data = torch.ones(4)
        with pytest.raises(RuntimeError, match="has shape"):
            it.step()
        params[2].data = whole
        drive(it, [[None, *[torch.ones_like(p) for p in params[1:]]]])
        assert_same_bits([it.state[p]["ema"] for p in params], [wide(p) for p in params], "the first")
        before = [wide(p) for p in params]
        drive(it, [[torch.ones_like(p) for p in params]])
        expected = [torch.lerp(b, wide(p), 1 - 0.9) for b, p in zip(before, params, strict=True)]
        assert_same_bits([it.state[p]["ema"] for p in params], expected, "the second")


def wide(param):
    return param.detach().clone() if param.dtype.itemsize >= 4 else param.detach().float()

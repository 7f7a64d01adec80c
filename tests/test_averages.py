"""fastopt.swa_utils, and fastopt in the place of torch.optim: the averages are torch's, bit for bit."""

import copy
import importlib
import inspect

import pytest
import torch
from torch.optim import swa_utils as theirs

import fastopt
from fastopt import swa_utils as ours

from .reference import assert_same_bits
from .test_clip_grad import everywhere

FUNCTIONS = {
    "mean": lambda of: {},
    "ema": lambda of: {"multi_avg_fn": of.get_ema_multi_avg_fn(0.9)},
    "slow ema": lambda of: {"multi_avg_fn": of.get_ema_multi_avg_fn(0.3)},
    "swa": lambda of: {"multi_avg_fn": of.get_swa_multi_avg_fn()},
    "avg_fn": lambda of: {"avg_fn": of.get_ema_avg_fn(0.9)},
    "own": lambda of: {"multi_avg_fn": lambda averages, values, n: torch._foreach_lerp_(averages, values, 0.5)},
}


def model(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 33), torch.nn.BatchNorm1d(33), torch.nn.Linear(33, 4100, bias=False), torch.nn.PReLU()
    ).to(dtype)


def train(module, step):
    generator = torch.Generator().manual_seed(step)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
        else:
            tensor += 3


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_averaged_model(name, dtype, use_buffers):
    module = model(dtype)
    both = [of.AveragedModel(module, use_buffers=use_buffers, **FUNCTIONS[name](of)) for of in (theirs, ours)]
    for step in range(20):
        train(module, step)
        if name in ("swa", "own") and use_buffers and step > 0:  # no function for integers, in torch either
            for averaged in both:
                with pytest.raises(RuntimeError, match="Integer division|not implemented for 'Long'"):
                    averaged.update_parameters(module)
            return
        for averaged in both:
            averaged.update_parameters(module)
        assert_same_bits(*(list(averaged.state_dict().values()) for averaged in both), f"step {step}")


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_200_updates(name):
    averages = [[torch.zeros(4099), torch.zeros(3, 7)] for _ in range(2)]
    updates = [FUNCTIONS[name](of)["multi_avg_fn"] for of in (theirs, ours)]
    for step in range(200):
        values = [torch.randn(4099), torch.randn(3, 7)]
        for update, own in zip(updates, averages, strict=True):
            update(own, values, torch.tensor(step))
        assert_same_bits(*averages, f"step {step}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_same_everywhere(dtype):
    averages, values = ([torch.randn(n, 3).to(dtype) for n in (0, 1, 8, 1366, 20000)] for _ in range(2))
    expected = copy.deepcopy(averages)
    theirs.get_ema_multi_avg_fn(0.9)(expected, values, 1)

    def average():
        own = copy.deepcopy(averages)
        ours.get_ema_multi_avg_fn(0.9)(own, values, 1)
        return own

    for where, result in everywhere(average):
        assert_same_bits(result, expected, where)


def test_checkpoints_go_both_ways():
    module = model()
    for first, second in ((theirs, ours), (ours, theirs)):
        saved = first.AveragedModel(module, multi_avg_fn=first.get_ema_multi_avg_fn(0.9))
        for step in range(3):
            train(module, step)
            saved.update_parameters(module)
        loaded = second.AveragedModel(module, multi_avg_fn=second.get_ema_multi_avg_fn(0.9))
        loaded.load_state_dict(saved.state_dict())
        for averaged in (saved, loaded):
            averaged.update_parameters(module)
        assert_same_bits(*(list(averaged.state_dict().values()) for averaged in (saved, loaded)), "loaded")


def test_refused_as_torch_does():
    for of in (theirs, ours):
        with pytest.raises(ValueError, match="Invalid decay value 2.0"):
            of.get_ema_multi_avg_fn(2.0)
        with pytest.raises(RuntimeError):
            of.get_ema_multi_avg_fn(0.5)([torch.zeros(3)], [torch.zeros(4)], 1)


def test_what_is_no_number_is_torchs():
    both = []
    for of in (theirs, ours):
        averages, values = [torch.tensor([3, 4])], [torch.tensor([9, 1])]
        of.get_ema_multi_avg_fn(0.5)(averages, values, 1)
        both.append(averages)
    assert_same_bits(*both, "int64")


def test_every_other_name_is_torchs_own():
    for name in dir(torch.optim):
        if not name.startswith("_") and name not in fastopt.__all__:
            assert getattr(fastopt, name) is getattr(torch.optim, name), name
        assert name in dir(fastopt)
    for name in theirs.__all__:
        assert getattr(ours, name) is getattr(theirs, name) or getattr(ours, name).__module__ == ours.__name__
    assert fastopt.lr_scheduler is importlib.import_module("fastopt.lr_scheduler") is torch.optim.lr_scheduler
    assert ours.SWALR is theirs.SWALR and ours.update_bn is theirs.update_bn
    with pytest.raises(AttributeError, match="torch.optim.*no attribute 'Adamantium'"):
        fastopt.Adamantium  # noqa: B018


def test_a_refused_update_changes_nothing():
    """torch cannot divide integer buffers, and says so each time."""
    module = torch.nn.BatchNorm1d(2)
    averaged = ours.AveragedModel(module, multi_avg_fn=ours.get_swa_multi_avg_fn(), use_buffers=True)
    averaged.update_parameters(module)
    module.weight.data.fill_(3.0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Integer division"):
            averaged.update_parameters(module)
    assert averaged.n_averaged == 1


def test_buffers_of_any_dtype_and_of_later():
    both = []
    for of in (theirs, ours):
        module = torch.nn.BatchNorm1d(2)
        module.register_buffer("complex", torch.ones(2, dtype=torch.complex64))
        module.register_buffer("integer", torch.tensor(4))
        averaged = of.AveragedModel(module, multi_avg_fn=of.get_ema_multi_avg_fn(0.3), use_buffers=True)
        averaged.update_parameters(module)
        module.register_buffer("late", torch.ones(1))
        train(module, 1)
        averaged.update_parameters(module)
        both.append(list(averaged.state_dict().values()))
    assert_same_bits(*both, "buffers")


def test_parameters_of_a_subclass():
    both = []
    for of in (theirs, ours):

        class Some(of.AveragedModel):
            def parameters(self, recurse=True):
                return iter([self.module.weight])

        module = torch.nn.Linear(2, 2)
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
        averaged = Some(module, multi_avg_fn=of.get_ema_multi_avg_fn(0.3))
        for value in (1.0, 2.0):
            for param in module.parameters():
                param.data.fill_(value)
            averaged.update_parameters(module)
        both.append([averaged.module.weight.detach(), averaged.module.bias.detach()])
    assert_same_bits(*both, "some")


def test_functions_are_called_as_torchs():
    for name in ("get_ema_multi_avg_fn", "get_swa_multi_avg_fn"):
        function, own = getattr(theirs, name)(), getattr(ours, name)()
        assert own.__name__ == function.__name__
        arguments = [[torch.zeros(2)], [torch.ones(2)], 1]
        own(**dict(zip(inspect.signature(function).parameters, arguments, strict=True)))
        assert arguments[0][0][0] > 0


def test_averages_that_share_memory_from_some_call_on():
    """Then they take turns. Each half of the memory is long: its thread would be at its beginning too early."""
    torch.set_num_threads(2)
    size, half = 400_000, 200_000
    memories = [torch.zeros(2 * size) for _ in range(2)]
    for begin in (size, half, size, half):
        values = [torch.randn(size) for _ in range(2)]
        for of, memory in zip((theirs, ours), memories, strict=True):
            of.get_ema_multi_avg_fn(0.75)([memory[:size], memory[begin : begin + size]], values, 1)
        assert_same_bits(memories[1], memories[0], f"the second from {begin} on")

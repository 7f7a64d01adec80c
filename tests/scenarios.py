"""Scenarios: functions of `make`, which makes an optimizer, that return what must be equal with fastopt's and torch's.

`same_as_torch` runs one with fastopt's class and with torch's for-loop; the rest is what scenarios are made of.
"""

import warnings

import torch
from torch import nn

import fastopt

from . import reference
from .reference import assert_same_bits, snapshot


def same_as_torch(row, scenario, ours=None, theirs=None):
    """`ours` and `theirs` are the options, by default the row's plain ones. Warnings count as results."""
    results = []
    for make in (row.make_ours(ours or row.plain), row.make_reference(theirs or row.plain)):
        torch.manual_seed(0)
        with reference.correctly_rounded_sqrt(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            snapshots = scenario(make)
        results.append((snapshots, [(warning.category, str(warning.message)) for warning in caught]))
    assert_same_bits(results[0][0], results[1][0], row.name)
    assert results[0][1] == results[1][1]
    return results[0][0]


def small_model():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def backward(model, factor=1.0):
    loss = model(torch.randn(4, 6)).square().mean() * factor
    loss.backward()
    return loss


def train(optimizer, model, steps=3):
    snapshots = []
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        snapshots.append(snapshot(optimizer))
    return snapshots


def steps_of_torch():
    """How many steps torch's own code did so far, by reason."""
    return dict(fastopt.backend_info()["torch_steps"])

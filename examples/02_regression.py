"""Regression: a tanh and a relu network learn exp(-x) sin(5x), and 30,000 SGD steps find y = 3x + 0.8.

The second part is the case where the arithmetic is nothing and the time a step costs on the host is everything: two
parameters of one element each.
"""

import time
from functools import partial

import torch
from common import COLOURS, FASTOPT, TORCH, TORCH_FUSED, arguments, curve, mlp, plt, save

import fastopt


def fit_curve(activation, steps):
    """A network of two hidden layers after `steps` Adam steps on the whole curve, and its loss at each step."""
    torch.manual_seed(0)
    model = mlp(1, 64, 64, 1, activation=activation)
    optimizer = fastopt.Adam(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    inputs, targets = curve()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return model, losses


class LinearRegression:
    """y = weight x + bias by SGD; keeps the seconds of training, those in optimizer.step(), and the way taken."""

    def __init__(self, sgd):
        self.weight = torch.zeros(1, requires_grad=True)
        self.bias = torch.zeros(1, requires_grad=True)
        self.optimizer = sgd([self.weight, self.bias], lr=0.01)
        self.inputs = torch.linspace(-1, 1, 64)
        self.targets = 3 * self.inputs + 0.8
        self.seconds = self.step_seconds = 0.0
        self.way = []

    def train(self, steps):
        begin = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = (self.weight * self.inputs + self.bias - self.targets).square().mean()
            loss.backward()
            before = time.perf_counter()
            self.optimizer.step()
            self.step_seconds += time.perf_counter() - before
        self.seconds += time.perf_counter() - begin
        self.way.append((self.weight.item(), self.bias.item()))


def race(steps, block=500):
    """Trains with each library in turns of `block` steps, so that a busy moment of the machine hits all of them."""
    runs = {
        "torch.optim": LinearRegression(torch.optim.SGD),
        "torch fused": LinearRegression(partial(torch.optim.SGD, fused=True)),
        "fastopt": LinearRegression(fastopt.SGD),
    }
    for _ in range(steps // block):
        for run in runs.values():
            run.train(block)
    return runs


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    figure, (loss_axis, fit_axis, time_axis) = plt.subplots(1, 3, figsize=(13.5, 4), width_ratios=(1, 1.15, 1))

    inputs, targets = curve()
    fit_axis.plot(inputs, targets, color="#BBBBBB", linewidth=6, label="exp(-x) sin(5x)")
    for name, activation, colour in [("tanh", torch.nn.Tanh, COLOURS["SGD"]), ("relu", torch.nn.ReLU, COLOURS["Adam"])]:
        model, losses = fit_curve(activation, steps=300 if options.quick else 1500)
        print(f"{name} network: loss {losses[0]:.5f} at the first step, {losses[-1]:.2e} after {len(losses)}")
        loss_axis.semilogy(losses, color=colour, linewidth=1.2, label=name)
        fit_axis.plot(inputs, model(inputs).detach(), color=colour, linewidth=1.6, label=name)
    loss_axis.set(title="Adam: loss", xlabel="step", ylabel="mean squared error")
    loss_axis.legend()
    fit_axis.set(title="The fit", xlabel="x", ylabel="y")
    fit_axis.legend()

    steps = 2000 if options.quick else 30_000
    runs = race(steps)
    print(f"\ny = 3x + 0.8 by SGD, {steps:,} steps    weight     bias    training    in step()    us a step()")
    for name, run in runs.items():
        print(f"{name:>34}  {run.weight.item():8.5f} {run.bias.item():8.5f} {run.seconds:9.2f} s "
              f"{run.step_seconds:10.3f} s {run.step_seconds / steps * 1e6:13.2f}")
    fast = runs["fastopt"]
    for name in ("torch.optim", "torch fused"):
        run = runs[name]
        same = run.way == fast.way
        print(f"against {name}: step() {run.step_seconds / fast.step_seconds:.1f} times as fast, the whole training "
              f"{run.seconds / fast.seconds:.2f} times; the same bits all the way: {'yes' if same else 'no'}")

    in_step = [run.step_seconds for run in runs.values()]
    rest = [run.seconds - run.step_seconds for run in runs.values()]
    time_axis.bar(runs.keys(), rest, color="#E3E6EA", width=0.6, label="loss and gradients")
    time_axis.bar(runs.keys(), in_step, bottom=rest, color=[TORCH, TORCH_FUSED, FASTOPT], width=0.6)
    for place, run in enumerate(runs.values()):
        time_axis.text(place, run.seconds, f"step() {run.step_seconds:.2f} s", ha="center", va="bottom", fontsize=9)
    time_axis.set(title=f"{steps:,} SGD steps on y = 3x + 0.8", ylabel="seconds")
    time_axis.set_ylim(top=max(run.seconds for run in runs.values()) * 1.25)
    time_axis.legend(loc="upper right")
    time_axis.grid(axis="x", visible=False)
    save(figure, options.out, "02_regression.png")


if __name__ == "__main__":
    main()

"""The whole library in one picture: five optimizers, fastopt beside torch.optim, on handwritten digits and on a curve.

A small network learns scikit-learn's digits and y = exp(-x) sin(5x) with each optimizer of both libraries, from the
same seed and in the same order. Then the time of one step is measured on the trained networks, the libraries taking
turns. torch.optim trains once more with a correctly rounded square root, which its own on CPU is not: that one bit is
all that may set the libraries apart.
"""

import inspect
import statistics
import sys
import time
from copy import deepcopy
from functools import partial

import torch
from common import (
    COLOURS,
    FASTOPT,
    TORCH,
    TORCH_FUSED,
    accuracy,
    arguments,
    curve,
    digits,
    largest_difference,
    mlp,
    plt,
    rounded_sqrt,
    save,
)

import fastopt

OPTIMIZERS = {
    "SGD": {"lr": 0.03, "momentum": 0.9},
    "Adagrad": {"lr": 0.02},
    "RMSprop": {"lr": 0.001, "alpha": 0.999},  # with 0.99 it oscillates on the curve, and one bit grows to a difference
    "Adam": {"lr": 0.002},
    "AdamW": {"lr": 0.001, "weight_decay": 0.1},
}
LIBRARIES = {"torch.optim": torch.optim, "fastopt": fastopt}


class Digits:
    """Which digit is an 8 x 8 picture? 64-128-64-10 units, batches of 64."""

    title = "digits"
    loss_of = staticmethod(torch.nn.functional.cross_entropy)

    def __init__(self, quick):
        self.inputs, self.targets, self.test_inputs, self.test_targets = digits()
        self.epochs = 2 if quick else 20

    def model(self):
        return mlp(64, 128, 64, 10)

    def batches(self, epoch):
        order = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(epoch))
        return order.split(64)

    def accuracy(self, model):
        return f"{accuracy(model, self.test_inputs, self.test_targets):.1%}"


class Curve:
    """y = exp(-x) sin(5x): 1-64-64-1 units, all 256 points at every step."""

    title = "exp(-x) sin(5x)"
    loss_of = staticmethod(torch.nn.functional.mse_loss)

    def __init__(self, quick):
        self.inputs, self.targets = curve()
        self.epochs = 40 if quick else 1000

    def model(self):
        return mlp(1, 64, 64, 1, activation=torch.nn.Tanh)

    def batches(self, epoch):
        return [slice(None)]

    def accuracy(self, model):
        return ""  # a curve has none


def train(task, make_optimizer, progress):
    """Trains a new network from seed 0; gives it, the loss at each step and the mean loss of the last epoch."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = make_optimizer(model.parameters())
    losses = []
    for epoch in range(task.epochs):
        batches = task.batches(epoch)
        for batch in batches:
            optimizer.zero_grad()
            loss = task.loss_of(model(task.inputs[batch]), task.targets[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        progress(epoch + 1, sum(losses[-len(batches) :]) / len(batches))
    return model, losses, sum(losses[-len(batches) :]) / len(batches)


def step_times(task, model, contenders, rounds):
    """Median microseconds of one step of each optimizer, each on its own copy of the trained network, taking turns."""
    optimizers, times = {}, {}
    for name, make_optimizer in contenders.items():
        copy = deepcopy(model)
        task.loss_of(copy(task.inputs), task.targets).backward()
        optimizers[name], times[name] = make_optimizer(copy.parameters()), []
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) * 1e6 for name, seconds in times.items()}


def compare(task, name, rounds):
    """Trains with both libraries, times the steps, and gives one row of the table."""
    settings = OPTIMIZERS[name]
    models, losses, final = {}, {}, {}
    for library, module in LIBRARIES.items():

        def progress(epoch, loss, library=library):
            if sys.stdout.isatty() or epoch == task.epochs:
                print(f"{task.title:16} {name:8} {library:12} epoch {epoch:4d} of {task.epochs}   loss {loss:.3e}",
                      end="\n" if epoch == task.epochs else "\r", flush=True)

        make_optimizer = partial(getattr(module, name), **settings)
        models[library], losses[library], final[library] = train(task, make_optimizer, progress)

    with rounded_sqrt():
        exact, _, _ = train(task, partial(getattr(torch.optim, name), **settings), progress=lambda epoch, loss: None)

    contenders = {"torch default": partial(getattr(torch.optim, name), **settings)}
    if "fused" in inspect.signature(getattr(torch.optim, name)).parameters:
        contenders["torch fused"] = partial(getattr(torch.optim, name), **settings, fused=True)
    contenders["fastopt"] = partial(getattr(fastopt, name), **settings)
    return {
        "task": task.title,
        "optimizer": name,
        "losses": losses,
        "final": final,
        "accuracy": {library: task.accuracy(model) for library, model in models.items()},
        "difference": [largest_difference(models["fastopt"], other) for other in (models["torch.optim"], exact)],
        "us": step_times(task, models["fastopt"], contenders, rounds),
    }


def print_table(rows):
    line = "{:15} {:8} {:>9} {:>9}  {:>6} {:>6}  {:>8} {:>9}  {:>8} {:>6} {:>7}  {:>8} {:>6}".format
    print("\n" + line("", "", "loss", "", "right", "", "weights", "with", "us/step", "", "", "speed-up", ""))
    print(line("", "", "torch", "fastopt", "torch", "fastopt", "differ", "true sqrt", "default", "fused", "fastopt",
               "default", "fused"))
    for row in rows:
        us = row["us"]
        default, fused, ours = us["torch default"], us.get("torch fused"), us["fastopt"]
        cells = [f"{loss:.3e}" for loss in row["final"].values()]
        cells += row["accuracy"].values()
        cells += [f"{apart:.1e}" for apart in row["difference"]]
        cells += [f"{default:.1f}", f"{fused:.1f}" if fused else "-", f"{ours:.1f}"]
        cells += [f"{default / ours:.1f} x", f"{fused / ours:.1f} x" if fused else "-"]
        print(line(row["task"], row["optimizer"], *cells))


def draw(rows, tasks):
    """Above, the loss curves of both libraries over one another; below, the time of a step. One column per task."""
    figure, axes = plt.subplots(2, len(tasks), figsize=(13, 8), height_ratios=(1.25, 1))
    for task, (loss_axis, time_axis) in zip(tasks, axes.T, strict=True):
        own = [row for row in rows if row["task"] == task.title]
        for row in own:
            smooth = torch.tensor([row["losses"]["torch.optim"], row["losses"]["fastopt"]])
            width = max(1, smooth.shape[1] // 40)
            smooth = smooth.unfold(1, width, 1).mean(2)
            colour = COLOURS[row["optimizer"]]
            loss_axis.semilogy(smooth[0], color=colour, alpha=0.3, linewidth=6)
            loss_axis.semilogy(smooth[1], color=colour, linewidth=1.3, label=row["optimizer"])
        loss_axis.set(title=f"{task.title}: wide torch.optim, thin fastopt", xlabel="step", ylabel="loss, running mean")
        loss_axis.legend()

        for offset, (contender, colour) in enumerate(
            {"torch default": TORCH, "torch fused": TORCH_FUSED, "fastopt": FASTOPT}.items()
        ):
            values = [row["us"].get(contender, 0) for row in own]
            places = [place + (offset - 1) * 0.28 for place in range(len(own))]
            time_axis.bar(places, values, width=0.26, color=colour, label=contender)
            for place, value in zip(places, values, strict=True):
                time_axis.text(place, value, f"{value:.3g}" if value else "none", ha="center", va="bottom", fontsize=8)
        time_axis.set(title="one step, median", ylabel="microseconds", xticks=range(len(own)),
                      xticklabels=[row["optimizer"] for row in own])
        time_axis.grid(axis="x", visible=False)
        time_axis.legend(loc="upper left", ncols=3)
        time_axis.set_ylim(top=max(max(row["us"].values()) for row in own) * 1.25)
    return figure


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    begin = time.perf_counter()
    print(f"fastopt: {fastopt.backend_info()}\n")
    tasks = [Digits(options.quick), Curve(options.quick)]
    rows = [compare(task, name, rounds=20 if options.quick else 300) for task in tasks for name in OPTIMIZERS]
    print_table(rows)
    left_to_torch = fastopt.backend_info()["torch_steps"]
    print(f"\n{torch.get_num_threads()} thread, torch {torch.__version__}, {time.perf_counter() - begin:.0f} s in all; "
          f"steps that fastopt left to torch.optim: {left_to_torch or 'none'}")
    save(draw(rows, tasks), options.out, "demo.png")


if __name__ == "__main__":
    main()

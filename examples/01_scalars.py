"""One scalar and two: what Adam with lr=1 does to x**2 and |x+y|, step by step.

Adam divides the mean of the gradients by the root of the mean of their squares. While the gradient stays the same, that
is 1, so a parameter moves by exactly lr a step, however large or small the gradient is.

Every trajectory is compared with torch.optim's, twice: bit for bit where torch's square roots are correctly rounded, as
fastopt's are; and as torch is on this machine. On CPU, torch takes its square root from a library (MKL) that is off by
one unit in the last place for some inputs, which ones depends on the processor: a last digit may differ there.
"""

import torch
from common import COLOURS, arguments, plt, rounded_sqrt, save

import fastopt


def trajectory(loss_of, start, steps, library=fastopt):
    """The values of the scalars before the first step and after each: steps + 1 tuples."""
    scalars = [torch.tensor(value, requires_grad=True) for value in start]
    optimizer = library.Adam(scalars, lr=1.0)
    values = [tuple(start)]
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(*scalars).backward()
        optimizer.step()
        values.append(tuple(scalar.item() for scalar in scalars))
    return values


EXPERIMENTS = {
    # title: (loss, start, what to see)
    "x**2": (lambda x: x**2, (10.0,), "x falls by 1, then by a little less: the gradient shrinks"),
    "|x + y|": (lambda x, y: (x + y).abs(), (10.0, 8.0), "both fall by 1 a step until x + y changes sign"),
    "|x.detach() + y|": (lambda x, y: (x.detach() + y).abs(), (10.0, 8.0), "no gradient reaches x: x stays still"),
}


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    steps = 9 if options.quick else 30
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
    for axis, (title, (loss_of, start, remark)) in zip(axes, EXPERIMENTS.items(), strict=True):
        values = trajectory(loss_of, start, steps)
        print(f"\nloss = {title}: {remark}\nstep " + "".join(f"{name:>14}" for name in "xy"[: len(start)]))
        for step, row in enumerate(values[:10]):
            print(f"{step:4d} " + "".join(f"{value:14.8f}" for value in row))
        with rounded_sqrt():
            same = values == trajectory(loss_of, start, steps, library=torch.optim)
        print(f"as torch.optim with correctly rounded square roots, bit for bit: {'yes' if same else 'no'}")
        theirs = trajectory(loss_of, start, steps, library=torch.optim)
        apart = max(abs(a - b) for pair in zip(values, theirs, strict=True) for a, b in zip(*pair, strict=True))
        print(f"largest distance from torch.optim as it is on this machine: {apart:.1e}")

        for name, column in zip("xy"[: len(start)], zip(*values, strict=True), strict=True):
            colour = COLOURS["Adam" if name == "x" else "SGD"]
            axis.plot(column, "o-", color=colour, markersize=3.5, linewidth=1.2, label=name)
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.set_title(f"loss = {title}\n{remark}", fontsize=10)
        axis.set_xlabel("step")
        axis.legend()
    axes[0].set_ylabel("value")
    figure.suptitle("fastopt.Adam, lr = 1: a constant gradient means one lr a step")
    save(figure, options.out, "01_scalars.png")


if __name__ == "__main__":
    main()

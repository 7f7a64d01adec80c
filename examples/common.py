"""What the demo and the examples share: arguments, data, a small network and the look of the pictures."""

import argparse
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files; no display is needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

COLOURS = {  # Okabe and Ito's palette, told apart by colour-blind readers too
    "SGD": "#0072B2",
    "Momentum": "#56B4E9",
    "Adagrad": "#009E73",
    "RMSprop": "#E69F00",
    "Adam": "#D55E00",
    "AdamW": "#CC79A7",
}
TORCH, TORCH_FUSED, FASTOPT = "#B8BEC6", "#7A8490", "#D55E00"  # for pictures that compare the libraries

torch.set_num_threads(1)  # networks this small are faster on one thread than on several that wait for one another

plt.rcParams.update({
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
})


@contextmanager
def rounded_sqrt():
    """While this is open, the square roots of tensors are numpy's, which are correctly rounded."""
    originals = torch.Tensor.sqrt, torch.Tensor.sqrt_
    torch.Tensor.sqrt = lambda tensor: torch.as_tensor(np.sqrt(tensor.detach().numpy()))
    torch.Tensor.sqrt_ = lambda tensor: tensor.copy_(tensor.sqrt())
    try:
        yield
    finally:
        torch.Tensor.sqrt, torch.Tensor.sqrt_ = originals


def arguments(description):
    """A parser with the options every example has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a few seconds: fewer steps, same code")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for pictures (out)")
    return parser


def save(figure, folder, name):
    """Writes the picture and says where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name)
    plt.close(figure)
    print(f"picture: {folder / name}")


def mlp(*sizes, activation=torch.nn.ReLU):
    """Linear layers of these sizes with the activation between them."""
    layers = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [torch.nn.Linear(inputs, outputs), activation()]
    return torch.nn.Sequential(*layers[:-1])


def digits():
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: train inputs, train labels, test inputs, test labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(data.target, dtype=torch.int64)[order]
    return inputs[:1437], labels[:1437], inputs[1437:], labels[1437:]


def curve(points=256):
    """y = exp(-x) sin(5x) on 0..3: inputs and targets, one column each."""
    x = torch.linspace(0, 3, points).unsqueeze(1)
    return x, torch.exp(-x) * torch.sin(5 * x)


def accuracy(model, inputs, labels):
    """The share of inputs whose largest output is the right one."""
    with torch.no_grad():
        return (model(inputs).argmax(1) == labels).float().mean().item()


def largest_difference(one, other):
    """The largest absolute difference between the parameters of two models of the same shape."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)

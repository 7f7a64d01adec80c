"""Classification: a train/test loop with SGD and Adam, StepLR, and parameter groups with their own lr and weight decay.

By default on scikit-learn's handwritten digits. With `--data DIR` on FashionMNIST: DIR holds the four IDX files (plain
or .gz) or is the folder torchvision keeps them in; with `--download` torchvision fetches them into DIR first.
"""

import gzip
import math
from pathlib import Path

import torch
from common import COLOURS, accuracy, arguments, digits, largest_difference, mlp, plt, save

import fastopt


def read_idx(folder, name):
    """One IDX file as a uint8 tensor. Two zero bytes, type 8 (uint8), number of dimensions, sizes, then the data."""
    for place in (folder, folder / "FashionMNIST" / "raw"):
        for path, opener in ((place / name, open), (place / f"{name}.gz", gzip.open)):
            if path.exists():
                with opener(path, "rb") as file:
                    data = file.read()
                if data[:3] != b"\0\0\x08":
                    raise ValueError(f"{path}: not an IDX file of unsigned bytes")
                shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
                if len(data) != 4 + 4 * len(shape) + math.prod(shape):
                    raise ValueError(f"{path}: {len(data)} bytes do not hold the shape {shape} it names")
                return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * len(shape)).view(shape)
    raise FileNotFoundError(f"{name}[.gz] is neither in {folder} nor in {folder / 'FashionMNIST' / 'raw'}")


def fashion_mnist(folder):
    """Train inputs, train labels, test inputs, test labels; one row of 784 numbers in 0..1 per image."""
    data = []
    for part in ("train", "t10k"):
        data.append(read_idx(folder, f"{part}-images-idx3-ubyte").flatten(1).float() / 255)
        data.append(read_idx(folder, f"{part}-labels-idx1-ubyte").long())
    return data


def param_groups(model, lr):
    """Weights decay, biases do not, and the last layer learns at half the rate."""
    *body, head = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
    return [
        {"params": [layer.weight for layer in body], "weight_decay": 1e-3},
        {"params": [layer.bias for layer in body]},
        {"params": head.parameters(), "lr": lr / 2},
    ]


def train(model, optimizer, data, epochs, batch_size=64):
    """Trains, and gives the train loss, the test accuracy and the groups' lrs of each epoch."""
    train_inputs, train_labels, test_inputs, test_labels = data
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=-(-epochs // 3), gamma=0.3)
    shuffle = torch.Generator().manual_seed(0)
    history = []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(train_inputs), generator=shuffle).split(batch_size):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(train_inputs[batch]), train_labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        history.append((total / len(train_inputs), accuracy(model, test_inputs, test_labels), scheduler.get_last_lr()))
        scheduler.step()
    return history


OPTIMIZERS = {"SGD": {"lr": 0.05, "momentum": 0.9}, "Adam": {"lr": 2e-3}}


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="FashionMNIST's IDX files, or torchvision's folder")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch FashionMNIST into --data")
    options = parser.parse_args()
    if options.download:
        if options.data is None:
            parser.error("--download needs --data DIR")
        from torchvision.datasets import FashionMNIST

        FashionMNIST(options.data, download=True)
    data = fashion_mnist(options.data) if options.data else digits()
    epochs = 4 if options.quick else 12
    print(f"{len(data[0]):,} images to train on, {len(data[2]):,} to test on")

    figure, (loss_axis, accuracy_axis, lr_axis) = plt.subplots(1, 3, figsize=(13, 3.9))
    for name, settings in OPTIMIZERS.items():
        histories, models = {}, {}
        for library in (torch.optim, fastopt):
            torch.manual_seed(0)
            models[library] = model = mlp(data[0].shape[1], 128, 64, 10)
            optimizer = getattr(library, name)(param_groups(model, settings["lr"]), **settings)
            histories[library] = train(model, optimizer, data, epochs)

        print(f"\n{name:6} lr of each group: {[group['initial_lr'] for group in optimizer.param_groups]}")
        print("           torch.optim               fastopt")
        print("epoch      loss    accuracy      loss    accuracy       lr")
        for epoch, rows in enumerate(zip(*histories.values(), strict=True), 1):
            (torch_loss, torch_share, _), (loss, share, rates) = rows
            print(f"{epoch:5d} {torch_loss:9.4f} {torch_share:9.2%} {loss:11.4f} {share:9.2%} {rates[0]:10.2e}")
        print(f"largest parameter difference: {largest_difference(*models.values()):.1e}")

        ticks = range(1, epochs + 1)
        for axis, column in ((loss_axis, 0), (accuracy_axis, 1)):
            torch_values, values = ([row[column] for row in history] for history in histories.values())
            axis.plot(ticks, torch_values, "o", color=COLOURS[name], fillstyle="none", markersize=9,
                      label=f"{name}, torch.optim")
            axis.plot(ticks, values, ".-", color=COLOURS[name], linewidth=1.4, label=f"{name}, fastopt")
        for group, (part, style) in {0: ("body", "-"), 2: ("last layer", "--")}.items():
            rates = [row[2][group] for row in histories[fastopt]]
            lr_axis.step(ticks, rates, style, where="mid", color=COLOURS[name], label=f"{name}, {part}")
    loss_axis.set(title="Train loss", xlabel="epoch", ylabel="cross entropy")
    accuracy_axis.set(title="Test accuracy", xlabel="epoch", ylabel="share of images")
    lr_axis.set(title="StepLR: lr of the groups", xlabel="epoch", ylabel="lr", yscale="log")
    lr_axis.set_ylim(bottom=1.5e-5)
    for axis, place in ((loss_axis, "upper right"), (accuracy_axis, "lower right"), (lr_axis, "lower left")):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc=place)
    save(figure, options.out, "03_classification.png")


if __name__ == "__main__":
    main()

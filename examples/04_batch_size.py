"""Batch size against loss: with lr in proportion to the batch size, the loss per epoch stays about the same.

A batch four times as large takes a quarter of the steps in an epoch; an lr four times as large makes up for it. With
one lr for all, large batches fall behind.
"""

import time

import torch
from common import arguments, digits, mlp, plt, save

import fastopt

LR_OF_BATCH_SIZE = {16: 0.01, 32: 0.02, 64: 0.04, 128: 0.08, 256: 0.16}


def train(batch_size, lr, epochs):
    """The loss on the whole training set before training and after each epoch, and the seconds training took."""
    torch.manual_seed(0)
    inputs, labels, _, _ = digits()
    model = mlp(64, 64, 10)
    optimizer = fastopt.SGD(model.parameters(), lr=lr)
    cross_entropy = torch.nn.functional.cross_entropy
    losses, seconds = [cross_entropy(model(inputs), labels).item()], 0.0
    for _ in range(epochs):
        begin = time.perf_counter()
        for batch in torch.randperm(len(inputs)).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
        seconds += time.perf_counter() - begin
        losses.append(cross_entropy(model(inputs), labels).item())
    return losses, seconds


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    epochs = 3 if options.quick else 20
    train(16, 0.01, epochs=1)  # the first steps of a process import more of torch: keep that out of the seconds
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), sharey=True)
    shades = plt.get_cmap("viridis")
    print(f"loss after {epochs} epochs\nbatch size       lr      loss   seconds    with lr = 0.01")
    for place, (batch_size, lr) in enumerate(LR_OF_BATCH_SIZE.items()):
        scaled, seconds = train(batch_size, lr, epochs)
        fixed, _ = train(batch_size, 0.01, epochs)
        print(f"{batch_size:10d} {lr:8.2f} {scaled[-1]:9.4f} {seconds:9.2f} {fixed[-1]:17.4f}")
        colour = shades(place / len(LR_OF_BATCH_SIZE))
        axes[0].plot(scaled, color=colour, label=f"{batch_size}, lr {lr:.2f}")
        axes[1].plot(fixed, color=colour, label=f"{batch_size}")
    axes[0].set(title="lr in proportion to the batch size", ylabel="train loss")
    axes[1].set(title="lr = 0.01 for all")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(title="batch size")
    save(figure, options.out, "04_batch_size.png")


if __name__ == "__main__":
    main()

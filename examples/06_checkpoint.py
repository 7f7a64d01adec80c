"""A checkpoint written by torch.optim is resumed by fastopt, and one written by fastopt by torch.optim.

A third of the training runs with torch.optim, a third with fastopt, the last third with torch.optim again, each from
the file that the one before wrote. The losses are those of one training that never stopped.
"""

import torch
from common import FASTOPT, TORCH_FUSED, arguments, curve, largest_difference, mlp, plt, save

import fastopt

OPTIMIZERS = {
    "SGD": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.01},
}


def new_training(name, library):
    """A model from a fixed seed, and the library's optimizer for it."""
    torch.manual_seed(0)
    model = mlp(1, 64, 64, 1)
    return model, getattr(library, name)(model.parameters(), **OPTIMIZERS[name])


def train(model, optimizer, steps):
    """Trains on the whole curve at each step; gives the losses."""
    inputs, targets = curve()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def interrupted(name, steps, path):
    """Three sessions of `steps` steps, each from the checkpoint of the one before. Gives losses and model."""
    losses = []
    for session, library in enumerate((torch.optim, fastopt, torch.optim)):
        model, optimizer = new_training(name, library)
        if session > 0:
            checkpoint = torch.load(path)
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        losses += train(model, optimizer, steps)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return losses, model


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    steps = 20 if options.quick else 150
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4))
    for axis, name in zip(axes, OPTIMIZERS, strict=True):
        path = options.out / f"06_{name}.pt"
        losses, model = interrupted(name, steps, path)
        reference_model, reference_optimizer = new_training(name, torch.optim)
        reference = train(reference_model, reference_optimizer, 3 * steps)

        print(f"\n{name}: torch.optim -> {path} -> fastopt -> {path} -> torch.optim")
        print("step   with checkpoints   never stopped")
        for step in (0, steps - 1, steps, 2 * steps - 1, 2 * steps, 3 * steps - 1):
            print(f"{step:4d} {losses[step]:18.10f} {reference[step]:15.10f}")
        apart = [abs(a - b) / b for a, b in zip(losses, reference, strict=True)]
        print(f"losses equal to the last bit: {apart.count(0)} of {len(apart)}; largest relative difference "
              f"{max(apart):.1e}; parameters at most {largest_difference(model, reference_model):.1e} apart")

        axis.semilogy(reference, color="#DDDDDD", linewidth=7, label="torch.optim, never stopped")
        sessions = [(TORCH_FUSED, "torch.optim"), (FASTOPT, "fastopt"), (TORCH_FUSED, None)]
        for session, (colour, label) in enumerate(sessions):
            span = range(session * steps, (session + 1) * steps)
            axis.semilogy(span, losses[span.start : span.stop], color=colour, linewidth=1.8, label=label)
            if session > 0:
                axis.axvline(span.start, color="#888888", linestyle=":", linewidth=1)
        axis.set(title=f"{name}: resumed twice from a file", xlabel="step", ylabel="mean squared error")
        axis.legend()
    save(figure, options.out, "06_checkpoint.png")


if __name__ == "__main__":
    main()

"""A character model in bfloat16 that trains as in float32, and one that stands still.

The text is Python's own language reference, as `help("assert")` prints it; the model guesses a character from the 24
before. Five trainings with AdamW begin with the same weights and see the same batches. They differ in how the weights
and the optimizer's state are kept, and in nothing else: forward and backward are computed in float32, from the weights
as they are stored, so that no processor's 16-bit products play a part. The gradients of bfloat16 weights are rounded to
bfloat16, which is autograd's doing.

A weight has moved once its bfloat16 number is not the one it began with: in float32, the number that it rounds to.
"""

from pydoc_data.topics import topics

import torch
from common import FASTOPT, arguments, plt, save
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import fastopt

CONTEXT, LR = 24, 2e-4
WIDE_STATE = {"state_dtype": torch.float32}
RUNS = {  # the dtype of the weights, options of the optimizer, and the look of the curve
    "float32": (torch.float32, {}, {"color": "#B8BEC6", "lw": 6}),
    "bf16, as torch keeps it": (torch.bfloat16, {}, {"color": FASTOPT}),
    "bf16 + remainder, bf16 state": (torch.bfloat16, {"master_weights": True}, {"color": "#009E73"}),
    "bf16, stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True, **WIDE_STATE}, {"color": "#56B4E9"}),
    "bf16 + remainder": (torch.bfloat16, {"master_weights": True, **WIDE_STATE}, {"color": "#000000", "ls": "--"}),
}  # fmt: skip


def text():
    """The numbers of the characters to train on and, the last tenth, to test with; and how many characters exist."""
    characters = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: number for number, character in enumerate(sorted(set(characters)))}
    numbers = torch.tensor([alphabet[character] for character in characters])
    train, test = numbers.split([len(numbers) - len(numbers) // 10, len(numbers) // 10])
    return train, test, len(alphabet)


def new_model(characters):
    """From a context to a score for each character. Its bfloat16 weights are what every training begins with."""
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(characters, 16), torch.nn.Flatten()]
    for inputs in (16 * CONTEXT, 192):
        layers += [torch.nn.Linear(inputs, 192), torch.nn.LayerNorm(192), torch.nn.GELU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(192, characters)).bfloat16()


def loss_of(model, numbers, places):
    """The mean loss of the characters at these places, in nats, computed in float32 whatever the weights are."""
    windows = numbers[places[:, None] + torch.arange(-CONTEXT, 1)]
    weights = {name: param.float() for name, param in model.named_parameters()}
    return cross_entropy(functional_call(model, weights, windows[:, :-1]), windows[:, -1])


class Moved:
    """Which weights have been another bfloat16 number than at the start."""

    def __init__(self, params):
        self.start = {param: param.detach().to(torch.bfloat16, copy=True) for param in params}
        self.seen = {param: torch.zeros_like(param, dtype=torch.bool) for param in self.start}

    def look(self):
        for param, seen in self.seen.items():
            seen |= param.detach().bfloat16() != self.start[param]

    def never(self, params):
        """The share of the weights of these parameters that never was."""
        return 1 - torch.cat([self.seen[param].flatten() for param in params]).double().mean().item()


def train(dtype, options, steps, measurements):
    """Steps, test losses, and shares of all and of the layer norms' weights that never moved; and the optimizer."""
    train_text, test_text, characters = text()
    model = new_model(characters).to(dtype)
    optimizer = fastopt.AdamW(model.parameters(), lr=LR, **options)
    schedule = fastopt.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    moved = Moved(model.parameters())
    norms = [layer.weight for layer in model if isinstance(layer, torch.nn.LayerNorm)]
    random = torch.Generator().manual_seed(0)
    test_places = torch.randint(CONTEXT, len(test_text), (4096,), generator=random)
    rows = []
    for step in range(steps + 1):
        if step % (steps // measurements) == 0:
            moved.look()
            with torch.no_grad():
                loss = loss_of(model, test_text, test_places).item()
            rows.append((step, loss, moved.never(moved.seen), moved.never(norms)))
        places = torch.randint(CONTEXT, len(train_text), (128,), generator=random)
        optimizer.zero_grad()
        loss_of(model, train_text, places).backward()
        optimizer.step()
        schedule.step()
    return rows, optimizer


def bytes_of(optimizer):
    """Bytes an element: kept between steps, without the gradient, and moved by a step, which reads and writes these."""
    param = optimizer.param_groups[0]["params"][0]
    state = [value for value in optimizer.state[param].values() if getattr(value, "shape", None) == param.shape]
    kept = sum(tensor.itemsize for tensor in (param, *state))
    return kept, 2 * kept + param.itemsize


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    steps, measurements = (200, 10) if options.quick else (3000, 50)
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4))
    print(f"{steps} steps of AdamW on the language reference\n"
          f"{'':30}bytes an element     test  against  never moved:\n"
          f"{'':30} kept  moved         loss  float32     all   norms")
    wanted = None
    for name, (dtype, of_optimizer, look) in RUNS.items():
        rows, optimizer = train(dtype, of_optimizer, steps, measurements)
        at, losses, never, norms = zip(*rows, strict=True)
        wanted = wanted or losses  # the first is float32
        off = [100 * (loss / other - 1) for loss, other in zip(losses, wanted, strict=True)]
        kept, moved = bytes_of(optimizer)
        print(f"{name:30}{kept:5d} {moved:6d} {losses[-1]:12.4f} {off[-1]:+7.2f}% {never[-1]:8.1%} {norms[-1]:7.1%}")
        axes[0].plot(at, losses, label=name, **look)
        axes[1].plot(at, off, **look)
        axes[2].plot(at, [100 * share for share in norms], **look)
        axes[2].plot(at, [100 * share for share in never], **(look | {"ls": ":"}))
    axes[0].set(title="test loss", ylabel="nats a character")
    axes[1].set(title="test loss above float32's", ylabel="%", ylim=(-1, 3))
    axes[2].set(title="weights that never moved", ylabel="% of the layer norms' (dotted: of all)")
    for axis in axes:
        axis.set_xlabel("step")
    figure.legend(loc="outside lower center", ncols=len(RUNS))
    save(figure, options.out, "07_low_precision.png")


if __name__ == "__main__":
    main()

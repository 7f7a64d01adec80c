"""The shapes that are benchmarked, from two scalars to GPT-2. A workload is param groups, each a sequence of shapes."""

from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    name: str
    groups: tuple[tuple[Shape, ...], ...]

    @property
    def shapes(self) -> list[Shape]:
        return [shape for group in self.groups for shape in group]

    @property
    def elements(self) -> int:
        return sum(map(prod, self.shapes))


def one_group(name: str, shapes: list[Shape]) -> Workload:
    return Workload(name, (tuple(shapes),))


def mlp(*widths: int) -> list[Shape]:
    """Weight and bias of each torch.nn.Linear from one width to the next."""
    return [shape for n, m in zip(widths, widths[1:], strict=False) for shape in ((m, n), (m,))]


def resnet50() -> list[Shape]:
    """torchvision's resnet50(): 53 convolutions without bias, a batch norm (weight, bias) after each, one Linear."""
    shapes: list[Shape] = []

    def conv_bn(outputs: int, inputs: int, kernel: int) -> None:
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    conv_bn(64, 3, 7)
    inputs = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            conv_bn(planes, inputs, 1)
            conv_bn(planes, planes, 3)
            conv_bn(4 * planes, planes, 1)
            if block == 0:  # the shortcut changes the number of channels
                conv_bn(4 * planes, inputs, 1)
            inputs = 4 * planes
    return [*shapes, *mlp(2048, 1000)]


def gpt2() -> list[Shape]:
    """GPT-2 124M, input and output embeddings tied: 148 tensors."""
    width = 768
    layer_norm = [(width,), (width,)]
    layer = [
        *layer_norm, (width, 3 * width), (3 * width,), (width, width), (width,),
        *layer_norm, (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(50257, width), (1024, width), *layer * 12, *layer_norm]


WORKLOADS = {
    workload.name: workload
    for workload in (
        one_group("two scalars", [(), ()]),
        one_group("mlp", mlp(784, 512, 512, 10)),
        one_group("1000 x 256", [(256,)] * 1000),
        Workload("465 groups", (((256,),),) * 465),
        one_group("10 x 1M", [(1_000_000,)] * 10),
        one_group("resnet50", resnet50()),
        one_group("64M", [(64_000_000,)]),
        one_group("gpt2", gpt2()),
    )
}

# The larger ones are left out: their slowest candidates take up to seconds a step.
QUICK = ("two scalars", "mlp", "1000 x 256", "465 groups", "10 x 1M")

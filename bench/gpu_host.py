"""The host's time of a step of GPU tensors, without a GPU: Triton's real launcher on a stub libcuda that does nothing.

    python -m bench.gpu_host [--quick] [--optimizer Adam] [--json FILE]
    python -m bench.gpu_host --uploads [--json FILE]

fastopt's step is the whole of it, with every check and the scalars' upload as a copy in main memory; what a driver
would add for a copy, an event and a launch is missing. torch's steps have empty tensors, so that their kernels are
missing too: fused as it is, foreach as on CUDA, where it is the default. What they launch on a GPU, one launch or more
for about fifty tensors, is missing as well. Tensors without elements have nothing to launch, so fastopt's have some; of
a size that malloc keeps out of the heap where torch's objects are, as a GPU's memory is.

--uploads counts instead what a step of Llama-7B's shapes sends to the GPU: at the first, when nothing changes, when lr
does, when gradients move.
"""

import argparse
import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .candidates import OPTIMIZERS, make_torch
from .measure import FULL, QUICK, compare_times, environment, interleave
from .report import duration, environment_text, table, times
from .run import save

COUNTS = (148, 291, 1000)  # GPT-2, Llama-7B, many small ones
SIZE = 65536
M_MMAP_THRESHOLD = -3  # glibc's; what is set stays, while the default grows


def steps(optimizer: str, tensors: int) -> dict[str, Any]:
    """A step of fastopt on tensors that it takes for a GPU's, and torch's on as many without elements."""
    import fastopt

    row, groups = OPTIMIZERS[optimizer], {}
    for name, size in (("fastopt", SIZE), ("fused", 0), ("foreach", 0)):
        params = [torch.nn.Parameter(torch.zeros(size)) for _ in range(tensors)]
        for param in params:
            param.grad = torch.zeros(size)
        groups[name] = [{"params": params[: tensors // 2]}, {"params": params[tensors // 2 :], "lr": 2e-3}]
    return {
        "fastopt": getattr(fastopt, row.name)(groups["fastopt"], **row.options).step,
        "fused": make_torch(fused=True)(row, groups["fused"], torch.float32).step,
        "foreach": make_torch(foreach=True)(row, groups["foreach"], torch.float32).step,
    }


def llama_7b() -> list[tuple[int, ...]]:
    """LLaMA, arXiv:2302.13971, 7B: 32 layers of width 4096, 291 tensors."""
    width, hidden, vocabulary = 4096, 11008, 32000
    layer = [*4 * [(width, width)], *2 * [(hidden, width)], (width, hidden), (width,), (width,)]
    return [(vocabulary, width), *32 * layer, (width,), (vocabulary, width)]


def uploads(optimizer: str) -> list[dict[str, Any]]:
    """Words of 8 bytes, and copies, that steps of Llama-7B upload; on memory that is never touched."""
    import fastopt

    row, found = OPTIMIZERS[optimizer], []

    def make(group_count: int, **options: Any) -> Any:
        params = [torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)) for shape in llama_7b()]
        first = [param for param in params if param.dim() > 1]
        rest = [param for param in params if param.dim() < 2]
        groups = [{"params": first + rest}] if group_count == 1 else [{"params": first}, {"params": rest}]
        made = getattr(fastopt, row.name)(groups, **row.options, **options)
        for param in params:  # states that nobody fills, as zeros would be
            param.grad = torch.empty_like(param)
            made.state[param] = {name: torch.empty_like(param) for name in row.slots} | {"step": torch.tensor(0.0)}
        return made

    for groups, capturable in ((1, False), (2, False), (2, True)):
        made = make(groups, **({"capturable": True} if capturable else {}))
        params = [param for group in made.param_groups for param in group["params"]]

        def move(count: int, params: list[Any] = params) -> None:
            for param in params[:count]:
                param.grad = torch.empty_like(param)

        def other_lr(made: Any = made) -> None:
            for group in made.param_groups:
                group["lr"] *= 0.9

        changes = {
            "first step": int, "nothing changes": int, "lr changes": other_lr,
            "one gradient moves": partial(move, 1), "all gradients move": partial(move, len(params)),
        }  # fmt: skip
        for what, change in changes.items():
            buckets = made._fastopt_gpu.buckets.values() if made._fastopt_gpu else ()
            before = sum(bucket.uploads for bucket in buckets), sum(bucket.uploaded_words for bucket in buckets)
            change()
            made.step()
            buckets = made._fastopt_gpu.buckets.values()
            copies = sum(bucket.uploads for bucket in buckets) - before[0]
            words = sum(bucket.uploaded_words for bucket in buckets) - before[1]
            found.append({"optimizer": optimizer, "tensors": len(params), "groups": groups, "capturable": capturable,
                          "what": what, "copies": copies, "bytes": 8 * words})  # fmt: skip
    return found


def main() -> int:
    if torch.cuda.is_available():
        raise SystemExit("bench.gpu_host is for machines without a GPU; here, bench.gpu has the host's time")
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="less time")
    options.add_argument("--optimizer", choices=[name for name in OPTIMIZERS if name != "RMSprop"], default="Adam")
    options.add_argument("--uploads", action="store_true", help="count what is uploaded instead")
    options.add_argument("--json", type=Path, help="write the results here")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SIZE * 4)

    import fastopt
    from tests.tools import stub_driver

    document: dict[str, Any] = {"environment": environment(), "results": []}
    print(environment_text(document["environment"]))
    lines = []
    with stub_driver.installed():
        fastopt._C.set_gpu_type("cpu")
        if arguments.uploads:
            document["uploads"] = uploads(arguments.optimizer)
            rows = [
                (str(found["groups"]), "yes" if found["capturable"] else "no", found["what"], str(found["copies"]),
                 f"{found['bytes']:,}")
                for found in document["uploads"]
            ]  # fmt: skip
            print(f"{arguments.optimizer}, {document['uploads'][0]['tensors']} tensors of Llama-7B, bfloat16\n")
            print(table(("param groups", "capturable", "what", "copies", "bytes"), rows))
        for tensors in () if arguments.uploads else COUNTS:
            measured = steps(arguments.optimizer, tensors)
            nothing = {name: partial(int) for name in measured}
            result = compare_times(interleave(measured, QUICK if arguments.quick else FULL, nothing))
            document["results"].append({"optimizer": arguments.optimizer, "tensors": tensors} | result)
            seconds, ratio = result["seconds"], result["ratio"]
            lines.append(
                (
                    str(tensors), duration(seconds["fastopt"]["median"]), duration(seconds["fastopt"]["q20"]),
                    *(duration(seconds[name]["median"]) for name in ("fused", "foreach")),
                    *(times(ratio[name]["median"]) for name in ("fused", "foreach")),
                )
            )  # fmt: skip
        fastopt._C.set_gpu_type("cuda")
    save(arguments.json, document)
    if lines:
        print(f"{arguments.optimizer}, two groups, host time of a step\n")
        print(table(("tensors", "fastopt", "(20 %)", "fused", "foreach", "fused/fastopt", "foreach/fastopt"), lines))
    wrong = fastopt.backend_info()["torch_steps"]
    if wrong:
        print(f"torch's own step ran: {wrong}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())

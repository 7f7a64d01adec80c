"""A step of Adam whose parameters or state have 16 bits: how long, against the same bytes and against torch's fused.

    python -m bench.low_precision [--quick] [--workloads gpt2] [--candidates fp32 ...] [--threads N] [--json FILE]

Each way to keep the weights is compared with torch's for-loop in float32 before it is timed, and has a roof of its
own: the bytes of its own tensors, moved without arithmetic. All ways and all roofs take turns in one process.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from .candidates import CHECK_STEPS, OPTIMIZERS, Problem, Row, Unavailable, make_fastopt, make_torch, module_or_none
from .measure import CACHE_BYTES, QUICK, Effort, environment, interleave, summary
from .report import environment_text, low_precision_table
from .roof import LEAST_ELEMENTS, roof_step
from .run import parser, save
from .workloads import WORKLOADS, Workload

FP32, BF16 = torch.float32, torch.bfloat16
UNIT = "torch fused, fp32"
ADAM = OPTIMIZERS["Adam"]
LONG = Effort(seconds=120.0, min_rounds=11, max_rounds=101, batch=5e-3)


@dataclass(frozen=True)
class Way:
    """To keep weights and state: the parameters' dtype, fastopt's options (None: torch's fused step), the companion."""

    dtype: torch.dtype
    options: dict[str, Any] | None
    companion: tuple[str, ...] = ()

    @property
    def row(self) -> Row:
        return replace(ADAM, slots=(*ADAM.slots, *self.companion), options=self.options or {})

    def make(self, problem: Problem) -> Optimizer:
        build = make_torch(fused=True) if self.options is None else make_fastopt
        return build(self.row, problem.groups(self.dtype), self.dtype)


WAYS = {
    UNIT: Way(FP32, None),
    "torch fused, bf16": Way(BF16, None),
    "fp32": Way(FP32, {}),
    "fp32, bf16 state": Way(FP32, {"state_dtype": BF16}),
    "bf16 + remainder, fp32 state": Way(BF16, {"master_weights": True, "state_dtype": FP32}, ("remainder",)),
    "bf16 + remainder, bf16 state": Way(BF16, {"master_weights": True}, ("remainder",)),
    "bf16, stochastic rounding, fp32 state": Way(BF16, {"stochastic_rounding": True, "state_dtype": FP32}),
    "bf16": Way(BF16, {}),
}


def tensors(optimizer: Optimizer, way: Way) -> list[list[torch.Tensor]]:
    """What a step reads, of each parameter: itself, gradient and state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [[param, param.grad, *(optimizer.state[param][slot] for slot in way.row.slots)] for param in params]


def expected_weights(problem: Problem) -> list[torch.Tensor]:
    """What torch's for-loop in float32 makes of them in the check's steps."""
    optimizer = torch.optim.Adam(problem.groups(FP32), foreach=False)
    for _ in range(CHECK_STEPS):
        optimizer.step()
    return [param.detach() for group in optimizer.param_groups for param in group["params"]]


def wrong(optimizer: Optimizer, way: Way, expected: list[torch.Tensor], problem: Problem) -> str:
    """Takes the check's steps and compares the weights, masters where there are any: "", or what is wrong.

    They may be off by four units in their last place and, with 16-bit state, by 2 % of what the steps changed. Masters
    are float32 numbers, so a remainder that is left out shows.
    """
    fastopt: Any = module_or_none("fastopt")
    before = Counter(fastopt.backend_info()["torch_steps"]) if fastopt else Counter()
    for _ in range(CHECK_STEPS):
        optimizer.step()
    masters: dict[torch.Tensor, torch.Tensor] = {}
    if way.options is not None:
        if reasons := dict(Counter(fastopt.backend_info()["torch_steps"]) - before):
            return f"torch's own step ran: {reasons}"
        masters = fastopt.master_weights(optimizer) if way.companion else {}
    unit = 4 * torch.finfo(FP32 if masters else way.dtype).eps
    (state,) = {optimizer.state[row[0]]["exp_avg"].dtype for row in tensors(optimizer, way)}
    share = 1e-6 if state == FP32 else 0.02
    for (param, *_), right, start in zip(tensors(optimizer, way), expected, problem.start, strict=True):
        off = (masters.get(param, param.detach()).float() - right).abs_()
        allowed = (right - start.float()).abs_().mul_(share).add_(right.abs() + start.float().abs(), alpha=unit)
        if count := int((~(off <= allowed)).sum()):
            return f"{count} of {off.numel()} weights wrong, by up to {off.max():.2g}"
    return ""


def measure_ways(workload: Workload, effort: Effort, names: Iterable[str] = tuple(WAYS)) -> dict[str, Any]:
    """One result: bytes and seconds of each way; those of its roof and of torch's fused fp32 in units of them."""
    problem = Problem(workload, BF16)  # numbers that every way can hold
    expected = expected_weights(problem)
    result: dict[str, Any] = {
        "workload": workload.name, "tensors": len(workload.shapes), "elements": workload.elements,
        "threads": torch.get_num_threads(), "refused": {}, "absent": {}, "bytes": {}, "kept": {},
    }  # fmt: skip
    steps: dict[str, Callable[[], Any]] = {}
    for name in names:
        way = WAYS[name]
        try:
            optimizer = way.make(problem)
        except Unavailable as why:
            result["absent"][name] = str(why)
            continue
        if text := wrong(optimizer, way, expected, problem):
            result["refused"][name] = text
            continue
        sizes = [tensor.itemsize for tensor in tensors(optimizer, way)[0]]
        result["kept"][name], result["bytes"][name] = sum(sizes) - sizes[1], 2 * sum(sizes) - sizes[1]
        steps[name] = optimizer.step
        if workload.elements >= LEAST_ELEMENTS:
            steps[f"roof: {name}"] = roof_step(optimizer, way.row)
    del expected
    if not steps:
        return result
    gc.collect()
    # Small steps run from the caches: one step brings back what the one before evicted.
    small = {name: workload.elements * result["bytes"][name.removeprefix("roof: ")] < CACHE_BYTES for name in steps}
    times = interleave(steps, effort, {name: step if small[name] else partial(int) for name, step in steps.items()})
    ways = list(result["bytes"])
    result["rounds"] = len(times[ways[0]])
    result["seconds"] = {name: summary(numbers) for name, numbers in times.items()}
    for key, other in (("of_roof", "roof: {}"), ("gain", UNIT)):
        pairs = {name: (times[other.format(name)], times[name]) for name in ways if other.format(name) in times}
        result[key] = {
            name: {
                "median": summary([a / b for a, b in zip(*both, strict=True)])["median"],
                "quick": summary(both[0])["q20"] / summary(both[1])["q20"],  # of the rounds that nothing disturbed
            }
            for name, both in pairs.items()
        }
    return result


def main() -> int:
    options = parser(__doc__, WAYS)
    options.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME", help=", ".join(WORKLOADS))
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    document: dict[str, Any] = {"environment": environment(), "low_precision": []}
    print(environment_text(document["environment"]))
    for name in arguments.workloads or (["10 x 1M"] if arguments.quick else ["gpt2"]):
        result = measure_ways(WORKLOADS[name], QUICK if arguments.quick else LONG, arguments.candidates)
        document["low_precision"].append(result)
        save(arguments.json, document)
        print(low_precision_table(result), flush=True)
    return int(any(result["refused"] for result in document["low_precision"]))


if __name__ == "__main__":
    raise SystemExit(main())

"""What surrounds a step: whole training iterations part by part, steps with cold caches, functions against torch's.

    python -m bench.loop [--quick] [--what iterations cold functions whole] [--threads N] [--candidates fastopt ...]
                         [--json FILE]

A step that is timed in a row of steps finds its tensors in the caches. In training it comes after a backward, which has
used them for other things: so iterations are timed in place, with the clock read between their parts (some 50 ns each,
which is in the figures), and the steps of the workloads with the caches filled with other data before each.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .candidates import CANDIDATES, LR, OPTIMIZERS, Problem, Unavailable, make, module_or_none
from .measure import FULL, QUICK, Effort, compare_times, environment, interleave, rounds, summary
from .report import environment_text, loop_text
from .roof import LEAST_ELEMENTS, roof_step
from .run import parser, save
from .workloads import WORKLOADS, Workload

PARTS = ("zero_grad", "forward", "backward", "clip", "step", "average")
OWN = ("zero_grad", "clip", "step", "average")  # what is not the model's
MAX_NORM, DECAY = 1.0, 0.999
FOLDED = "folded"  # the candidate that clips and averages inside the step
CHECKED = 20  # iterations whose losses are compared
# Of a loss, relatively. The norms differ by the rounding of torch's float32 sums, and torch's implementations among one
# another by that of their updates; both are in the parameters of the next iteration.
LOSS_TOLERANCE = 1e-4
CPU = torch.device("cpu")
OTHER_DATA = 256 << 20  # bytes, more than the caches of two cores hold

Clock = Callable[[], float]
Batch = tuple[Tensor, Tensor]


# ---- the models


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A GPT of 0.93 M parameters, input and output embeddings tied."""

    def __init__(self, vocabulary: int = 1024, context: int = 64, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks, self.norm = nn.Sequential(*(Block(width, 4) for _ in range(layers))), nn.LayerNorm(width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        return (self.norm(self.blocks(x)) @ self.token.weight.t()).flatten(0, 1)


class NarrowCNN(nn.Module):
    """100 convolutions of 8 channels, each with a batch norm and a way around it: 404 tensors, 61,000 numbers."""

    def __init__(self, layers: int = 100, channels: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, channels, 1), nn.Linear(channels, 10)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + 0.1 * layer(x)
        return self.last(x.mean((2, 3)))


def mlp(*widths: int, activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), activation()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Task:
    """A model and what it is trained on; both are made from torch's seed."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]


def line() -> Batch:
    x = torch.rand(100, 1)
    return x, 3 * x + 2 + 0.1 * torch.randn(100, 1)


def actions() -> Batch:
    """What an agent has seen, done and got: observations; for each of two actions its advantage if it was taken."""
    return torch.randn(64, 8), functional.one_hot(torch.randint(2, (64,)), 2) * torch.randn(64, 1)


def policy_gradient(logits: Tensor, advantages: Tensor) -> Tensor:
    return -(functional.log_softmax(logits, -1) * advantages).sum(-1).mean()


def classes(*shape: int) -> Batch:
    return torch.randn(shape), torch.randint(10, shape[:1])


def text() -> Batch:
    tokens = torch.randint(1024, (8, 65))
    return tokens[:, :-1], tokens[:, 1:].flatten()


TASKS = {
    task.name: task
    for task in (
        Task("linear regression", partial(nn.Linear, 1, 1), line, functional.mse_loss),
        Task("RL actor 64-64", partial(mlp, 8, 64, 64, 2, activation=nn.Tanh), actions, policy_gradient),
        Task("MLP 784-512-512-10", partial(mlp, 784, 512, 512, 10, activation=nn.ReLU), partial(classes, 64, 784),
             functional.cross_entropy),
        Task("GPT 0.93 M", GPT, text, functional.cross_entropy),
        Task("CNN of 100 narrow layers", NarrowCNN, partial(classes, 8, 3, 16, 16), functional.cross_entropy),
    )
}  # fmt: skip


# ---- iterations, part by part


class Training:
    """The training of one candidate: every one of a task sees the same numbers."""

    def __init__(self, task: Task, candidate: str, device: torch.device = CPU) -> None:
        folded, candidate = candidate == FOLDED, "fastopt" if candidate == FOLDED else candidate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = task.model().to(device)
            self.batches = cycle([[tensor.to(device) for tensor in task.batch()] for _ in range(8)])
        model, params = self.model, list(self.model.parameters())
        self.loss, self.losses = task.loss, list[float]()
        self.clip: Callable[[], Any] = lambda: None
        self.average: Callable[[], Any] = lambda: None
        library: Any = module_or_none("fastopt") if candidate == "fastopt" else torch.nn.utils
        if folded and library:
            self.optimizer: Any = library.Adam(params, lr=LR, max_grad_norm=MAX_NORM, ema_decay=DECAY)
            return
        self.optimizer = CANDIDATES[candidate](OPTIMIZERS["Adam"], params, torch.float32)
        averages: Any = library.swa_utils if candidate == "fastopt" else torch.optim.swa_utils
        clip = partial(library.clip_grad_norm_, **({"foreach": True} if candidate == "foreach" else {}))
        average = averages.AveragedModel(model, multi_avg_fn=averages.get_ema_multi_avg_fn(DECAY))
        self.clip = lambda: clip(model.parameters(), MAX_NORM)
        self.average = lambda: average.update_parameters(model)

    def run(self, iterations: int, clock: Clock = time.perf_counter) -> list[float]:
        """Seconds of each part of an iteration, the mean of some."""
        model, optimizer, clip, average, loss_of = self.model, self.optimizer, self.clip, self.average, self.loss
        sums = [0.0] * len(PARTS)
        for _ in range(iterations):
            inputs, targets = next(self.batches)
            t0 = clock()
            optimizer.zero_grad()
            t1 = clock()
            loss = loss_of(model(inputs), targets)
            t2 = clock()
            loss.backward()
            t3 = clock()
            clip()
            t4 = clock()
            optimizer.step()
            t5 = clock()
            average()
            t6 = clock()
            for part, took in enumerate((t1 - t0, t2 - t1, t3 - t2, t4 - t3, t5 - t4, t6 - t5)):
                sums[part] += took
            if len(self.losses) < CHECKED:
                self.losses.append(loss.item())
        return [took / iterations for took in sums]


def off(losses: list[float], expected: list[float]) -> float:
    """By how much of its value a loss differs, at most; NaN differs by infinity."""
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    return max(difference if difference == difference else float("inf") for difference in differences)


def measure_iterations(task: Task, candidates: list[str], effort: Effort) -> dict[str, Any]:
    """`seconds` and `ratio` are of whole iterations, `parts` the seconds of each part, `own` of all but the model's."""
    expected = Training(task, "default")
    expected.run(CHECKED)
    trained: dict[str, Training] = {}
    result: dict[str, Any] = {
        "task": task.name, "threads": torch.get_num_threads(), "refused": {}, "absent": {}, "losses_off": {},
        "tensors": len(list(expected.model.parameters())),
        "elements": sum(param.numel() for param in expected.model.parameters()),
    }  # fmt: skip
    for name in candidates:
        try:
            training = Training(task, name)
        except Unavailable as why:
            result["absent"][name] = str(why)
            continue
        training.run(CHECKED)
        difference = result["losses_off"][name] = off(training.losses, expected.losses)
        if difference > LOSS_TOLERANCE:
            result["refused"][name] = f"losses differ by {difference:.1e} of their value"
        else:
            trained[name] = training
    sizes = {}
    for name, training in trained.items():
        sizes[name] = max(1, round(4 * effort.batch / sum(training.run(10))))
    gc.collect()
    gc.disable()  # as timeit does
    try:
        times: dict[str, list[list[float]]] = {name: [] for name in trained}
        for order in rounds(trained, effort):
            for name in order:
                trained[name].run(1)
                times[name].append(trained[name].run(sizes[name]))
    finally:
        gc.enable()
    if times:
        result |= compare_times({name: [sum(parts) for parts in of] for name, of in times.items()})
    own = [PARTS.index(part) for part in OWN]
    result["own"] = {name: summary([sum(parts[i] for i in own) for parts in of]) for name, of in times.items()}
    result["parts"] = {
        name: {part: summary([parts[i] for parts in of]) for i, part in enumerate(PARTS)} for name, of in times.items()
    }
    return result


# ---- steps, cold and warm


def single_calls(
    calls: dict[str, Callable[[], Any]], prepare: Callable[[str], Any], effort: Effort, row: int = 1
) -> dict[str, list[float]]:
    """Seconds of one call of each in every round, right after `prepare`, which is not timed.

    Or, of a row of calls, the mean of those after the first.
    """
    clock = time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        prepare(name), call()
    gc.collect()
    gc.disable()
    try:
        for order in rounds(calls, effort):
            for name in order:
                call, took = calls[name], []
                for _ in range(row):
                    prepare(name)
                    began = clock()
                    call()
                    took.append(clock() - began)
                times[name].append(fmean(took[1:] or took))
    finally:
        gc.enable()
    return times


def measure_cold(workload: Workload, candidates: list[str], effort: Effort) -> dict[str, Any]:
    """A step of Adam: `warm`, in a row of steps, and `cold`, each with the caches full of other data."""
    problem, row = Problem(workload, torch.float32), OPTIMIZERS["Adam"]
    result: dict[str, Any] = {
        "workload": workload.name, "optimizer": "Adam", "dtype": "fp32", "threads": torch.get_num_threads(),
        "absent": {},
    }  # fmt: skip
    steps: dict[str, Callable[[], Any]] = {}
    for name in candidates:
        try:
            steps[name] = make(name, row, problem).step
        except Unavailable as why:
            result["absent"][name] = str(why)
    other = torch.zeros(OTHER_DATA // 4)
    result["cold"] = compare_times(single_calls(steps, lambda name: other.add_(1), effort))
    result["warm"] = compare_times(interleave(steps, effort, steps))
    return result


# ---- functions by name

Calls = dict[str, Callable[[], Any]]


def with_grads(problem: Problem) -> list[nn.Parameter]:
    return problem.groups(torch.float32, copy_grads=True)[0]["params"]


def clipping(problem: Problem, max_norm: float) -> Calls:
    """Gradients that are clipped stay so where max_norm is 0 alone; all that is written are zeros then."""
    fastopt: Any = module_or_none("fastopt")
    ours, theirs = with_grads(problem), with_grads(problem)
    return {
        "fastopt": lambda: fastopt.clip_grad_norm_(ours, max_norm),
        "torch": lambda: torch.nn.utils.clip_grad_norm_(theirs, max_norm),
    }


def averaging(problem: Problem) -> Calls:
    fastopt: Any = module_or_none("fastopt")
    values = [param.detach() for param in with_grads(problem)]
    calls: Calls = {}
    for name, of in (("fastopt", fastopt.swa_utils), ("torch", torch.optim.swa_utils)):
        averages = [value.clone() for value in values]
        calls[name] = partial(of.get_ema_multi_avg_fn(DECAY), averages, values, 1)
    return calls


def averaging_models(problem: Problem) -> Calls:
    fastopt: Any = module_or_none("fastopt")
    model = nn.ParameterList(with_grads(problem))
    calls: Calls = {}
    for name, of in (("fastopt", fastopt.swa_utils), ("torch", torch.optim.swa_utils)):
        average = of.AveragedModel(model, multi_avg_fn=of.get_ema_multi_avg_fn(DECAY))
        average.update_parameters(model)
        calls[name] = partial(average.update_parameters, model)
    return calls


def zeroing(problem: Problem, set_to_none: bool) -> tuple[Calls, Callable[[str], Any]]:
    """The calls, and what must be done before each: gradients to drop, of which nothing is freed, as they are kept."""
    fastopt: Any = module_or_none("fastopt")
    params = with_grads(problem)
    grads = [(param, param.grad) for param in params]

    def prepare(name: str) -> None:
        for param, grad in grads:
            param.grad = grad

    return {
        "fastopt": partial(fastopt.Adam(params).zero_grad, set_to_none),
        "torch": partial(torch.optim.Adam(params).zero_grad, set_to_none),
    }, prepare


def functions(problem: Problem) -> Iterator[tuple[str, Calls, Callable[[str], Any] | None]]:
    """The name of each function, a call of ours and of torch's, and what must be done before a call."""
    yield "clip_grad_norm_, not clipping", clipping(problem, 1e9), None
    yield "clip_grad_norm_, clipping", clipping(problem, 0.0), None
    yield "get_ema_multi_avg_fn", averaging(problem), None
    yield "AveragedModel.update_parameters", averaging_models(problem), None
    yield "zero_grad()", *zeroing(problem, True)
    yield "zero_grad(set_to_none=False)", zeroing(problem, False)[0], None


def measure_functions(workload: Workload, effort: Effort) -> Iterator[dict[str, Any]]:
    for function, calls, prepare in functions(Problem(workload, torch.float32)):
        head = {"function": function, "workload": workload.name, "threads": torch.get_num_threads()}
        times = single_calls(calls, prepare, effort) if prepare else interleave(calls, effort, calls)
        del calls
        gc.collect()  # its tensors
        yield head | compare_times(times)


IN_A_ROW = 11
WHOLES: dict[str, set[str]] = {
    "clip, step, zero_grad": {"clip"},
    "unscale, step, zero_grad": {"unscale"},
    "unscale, clip, step, average, zero_grad": {"unscale", "clip", "average"},
}


class Whole:
    """A step of Adam with what surrounds it: "folded", inside the step, or one by one. Clipping multiplies."""

    def __init__(self, problem: Problem, how: str, parts: set[str]) -> None:
        fastopt: Any = module_or_none("fastopt")
        optim: Any = torch.optim if how == "torch" else fastopt
        groups = problem.groups(torch.float32, copy_grads=True)
        params = [param for group in groups for param in group["params"]]
        self.grads = [(param, param.grad, values) for param, values in zip(params, problem.grads, strict=True)]
        self.folded, self.parts, self.model = how == FOLDED, parts, nn.ParameterList(params)
        options: dict[str, Any] = {"fused": True} if how == "torch" else {}
        if self.folded:
            values = {"clip": {"max_grad_norm": MAX_NORM}, "average": {"ema_decay": DECAY}}
            options = {name: value for part in parts & values.keys() for name, value in values[part].items()}
        self.optimizer = optim.Adam(groups, **options)
        self.clip = torch.nn.utils.clip_grad_norm_ if how == "torch" else fastopt.clip_grad_norm_
        self.scaler: Any = None
        if "unscale" in parts:
            device = params[0].device
            self.scaler = (fastopt if self.folded else torch.amp).GradScaler(device.type, init_scale=2.0)
            self.scaler.scale(torch.ones((), device=device))
        if "average" in parts and not self.folded:
            ema = optim.swa_utils.get_ema_multi_avg_fn(DECAY)
            self.average = optim.swa_utils.AveragedModel(self.model, multi_avg_fn=ema)
        self.in_turn = self.calls()

    def prepare(self, new: bool) -> None:
        """Gradients: new ones, as by a backward, or those of the call before."""
        for param, grad, values in self.grads:
            param.grad = grad.copy_(values) if new else grad

    def roof(self) -> Callable[[], None]:
        """The bytes of a step, moved without arithmetic; of one folded, which takes its first step for it."""
        self.prepare(True), self.optimizer.step()
        adam = OPTIMIZERS["Adam"]
        slots = (*adam.slots, *["ema"] * ("average" in self.parts))
        return roof_step(self.optimizer, replace(adam, slots=slots), clips=len(self.parts) > 0)

    def calls(self) -> list[Callable[[], Any]]:
        """What the loop of a user says between backward and the next forward."""
        apart = set() if self.folded else self.parts
        optimizer, scaler = self.optimizer, self.scaler
        calls: list[Callable[[], Any]] = []
        if "clip" in apart:
            calls += [partial(scaler.unscale_, optimizer)] if scaler else []
            calls += [lambda: self.clip(self.model.parameters(), MAX_NORM)]
        calls += [partial(scaler.step, optimizer), scaler.update] if scaler else [optimizer.step]
        if "average" in apart:
            calls += [partial(self.average.update_parameters, self.model)]
        return [*calls, optimizer.zero_grad]

    def __call__(self) -> None:
        for call in self.in_turn:
            call()


def wholes(problem: Problem, parts: set[str]) -> dict[str, Whole]:
    return {how: Whole(problem, how, parts) for how in (FOLDED, "fastopt", "torch")}


def measure_whole(workload: Workload, effort: Effort) -> Iterator[dict[str, Any]]:
    problem = Problem(workload, torch.float32)
    for title, parts in WHOLES.items():
        calls = wholes(problem, parts)
        head = {"function": title, "workload": workload.name, "threads": torch.get_num_threads()}
        of_calls: dict[str, Callable[[], Any]] = dict(calls)
        if workload.elements >= LEAST_ELEMENTS:
            of_calls["roof"] = calls[FOLDED].roof()
        for grads, row in (("new", 1), ("the same", IN_A_ROW)):

            def prepare(name: str, of: dict[str, Whole] = calls, new: bool = grads == "new") -> None:
                of[FOLDED if name == "roof" else name].prepare(new)

            yield head | {"grads": grads} | compare_times(single_calls(of_calls, prepare, effort, row), FOLDED)
        del calls, of_calls
        gc.collect()


WHAT = ("iterations", "cold", "functions", "whole")
OF_FUNCTIONS = ("two scalars", "mlp", "1000 x 256", "gpt2")
OF_WHOLE = ("two scalars", "mlp", "1000 x 256", "465 groups", "resnet50", "gpt2")
COLD = tuple(name for name in WORKLOADS if name != "64M")  # no warmer than cold


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    # Short calls are timed one by one here: more rounds of less.
    effort, singles = (QUICK, QUICK) if quick else (FULL, Effort(seconds=5.0, min_rounds=7, max_rounds=400, batch=5e-3))
    candidates = [name for name in arguments.candidates if name != "deepspeed"]
    training = [FOLDED] * ("fastopt" in candidates) + candidates
    document: dict[str, Any] = {"environment": environment()}
    print(environment_text(document["environment"]))

    def add(kind: str, result: dict[str, Any]) -> None:
        document.setdefault(kind, []).append(result)
        save(arguments.json, document)
        print(f"{kind}: {result.get('task') or result['workload']} {result.get('function', '')}", flush=True)

    if "iterations" in arguments.what:
        for task in TASKS.values():
            add("iterations", measure_iterations(task, training, effort))
    if "cold" in arguments.what:
        for name in ("two scalars", "mlp", "1000 x 256") if quick else COLD:
            add("cold", measure_cold(WORKLOADS[name], candidates, singles))
    if "functions" in arguments.what and "fastopt" in candidates:
        for name in OF_FUNCTIONS[:3] if quick else OF_FUNCTIONS:
            for result in measure_functions(WORKLOADS[name], singles):
                add("functions", result)
    if "whole" in arguments.what and "fastopt" in candidates:
        for name in OF_WHOLE[:4] if quick else OF_WHOLE:
            for result in measure_whole(WORKLOADS[name], singles):
                add("whole", result)
    print("\n" + loop_text(document))
    return int(any("fastopt" in result["refused"] for result in document.get("iterations", ())))


if __name__ == "__main__":
    raise SystemExit(main())

"""The benchmark as a pytest-benchmark suite on the small workloads, and tests of the benchmark itself.

    pytest bench/test_bench.py -m slow --benchmark-enable [--benchmark-group-by=param:workload,param:optimizer]

`make test-long` runs each once, untimed; a plain `pytest` runs the tests of the benchmark. pytest-benchmark times one
candidate after the other; bench.run, which takes turns, is the one to believe where two are close.
"""

import copy

import pytest
import torch

from . import candidates, compare, loop, low_precision, measure, report, roof, workloads
from .candidates import CANDIDATES, OPTIMIZERS, Problem, check, reference
from .loop import PARTS, TASKS, Training

SMALL = ("two scalars", "mlp", "1000 x 256", "465 groups")
TINY = workloads.Workload("tiny", (((5,), (3, 4)), ((130,),)))


@pytest.mark.slow
@pytest.mark.parametrize("workload", SMALL)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_step(benchmark, workload, optimizer, candidate):
    row, problem = OPTIMIZERS[optimizer], Problem(workloads.WORKLOADS[workload], torch.float32)
    try:
        subject = candidates.make(candidate, row, problem)
    except candidates.Unavailable as why:
        pytest.skip(str(why))
    assert check(candidate, subject, reference(row, problem), row, problem) == ""
    benchmark(subject.step)


# ---- the benchmark itself


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [("mlp", 6, 669_706), ("resnet50", 161, 25_557_032), ("gpt2", 148, 124_439_808), ("465 groups", 465, 119_040)],
)
def test_workloads_have_the_published_sizes(name, tensors, elements):
    workload = workloads.WORKLOADS[name]
    assert (len(workload.shapes), workload.elements) == (tensors, elements)


class WrongLast(torch.optim.Adam):
    """Leaves the last element of the last tensor as it was."""

    def step(self):
        last = self.param_groups[-1]["params"][-1].data[-1:]
        before = last.clone()
        super().step()
        last.copy_(before)


class NotANumber(torch.optim.Adam):
    def step(self):
        super().step()
        self.param_groups[0]["params"][0].data[0] = float("nan")


class WrongRate(torch.optim.Adam):
    """Gives every group the first one's learning rate."""

    def step(self):
        for group in self.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        super().step()


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    # learning rates that differ by 1/1000 are the same in bf16
    [(WrongLast, "fp32"), (WrongLast, "bf16"), (NotANumber, "fp32"), (NotANumber, "bf16"), (WrongRate, "fp32")],
)
def test_a_wrong_candidate_is_refused_and_not_timed(wrong, dtype, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "fused", lambda row, groups, dtype: wrong(groups))
    result = measure.measure(TINY, "Adam", dtype, measure.QUICK, ["default", "fused"])
    assert set(result["refused"]) == {"fused"}
    assert set(result["seconds"]) == {"default"}


@pytest.mark.parametrize("dtype", measure.DTYPES.values())
def test_checking_leaves_the_problem_as_it_was(dtype):
    row, problem = OPTIMIZERS["Adam"], Problem(TINY, dtype)
    before = copy.deepcopy([problem.start, problem.grads])
    subject = candidates.make("default", row, problem)
    subject.param_groups[0]["eps"] = 0.1
    assert check("default", subject, reference(row, problem), row, problem)
    torch.testing.assert_close([problem.start, problem.grads], before, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", measure.DTYPES.values())
def test_the_roof_changes_nothing(optimizer, dtype):
    row, problem = OPTIMIZERS[optimizer], Problem(TINY, dtype)
    subject = candidates.make("default", row, problem)
    subject.step()
    before = copy.deepcopy(subject.state_dict()), [p.clone() for group in subject.param_groups for p in group["params"]]
    roof.roof_step(subject, row)()
    after = subject.state_dict(), [p for group in subject.param_groups for p in group["params"]]
    torch.testing.assert_close(after[0]["state"], before[0]["state"], rtol=0, atol=0)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("itemsizes", [(2, 2), (4, 4, 4), (2, 2, 4, 4), (4, 4, 2, 2, 4)], ids=str)
def test_the_roof_writes_every_element(itemsizes, threads):
    """With a `zero` that is not zero every word of every written operand changes, and nothing beyond."""
    sizes, guard = [1, 0, 33, 1000, 64], 64
    dtypes = [{2: torch.int16, 4: torch.int32}[itemsize] for itemsize in itemsizes]
    tensors = [[torch.full((size + guard,), 1 << k, dtype=kind) for k, kind in enumerate(dtypes)] for size in sizes]
    table, ends = torch.tensor([[t.data_ptr() for t in row] for row in tensors]), torch.tensor(sizes).cumsum(0)
    kinds, written = torch.tensor(itemsizes), torch.tensor([k != 1 for k in range(len(itemsizes))]).long()
    arrays = table.data_ptr(), ends.data_ptr(), len(sizes), kinds.data_ptr(), written.data_ptr(), len(itemsizes)
    roof.kernel(roof.isa())(*arrays, threads, -1)
    for size, row in zip(sizes, tensors, strict=True):
        for operand, tensor in enumerate(row):
            changed = tensor != 1 << operand
            assert changed[:size].all() == (operand != 1 or not size)
            assert not changed[size:].any()


def result(ratio, **more):
    spread = {"median": ratio, "q20": ratio * 0.99, "q80": ratio * 1.01}
    return {"workload": "mlp", "optimizer": "Adam", "dtype": "fp32", "threads": 2, "refused": {},
            "seconds": {"fastopt": {}}, "ratio": {"fused": spread, "default": spread}} | more  # fmt: skip


def test_compare_says_what_got_slower():
    old = {"results": [result(2.0)], "instructions": {"Adam": 1000}}
    assert compare.slower(old, {"results": [result(1.9)], "instructions": {"Adam": 1005}}, 0.10) == []
    assert compare.slower(old, {"results": [result(2.5)]}, 0.10) == []
    ((*_, text),) = compare.slower(old, {"results": [result(1.6)]}, 0.10)
    assert text == "1.25 x the time"
    ((*_, text),) = compare.slower(old, {"instructions": {"Adam": 1020}}, 0.10)
    assert text == "1.020 x the instructions"
    ((*_, text),) = compare.slower(old, {"results": [result(2.0, refused={"fastopt": "param 0"})]}, 0.10)
    assert text == "wrong: param 0"


def test_compare_wants_the_quantiles_apart():
    noisy = result(1.6)
    for name in noisy["ratio"]:
        noisy["ratio"][name] = {"median": 1.6, "q20": 1.0, "q80": 2.2}
    assert compare.slower({"results": [result(2.0)]}, {"results": [noisy]}, 0.10) == []


# ---- whole iterations


@pytest.fixture
def one_thread():
    """The pool's barriers are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LITTLE = measure.Effort(seconds=0.02, min_rounds=2, max_rounds=3, batch=1e-4)


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [("linear regression", 2, 2), ("RL actor 64-64", 6, 4866), ("MLP 784-512-512-10", 6, 669_706),
     ("GPT 0.93 M", 52, 932_608), ("CNN of 100 narrow layers", 404, 60_122)],
)  # fmt: skip
def test_models_have_the_stated_sizes(name, tensors, elements):
    params = list(TASKS[name].model().parameters())
    assert (len(params), sum(param.numel() for param in params)) == (tensors, elements)


def test_each_part_is_timed():
    """With a clock that goes on by 1 whenever it is read, each part takes 1."""
    ticks = iter(range(1000))
    assert Training(TASKS["linear regression"], "default").run(3, lambda: next(ticks)) == [1.0] * len(PARTS)


@pytest.mark.parametrize("name", ["linear regression", "RL actor 64-64"])
def test_losses_are_those_of_torch(one_thread, name):
    result = loop.measure_iterations(TASKS[name], ["default", "foreach", "fused", "fastopt", "folded"], LITTLE)
    assert not result["refused"]
    assert result["seconds"].keys() == result["parts"].keys() == result["losses_off"].keys() >= {"default", "fused"}
    assert result["parts"]["fused"].keys() == set(PARTS)
    assert "all but the model" in report.loop_text({"iterations": [result]})


def test_a_training_with_other_losses_is_refused(one_thread, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "fused", lambda row, params, dtype: torch.optim.Adam(params, lr=2e-3))
    result = loop.measure_iterations(TASKS["RL actor 64-64"], ["default", "fused"], LITTLE)
    assert set(result["refused"]) == {"fused"}
    assert set(result["seconds"]) == {"default"}
    assert "fused: WRONG" in report.loop_text({"iterations": [result]})
    assert loop.off([1.0, float("nan")], [1.0, 1.0]) == float("inf")


@pytest.fixture
def dry_gpu(monkeypatch):
    """bench.gpu_loop on CPU tensors, of torch's candidates alone."""
    pytest.importorskip("triton")
    from . import gpu_dry, gpu_loop

    monkeypatch.setattr(gpu_loop, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_loop, "CANDIDATES", ("default", "fused"))
    with gpu_dry.dry_run():
        yield gpu_loop


def test_iterations_on_a_gpu(one_thread, dry_gpu):
    """The host's time and the device's of each part, and of what is not the model's together."""
    result = dry_gpu.measure_iterations(TASKS["RL actor 64-64"], LITTLE)
    assert not result["refused"] and result["seconds"].keys() == {"default", "fused"}
    for kind in ("host", "device"):
        assert result[kind]["fused"].keys() == {*PARTS, "own"}
        assert 0 < result[kind]["fused"]["step"]["median"] < result[kind]["fused"]["own"]["median"]


def test_a_training_on_a_gpu_with_other_losses_is_refused(one_thread, dry_gpu, monkeypatch):
    """Unless torch's own are as far from one another."""
    monkeypatch.setitem(CANDIDATES, "fused", lambda row, params, dtype: torch.optim.Adam(params, lr=2e-3))
    result = dry_gpu.measure_iterations(TASKS["RL actor 64-64"], LITTLE)
    assert set(result["refused"]) == {"fused"}
    assert set(result["seconds"]) == set(result["host"]) == set(result["device"]) == {"default"}
    difference = result["losses_off"]["fused"]
    monkeypatch.setattr(dry_gpu, "off", lambda losses, expected: difference)
    assert not dry_gpu.measure_iterations(TASKS["RL actor 64-64"], LITTLE)["refused"]


def test_calls_on_a_gpu(one_thread, dry_gpu):
    """Each has new gradients before every call, and both times."""
    prepared, called = [], []
    calls = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    result = dry_gpu.measure_calls(calls, prepared.append, LITTLE, lambda step, host: step() or 1e-3, "a")
    assert prepared == called and len(called) == 2 + 4 * result["rounds"]
    assert result["ratio"]["b"]["median"] == 1 and result["host"].keys() == {"a", "b"}


def test_steps_with_cold_caches(one_thread, monkeypatch):
    monkeypatch.setattr(loop, "OTHER_DATA", 1 << 10)
    result = loop.measure_cold(TINY, ["fastopt", "fused"], LITTLE)
    assert result["cold"]["seconds"].keys() == result["warm"]["seconds"].keys() >= {"fused"}
    assert TINY.name in report.loop_text({"cold": [result]})


def test_functions_are_called_on_what_they_shall_do(one_thread):
    pytest.importorskip("fastopt")
    results = list(loop.measure_functions(TINY, LITTLE))
    assert len({result["function"] for result in results}) == len(results) == 6
    assert all(result["seconds"].keys() == {"fastopt", "torch"} for result in results)
    problem = Problem(TINY, torch.float32)
    calls, prepare = loop.zeroing(problem, True)
    (optimizer,) = {call.func.__self__ for name, call in calls.items() if name == "torch"}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for call in calls.values():
        prepare("")
        assert all(param.grad is not None for param in params)
        call()
        assert all(param.grad is None for param in params)
    for call in loop.clipping(problem, 1e9).values():
        assert call() > 1
    for call in loop.clipping(problem, 0.0).values():
        call()
        assert call() == 0
    ours, theirs = loop.averaging(problem).values()
    before = theirs.args[0][0].clone()
    ours(), theirs()
    assert torch.equal(ours.args[0][0], theirs.args[0][0]) and ours.args[0][0] is not ours.args[1][0]
    assert before.shape == theirs.args[0][0].shape


@pytest.mark.parametrize("parts", loop.WHOLES.values(), ids=loop.WHOLES.keys())
def test_what_surrounds_a_step_is_the_same_inside_it(one_thread, parts):
    """The three leave the same parameters, as far as the rounding of torch's norm allows, and no gradient."""
    pytest.importorskip("fastopt")
    wholes = loop.wholes(Problem(TINY, torch.float32), parts)
    for whole in wholes.values():
        for _ in range(3):
            whole.prepare(True)
            whole()
        assert all(param.grad is None for param in whole.model)
    for folded, apart, torchs in zip(*(whole.model for whole in wholes.values()), strict=True):
        assert torch.equal(folded, apart)
        torch.testing.assert_close(folded, torchs)
    averages = [wholes["folded"].optimizer.state[param].get("ema") for param in wholes["folded"].model]
    assert [average is None for average in averages] == ["average" not in parts] * len(averages)
    if "average" in parts:
        torch.testing.assert_close(averages, [param.detach() for param in wholes["torch"].average.module])


def test_whole_steps_are_timed(one_thread):
    pytest.importorskip("fastopt")
    results = list(loop.measure_whole(TINY, LITTLE))
    kinds = [(result["function"], result["grads"]) for result in results]
    assert kinds == [(name, grads) for name in loop.WHOLES for grads in ("new", "the same")]
    assert all(result["seconds"].keys() == {"folded", "fastopt", "torch"} for result in results)
    assert {result["unit"] for result in results} == {"folded"}
    assert "unscale, clip, step" in report.loop_text({"whole": results})


def test_the_roof_of_a_step_with_what_surrounds_it(one_thread, monkeypatch):
    """Has its bytes: gradients twice where it clips or unscales, averages; and changes nothing."""
    pytest.importorskip("fastopt")
    monkeypatch.setattr(loop, "LEAST_ELEMENTS", 1)
    results = list(loop.measure_whole(TINY, LITTLE))
    assert all("roof" in result["seconds"] for result in results)
    problem, moved = Problem(TINY, torch.float32), []
    monkeypatch.setattr(roof, "moves", lambda tensors, written: moved.append([len(row) for row in tensors]) or int)
    for parts in loop.WHOLES.values():
        loop.Whole(problem, "folded", parts).roof()()
    count = len(problem.start)
    assert moved == [[4] * count, [1] * count] * 2 + [[5] * count, [1] * count]


# ---- 16 bits


def test_ways_to_keep_weights(one_thread, monkeypatch):
    """Each moves the bytes that docs/low-precision.md says, has a roof of them, and is right."""
    pytest.importorskip("fastopt")
    monkeypatch.setattr(low_precision, "LEAST_ELEMENTS", 1)
    result = low_precision.measure_ways(TINY, LITTLE)
    kept_and_moved = {name: (result["kept"][name], moved) for name, moved in result["bytes"].items()}
    assert kept_and_moved == {
        "torch fused, fp32": (12, 28), "torch fused, bf16": (6, 14), "fp32": (12, 28), "fp32, bf16 state": (8, 20),
        "bf16 + remainder, fp32 state": (12, 26), "bf16 + remainder, bf16 state": (8, 18),
        "bf16, stochastic rounding, fp32 state": (10, 22), "bf16": (6, 14),
    }  # fmt: skip
    assert not result["refused"] and not result["absent"]
    assert result["of_roof"].keys() == result["gain"].keys() == result["bytes"].keys()
    text = report.report([{"environment": measure.environment(), "low_precision": [result]}], None)
    assert all(f"| {name} " in text for name in result["bytes"])


def test_a_lost_remainder_is_refused(one_thread, monkeypatch):
    fastopt = pytest.importorskip("fastopt")
    name = "bf16 + remainder, fp32 state"
    monkeypatch.setattr(fastopt, "master_weights", lambda optimizer: {
        param: param.detach().float() for group in optimizer.param_groups for param in group["params"]
    })  # fmt: skip
    result = low_precision.measure_ways(TINY, LITTLE, [name])
    assert result["refused"].keys() == {name} and "seconds" not in result
    assert f"{name}: WRONG" in report.low_precision_table(result)

"""What a step of GPU tensors does beside the update, without a GPU: as test_gpu.py, on the PTX interpreter.

The norm and, given it, parameters, state and running averages have the bits of the C++ backend.
"""

import contextlib
import copy
import itertools
import math
import re
import struct

import pytest
import torch

import fastopt

from .optimizers import ROWS
from .reference import assert_same_bits, snapshot

triton = pytest.importorskip("triton")

from fastopt.kernels import multi_tensor, passes  # noqa: E402

from fastopt import gpu as backend  # noqa: E402
from fastopt import gpu_bucket, gpu_passes  # noqa: E402

from .test_gpu import CHUNK, Graph, capturable_rows, triton_serves_cpu_tensors  # noqa: E402
from .test_gpu_passes import EXTREME, on_cpu  # noqa: E402
from .test_kernels import ROCM, accesses, compiled_for  # noqa: E402
from .tools import sass  # noqa: E402

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = (0, 1, 5, 33, 300, CHUNK + 1)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
ADAM = next(row for row in ROWS if row.name == "Adam")
CLIP, EMA, UNSCALE = {"max_grad_norm": 3.0}, {"ema_decay": 0.9}, {"scale": 1024.0}
WAYS = [CLIP, EMA, UNSCALE, CLIP | EMA, UNSCALE | CLIP, UNSCALE | EMA, UNSCALE | CLIP | EMA]


@pytest.fixture(params=[90, pytest.param(80, marks=pytest.mark.slow)], ids=["sm_90", "sm_80"])
def gpu(request):
    with triton_serves_cpu_tensors(request.param, races=True) as stand_in:
        yield stand_in


@pytest.fixture
def idle_gpu():
    """A GPU that is sent everything and does nothing."""
    with triton_serves_cpu_tensors(execute=False) as stand_in:
        yield stand_in


def parameters(dtypes, sizes=SIZES):
    """Of which every fifth begins an element behind an address that 16 divides."""
    torch.manual_seed(0)
    made = []
    for number, (dtype, size) in enumerate(itertools.product(dtypes, sizes)):
        off = number % 5 == 4
        made.append(torch.nn.Parameter(torch.randn(size + off).to(dtype)[off:]))
    return made


def give_gradients(optimizer, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for param in params_of(optimizer):
        param.grad = torch.randn(param.shape, generator=generator).mul_(scale).to(param.dtype)


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def optimizer_of(row, dtypes, scale=None, sizes=SIZES, **options):
    params = parameters(dtypes, sizes)
    optimizer = row.ours(params[::2], **row.plain, **options)
    optimizer.add_param_group({"params": params[1::2], "lr": 0.03, "maximize": True})
    if scale is not None:
        optimizer.grad_scale = torch.tensor(scale)
    return optimizer


def names(gpu):
    return [launch.name for launch in gpu.launches]


def run(row, dtypes, way, norms=None, sizes=SIZES):
    """Four steps, of which the second does not clip: norms and snapshots. `norms`: that are given."""
    optimizer = optimizer_of(row, dtypes, sizes=sizes, **way)
    scale = way.get("scale")
    found = []
    for step, size in enumerate((1.0, 1e-4, 100.0, 1.0)):
        give_gradients(optimizer, step, size * (scale or 1.0))
        before = [param.grad.clone() for param in params_of(optimizer)]
        if norms is not None and "max_grad_norm" in way:
            optimizer._fastopt_options.searched = (scale and 1 / scale), norms[step].item()
        optimizer.step()
        assert_same_bits([param.grad for param in params_of(optimizer)], before, "gradients stay")
        found.append((optimizer.grad_norm if "max_grad_norm" in way else None, snapshot(optimizer)))
    return [norm for norm, _ in found], [state for _, state in found]


# ---- bits


@pytest.mark.parametrize(
    "row, way",  # each way with one optimizer, each optimizer with all at once; the full product is slow
    [
        pytest.param(
            row, way, id=f"{row.name}-{' '.join(way)}", marks=() if row is ADAM or way is WAYS[-1] else pytest.mark.slow
        )
        for row, way in itertools.product(ROWS, WAYS)
    ],
)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_bits_of_the_cpp_backend(row, way, dtype, gpu):
    norms, actual = run(row, (dtype,), way)
    with on_cpu():
        own_norms, _ = run(row, (dtype,), way)
        _, expected = run(row, (dtype,), way, norms)
    assert_same_bits(actual, expected, row.name)
    if "max_grad_norm" in way:
        assert all(norm.dtype == (F64 if dtype == F64 else F32) and norm.shape == () for norm in norms)
        assert len({norm.data_ptr() for norm in norms}) == len(norms)  # of their own
        if dtype == F64:  # there is nothing wider to sum in
            torch.testing.assert_close(norms, own_norms, rtol=1e-15, atol=0)
        else:
            assert_same_bits(norms, own_norms, "norms")
    one_step = ["partial_norms", "finish_norm"] * ("max_grad_norm" in way) + ["multi_tensor_update"]
    assert names(gpu) == 4 * one_step


@every_row
def test_parameters_of_several_dtypes_have_one_norm(row, gpu):
    dtypes, way = (BF16, F32, F16), UNSCALE | CLIP | EMA
    norms, actual = run(row, dtypes, way, sizes=(5, 130))
    with on_cpu():
        own_norms, expected = run(row, dtypes, way, sizes=(5, 130))
    assert_same_bits([norms, actual], [own_norms, expected], row.name)
    assert names(gpu)[:7] == 3 * ["partial_norms"] + ["finish_norm"] + 3 * ["multi_tensor_update"]


@every_row
def test_states_of_another_dtype(row, gpu):
    """In float32 for bfloat16, as after a load. An average of 16 bits is updated beside torch's own step."""

    def steps(narrow):
        optimizer = optimizer_of(row, (BF16,), **UNSCALE, **CLIP, **EMA)
        found = []
        for step in range(3):
            give_gradients(optimizer, step, 1024.0)
            optimizer.step()
            for entry in optimizer.state.values():
                entry.update({name: entry[name].float() for name in row.slots if entry.get(name) is not None})
            found.append(snapshot(optimizer))
        if narrow:
            optimizer.grad_scale = optimizer.max_grad_norm = None
            for entry in optimizer.state.values():
                entry["ema"] = entry["ema"].bfloat16()
                entry.update({name: entry[name].bfloat16() for name in row.slots if entry.get(name) is not None})
            optimizer.step()
        return optimizer, found

    _, actual = steps(narrow=False)
    with on_cpu():
        assert_same_bits(actual, steps(narrow=False)[1], row.name)
    optimizer, found = steps(narrow=True)
    reason = f"{row.name}: on a GPU, a running average of 16 bits"
    assert fastopt.backend_info()["torch_steps"].get(reason)
    for param, before in zip(params_of(optimizer), found[-1]["ema", F32][1].split(sizes_of(optimizer)), strict=True):
        expected = before.bfloat16().lerp(param.detach(), 0.1)
        assert_same_bits(optimizer.state[param]["ema"], expected, "average")


def sizes_of(optimizer):
    return [param.numel() for param in params_of(optimizer)]


@every_row
def test_nothing_else_is_touched(row, gpu):
    optimizer = optimizer_of(row, (BF16,), **UNSCALE, **CLIP, **EMA)
    give_gradients(optimizer, 0)
    optimizer.step()
    give_gradients(optimizer, 1)
    launch = type(gpu).launch

    def watched(*arguments):
        state = [x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, torch.Tensor)]
        kept = optimizer._fastopt_gpu
        gpu.options["ranges"] = [*params_of(optimizer), *(p.grad for p in params_of(optimizer)), *state, *results]
        gpu.options["ranges"] += [*(b.buffer for b in kept.buckets.values()), *kept.numbers.values()]
        launch(gpu, *arguments)

    results, empty, to = [], torch.empty, backend.number_on
    gpu.launch = watched
    backend.torch.empty = lambda *a, **o: results.append(empty(*a, **o)) or results[-1]
    backend.number_on = lambda *a: results.append(to(*a)) or results[-1]
    try:
        optimizer.step()
    finally:
        backend.torch.empty, backend.number_on = empty, to
    assert len(results) == 2  # the scale and the norm


@pytest.mark.parametrize("special", [math.nan, math.inf])
@every_row
def test_norm_that_is_not_finite(row, special, gpu):
    """As on the CPU, and refused with error_if_nonfinite: nothing is made, counted or launched for it."""

    def step(optimizer):
        give_gradients(optimizer, 1)
        params_of(optimizer)[4].grad[7] = special
        optimizer.step()
        return [snapshot(optimizer), optimizer.grad_norm]

    actual = step(optimizer_of(row, (F32,), **CLIP))
    with on_cpu():
        assert_same_bits(actual, step(optimizer_of(row, (F32,), **CLIP)), "stepped")
    for steps in (0, 2):
        optimizer = optimizer_of(row, (F32,), **CLIP, **EMA, error_if_nonfinite=True)
        for number in range(steps):
            give_gradients(optimizer, number)
            optimizer.step()
            assert names(gpu)[-4:] == ["partial_norms", "finish_norm", "finish_norm", "multi_tensor_update"]
        before, entries = copy.deepcopy(snapshot(optimizer)), len(optimizer.state)
        with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
            step(optimizer)
        assert_same_bits(snapshot(optimizer), before, "refused")
        assert len(optimizer.state) == entries
        give_gradients(optimizer, 5)
        optimizer.step()
        with on_cpu():
            other = optimizer_of(row, (F32,), **CLIP, **EMA, error_if_nonfinite=True)
            for number in [*range(steps), 5]:
                give_gradients(other, number)
                other.step()
        assert_same_bits(snapshot(optimizer), snapshot(other), "after it")


@pytest.mark.parametrize("numbers", EXTREME.values(), ids=EXTREME)
def test_search_finds_what_is_not_finite(numbers, gpu):
    """Not a norm that float32 does not hold, of gradients that are finite."""
    grads = [torch.ones(5), torch.tensor(numbers)]
    for inverse_scale in (None, 0.25, torch.tensor(0.25)):
        norm, found_inf = gpu_passes.search(grads, inverse_scale)
        scaled = grads if inverse_scale is None else [grad * 0.25 for grad in grads]
        with on_cpu():
            assert_same_bits(norm, fastopt.get_total_norm(scaled), "norm")
        assert found_inf.dtype == F32 and found_inf == any(not grad.isfinite().all() for grad in scaled)


def test_scaled_gradients_are_rounded_before_they_are_squared(gpu):
    for dtype in (F32, F64, BF16, F16):
        grads = [torch.randn(size).to(dtype) for size in SIZES]
        norm, found_inf = gpu_passes.search(grads, 1 / 3)
        with on_cpu():
            expected = fastopt.get_total_norm([(grad * (1 / 3)).to(dtype) for grad in grads])
        torch.testing.assert_close(norm, expected, rtol=1e-15 if dtype == F64 else 0, atol=0)
        assert found_inf == 0
    assert gpu_passes.search([torch.ones(2, dtype=torch.complex64)]) is None


def test_infinite_factor(gpu):
    grads = [torch.ones(3), torch.ones(CHUNK + 1)]
    norm, found_inf = gpu_passes.search(grads, math.inf)
    assert norm == math.inf and found_inf == 1


def test_found_inf_leaves_the_step_out(gpu):
    optimizer = optimizer_of(ADAM, (F32,), **UNSCALE)
    give_gradients(optimizer, 1)
    before = snapshot(optimizer)
    optimizer.found_inf = torch.tensor(2.0)
    optimizer.step()
    assert_same_bits(snapshot(optimizer), before, "left out")
    assert not gpu.launches and not optimizer.state


def test_tensors_without_elements_have_a_norm(gpu):
    optimizer = optimizer_of(ADAM, (F32,), sizes=(0, 0), **CLIP)
    give_gradients(optimizer, 1)
    optimizer.step()
    assert optimizer.grad_norm == 0 and names(gpu) == ["finish_norm"]


# ---- what the host does


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_hot_step_uploads_compiles_and_allocates_nothing(way, idle_gpu, monkeypatch):
    """But the norm, a tensor of its own."""
    params = parameters((F32, BF16))
    optimizer = ADAM.ours(params, **ADAM.plain, **{name: way[name] for name in way if name != "scale"})
    if "scale" in way:
        optimizer.grad_scale = way["scale"]  # a number: a tensor is the user's to make
    give_gradients(optimizer, 1)
    for _ in range(3):
        optimizer.step()
    compilations, made = [], []
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", lambda *args: compilations.append(args))
    for name in ("empty", "full"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **options: made.append(a) or make(*a, **options))
    buckets = optimizer._fastopt_gpu.buckets.values()
    uploads = [bucket.uploads for bucket in buckets]
    counters = fastopt._C.counters()
    for step in range(5):
        if "max_grad_norm" in way:
            optimizer.max_grad_norm = 1.0 + step
        if "ema_decay" in way:
            optimizer.ema_decay = 0.5 + step / 10
        optimizer.step()
    assert [bucket.uploads for bucket in buckets] == uploads and not compilations
    assert fastopt._C.counters() == counters
    assert made == 5 * [((),)] * ("max_grad_norm" in way)
    weights = {struct.unpack("<d", launch.parameters[-3])[0] for launch in idle_gpu.launches[-12:]}
    assert 1 - optimizer.ema_decay in weights if "ema_decay" in way else True


@every_row
def test_options_that_change_between_steps(row, gpu):
    """Clipping, averages and a scale on and off: as on the CPU, and kernels are made before anything is written."""

    def steps():
        optimizer = optimizer_of(row, (F32, BF16), sizes=(5, 130), **CLIP, **EMA)
        found = []
        for step, (max_norm, decay, scale) in enumerate(
            [
                (2.0, 0.9, None),
                (None, 0.9, None),
                (0.5, None, 4.0),
                (0.5, 0.5, None),
                (2.0, 0.9, 2.0),
                (None, None, None),
            ]
        ):
            optimizer.max_grad_norm, optimizer.ema_decay = max_norm, decay
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            give_gradients(optimizer, step)
            optimizer.step()
            found += [snapshot(optimizer)] + [optimizer.grad_norm] * (max_norm is not None)
        return found

    actual = steps()
    with on_cpu():
        assert_same_bits(actual, steps(), row.name)


def test_a_kernel_that_cannot_be_made_changes_nothing(gpu, monkeypatch):
    optimizer = optimizer_of(ADAM, (F32,), max_grad_norm=1.0)
    optimizer.max_grad_norm = None
    give_gradients(optimizer, 1)
    optimizer.step()
    before = copy.deepcopy(snapshot(optimizer))
    optimizer.max_grad_norm = 1.0

    def fail(*_):
        raise RuntimeError("no ptxas")

    with monkeypatch.context() as patch:
        patch.setattr(gpu_bucket.passes, "step_norm_launcher", fail)
        with pytest.raises(RuntimeError, match="could not make fastopt's kernel of adam for cpu.*no ptxas"):
            optimizer.step()
    assert_same_bits(snapshot(optimizer), before, "refused")
    optimizer.step()
    assert optimizer.grad_norm > 0


@pytest.mark.parametrize("failing", ["partial_norms", "finish_norm", "multi_tensor_update"])
def test_a_step_after_one_that_failed(failing, gpu, monkeypatch):
    """It counts for nothing, at the first step and at a later one; and averages begin with the one after it."""
    optimizer, other = (optimizer_of(ADAM, (F32,), **CLIP, **EMA) for _ in range(2))
    for step in range(2):
        give_gradients(optimizer, step)
        launch = type(gpu).launch

        def fail(function, *arguments, launch=launch):
            if function.name == failing:
                raise RuntimeError("an error")
            launch(gpu, function, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(gpu, "launch", fail, raising=False)
            with pytest.raises(RuntimeError, match=r"failed at launch 1 of 1 of adam's kernel"):
                optimizer.step()
        assert {entry["step"].item() for entry in optimizer.state.values()} == {step}
        optimizer.step()
        with on_cpu():
            give_gradients(other, step)
            other.step()
        assert_same_bits([snapshot(optimizer), optimizer.grad_norm], [snapshot(other), other.grad_norm], str(step))


# ---- found_inf, read by the update of a capturable step

LOW = {
    (F32,): {},
    (F64,): {},
    (BF16, F32): {"master_weights": True, "state_dtype": F32},
    (F16,): {"stochastic_rounding": True, "state_dtype": BF16},
}
FOUND = [torch.tensor(0.0), torch.tensor(2.0), torch.tensor([0.0]), torch.tensor(math.nan), torch.zeros((), dtype=F64)]
FOUND += [torch.ones((), dtype=F64), torch.tensor(True), torch.tensor([0.0, 0.5]), torch.tensor(0)]


@contextlib.contextmanager
def nobody_waits(monkeypatch):
    """For a number on the device."""

    def wait(tensor):
        raise AssertionError("the host looks at a number on the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, wait)
        yield


@pytest.mark.parametrize("way", [{}, UNSCALE | CLIP | EMA], ids=str)
@pytest.mark.parametrize("dtypes", LOW, ids=str)
@capturable_rows
def test_the_update_reads_found_inf(row, dtypes, way, gpu, monkeypatch):
    """Of any dtype, whatever is not 0: nothing is touched. The bits are those of the other steps alone."""

    def steps(on_gpu):
        optimizer = optimizer_of(
            row, dtypes, **way, **LOW[dtypes], sizes=(1, 33, 300, 5, 2 * CHUNK + 1, 0), capturable=on_gpu
        )
        found = []
        for step, found_inf in enumerate([torch.tensor(0.0), *FOUND]):
            give_gradients(optimizer, step)
            if step == 3:
                for param in params_of(optimizer)[1::3]:
                    param.grad = None  # of which there are averages
            optimizer.found_inf = found_inf
            before = snapshot(optimizer)
            with nobody_waits(monkeypatch) if on_gpu and step else contextlib.nullcontext():
                optimizer.step()
            if found_inf.any():
                assert_same_bits(snapshot(optimizer), before, f"left out: {found_inf}")
            found.append(snapshot(optimizer))
        return found

    actual = steps(on_gpu=True)
    assert any("multi_tensor_prepare" in name for name in names(gpu))
    with on_cpu():
        expected = steps(on_gpu=False)
    if dtypes == (F64,):  # the powers of beta are not one function everywhere
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)
    else:
        assert_same_bits(actual, expected, row.name)


@capturable_rows
def test_a_first_step_that_is_left_out_makes_nothing(row, gpu):
    optimizer = optimizer_of(row, (F32,), **CLIP, **EMA, capturable=True)
    give_gradients(optimizer, 1)
    optimizer.found_inf = torch.tensor(2.0)
    before = snapshot(optimizer)
    optimizer.step()
    assert_same_bits(snapshot(optimizer), before, "left out")
    assert not gpu.launches and not optimizer.state


@capturable_rows
def test_found_inf_where_torch_steps(row, gpu, monkeypatch):
    """The host looks then; torch's step refuses the CPU that is a GPU here."""
    optimizer = optimizer_of(row, (torch.complex64,), sizes=(3, 5), capturable=True)
    optimizer.found_inf = torch.tensor(2.0)
    give_gradients(optimizer, 1)
    before = snapshot(optimizer)
    optimizer.step()
    optimizer.found_inf.zero_()
    with pytest.raises(AssertionError, match="capturable=True"):
        optimizer.step()
    monkeypatch.setattr("fastopt.aside.is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="because a parameter is complex, and while a CUDA graph is captured nobody"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before, "left out or refused")


@capturable_rows
def test_found_inf_of_a_step_that_refuses_norms(row, gpu):
    """It waits for the norm anyway; a step that is left out refuses nothing."""
    optimizer = optimizer_of(row, (F32,), **CLIP, error_if_nonfinite=True, capturable=True)
    optimizer.found_inf = torch.tensor(1.0)
    give_gradients(optimizer, 1)
    params_of(optimizer)[2].grad.fill_(math.inf)
    optimizer.step()
    assert not optimizer.state
    optimizer.found_inf.zero_()
    with pytest.raises(RuntimeError, match="is non-finite"):
        optimizer.step()


def test_not_every_group_counts_on_the_gpu(gpu):
    """The host looks: it has counts of its own."""
    optimizer = optimizer_of(ADAM, (F32,))
    optimizer.param_groups[0]["capturable"] = True
    give_gradients(optimizer, 1)
    optimizer.step()
    before, launches = snapshot(optimizer), len(gpu.launches)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert_same_bits(snapshot(optimizer), before, "left out")
    assert len(gpu.launches) == launches


def test_hot_capturable_step_with_all_of_it(idle_gpu, monkeypatch):
    """Allocates, uploads and compiles nothing, but for the norm; four launches, of which one counts."""
    optimizer = optimizer_of(ADAM, (F32,), **CLIP, **EMA, capturable=True)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), 4.0
    give_gradients(optimizer, 1)
    optimizer.step()
    optimizer.step()
    (bucket,) = optimizer._fastopt_gpu.buckets.values()
    made, uploads, counters = [], bucket.uploads, fastopt._C.counters()
    for name in ("empty", "full"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **options: made.append(a) or make(*a, **options))
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", None)
    idle_gpu.launches.clear()
    optimizer.step()
    assert fastopt._C.counters() == counters and bucket.uploads == uploads and made == [((),)]
    assert names(idle_gpu) == ["partial_norms", "finish_norm", "multi_tensor_prepare", "multi_tensor_update"]


class Scaler(fastopt.GradScaler):
    """Shows what torch's scaler hands to and gets from the step."""

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        self.inverse, self.found = inv_scale, found_inf
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)


@pytest.mark.parametrize("way", [{}, CLIP | EMA], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@capturable_rows
def test_scaler_of_capturable_steps(row, dtype, way, gpu, monkeypatch):
    """Searches, unscales, clips and leaves out, and after the first step nobody waits; torch's scale and bits."""

    def steps(scaler, **options):
        optimizer = optimizer_of(row, (dtype,), **way, **options)
        found = []
        for step in range(9):
            give_gradients(optimizer, step, float(scaler.scale(torch.ones(()))))
            if step in (0, 3, 4, 7):
                params_of(optimizer)[1 + step // 2].grad[-1:] = (math.inf, math.nan)[step % 2]
            before = snapshot(optimizer)
            hot = step > 1 and isinstance(scaler, fastopt.GradScaler) and options
            with nobody_waits(monkeypatch) if hot else contextlib.nullcontext():
                scaler.step(optimizer)
                scaler.update()
            if step in (0, 3, 4, 7):
                assert_same_bits(snapshot(optimizer), before, "left out")
            elif "max_grad_norm" in way:
                found.append(optimizer.grad_norm.clone())
            found += [torch.tensor(scaler.get_scale()), snapshot(optimizer)]
        return found

    options = {"init_scale": 2.0**10, "growth_factor": 1.7, "backoff_factor": 0.6, "growth_interval": 2}
    actual = steps(Scaler("cpu", **options), capturable=True)
    with on_cpu():
        expected = steps(fastopt.GradScaler("cpu", **options))
        if not way:
            assert_same_bits(expected, steps(torch.amp.GradScaler("cpu", **options)), "torch's scaler")
    if dtype == F64:
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)
    else:
        assert_same_bits(actual, expected, row.name)


def test_scaler_of_capturable_steps_where_torch_steps(gpu):
    """The host searches; as above, torch's step refuses these. What a user sets by hand is taken, too."""
    optimizer = optimizer_of(ADAM, (torch.complex64,), sizes=(3, 5), capturable=True)
    scaler = fastopt.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    refused = pytest.raises(AssertionError, match="capturable")
    for value, error in ((math.inf, contextlib.nullcontext()), (1.0, refused)):
        give_gradients(optimizer, 1)
        params_of(optimizer)[1].grad[2] = value
        before = snapshot(optimizer)
        with error:
            scaler.step(optimizer)
        assert_same_bits(snapshot(optimizer), before, "left out or refused")
        scaler.update()
    assert scaler.get_scale() == 2.0
    optimizer = optimizer_of(ADAM, (F32,), capturable=True)
    optimizer.found_inf = torch.tensor(1.0)
    give_gradients(optimizer, 1)
    scaler.step(optimizer)
    assert not optimizer.state


# ---- graphs


@pytest.mark.parametrize("dtypes", LOW, ids=str)
@capturable_rows
def test_graphs_replay_found_inf_and_low_precision(row, dtypes, gpu, monkeypatch):
    """A scaler's step with all there is: each replay searches, unscales, clips, steps and averages, or does not."""

    def run(use_graph):
        optimizer = optimizer_of(row, dtypes, **CLIP, **EMA, **LOW[dtypes], sizes=(1, 33, CHUNK + 5), capturable=True)
        float16_too = lambda optimizer: [param.grad for param in params_of(optimizer)]  # noqa: E731
        monkeypatch.setattr("fastopt.grad_scaler._gpu_grads", float16_too)  # which scalers refuse, as torch's
        monkeypatch.setattr(backend, "number_on", lambda device, number: number)  # which copies from cpu to cpu:0
        scaler = Scaler("cpu", init_scale=2.0**10, growth_interval=2)

        def fill(number):
            scale = float(scaler.scale(torch.ones(())))
            generator = torch.Generator().manual_seed(number)
            for param in params_of(optimizer):
                value = torch.randn(param.shape, generator=generator).mul_(scale).to(param.dtype)
                param.grad = value if param.grad is None else param.grad.copy_(value)
            if number in (1, 4, 5):
                params_of(optimizer)[2].grad[7] = math.nan

        def update():  # as torch's operations do, which a graph has
            torch._amp_update_scale_(scaler._scale, scaler._growth_tracker, scaler.found, 2.0, 0.5, 2)

        graph, found = Graph(monkeypatch), []
        for number in range(8):
            fill(number)
            if use_graph and number == 3:
                monkeypatch.setattr(optimizer._fastopt_gpu, "_on_cuda", True)
                with graph.capture():
                    scaler.step(optimizer)
            if use_graph and number >= 3:
                scaler.inverse.copy_(scaler._scale.double().reciprocal().float())
                graph.replay()
            else:
                scaler.step(optimizer)
            update()
            scaler._per_optimizer_states.clear()
            found += [float(scaler._scale), snapshot(optimizer), optimizer.grad_norm.clone()]
        return found

    actual, expected = run(True), run(False)
    assert actual[::3] == [2.0**10, 2.0**9, 2.0**9, 2.0**10, 2.0**9, 2.0**8, 2.0**8, 2.0**9]
    assert actual[::3] == expected[::3]
    assert_same_bits([actual[1::3], actual[2::3]], [expected[1::3], expected[2::3]], row.name)


@capturable_rows
def test_graphs_replay_found_inf_set_by_hand(row, gpu, monkeypatch):
    """Each replay obeys the number that is there then."""
    optimizer, other = (optimizer_of(row, (F32,), **CLIP, capturable=True) for _ in range(2))
    optimizer.found_inf = other.found_inf = found_inf = torch.tensor(0.0)
    for each in (optimizer, other):
        give_gradients(each, 0)
        each.step()
    monkeypatch.setattr(backend, "number_on", lambda device, number: number)  # which copies from cpu to cpu:0
    monkeypatch.setattr(optimizer._fastopt_gpu, "_on_cuda", True)
    graph = Graph(monkeypatch)
    with graph.capture():
        optimizer.step()
    for step, value in enumerate((0.0, 2.0, math.inf, 0.0)):
        found_inf.fill_(value)
        before = snapshot(other)
        for own, its in zip(params_of(optimizer), params_of(other), strict=True):
            its.grad = torch.randn_like(its)
            own.grad.copy_(its.grad)
        graph.replay()
        other.step()
        assert_same_bits(snapshot(optimizer), snapshot(other), str(step))
        if value:
            assert_same_bits(snapshot(optimizer), before, "left out")


@capturable_rows
def test_graphs_replay_all_of_it(row, gpu, monkeypatch):
    """Norm, clipping, a scale that changes, averages: as the same steps without graphs."""

    def run(use_graph):
        torch.manual_seed(0)
        params = parameters((F32,))
        optimizer = row.ours(params, **row.plain, **CLIP, **EMA, capturable=True)
        scale = torch.tensor(4.0)
        optimizer.grad_scale = inverse = torch.empty(())
        monkeypatch.setattr("fastopt.extras._inverse", lambda scale: inverse)  # torch's operations, which a graph has
        monkeypatch.setattr(backend, "number_on", lambda device, number: number)  # and this copies from cpu to cpu:0
        for param in params:
            param.grad = torch.empty_like(param)

        def fill():
            for param in params:
                param.grad.normal_().mul_(scale)
            inverse.copy_(1 / scale)
            scale.mul_(2)

        fill()
        optimizer.step()
        step, norms = optimizer.step, []
        if use_graph:
            monkeypatch.setattr(optimizer._fastopt_gpu, "_on_cuda", True)
            graph = Graph(monkeypatch)
            with graph.capture():
                optimizer.step()
            step = graph.replay
        for _ in range(4):
            fill()
            step()
            norms.append(optimizer.grad_norm.clone())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        fill()
        optimizer.step()
        return [snapshot(optimizer), norms]

    assert_same_bits(run(True), run(False), row.name)


@capturable_rows
def test_a_capture_that_cannot_be_right_is_refused(row, gpu, monkeypatch):
    """Other options than at the steps before, and what looks at the norm."""
    optimizer = optimizer_of(row, (F32,), **CLIP, capturable=True)
    optimizer.max_grad_norm = None
    give_gradients(optimizer, 1)
    optimizer.step()
    before = copy.deepcopy(snapshot(optimizer))
    monkeypatch.setattr(optimizer._fastopt_gpu, "_on_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="captured in a CUDA graph before it ran outside"):
        optimizer.step()
    optimizer._fastopt_options.error_if_nonfinite = True
    monkeypatch.setattr("fastopt.extras.is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="error_if_nonfinite=True looks at the norm before anything is written"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before, "refused")


# ---- what it costs


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize(
    "way, expected", [(CLIP, 32), (CLIP | EMA, 40), (UNSCALE | CLIP | EMA, 40), (EMA, 36)], ids=str
)
def test_bytes_of_an_element(way, expected, found_inf, gpu):
    """Of float32 and Adam, of tensors: 28 for the update, 4 more for a norm, 8 more for an average.

    found_inf takes none, and leaves the norm alone where it is not 0.
    """
    options = {name: value for name, value in way.items() if name != "scale"}
    params = [torch.nn.Parameter(torch.zeros(8 * CHUNK))]
    optimizer = fastopt.Adam(params, **options, capturable=found_inf is not None)
    if "scale" in way:
        optimizer.grad_scale = torch.tensor(way["scale"])
    gpu.options["counts"] = True
    for number in range(2):
        give_gradients(optimizer, 1)
        gpu.launches.clear()
        if found_inf is not None:
            optimizer.found_inf = torch.tensor(found_inf if number else 0.0)
        optimizer.step()
    wide = 0
    for launch in gpu.launches:
        found = accesses(launch.machine.instructions)
        wide += 16 * (found["ld"][16] + found["st"][16])  # all but those of the arrays
    assert wide == (expected * 8 * CHUNK if not found_inf else 4 * 8 * CHUNK * ("max_grad_norm" in way))


def test_found_inf_is_one_load_of_a_thread(gpu):
    """In the update, and in the kernel that counts."""
    loads = {"multi_tensor_update": [], "multi_tensor_prepare": []}
    for found_inf in (None, torch.tensor(0.0)):
        optimizer = fastopt.Adam([torch.nn.Parameter(torch.zeros(8 * CHUNK))], capturable=True)
        optimizer.found_inf = found_inf
        give_gradients(optimizer, 1)
        optimizer.step()
        gpu.options["counts"] = True
        optimizer.step()
        gpu.options["counts"] = False
        for launch in gpu.launches[-2:]:
            loads[launch.name].append(accesses(launch.machine.instructions)["ld"].total())
    without, with_it = loads["multi_tensor_update"]
    assert 0 < with_it - without <= 8 * 128 * 2
    without, with_it = loads["multi_tensor_prepare"]
    assert 0 < with_it - without <= 32 * 2


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("row", [ADAM, ROWS[0]], ids=lambda row: row.name)
def test_accesses_are_wide(row, dtype, idle_gpu):
    """16 bytes at a time, of what is not narrower than another operand."""
    used = (1 << len(row.slots)) - 1
    update = multi_tensor.update_launcher(row.module, used, dtype, dtype, 90, 2, True)
    norm = passes.step_norm_launcher(1, dtype, 90, multi_tensor.table_columns(row.module, True), 1)
    wide = {F32: "v4.b32", F64: "v2.b64", BF16: "v4.b32"}[dtype]
    ptx = update.compiled.asm["ptx"]
    operands = 1 if dtype == BF16 else 3 + len(row.slots)  # that are loaded; the average has 32 bits
    assert ptx.count(f"ld.global.{wide}") >= operands and ptx.count(f"st.global.{wide}") >= max(1, operands - 1)
    assert f"ld.global.{wide}" in norm.compiled.asm["ptx"]


@pytest.mark.parametrize("skips", [False, True], ids=["", "skips"])
@pytest.mark.parametrize("factors, average, registers", [(1, False, 64), (2, False, 64), (2, True, 80)])
def test_registers_on_sm_90(factors, average, registers, skips, idle_gpu):
    """Of float32 Adam. Factors and found_inf take none; an average leaves room for 768 threads of a multiprocessor."""
    launcher = multi_tensor.update_launcher("adam", 0b011, F32, F32, 90, factors, average, None, False, 0, skips)
    code = sass.report(launcher.compiled)
    assert code.registers <= registers and code.spills == 0


@pytest.mark.parametrize("target", ROCM, ids=lambda target: target.arch)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_compiles_for_rocm(dtype, target):
    kernels = [
        multi_tensor.update_kernel("adam", 0b111, dtype, dtype, target.warp_size, 2, True, None, False, 0, True),
        multi_tensor.prepare_kernel("adam", dtype, True),
        passes.norm_kernel(1, dtype, target.warp_size, 8, 3, 1),
    ]
    for kernel in kernels:
        asm = compiled_for(target, *kernel).asm
        assert set(re.findall(r"[sv]gpr_spill_count: +(\d+)", asm["amdgcn"])) == {"0"}
        operations = re.findall(r"= (f(?:add|sub|mul|div)\b.*|.*call .*@llvm\.(?:fma|sqrt)\..*)", asm["llir"])
        assert not re.search(r"\b(fast|contract|reassoc|arcp|afn|nnan|ninf|nsz)\b|!fpmath", "\n".join(operations))

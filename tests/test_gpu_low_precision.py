"""16-bit parameters that train as float32 ones on GPUs, without one: the bits of the C++ backend."""

import itertools

import pytest
import torch

from .optimizers import ROWS
from .reference import assert_same_bits, snapshot

triton = pytest.importorskip("triton")

from fastopt.kernels import multi_tensor  # noqa: E402

from .test_gpu import CHUNK, Graph, capturable_rows, triton_serves_cpu_tensors  # noqa: E402
from .test_gpu_passes import on_cpu  # noqa: E402
from .test_kernels import compiled_for  # noqa: E402
from .tools import sass  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = (0, 1, 5, 33, 300, CHUNK + 1)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
every_dtype = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
EMA, CLIP = {"ema_decay": 0.9}, {"max_grad_norm": 3.0}
WAYS = {
    "masters": {"master_weights": True},
    "masters, float32 state": {"master_weights": True, "state_dtype": F32},
    "masters, averaged": {"master_weights": True, **EMA},
    "masters, clipped, float32 gradients": {"master_weights": True, "grad_dtype": F32, **CLIP},
    "random bits": {"stochastic_rounding": True, "rounding_seed": 2**63 + 5},
    "random bits, float32 state and gradients": {"stochastic_rounding": True, "state_dtype": F32, "grad_dtype": F32},
    "random bits, clipped, averaged": {"stochastic_rounding": True, **CLIP, **EMA},
    "float32 gradients": {"grad_dtype": F32},
    "float32 gradients, clipped, averaged": {"grad_dtype": F32, **CLIP, **EMA},
}


@pytest.fixture(params=[90, pytest.param(80, marks=pytest.mark.slow)], ids=["sm_90", "sm_80"])
def gpu(request):
    with triton_serves_cpu_tensors(request.param, races=True) as stand_in:
        yield stand_in


def run(row, dtype, grad_dtype=None, norms=None, **options):
    """Four steps, between which some parameters are written from outside: norms and snapshots."""
    torch.manual_seed(0)
    params = []
    for number, (own, size) in enumerate(itertools.product((dtype, F32), SIZES)):
        off = number % 5 == 4  # every fifth begins behind an address that 16 divides
        params.append(torch.nn.Parameter(torch.randn(size + off).to(own)[off:]))
    optimizer = row.ours(params[::2], **row.plain, **options)
    optimizer.add_param_group({"params": params[1::2], "lr": 0.03, "maximize": True})
    found = [], []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad_dtype = None
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.to(param.dtype if grad_dtype is None else grad_dtype)
        if step == 2:
            with torch.no_grad():
                params[4][7:200] = 1.5
                params[3][3] = -0.0
        if norms is not None:
            optimizer._fastopt_options.searched = None, norms[step].item()
        optimizer.step()
        found[0].append(optimizer.grad_norm if "max_grad_norm" in options else None)
        found[1].append(snapshot(optimizer))
    return *found, optimizer


@pytest.mark.parametrize(
    "row, way",  # each way with one optimizer, each optimizer with three; the full product is slow
    [
        pytest.param(
            row, way, id=f"{row.name}-{way}", marks=() if row is ROWS[-1] or "averaged" in way else pytest.mark.slow
        )
        for row, way in itertools.product(ROWS, WAYS)
    ],
)
@every_dtype
def test_bits_of_the_cpp_backend(row, dtype, way, gpu):
    norms, actual, _ = run(row, dtype, **WAYS[way])
    assert gpu.launches
    with on_cpu():
        _, expected, _ = run(row, dtype, **WAYS[way], norms=norms if "max_grad_norm" in WAYS[way] else None)
    assert_same_bits(actual, expected, row.name)


@capturable_rows
@every_dtype
@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_capturable_steps(row, dtype, option, gpu):
    options = {option: True, "state_dtype": F32}
    _, actual, _ = run(row, dtype, **options, capturable=True)
    with on_cpu():
        _, expected, _ = run(row, dtype, **options)
    assert_same_bits(actual, expected, row.name)


@capturable_rows
@every_dtype
@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_graphs_replay(row, dtype, option, gpu, monkeypatch):
    """Between replays a step without the graph, and parameters that are written: as the same steps without graphs."""

    def run(use_graph):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size).to(own)) for own in (dtype, F32) for size in (5, CHUNK + 1)]
        optimizer = row.ours(params, **row.plain, **{option: True}, state_dtype=F32, capturable=True)
        graph, found = Graph(monkeypatch), []
        for step in range(7):
            for param in params:
                param.grad = torch.empty_like(param) if param.grad is None else param.grad
                param.grad.normal_()
            if use_graph and step == 2:
                monkeypatch.setattr(optimizer._fastopt_gpu, "_on_cuda", True)
                before = snapshot(optimizer)
                with graph.capture():
                    optimizer.step()
                assert_same_bits(snapshot(optimizer), before, "captured, not stepped")
                monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            if step == 4:
                with torch.no_grad():
                    params[1][7:200] = 1.5
            if use_graph and step >= 2 and step != 5:
                graph.replay()
            else:
                optimizer.step()
            found.append(snapshot(optimizer))
        return found

    assert_same_bits(run(True), run(False), row.name)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("state", "grad", "companion", "draws", "most"),
    [(BF16, BF16, True, 0, 80), (F32, BF16, True, 0, 80), (F32, F32, True, 0, 80), (BF16, BF16, False, 1, 128)],
    ids=["remainder", "remainder, float32 state", "remainder, float32 state and gradients", "random bits"],
)
def test_registers(arch, state, grad, companion, draws, most):
    """None is spilled; with random bits there is room for 512 threads of each multiprocessor."""
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    kernel = multi_tensor.update_kernel("adam", 0b011, BF16, state, 32, 0, False, grad, companion, draws)
    code = sass.report(compiled_for(target, *kernel))
    print(f"sm_{arch}: {code.registers} registers, {code.spills} spilled")
    assert code.spills == 0 and code.registers <= most

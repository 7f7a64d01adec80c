"""What needs a GPU, and is skipped without: the table of test_gpu.py on real tensors, devices, streams and graphs."""

import copy
import gc
import threading

import pytest
import torch

import fastopt

from .optimizers import ROWS
from .reference import assert_same_bits
from .test_gpu import CHUNK, DTYPES, constructor_options, drive_table, params_of

pytestmark = pytest.mark.gpu
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
capturable_rows = pytest.mark.parametrize(
    "row", [row for row in ROWS if "capturable" in row.theirs([torch.zeros(1)]).defaults], ids=lambda row: row.name
)

SIZES = (3, CHUNK + 1, 40, 100_003)


def contents(optimizer):
    """Copies on the CPU of each parameter and its state."""
    found = []
    for param in params_of(optimizer):
        state = {name: value for name, value in optimizer.state.get(param, {}).items() if value is not None}
        found.append({name: value.detach().cpu().clone() for name, value in {"param": param, **state}.items()})
    return found


def optimizers_on(row, *placements, **options):
    """For each placement, a device for each of SIZES, an optimizer in two groups with the same values."""
    start = [torch.randn(size) for size in SIZES]
    made = []
    for devices in placements:
        params = [torch.nn.Parameter(value.to(device, copy=True)) for value, device in zip(start, devices, strict=True)]
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.03}]
        made.append(row.ours(groups, **row.plain, **options))
    return made


def set_grads(*optimizers):
    for params in zip(*map(params_of, optimizers), strict=True):
        grad = torch.randn(params[0].shape)
        for param in params:
            param.grad = grad.to(param.device)


CPU, CUDA = ("cpu",) * len(SIZES), ("cuda",) * len(SIZES)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
@every_row
def test_bits_of_the_cpp_backend(row, dtypes):
    """Every combination of options: odd sizes, tensors that are not aligned, missing gradients, unlike step counts."""
    left_to_torch = fastopt.backend_info()["torch_steps"]
    for constructor in constructor_options(row):
        expected, _ = drive_table(row, *dtypes, constructor)
        actual, _ = drive_table(row, *dtypes, constructor, "cuda")
        for snapshot in actual:
            for key, value in snapshot.items():
                if isinstance(value, tuple):
                    snapshot[key] = value[0], value[1].cpu()
        assert_same_bits(actual, expected, f"{row.name} {constructor}")
    assert fastopt.backend_info()["torch_steps"] == left_to_torch


@every_row
def test_cpu_and_gpu_parameters_in_one_optimizer(row):
    expected, mixed = optimizers_on(row, CPU, ("cuda", "cpu", "cuda", "cpu"))
    for _ in range(4):
        set_grads(expected, mixed)
        expected.step()
        mixed.step()
        assert_same_bits(contents(mixed), contents(expected), row.name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@every_row
def test_parameters_on_two_gpus(row):
    """Whichever device is the current one; it stays the current one."""
    expected, spread = optimizers_on(row, CPU, ("cuda:0", "cuda:1", "cuda:1", "cuda:0"))
    for t in range(4):
        set_grads(expected, spread)
        expected.step()
        with torch.cuda.device(t % 2):
            spread.step()
            assert torch.cuda.current_device() == t % 2
        assert_same_bits(contents(spread), contents(expected), row.name)


@every_row
def test_steps_are_queued_without_waiting(row):
    """On a stream of the user's that is busy all the while: no synchronisation, and each step has its own scalars."""
    expected, ours = optimizers_on(row, CPU, CUDA)
    set_grads(expected, ours)
    expected.step()
    ours.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(500_000_000)  # a fifth of a second or more
            for t in range(10):
                for optimizer in (expected, ours):
                    optimizer.param_groups[t % 2]["lr"] *= 0.7
                    optimizer.step()
            busy = not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert busy
    stream.synchronize()
    assert_same_bits(contents(ours), contents(expected), row.name)


@every_row
def test_a_buffer_outlives_its_optimizer(row):
    """Freed while a step on another stream is queued: nobody else is given the memory before that step has run."""
    expected, ours = optimizers_on(row, CPU, CUDA)
    set_grads(expected, ours)
    for optimizer in (expected, ours):
        optimizer.step()
    params, stream = params_of(ours), torch.cuda.Stream()
    torch.cuda.synchronize()
    words = [bucket.buffer.numel() for bucket in ours._fastopt_gpu.buckets.values()]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        for optimizer in (expected, ours):
            optimizer.step()
    state = ours.state
    del ours, optimizer
    gc.collect()
    wild = [torch.full((size,), -1, dtype=torch.int64, device="cuda") for size in words for _ in range(50)]
    torch.cuda.synchronize()
    assert len(wild) == 50 * len(words) and len(state) == len(params)
    for param, other in zip(params, params_of(expected), strict=True):
        assert_same_bits(param.detach().cpu(), other.detach())


def test_steps_while_another_thread_captures():
    """In the default mode, in which an event that is queried or memory that is locked would end the capture."""
    row = next(row for row in ROWS if row.name == "Adam")
    expected, ours = optimizers_on(row, CPU, CUDA)
    set_grads(expected, ours)
    grads = [[param.grad.clone() for param in params_of(ours)] for _ in range(2)]  # so that each step uploads
    for optimizer in (expected, ours):
        optimizer.step()
    torch.cuda.synchronize()
    numbers, stream, errors = torch.zeros(1000, device="cuda"), torch.cuda.Stream(), []

    def steps():
        try:
            with torch.cuda.stream(stream):
                for t in range(20):
                    for param, grad in zip(params_of(ours), grads[t % 2], strict=True):
                        param.grad = grad
                    ours.step()
        except Exception as error:
            errors.append(error)

    graph, thread = torch.cuda.CUDAGraph(), threading.Thread(target=steps)
    with torch.cuda.graph(graph):
        numbers += 1
        thread.start()
        thread.join()
        numbers += 1
    graph.replay()
    torch.cuda.synchronize()
    assert not errors and (numbers == 2).all()
    for _ in range(20):
        expected.step()
    assert_same_bits(contents(ours), contents(expected), row.name)


@every_row
def test_capture_raises(row):
    """torch's error, and nothing has changed."""
    (optimizer,) = optimizers_on(row, CUDA)
    set_grads(optimizer)
    optimizer.step()
    before = contents(optimizer)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(RuntimeError, match="capturable is False|no capturable option"):
            optimizer.step()
    assert_same_bits(contents(optimizer), before, row.name)
    optimizer.step()
    assert not torch.equal(contents(optimizer)[1]["param"], before[1]["param"])


@capturable_rows
def test_capturable_in_a_graph(row):
    """Replays do as steps without a graph, bit for bit, and as torch.optim's replays but for its fp32 scalars."""
    results = []
    for make, in_graph in ((row.ours, True), (row.ours, False), (row.theirs, True)):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size, device="cuda")) for size in SIZES]
        optimizer = make(params, **row.plain, capturable=in_graph)
        for param in params:
            param.grad = torch.randn_like(param)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if in_graph:
            with torch.cuda.graph(graph):
                optimizer.step()
        before = contents(optimizer)
        for _ in range(4):
            for param in params:
                param.grad.normal_()
            graph.replay() if in_graph else optimizer.step()
        results.append(contents(optimizer))
        assert all(state["step"] == 7 for state in results[-1])
        assert not torch.equal(results[-1][1]["param"], before[1]["param"])
    assert_same_bits(*results[:2], row.name)
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-6)


@every_row
def test_gradient_on_another_device_is_refused(row):
    (optimizer,) = optimizers_on(row, CUDA)
    set_grads(optimizer)
    optimizer.step()
    before, param = contents(optimizer), params_of(optimizer)[2]
    on_gpu, param.grad = param.data, None
    param.data = on_gpu.cpu()
    param.grad = torch.ones_like(param)
    param.data = on_gpu
    assert param.is_cuda and not param.grad.is_cuda
    with pytest.raises(RuntimeError, match="grad of parameter 1 of param group 1 is on cpu, the parameter on cuda"):
        optimizer.step()
    assert_same_bits(contents(optimizer), before, row.name)


@every_row
def test_checkpoint_moves_between_devices(row):
    """State saved on the GPU is loaded on the CPU, and the other way, and steps go on with the same bits."""
    expected, ours = optimizers_on(row, CPU, CUDA)
    for _ in range(2):
        set_grads(expected, ours)
        expected.step()
        ours.step()
    again, back = optimizers_on(row, CUDA, CPU)
    for optimizer, source in ((again, expected), (back, ours)):
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
        with torch.no_grad():
            for param, other in zip(params_of(optimizer), params_of(source), strict=True):
                param.copy_(other)
    set_grads(expected, ours, again, back)
    for optimizer in (expected, ours, again, back):
        optimizer.step()
        assert_same_bits(contents(optimizer), contents(expected), row.name)


@every_row
def test_two_launches_of_a_step_with_two_dtypes(row):
    """The profiler sees one kernel for each dtype."""
    params = [torch.nn.Parameter(torch.randn(size, device="cuda")) for size in SIZES]
    params += [torch.nn.Parameter(torch.randn(size, device="cuda", dtype=torch.bfloat16)) for size in SIZES]
    optimizer = row.ours(params, **row.plain)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    assert sum("multi_tensor_update" in event.name for event in profile.events()) == 2


# ---- clipping and averages


def both_grads(dtype, sizes=SIZES):
    """The same gradients of parameters on the CPU and on the GPU."""
    grads = [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]
    return [[param_with(grad.to(device, copy=True)) for grad in grads] for device in ("cpu", "cuda")]


def param_with(grad):
    param = torch.nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    return param


def grads_of(params):
    return [param.grad.cpu() for param in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_clipping_and_averages_are_the_cpus(dtype):
    """But for the last bits of a float64 norm, whose sums are added in another order."""
    left_to_torch = fastopt.backend_info()["torch_steps"]
    cpu, cuda = both_grads(dtype)
    for order in (2.0, 1.0, float("inf")):
        norms = [fastopt.get_total_norm([param.grad for param in params], order) for params in (cpu, cuda)]
        torch.testing.assert_close(norms[1].cpu(), norms[0], rtol=1e-15 if dtype == torch.float64 else 0, atol=0)
        fastopt.clip_grads_with_norm_(cuda, 0.9, norms[0].cuda())
        fastopt.clip_grads_with_norm_(cpu, 0.9, norms[0])
        assert_same_bits(grads_of(cuda), grads_of(cpu), f"{order}")
    for params in (cpu, cuda):
        fastopt.clip_grad_value_(params, 1e-3)
    assert_same_bits(grads_of(cuda), grads_of(cpu), "clamped")
    averages = [[torch.zeros_like(param.grad) for param in params] for params in (cpu, cuda)]
    for update in (fastopt.swa_utils.get_ema_multi_avg_fn(0.9), fastopt.swa_utils.get_swa_multi_avg_fn()):
        for own, params in zip(averages, (cpu, cuda), strict=True):
            update(own, [param.grad for param in params], 4)
    assert_same_bits([average.cpu() for average in averages[1]], averages[0], "averages")
    assert fastopt.backend_info()["torch_steps"] == left_to_torch or dtype == torch.float64


def test_clipping_is_queued_without_waiting():
    """On two streams in turn, with gradients of other addresses each time."""
    cpu, cuda = both_grads(torch.float32)
    ema, streams = fastopt.swa_utils.get_ema_multi_avg_fn(0.9), [torch.cuda.Stream() for _ in range(2)]
    averages = [torch.zeros_like(param.grad) for param in cuda]
    copies = [[param.grad.clone() for param in cuda] for _ in range(6)]
    values = [grad.clone() for grad in copies[0]]
    for stream in streams:  # compiles
        with torch.cuda.stream(stream):
            fastopt.clip_grad_norm_(cuda, 1e9)
            ema([torch.zeros_like(value) for value in values], values, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norms = []
        for turn, grads in enumerate(copies):
            for param, grad in zip(cuda, grads, strict=True):
                param.grad = grad
            with torch.cuda.stream(streams[turn % 2]):
                norms.append(fastopt.clip_grad_norm_(cuda, 1.0 + turn))
                if turn % 2:
                    ema(averages, values, turn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for turn, grads in enumerate(copies):
        expected = [param_with(value.cpu()) for value in values]
        assert norms[turn].cpu() == fastopt.clip_grad_norm_(expected, 1.0 + turn)
        assert_same_bits([grad.cpu() for grad in grads], grads_of(expected), f"{turn}")


def test_clipping_that_is_torchs():
    """Gradients on CPU and GPU; in a capture, whose graph then clips."""
    cpu, cuda = both_grads(torch.float32)
    exact = fastopt.get_total_norm([param.grad for param in cpu]).item()
    mixed = [param_with(cpu[0].grad.clone()), *(param_with(param.grad.clone()) for param in cuda[1:])]
    assert fastopt.clip_grad_norm_(mixed, 1.0).item() == pytest.approx(exact, rel=1e-3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = fastopt.clip_grad_norm_(cuda, 1.0)
    graph.replay()
    assert norm.item() == pytest.approx(exact, rel=1e-3)
    assert fastopt.get_total_norm([param.grad for param in cuda]).item() == pytest.approx(1.0, rel=1e-3)
    reasons = " ".join(fastopt.backend_info()["torch_steps"])
    assert "several devices" in reasons and "a CUDA graph is being captured" in reasons


# ---- clipping, a scale and averages inside the step


BESIDE = {"max_grad_norm": 1.0, "ema_decay": 0.9}


def with_scale(optimizer, scale, device):
    optimizer.grad_scale = torch.tensor(scale, device=device)


@every_row
def test_clipped_scaled_and_averaged_steps_are_the_cpus(row):
    """Queued without waiting, with a scale on the device that changes; the norms are read at the end."""
    cpu, cuda = optimizers_on(row, CPU, CUDA, **BESIDE)
    with_scale(cpu, 4.0, "cpu"), with_scale(cuda, 4.0, "cuda")
    grads = [[[torch.randn(size).to(device) for size in SIZES] for device in ("cpu", "cuda")] for _ in range(6)]
    for own, others in grads:
        for grad, other in zip(own, others, strict=True):
            other.copy_(grad)
    norms = []
    for turn, both in enumerate(grads):
        for optimizer, given in zip((cpu, cuda), both, strict=True):
            for param, grad in zip(params_of(optimizer), given, strict=True):
                param.grad = grad
            optimizer.grad_scale.mul_(2.0)
        cpu.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if turn > 1 else "default")
        try:
            cuda.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        norms.append((cpu.grad_norm, cuda.grad_norm))
    for expected, actual in norms:
        assert actual.device.type == "cuda" and actual.cpu() == expected
    assert_same_bits(contents(cuda), contents(cpu), row.name)


@capturable_rows
def test_graphs_clip_scale_and_average(row):
    plain, captured = optimizers_on(row, CUDA, CUDA, **BESIDE, capturable=True)
    for optimizer in (plain, captured):
        with_scale(optimizer, 4.0, "cuda")
    set_grads(plain, captured)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.synchronize()
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    norm = captured.grad_norm
    for turn in range(4):
        for optimizer in (plain, captured):
            optimizer.grad_scale.mul_(2.0)
        for own, other in zip(params_of(plain), params_of(captured), strict=True):
            own.grad.normal_()
            other.grad.copy_(own.grad)
        plain.step()
        graph.replay()
        assert torch.equal(norm, plain.grad_norm), turn
    assert_same_bits(contents(captured), contents(plain), row.name)


LOW = {  # of float32, bfloat16 and float16 parameters
    "float32": (torch.float32, {}),
    "float32, bfloat16 state": (torch.float32, {"state_dtype": torch.bfloat16}),
    "bfloat16, master weights": (torch.bfloat16, {"master_weights": True, "state_dtype": torch.float32}),
    "float16, master weights": (torch.float16, {"master_weights": True}),
    "bfloat16, random bits": (torch.bfloat16, {"stochastic_rounding": True, "state_dtype": torch.float32}),
}


@pytest.mark.parametrize("way", LOW)
@capturable_rows
def test_graphs_replay_low_precision(row, way):
    """Replays have the bits of steps without a graph, and of the CPU; found_inf, on the device, leaves some out."""
    dtype, options = LOW[way]
    cpu, plain, captured = optimizers_on(row, CPU, CUDA, CUDA, **BESIDE, **options)
    for optimizer in (cpu, plain, captured):
        for param in params_of(optimizer):
            param.data = param.data.to(dtype)
    for optimizer in (plain, captured):
        for group in optimizer.param_groups:
            group["capturable"] = True
        optimizer.found_inf = torch.zeros((), device="cuda")
    set_grads_of(dtype, cpu, plain, captured)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.synchronize()
    cpu.step()
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for turn, found_inf in enumerate((0.0, 2.0, 0.0, float("nan"), 1.0, 0.0)):
        set_grads_of(dtype, cpu, plain, captured)
        for optimizer in (plain, captured):
            optimizer.found_inf.fill_(found_inf)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if turn else "default")
        try:
            plain.step()
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if found_inf == 0:
            cpu.step()
        assert_same_bits(contents(captured), contents(plain), f"{way} {turn}")
    assert_same_bits(contents(captured), contents(cpu), way)


def set_grads_of(dtype, *optimizers):
    """New ones in the same memory."""
    for params in zip(*map(params_of, optimizers), strict=True):
        grad = torch.randn(params[0].shape).to(dtype)
        for param in params:
            if param.grad is None:
                param.grad = torch.empty_like(param)
            param.grad.copy_(grad)


@capturable_rows
def test_graphs_of_whole_iterations_with_a_scaler(row):
    """Replays have the bits of iterations without a graph: the same scale, and the same steps left out."""
    results = []
    for in_graph in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).cuda()
        inputs = torch.randn(32, 8, device="cuda")
        optimizer = row.ours(model.parameters(), **row.plain, **BESIDE, capturable=True)
        scaler = fastopt.GradScaler(init_scale=2.0**10, growth_interval=2)

        def iteration(model=model, inputs=inputs, optimizer=optimizer, scaler=scaler):
            optimizer.zero_grad(set_to_none=False)
            loss = model(inputs).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                iteration()
        torch.cuda.current_stream().wait_stream(stream)
        step, graph = iteration, torch.cuda.CUDAGraph()
        if in_graph:
            with torch.cuda.graph(graph):
                iteration()
            step = graph.replay
        found = []
        for turn in range(8):
            torch.manual_seed(turn)
            inputs.copy_(torch.randn(32, 8))
            if turn in (1, 4, 5):
                inputs[3, 2] = float("inf")
            before = contents(optimizer)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found.append([contents(optimizer), {"scale": torch.tensor(scaler._scale.item())}])
            if turn in (1, 4, 5):
                assert_same_bits(found[-1][0], before, "left out")
        results.append(found)
    assert_same_bits(results[1], results[0], row.name)
    scales = [scale["scale"].item() for _, scale in results[0]]
    assert len(set(scales)) > 2


@every_row
def test_clipping_of_parameters_on_cpu_and_gpu(row):
    """Beside the step, with the norm of all."""
    mixed, cpu = optimizers_on(row, ("cpu", "cuda", "cpu", "cuda"), CPU, max_grad_norm=1.0)
    for _ in range(3):
        set_grads(mixed, cpu)
        mixed.step()
        cpu.step()
        torch.testing.assert_close(mixed.grad_norm.cpu(), cpu.grad_norm, rtol=1e-5, atol=0)
    for actual, expected in zip(contents(mixed), contents(cpu), strict=True):
        torch.testing.assert_close(actual["param"], expected["param"], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_row
def test_several_gpus_have_one_norm(row):
    several, cpu = optimizers_on(row, ("cuda:0", "cuda:1", "cuda:1", "cuda:0"), CPU, **BESIDE)
    for _ in range(3):
        set_grads(several, cpu)
        several.step()
        cpu.step()
        assert several.grad_norm.cpu() == cpu.grad_norm
    assert_same_bits(contents(several), contents(cpu), row.name)

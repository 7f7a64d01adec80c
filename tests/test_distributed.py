"""torch.distributed's wrappers around fastopt on two gloo processes: the bits of torch.optim under the same wrapper.

A scenario runs in every process, with `make` for the optimizer of a list of parameters, once with fastopt's class and
once with torch's for-loop; it returns what must be equal. The reference's square root works on DTensors here.
"""

import contextlib
import copy
import itertools
import statistics
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastopt

from . import reference
from .optimizers import ROWS
from .reference import assert_same_bits

pytestmark = pytest.mark.slow


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def correctly_rounded_sqrt():
    with reference.correctly_rounded_sqrt():
        plain, plain_in_place = torch.Tensor.sqrt, torch.Tensor.sqrt_

        def sqrt(x):
            if not isinstance(x, DTensor):
                return plain(x)
            return DTensor.from_local(
                plain(x.to_local()), x.device_mesh, x.placements, shape=x.shape, stride=x.stride()
            )

        def sqrt_in_place(x):
            plain_in_place(local(x))
            return x

        torch.Tensor.sqrt, torch.Tensor.sqrt_ = sqrt, sqrt_in_place
        yield


@torch.no_grad()
def values_of(optimizer):
    """Copies of this process's part of all parameters and state."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            for tensor in (param, *optimizer.state.get(param, {}).values()):
                if isinstance(tensor, torch.Tensor):
                    found.append(local(tensor).clone())
    return found


def model_of_odd_sizes():
    """5 rows are not shared evenly by two processes, and of 1 row the second one gets nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 1))


def train(model, optimizer, steps=4, before_step=lambda: None):
    torch.manual_seed(100 + dist.get_rank())
    found = []
    for t in range(steps):
        optimizer.zero_grad(set_to_none=t % 2 == 0)
        model(torch.randn(3, 6)).square().mean().backward()
        before_step()
        with correctly_rounded_sqrt():
            optimizer.step()
        found += values_of(optimizer)
    return found


def ddp(make):
    model = nn.parallel.DistributedDataParallel(model_of_odd_sizes(), gradient_as_bucket_view=True)
    return train(model, make(model.parameters()))


def sharded(model, **options):
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp2(make):
    model = sharded(model_of_odd_sizes())
    assert all(isinstance(param, DTensor) for param in model.parameters())
    optimizer = make(model.parameters())
    found = train(model, optimizer, before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    state = optimizer.state[next(model.parameters())]
    assert all(isinstance(value, DTensor) for name, value in state.items() if name != "step")
    return found


def fsdp2_mixed_precision(make):
    model = sharded(model_of_odd_sizes(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    return train(model, make(model.parameters()))


def fsdp2_beside_plain_parameters(make):
    model, head = sharded(model_of_odd_sizes()), nn.Linear(6, 2)
    optimizer = make([{"params": model.parameters()}, {"params": head.parameters(), "lr": 0.5}])
    return train(model, optimizer) + train(lambda x: head(x) * model(x), optimizer)


def replicated_and_sharded_dtensors(make):
    """As tensor parallelism leaves them, with a strided local part."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    params = [
        nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, [placement]))
        for placement in (Shard(0), Shard(1), Replicate())
    ]
    return train(lambda x: sum((p * p).sum() for p in params).full_tensor() * x.new_ones(()), make(params))


def fsdp1(make):
    found = []
    for use_orig_params in (True, False):
        model = FullyShardedDataParallel(
            model_of_odd_sizes(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        found += train(model, make(model.parameters()))
    return found


def zero_redundancy(make):
    found = []
    for bucket_view in (False, True):
        model = nn.parallel.DistributedDataParallel(model_of_odd_sizes())
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), make.optimizer_class, parameters_as_bucket_view=bucket_view, **make.options
        )
        found += train(model, optimizer)
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            saved = optimizer.state_dict()
            found += [
                value for key in sorted(saved["state"]) for value in saved["state"][key].values() if value is not None
            ]
    return found


class Make:
    def __init__(self, optimizer_class, **options):
        self.optimizer_class, self.options = optimizer_class, options

    def __call__(self, params):
        return self.optimizer_class(params, **self.options)


def same_under_the_wrapper(scenario):
    for row in ROWS:
        options = copy.deepcopy(row.plain)
        before = fastopt.backend_info()["torch_steps"]
        results = []
        for make in (Make(row.ours, **options), Make(row.theirs, foreach=False, **options)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the wrappers
                results.append(scenario(make))
        assert len(results[0]) > 10
        assert_same_bits(*results, f"{scenario.__name__} {row.name}")
        assert fastopt.backend_info()["torch_steps"] == before, "torch's own step ran"


def host_time_of_dtensors(_):
    """Prints milliseconds of a step on 100 DTensor parameters, median of 30."""
    mesh = init_device_mesh("cpu", (1,))
    taken = {}
    for name, cls, how in (
        ("torch default", torch.optim.AdamW, {"foreach": False}),
        ("torch foreach", torch.optim.AdamW, {"foreach": True}),
        ("torch fused", torch.optim.AdamW, {"fused": True}),
        ("fastopt", fastopt.AdamW, {}),
    ):
        params = [nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)])) for _ in range(100)]
        for param in params:
            param.grad = distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)])
        optimizer = cls(params, **how)
        times = []
        for _ in range(33):
            begin = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - begin)
        taken[name] = 1e3 * statistics.median(times[3:])
    print("a step on 100 DTensor parameters:", ", ".join(f"{name} {ms:.3f} ms" for name, ms in taken.items()))
    assert taken["fastopt"] < min(ms for name, ms in taken.items() if name != "fastopt")


def clip_dtensors(_):
    """The norm is that of the whole tensors, a DTensor as torch's, the same in all processes; then torch's bits."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    planes = [init_device_mesh("cpu", shape) for shape in ((1, size), (size, 1))]
    both = [
        (line, ((Shard(0),), (Shard(1),), (Replicate(),))),
        (line, ((Replicate(),),)),
        *((plane, ((Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(1), Replicate()))) for plane in planes),
    ]
    for mesh, placements in both:
        for dtypes in ((torch.float32,), (torch.bfloat16, torch.float32), (torch.float64,)):
            torch.manual_seed(0)
            # 3 rows are not shared evenly, and of 1 row the second process gets nothing
            whole = [
                (torch.randn(rows, 50), place, dtype) for dtype in dtypes for place in placements for rows in (3, 1)
            ]

            def parameters(whole=whole, mesh=mesh):
                params = []
                for value, place, dtype in whole:
                    params.append(nn.Parameter(distribute_tensor(torch.zeros(value.shape, dtype=dtype), mesh, place)))
                    params[-1].grad = distribute_tensor(value.to(dtype, copy=True), mesh, place)
                return [nn.Parameter(torch.zeros(1)), *params]  # one without gradient

            for order in (2.0, 1.0, float("inf")):
                before = fastopt.backend_info()["torch_steps"]
                params = parameters()
                norm = fastopt.clip_grad_norm_(params, 0.5, order)
                assert fastopt.backend_info()["torch_steps"] == before, "torch's own function ran"
                assert type(norm) is DTensor and norm.device_mesh == mesh and norm.shape == ()
                assert norm.placements == (Replicate(),) * mesh.ndim
                exact = fastopt.get_total_norm([value.to(dtype).double() for value, _, dtype in whole], order).item()
                eps = torch.finfo(norm.dtype).eps
                assert abs(norm.to_local().item() - exact) <= (4 if norm.dtype == torch.float64 else 1) * eps * exact
                everywhere = [torch.zeros((), dtype=norm.dtype) for _ in range(size)]
                dist.all_gather(everywhere, norm.to_local())
                assert_same_bits(everywhere, [norm.to_local()] * size, "of all processes")
                theirs, given = parameters(), parameters()
                nn.utils.clip_grads_with_norm_(theirs, 0.5, norm)
                fastopt.clip_grads_with_norm_(given, 0.5, norm)
                expected = [param.grad.to_local() for param in theirs[1:]]
                assert_same_bits([param.grad.to_local() for param in params[1:]], expected, "clipped")
                assert_same_bits([param.grad.to_local() for param in given[1:]], expected, "with the norm")
                if order != float("inf"):  # where torch's hangs: the process with an empty part raises
                    torchs = nn.utils.clip_grad_norm_(parameters(), 0.5, order)
                    assert type(torchs) is DTensor and torchs.placements == norm.placements
                    rtol = 1e-2 if torch.bfloat16 in dtypes else 1e-5
                    torch.testing.assert_close(norm.to_local().to(torchs.dtype), torchs.to_local(), rtol=rtol, atol=0)

    bad = [distribute_tensor(torch.tensor([1.0, float("nan")]), line, [Shard(0)])]
    with pytest.raises(RuntimeError, match="order 2.0 for gradients from `parameters` is non-finite"):
        fastopt.get_total_norm(bad, error_if_nonfinite=True)
    assert fastopt.get_total_norm(bad, float("inf")).to_local().isnan()

    partial = nn.Parameter(distribute_tensor(torch.zeros(4), line, [Replicate()]))
    partial.grad = DTensor.from_local(torch.ones(4), line, [Partial()])
    norm = fastopt.clip_grad_norm_(partial, 1e9)
    assert norm.full_tensor().item() == pytest.approx(2 * size)
    assert any("clip_grad_norm_" in reason for reason in fastopt.backend_info()["torch_steps"])


def clip_mixed_dtensors(_):
    """Of several meshes or beside plain tensors: torch's result or error, whatever `foreach` is, and torch's bits."""
    size = dist.get_world_size()
    line, plane = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (1, size))
    named = init_device_mesh("cpu", (size,), mesh_dim_names=("x",))
    on_line, plain = (line, (Shard(0),)), (None, ())
    mixtures = [
        (on_line, plain), (plain, (line, (Replicate(),))), (on_line, (named, (Shard(0),))),
        (on_line, (plane, (Replicate(), Shard(0)))),
    ]  # fmt: skip
    calls = (
        lambda of, params, foreach: of.clip_grad_norm_(params, 0.5, foreach=foreach),
        lambda of, params, foreach: of.get_total_norm([param.grad for param in params], foreach=foreach),
        lambda of, params, foreach: of.clip_grads_with_norm_(params, 0.5, torch.tensor(5.0), foreach=foreach),
        lambda of, params, foreach: of.clip_grad_value_(params, 0.3, foreach=foreach),
    )
    results = 0
    for mixture, call, foreach in itertools.product(mixtures, calls, (None, False)):
        both = []
        for of in (nn.utils, fastopt):
            torch.manual_seed(0)
            params = []
            for mesh, placements in mixture:
                params.append(nn.Parameter(torch.zeros(4, 6)))
                grad = torch.randn(4, 6)
                if mesh is not None:
                    params[-1] = nn.Parameter(distribute_tensor(params[-1].data, mesh, placements))
                    grad = distribute_tensor(grad, mesh, placements)
                params[-1].grad = grad
            try:
                answer = call(of, params, foreach)
                results += 1
            except RuntimeError as error:
                answer = str(error)
            tensors = [local(param.grad) for param in params]
            if isinstance(answer, torch.Tensor):
                tensors.append(local(answer))
            both.append((type(answer), answer if isinstance(answer, str) else None, tensors))
        assert both[0][:2] == both[1][:2]
        assert_same_bits(both[0][2], both[1][2], f"{mixture}, foreach={foreach}")
    assert results, "torch takes none of them: nothing was compared"


def clip_in_fsdp2(_):
    """As in a training script; the same norm of the whole model as in one process."""
    for clip in (fastopt.clip_grad_norm_, nn.utils.clip_grad_norm_):
        model, whole = sharded(model_of_odd_sizes()), model_of_odd_sizes()
        x = torch.randn(3, 6)
        dist.broadcast(x, 0)
        for each in (model, whole):
            each(x).square().mean().backward()
        norm = clip(model.parameters(), 0.1)
        expected = fastopt.clip_grad_norm_(whole.parameters(), 0.1)
        assert norm.full_tensor().item() == pytest.approx(expected.item(), rel=1e-5)
        for a, b in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-6)


def save(path):
    """Every optimizer trains two steps under fully_shard, and is saved from all processes."""
    for row in ROWS:
        model = sharded(model_of_odd_sizes())
        optimizer = row.ours(model.parameters(), **row.plain)
        train(model, optimizer, 2)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=f"{path}/{row.name}")
        whole = [tensor.full_tensor() for tensor in model.state_dict().values()]
        if dist.get_rank() == 0:
            torch.save(whole, f"{path}/{row.name}.pt")


def resume(path):
    """By fastopt and by torch.optim, in another number of processes: the same parameters, state, and next steps."""
    for row in ROWS:
        results = []
        for make in (Make(row.ours, **row.plain), Make(row.theirs, foreach=False, **row.plain)):
            model = sharded(model_of_odd_sizes())
            optimizer = make(model.parameters())
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            checkpoint.load(state, checkpoint_id=f"{path}/{row.name}")
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            for tensor, saved in zip(model.state_dict().values(), torch.load(f"{path}/{row.name}.pt"), strict=True):
                assert_same_bits(tensor.full_tensor(), saved, row.name)
            found = values_of(optimizer)
            if row.name != "SGD":
                counts = [float(entry["step"]) for entry in optimizer.state.values()]
                assert counts == [2.0] * len(counts) and counts
            results.append(found + train(model, optimizer, 2))
        assert_same_bits(*results, row.name)


def worker(rank, world_size, store, function, argument):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(argument)
    finally:
        dist.destroy_process_group()


def in_processes(world_size, tmp_path, function, argument):
    """Runs `function(argument)` in each of `world_size` processes; an error in one of them is raised here."""
    store = tmp_path / f"store-{function.__name__}-{world_size}"
    torch.multiprocessing.spawn(worker, (world_size, str(store), function, argument), nprocs=world_size)


SCENARIOS = (
    ddp, fsdp2, fsdp2_mixed_precision, fsdp2_beside_plain_parameters, replicated_and_sharded_dtensors, fsdp1,
    zero_redundancy,
)  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_wrapper(scenario, tmp_path):
    in_processes(2, tmp_path, same_under_the_wrapper, scenario)


def test_checkpoint_in_another_world_size(tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    in_processes(2, tmp_path, save, str(path))
    in_processes(1, tmp_path, resume, str(path))


def test_host_time_of_dtensors(tmp_path):
    in_processes(1, tmp_path, host_time_of_dtensors, None)


CLIPPING = (clip_dtensors, clip_mixed_dtensors, clip_in_fsdp2)


@pytest.mark.parametrize("scenario", CLIPPING, ids=lambda scenario: scenario.__name__)
def test_clipping(scenario, tmp_path):
    in_processes(2, tmp_path, scenario, None)

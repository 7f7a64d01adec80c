"""Code of the user's that runs in the middle of a step and pulls the rug: a table of places times a table of deeds.

Run by test_interruptions.py in a process of its own, since what it looks for is a crash:

    python -m tests.interruptions [names of optimizers]

and under AddressSanitizer by `make asan`. A step may raise what it likes, and so may the ones after it.
"""

import contextlib
import gc
import itertools
import sys
import threading
import time
from types import SimpleNamespace

import torch

from .optimizers import ROWS

# ---- deeds: what is done when the step calls out


def clear_params(optimizer, params):
    for group in optimizer.param_groups:
        group["params"].clear()


def clear_groups(optimizer, params):
    optimizer.param_groups.clear()


def clear_group_dicts(optimizer, params):
    for group in optimizer.param_groups:
        group.clear()


def replace_groups(optimizer, params):
    optimizer.param_groups[:] = [
        {**group, "params": [torch.nn.Parameter(torch.ones(3)) for _ in group["params"]]}
        for group in optimizer.param_groups
    ]


def replace_params_lists(optimizer, params):
    for group in optimizer.param_groups:
        group["params"] = list(group["params"])[:1]


def clear_state(optimizer, params):
    optimizer.state.clear()


def clear_entries(optimizer, params):
    for entry in list(optimizer.state.values()):
        entry.clear()


def other_state_tensors(optimizer, params):
    for entry in list(optimizer.state.values()):
        for name, value in list(entry.items()):
            if isinstance(value, torch.Tensor):
                entry[name] = torch.zeros(17 if name != "step" else ())


def clear_all(optimizer, params):
    clear_entries(optimizer, params)
    clear_state(optimizer, params)
    clear_params(optimizer, params)
    clear_groups(optimizer, params)
    for param in params:
        param.grad = None
    params.clear()


def no_gradients(optimizer, params):
    for param in params:
        param.grad = None


def other_data(optimizer, params):
    for param in params:
        param.grad = None
        param.data = torch.ones(2)


def swap(optimizer, params):
    for param in params:
        param.grad = None
        with contextlib.suppress(RuntimeError):  # not where something else holds the tensor
            torch.utils.swap_tensors(param, torch.nn.Parameter(torch.ones(1)))


def free_storages(optimizer, params):
    tensors = [param for param in params] + [param.grad for param in params]
    tensors += [value for entry in list(optimizer.state.values()) for value in list(entry.values())]
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            getattr(tensor, "_local_tensor", tensor).untyped_storage().resize_(0)


def no_plan(optimizer, params):
    optimizer._fastopt_plan = None


def another_step(optimizer, params):
    optimizer.step()


def step_after_clearing(optimizer, params):
    clear_state(optimizer, params)
    optimizer.step()


def raise_an_error(optimizer, params):
    clear_all(optimizer, params)
    raise ArithmeticError


DEEDS = (
    clear_params, clear_groups, clear_group_dicts, replace_groups, replace_params_lists, clear_state, clear_entries,
    other_state_tensors, clear_all, no_gradients, other_data, swap, free_storages, no_plan, another_step,
    step_after_clearing, raise_an_error,
)  # fmt: skip

# ---- places: where the step calls out to `interrupt`, which does the deed


class Number:
    """A number, truth or object that interrupts whoever asks what it is."""

    def __init__(self, value, interrupt):
        self.value, self.interrupt = value, interrupt

    def __bool__(self):
        self.interrupt()
        return bool(self.value)

    def __float__(self):
        self.interrupt()
        return float(self.value)

    __index__ = None

    def __repr__(self):
        self.interrupt()
        return repr(self.value)

    @property
    def __class__(self):  # isinstance looks here
        self.interrupt()
        return Number


class DyingFloat(float):
    """A float that interrupts when it is dropped."""

    interrupt = None

    def __del__(self):
        if self.interrupt:
            self.interrupt()


class DyingTensor(torch.nn.Parameter):
    """The same as a tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    interrupt = None

    def __del__(self):
        if self.interrupt:
            self.interrupt()


class Key(str):
    """A key that interrupts when it is compared with one of the same hash."""

    interrupt = None

    def __hash__(self):
        return hash(str(self))

    def __eq__(self, other):
        if self.interrupt and isinstance(other, str):
            self.interrupt()
        return False


class Named(torch.nn.Parameter):
    """A parameter with a hash and an equality of its own."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    interrupt = None
    constant = False

    def __hash__(self):
        if self.interrupt:
            self.interrupt()
        return 17 if self.constant else id(self) + 1  # not what a tensor has

    def __eq__(self, other):
        if self.interrupt:
            self.interrupt()
        return self is other


class Lookup(type(torch.nn.Parameter)):
    """Interrupts at attributes of a class of tensors."""

    interrupt = None
    name = ""

    def __getattribute__(cls, name):
        if name == Lookup.name and Lookup.interrupt:
            Lookup.interrupt()
        return super().__getattribute__(name)


class LookedUp(torch.nn.Parameter, metaclass=Lookup):
    __torch_function__ = torch._C._disabled_torch_function_impl


def option(name):
    def place(it):
        group = it.optimizer.param_groups[it.group % len(it.optimizer.param_groups)]
        group[name] = (
            tuple(Number(value, it.interrupt) for value in group[name])
            if isinstance(group[name], tuple)
            else Number(group[name], it.interrupt)
        )

    place.__name__ = f"option {name}"
    return place


def option_that_dies(it):
    """While the option after it is read."""
    for group in it.optimizer.param_groups:
        group["lr"] = DyingFloat(0.1)
        group["lr"].interrupt = it.interrupt
        group["maximize"] = Number(False, lambda group=group: group.update(lr=0.1))


def a_pair_of_three(it):
    """Its repr is in the message."""
    for group in it.optimizer.param_groups:
        group["betas"] = [0.9, 0.99, Number(0, it.interrupt)]


def attribute(name):
    def place(it):
        def get(optimizer):
            it.interrupt()
            return optimizer.__dict__[name] if name in optimizer.__dict__ else getattr(base, name, None)

        base = type(it.optimizer)
        members = {name: property(get, lambda optimizer, value: optimizer.__dict__.__setitem__(name, value))}
        it.optimizer.__class__ = type(base.__name__, (base,), members)

    place.__name__ = f"attribute {name}"
    return place


def slots_of_new_state(it):
    it.optimizer.state.clear()
    base = type(it.optimizer)

    class Slots(type(base._fastopt)):
        def slots(self, optimizer, group):
            it.interrupt()
            return super().slots(optimizer, group)

    it.optimizer.__class__ = type(base.__name__, (base,), {"_fastopt": Slots()})


def step_count(it):
    for entry in it.optimizer.state.values():
        if "step" in entry:
            entry["step"] = Number(3.0, it.interrupt)


def state_slot(it):
    for entry in it.optimizer.state.values():
        for name in entry:
            if name != "step":
                entry[name] = Number(1.0, it.interrupt)


def item_of_params(it):
    it.optimizer.param_groups[0]["params"].insert(1, Number(1.0, it.interrupt))


def keys_of_groups(it):
    for group in it.optimizer.param_groups:
        shadows = {Key(name): 0 for name in group}
        values = dict(group)
        group.clear()
        group.update({**shadows, **values})
        for key in shadows:
            key.interrupt = it.interrupt


def keys_of_entries(it):
    for param, entry in list(it.optimizer.state.items()):
        shadows = {Key(name): 0 for name in entry}
        it.optimizer.state[param] = {**shadows, **entry}
        for key in shadows:
            key.interrupt = it.interrupt


def hash_of_parameters(it, **attributes):
    """In a state of another order, so that they are looked up."""
    named = replace_with(it, Named, **attributes)
    entries = list(it.optimizer.state.items())
    it.optimizer.state.clear()
    it.optimizer.state.update(reversed(entries))
    for param in named:
        param.interrupt = it.interrupt


def equality_of_parameters(it):
    """All have one hash."""
    hash_of_parameters(it, constant=True)


def class_lookup(name):
    def place(it):
        replace_with(it, LookedUp)
        Lookup.name, Lookup.interrupt = name, it.interrupt

    place.__name__ = f"class attribute {name}"
    return place


def parameters_that_die(it):
    replacements = replace_with(it, DyingTensor)
    for param in replacements:
        param.interrupt = it.interrupt
    it.params.clear()
    replacements.clear()
    del param  # the optimizer alone has them
    option("maximize")(it)


def replace_with(it, cls, **attributes):
    """Each parameter is one of another class with the same state."""
    made = []
    for group in it.optimizer.param_groups:
        for i, old in enumerate(group["params"]):
            new = cls(old.data)
            new.grad = old.grad
            for name, value in attributes.items():
                setattr(new, name, value)
            group["params"][i] = new
            if old in it.optimizer.state:
                it.optimizer.state[new] = it.optimizer.state.pop(old)
            made.append(new)
    it.params[:] = made
    return made


def places_of(row):
    options = row.theirs([torch.nn.Parameter(torch.zeros(1))]).param_groups[0].keys() - {"params"}
    return (
        *(option(name) for name in sorted(options)), option_that_dies, *[a_pair_of_three] * ("betas" in options),
        *(attribute(name) for name in ("param_groups", "state", "_fastopt_plan", "_fastopt", "_fastopt_gpu")),
        *[step_count] * row.ours._fastopt.has_step, slots_of_new_state, state_slot, item_of_params,
        keys_of_groups, keys_of_entries, equality_of_parameters, hash_of_parameters,
        class_lookup("__torch_function__"), class_lookup("grad"), parameters_that_die,
    )  # fmt: skip


# ---- running them


def optimizer_of(row):
    params = [torch.nn.Parameter(torch.randn(size)) for size in (3, 40, 1, 700, 5, 33)]
    for param in params:
        param.grad = torch.randn(param.shape)
    return row.ours([{"params": params[:3]}, {"params": params[3:], "lr": 0.2}], **row.plain), params


def interrupted(optimizer, params, place, deed, nth):
    """Steps in which the deed is done at the nth call of the place's, and some after it. How many calls there were."""
    calls = 0
    inside = False

    def interrupt():
        nonlocal calls, inside
        if inside:
            return
        calls += 1
        if calls == nth:
            inside = True
            try:
                deed(optimizer, params)
                gc.collect(0)
                junk.append([torch.full((size,), 3.0) for size in (3, 40, 1, 5, 33)])  # in memory that was just freed
            finally:
                inside = False

    junk = []
    place(SimpleNamespace(optimizer=optimizer, params=params, interrupt=interrupt, group=nth % 2))
    for _ in range(3):
        with contextlib.suppress(Exception):
            optimizer.step()
    return calls


def run_table(row):
    """Every deed at every place, at its first, second and fifth call, at a first step and after others."""
    silent = []
    for place in places_of(row):
        called = 0
        for deed, steps in itertools.product(DEEDS, (0, 2)):
            for nth in (1, 2, 5):
                optimizer, params = optimizer_of(row)
                for _ in range(steps):
                    optimizer.step()
                calls = interrupted(optimizer, params, place, deed, nth)
                Lookup.interrupt = None
                called += calls
                if calls < nth:
                    break
        if not called:
            silent.append(place.__name__)
    return silent


def run_dtensors(row):
    """Placements whose equality interrupts, and lookups of a spec's fields."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    class Placement(Shard):
        interrupt = None

        def __eq__(self, other):
            if Placement.interrupt:
                Placement.interrupt()
            return True

        __hash__ = Shard.__hash__

    def put_placements(spec_of):
        def place(it):
            for param in it.params:
                for tensor in spec_of(it.optimizer, param):
                    if isinstance(tensor, DTensor):
                        old = tensor._spec
                        tensor._spec = type(old)(old.mesh, (Placement(0),), tensor_meta=old.tensor_meta)
            Placement.interrupt = it.interrupt

        return place

    def put_lookups(name):
        def place(it):
            def get(spec):
                it.interrupt()
                return spec.__dict__.get(name)

            base = type(it.params[0]._spec)
            noisy = type("Noisy", (base,), {name: property(get, lambda s, value: s.__dict__.__setitem__(name, value))})
            for param in it.params:
                tensor = it.optimizer.state.get(param, {}).get("exp_avg", param.grad)
                spec = object.__new__(noisy)
                for field in ("mesh", "placements", "tensor_meta"):
                    object.__setattr__(spec, field, getattr(tensor._spec, field))
                tensor._spec = spec

        return place

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    places = [put_placements(lambda o, p: [p]), put_placements(lambda o, p: [p.grad])]
    places += [put_placements(lambda o, p: o.state.get(p, {}).values()), put_lookups("mesh"), put_lookups("placements")]
    total = 0
    for place, deed, nth in itertools.product(places, DEEDS, (1, 2, 4)):
        params = [torch.nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])) for _ in range(5)]
        for param in params:
            param.grad = distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])
        optimizer = row.ours([{"params": params[:2]}, {"params": params[2:]}], **row.plain)
        optimizer.step()
        total += interrupted(optimizer, params, place, deed, nth)
        Placement.interrupt = None
    dist.destroy_process_group()
    return [] if total else ["placements"]


def run_thread(row, seconds=1.0):
    """A thread that replaces groups, parameters and state, and clears them, while steps run and options call out."""
    stop = threading.Event()
    optimizer, params = optimizer_of(row)
    large = torch.nn.Parameter(torch.ones(300_000))  # a step releases the GIL
    large.grad = torch.ones(300_000)
    # Nothing can survive what frees a storage under a running kernel; nor, in torch, one thread that reads a gradient
    # while another drops it: `param.grad` itself crashes.
    wild = another_step, step_after_clearing, raise_an_error, free_storages, no_gradients, other_data, swap, clear_all
    calm = [deed for deed in DEEDS if deed not in wild]

    def disturb():
        for t in itertools.count():
            if stop.is_set():
                return
            with contextlib.suppress(Exception):
                calm[t % len(calm)](optimizer, params[:])
            time.sleep(1e-4)

    thread = threading.Thread(target=disturb)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        fresh, params[:] = optimizer_of(row)
        fresh.param_groups[0]["params"].append(large)
        fresh.param_groups[0]["maximize"] = Number(False, lambda: time.sleep(1e-5))  # others may run meanwhile
        optimizer.param_groups, optimizer.state = fresh.param_groups, fresh.state
        for _ in range(5):
            with contextlib.suppress(Exception):
                optimizer.step()
    stop.set()
    thread.join()
    sys.setswitchinterval(interval)


def main(names):
    """Prints the places that no step called: options that say how torch's own step runs."""
    torch.set_num_threads(2)
    sys.unraisablehook = lambda error: None  # what a __del__ raises
    for row in ROWS:
        if not names or row.name in names:
            silent = run_table(row) + run_dtensors(row)
            run_thread(row)
            print(f"{row.name} never calls:", ", ".join(silent))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The GPU kernels, executed from the PTX that Triton emits and compared bit for bit with numpy; no GPU needed."""

import decimal
import importlib
import itertools
import re
import struct
from collections import Counter

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from fastopt.kernels import arithmetic, multi_tensor  # noqa: E402
from fastopt.kernels.multi_tensor import CHUNK, compute_dtype  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from tests.tools import driver, reference_np, sass  # noqa: E402

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16)]  # of param and grad, of state
DTYPES += [(BF16, F32), (F16, F32), (F32, BF16), (F32, F16)]
RARE_DTYPES = [(F64, F32), (BF16, F16)]

# For each algorithm the masks of state slots in use; step counts and hyper-parameters, with every flag on and off.
MASKS = {
    "sgd": (0b0, 0b1),
    "adagrad": (0b1,),
    "rmsprop": (0b001, 0b011, 0b101, 0b111),
    "adam": (0b011, 0b111),
}
ROWS = {
    "sgd": [
        (1, dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.0, nesterov=False, maximize=False)),
        (2, dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.0, nesterov=False, maximize=False)),
        (7, dict(lr=1e-3, momentum=0.99, dampening=0.0, weight_decay=0.01, nesterov=True, maximize=False)),
        (9, dict(lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.1, nesterov=False, maximize=True)),
    ],
    "adagrad": [
        (1, dict(lr=0.1, lr_decay=0.0, weight_decay=0.0, eps=1e-10, maximize=False)),
        (5, dict(lr=0.01, lr_decay=0.3, weight_decay=0.1, eps=1e-10, maximize=False)),
        (900, dict(lr=0.01, lr_decay=1e-3, weight_decay=0.01, eps=0.0, maximize=True)),
    ],
    "rmsprop": [
        (1, dict(lr=0.01, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.9, centered=True, maximize=False)),
        (2, dict(lr=0.1, alpha=0.3, eps=0.0, weight_decay=0.1, momentum=0.5, centered=True, maximize=True)),
        (3, dict(lr=1e-4, alpha=0.0, eps=1e-2, weight_decay=1e-4, momentum=0.0, centered=True, maximize=False)),
    ],
    "adam": [
        (1, dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=-0.0, amsgrad=False, maximize=False,
                 decoupled_weight_decay=False)),
        (5, dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=0.0, weight_decay=0.1, amsgrad=False, maximize=False,
                 decoupled_weight_decay=True)),
        (1000, dict(lr=0.1, beta1=0.4, beta2=0.9995, eps=0.5, weight_decay=0.1, amsgrad=True, maximize=True,
                    decoupled_weight_decay=False)),
        (2, dict(lr=1e-4, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0, amsgrad=True, maximize=True,
                 decoupled_weight_decay=True)),
        # a root that is not divided by with multiplications: beta2 makes the correction more than 1
        (1, dict(lr=1e-3, beta1=0.9, beta2=-0.5, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False,
                 decoupled_weight_decay=False)),
    ],
}  # fmt: skip
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 127, 128, 129, 511, 513, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
SPECIAL = np.array([0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 2e-38, 3e38, 1e-20, 6e-8, 65504])


@pytest.fixture
def hopper():
    """A stand-in for an sm_90, which finds races; the number of its device is its architecture."""
    with driver.installed(90, races=True) as stand_in:
        yield stand_in


def every_kernel():
    """(algorithm, used, dtype, state_dtype); the rarer pairs of dtypes only with every slot in use."""
    for algorithm, masks in MASKS.items():
        for used in masks:
            for dtypes in DTYPES + (RARE_DTYPES if used == masks[-1] else []):
                if used or dtypes[0] == dtypes[1]:
                    yield algorithm, used, *dtypes


KERNELS = list(every_kernel())
FULL_KERNELS = [kernel for kernel in KERNELS if kernel[1] == MASKS[kernel[0]][-1]]  # every slot in use
FULL_F32_KERNELS = [kernel for kernel in FULL_KERNELS if kernel[2:] == (F32, F32)]


def name_of(kernel):
    return "-".join([kernel[0], format(kernel[1], "03b"), *(str(dtype).removeprefix("torch.") for dtype in kernel[2:])])


def module_of(algorithm):
    return importlib.import_module(f"fastopt.kernels.{algorithm}")


class Tensors:
    """The tensors of one step and the hyper-parameters of each, in turn the rows of ROWS.

    sizes: numbers of elements
    offsets: in turn, how many elements behind an address divisible by 16 its param, grad and states begin
    special: values from SPECIAL in place of random ones
    only: the place of the one row of ROWS for all tensors, which then comes with the launch
    """

    def __init__(self, kernel, sizes, offsets=((0, 0, 0, 0, 0),), special=False, only=None):
        self.kernel, self.only = kernel, only
        self.rows = ROWS[kernel[0]] if only is None else [ROWS[kernel[0]][only]]
        self.algorithm, self.used, self.dtype, state_dtype = kernel
        self.module = module_of(self.algorithm)
        self.slots = [slot for slot in range(len(self.module.SLOTS)) if self.used >> slot & 1]
        self.random, self.special = np.random.default_rng(0), special
        self.tensors = []  # param, grad and state slots in use of each
        for i, size in enumerate(sizes):
            dtypes = [self.dtype, self.dtype, *(state_dtype for _ in self.slots)]
            tensors = [self.tensor(size, *x) for x in zip(dtypes, offsets[i % len(offsets)], strict=False)]
            for slot, state in zip(self.slots, tensors[2:], strict=True):
                if self.module.SLOTS[slot] in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"):
                    state.abs_()
                elif self.algorithm == "sgd" and self.row(i)[0] == 1:
                    state.fill_(-0.0)  # what a momentum buffer is before its first step
            self.tensors.append(tensors)

    def row(self, i):
        """Step count and hyper-parameters of tensor i."""
        return self.rows[i % len(self.rows)]

    def tensor(self, size, dtype, offset):
        values = self.random.choice(SPECIAL, size) if self.special else self.random.standard_normal(size)
        storage = torch.empty(size + offset + 16, dtype=dtype)
        start = -storage.data_ptr() % 16 // dtype.itemsize + offset
        return storage[start : start + size].copy_(torch.from_numpy(values))

    def expected(self):
        """Param and state of each tensor after the step."""
        results = []
        for i, (param, grad, *state) in enumerate(self.tensors):
            values = {"param": param, "grad": grad}
            values |= {self.module.SLOTS[slot]: tensor for slot, tensor in zip(self.slots, state, strict=True)}
            wide = {name: tensor.to(compute_dtype(self.dtype)).numpy() for name, tensor in values.items()}
            with np.errstate(all="ignore"):
                stepped = reference_np.STEPS[self.algorithm](*reversed(self.row(i)), **wide)
            kept = zip(stepped, [param, *state], strict=True)
            results.append([torch.from_numpy(np.asarray(x)).to(tensor.dtype) for x, tensor in kept])
        return results

    def arrays(self, first_chunk=0):
        """The bytes of work, table and scalars, as kernels/multi_tensor.py lays them out.

        first_chunk: take the tensors for the end of larger ones, which have so many chunks before them
        """
        chunk_size, before = multi_tensor.CHUNK, first_chunk * multi_tensor.CHUNK
        work, table = [], np.zeros((len(self.tensors), 4 + len(self.module.SLOTS)), np.int64)
        for i, (param, grad, *state) in enumerate(self.tensors):
            work += [i << 32 | first_chunk + chunk for chunk in range(-(-param.numel() // chunk_size))]
            table[i, :2] = before + param.numel(), i % len(self.rows)
            columns = [2, 3, *(4 + slot for slot in self.slots)]
            table[i, columns] = [x.data_ptr() - before * x.element_size() for x in (param, grad, *state)]
        self.random.shuffle(work)
        T = torch.empty(0, dtype=compute_dtype(self.dtype)).numpy().dtype.type
        named = [reference_np.scalars(self.algorithm, hypers, t, T) for t, hypers in self.rows]
        scalars = np.array([[values[name] for name in self.module.SCALARS] for values in named], T)
        return np.array(work, np.int64).tobytes(), table.tobytes(), scalars.tobytes()

    def launch(self, gpu, **options):
        """Launch the update on arrays in one buffer, none of them aligned to 16 bytes unless by chance."""
        launcher = multi_tensor.update_launcher(*self.kernel, device=gpu.arch)
        arrays = self.arrays(**options)
        buffer, addresses = in_one_buffer(arrays)
        gpu.options["ranges"] = [(address, len(part)) for address, part in zip(addresses, arrays, strict=True)]
        gpu.options["ranges"] += itertools.chain(*self.tensors)
        addresses, words = self.with_scalars(addresses, arrays[2])
        launcher.launch(len(arrays[0]) // 8, 0, *addresses, words)
        del buffer

    def with_scalars(self, addresses, scalars):
        """The addresses of a launch, and the words that come with it: of scalars, if they are one row."""
        words = multi_tensor.scalars_words(self.algorithm, self.dtype)
        if self.only is None:
            return addresses, words * (0,)
        return [*addresses[:2], 0], struct.unpack(f"<{words}q", scalars.ljust(8 * words, b"\0"))

    def step_and_compare(self, gpu, **options):
        expected = self.expected()
        grads = [grad.clone() for _, grad, *_ in self.tensors]
        self.launch(gpu, **options)
        for (_, grad, *_), before in zip(self.tensors, grads, strict=True):
            assert torch.equal(bits(grad), bits(before))
        self.compare(expected)

    def compare(self, expected):
        """Bit by bit; one NaN is as good as another."""
        names = ["param", *(self.module.SLOTS[slot] for slot in self.slots)]
        for i, ((param, _grad, *state), right) in enumerate(zip(self.tensors, expected, strict=True)):
            for name, got, want in zip(names, [param, *state], right, strict=True):
                wrong = (bits(got) != bits(want)) & ~(got.isnan() & want.isnan())
                if wrong.any():
                    k = int(wrong.nonzero()[0])
                    raise AssertionError(
                        f"{name} of tensor {i} ({len(got)} elements, step count and hyper-parameters {self.row(i)}): "
                        f"{int(wrong.sum())} wrong, the first at {k}: {got[k].item()!r} in place of {want[k].item()!r}"
                    )


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def in_one_buffer(arrays):
    """The arrays one after the other, the first at an address that 8 divides but not 16; and their addresses."""
    buffer = torch.zeros(sum(map(len, arrays)) + 16, dtype=torch.uint8)
    start = (8 - buffer.data_ptr()) % 16
    addresses = [buffer.data_ptr() + start + sum(map(len, arrays[:i])) for i in range(len(arrays))]
    joined = b"".join(arrays)
    buffer[start : start + len(joined)] = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    return buffer, addresses


def compare_with_reference(gpu, kernel):
    Tensors(kernel, SIZES + 4 * [CHUNK + 2]).step_and_compare(gpu)
    Tensors(kernel, [64, 61, 70, 67], special=True).step_and_compare(gpu)


@pytest.mark.parametrize("kernel", KERNELS, ids=name_of)
def test_bits_of_the_reference(hopper, kernel):
    compare_with_reference(hopper, kernel)


@pytest.mark.parametrize("kernel", FULL_KERNELS, ids=name_of)
def test_scalars_that_come_with_the_launch(hopper, kernel):
    for only in range(len(ROWS[kernel[0]])):
        Tensors(kernel, [131, 1, CHUNK + 2], only=only).step_and_compare(hopper)


@pytest.mark.parametrize("kernel", FULL_KERNELS, ids=name_of)
def test_bits_of_the_reference_on_sm_80(kernel):
    """Which converts 16-bit types with other instructions."""
    with driver.installed(80, races=True) as ampere:
        compare_with_reference(ampere, kernel)


@pytest.mark.parametrize("kernel", FULL_KERNELS, ids=name_of)
def test_tensors_that_are_not_aligned(hopper, kernel):
    one_each = [tuple(int(i == j) for j in range(5)) for i in range(5)]
    offsets = [(0, 0, 0, 0, 0), *one_each, *(5 * (off,) for off in range(1, 9)), (3, 1, 2, 0, 1)]
    Tensors(kernel, [133] * len(offsets) + [CHUNK + 3] * 4, offsets).step_and_compare(hopper)
    alike = [5 * (1 + i % 7,) for i in range(len(AROUND_VECTORS))]
    Tensors(kernel, AROUND_VECTORS, alike).step_and_compare(hopper)
    Tensors(kernel, AROUND_VECTORS[::-1], alike).step_and_compare(hopper)


# so few elements that the first vector is the last, or none; and chunks whose ends are moved
AROUND_VECTORS = [*range(1, 10), 15, 16, 17, 25, CHUNK - 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7, 3 * CHUNK]


@pytest.mark.parametrize("kernel", FULL_KERNELS, ids=name_of)
def test_tensors_off_alignment_alike_are_accessed_in_vectors(hopper, kernel):
    """All but the first and last elements of a tensor, not of each chunk; but none where operands are off unlike."""
    _, used, dtype, state_dtype = kernel
    hopper.options["counts"] = True
    vector, states, size = 16 // max(dtype.itemsize, state_dtype.itemsize), used.bit_count(), 3 * CHUNK
    alike = ((5 * (1,), vector), (5 * (vector,), 0), (5 * (2 * vector - 1,), vector))
    for offsets, alone in (*alike, ((1, 0, 0, 0, 0), size)):
        Tensors(kernel, [size], [offsets]).launch(hopper)
        found, expected = accesses(hopper.launches[-1].machine.instructions), Counter()
        for tensors, itemsize in ((1, dtype.itemsize), (states, state_dtype.itemsize)):
            expected[itemsize] += tensors * alone
            expected[vector * itemsize] += tensors * (size - alone) // vector
        assert found["st"] == +expected, offsets
        loaded = 2 * (dtype.itemsize * vector == 16) + states * (state_dtype.itemsize * vector == 16)
        assert found["ld"][16] == loaded * (size - alone) // vector, offsets


def accesses(executed):
    """How many loads and stores of how many bytes were executed."""
    found = {"ld": Counter(), "st": Counter()}
    for opcode, count in executed.items():
        if match := re.fullmatch(r"(ld|st)\.global(?:\.v(\d))?\.b(\d+)", opcode):
            found[match[1]][int(match[2] or 1) * int(match[3]) // 8] += count
    return found


@pytest.mark.parametrize("chunk", [2**21, 2**22 + 1, 2**31 + 3, 2**32 - 2])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_more_elements_than_int32_counts(hopper, dtype, chunk):
    tensors = Tensors(("sgd", 1, dtype, dtype), [CHUNK + 7, 5], [(0, 0, 0), (1, 0, 0)])
    tensors.step_and_compare(hopper, first_chunk=chunk)


@pytest.mark.parametrize("kernel", FULL_F32_KERNELS, ids=name_of)
def test_other_chunk_sizes(hopper, kernel, monkeypatch):
    """Hardware may ask for others: with the smallest, the loop over a chunk takes one turn."""
    monkeypatch.setattr(multi_tensor, "CHUNK", 1024)
    monkeypatch.setattr(multi_tensor, "update_launcher", multi_tensor.update_launcher.__wrapped__)
    Tensors(kernel, [1023, 1024, 1025, 500, 2300]).step_and_compare(hopper)


@pytest.mark.parametrize("policy", ["evict_first", "evict_last"])
def test_eviction_hints_change_no_bits(hopper, policy, monkeypatch):
    """They are in the code, and no more than hints."""
    monkeypatch.setattr(multi_tensor, "EVICTION", policy)
    monkeypatch.setattr(multi_tensor, "update_launcher", multi_tensor.update_launcher.__wrapped__)
    Tensors(("adam", 0b111, F32, F32), [CHUNK + 5, 3]).step_and_compare(hopper)
    assert f"L1::{policy}" in hopper.launches[-1].ptx


def test_at_least_two_scalars():
    """fastopt/gpu.py takes the number of words for the number of rows."""
    assert all(len(module_of(algorithm).SCALARS) > 1 for algorithm in MASKS)


def test_nothing_is_compiled_twice(hopper, monkeypatch):
    """Whatever the number, sizes and alignment of tensors, and whatever their scalars are."""
    kernel = ("adam", 0b011, F32, F32)
    Tensors(kernel, [5]).launch(hopper)
    compilations = []
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", lambda *args: compilations.append(args))
    for i, sizes in enumerate([[1], [16], [17, 16, 1], 40 * [3], [5000]]):
        tensors = Tensors(kernel, sizes, [(0, 0, 0, 0), (1, 2, 3, 0)])
        monkeypatch.setitem(ROWS, "adam", [(t + i, hypers | {"lr": 0.1 / (i + 1)}) for t, hypers in ROWS["adam"]])
        tensors.step_and_compare(hopper)
    assert not compilations
    compiled = multi_tensor.update_launcher(*kernel, device=90).compiled
    assert not any(compiled.src.attrs.values())  # no alignment taken from the arguments of the warm-up


def test_launch_passes_what_it_is_given(hopper):
    hopper.execute = False
    words = (1, 16, -1, 2**63 - 1, -(2**63), 0)
    multi_tensor.update_launcher("adam", 3, F32, F32, device=90).launch(7, 0, 8, 24, 40, words)
    multi_tensor.prepare_launcher("adam", F32, device=90).launch(3, 0, 8, 24, 0)
    for launch, grid, numbers in zip(hopper.launches, (7, 3), ((8, 24, 40, *words), (8, 24, 0)), strict=True):
        assert launch.grid == (grid, 1, 1)
        assert [int.from_bytes(x, "little", signed=True) for x in launch.parameters] == [*numbers, 0, 0]


# Scalars computed on the device


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("algorithm", MASKS)
def test_prepare_computes_the_scalars_of_the_host(hopper, algorithm, dtype):
    """Each number as fp32 and as fp64 in device memory; then the next step, with another lr."""
    module, T = module_of(algorithm), torch.empty(0, dtype=compute_dtype(dtype)).numpy().dtype.type
    kinds = [(np.float64, np.float64), (np.float32, np.float64), (np.float64, np.float32), (np.float32, np.float32)]
    rows = [(*row, *kind) for row in ROWS[algorithm] for kind in kinds]
    steps = [np.array([t - 1], step_type) for t, _, step_type, _ in rows]
    numbers = [np.array([hypers[name] for name in module.HYPERS], kind) for _, hypers, _, kind in rows]
    hypers = np.array([[tagged(x) for x in (step, *row[:, None])] for step, row in zip(steps, numbers, strict=True)])
    scalars = np.full((len(rows), len(module.SCALARS)), 77, T)
    hopper.options["ranges"] = [(x.ctypes.data, x.nbytes) for x in (hypers, scalars, *steps, *numbers)]
    launcher = multi_tensor.prepare_launcher(algorithm, dtype, device=90)
    for turn in range(2):
        launcher.launch(len(rows), 0, hypers.ctypes.data, scalars.ctypes.data, 0)
        for (t, *_), step, row, got in zip(rows, steps, numbers, scalars, strict=True):
            assert step[0] == t + turn
            named = dict(zip(module.HYPERS, map(float, row), strict=True))
            want = reference_np.scalars(algorithm, named, t + turn, T)
            # pow is not the same function everywhere, to the last bit of fp64; fp32 does not see it
            rtol = 4e-16 if T is np.float64 else 0
            np.testing.assert_allclose(got, [want[name] for name in module.SCALARS], rtol=rtol, atol=0)
        for row in numbers:
            row[module.HYPERS.index("lr")] *= 0.7


def tagged(number):
    """The address of a one-element array in the form of the hypers array."""
    return number.ctypes.data + (number.dtype == np.float32)


@triton.jit
def power_kernel(bases, exponents, results):
    i = tl.program_id(0)
    tl.store(results + i, arithmetic.power(tl.load(bases + i), tl.load(exponents + i)))


def test_power(hopper):
    bases = [0.0, 0.3, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 1.0]
    exponents = [0, 1, 2, 3, 7, 10, 100, 1000, 4095, 12345, 10**6, 2**24]
    pairs = np.array(list(itertools.product(bases, exponents)))
    arguments = [torch.from_numpy(pairs[:, i].copy()) for i in range(2)] + [torch.empty(len(pairs), dtype=F64)]
    power_kernel[(len(pairs),)](*arguments, enable_fp_fusion=False)
    decimal.getcontext().prec = 60
    for (base, exponent), got in zip(pairs, arguments[2].tolist(), strict=True):
        exact = decimal.Decimal(base) ** int(exponent) if exponent else decimal.Decimal(1)
        error = abs(decimal.Decimal(got) - exact)
        assert error <= decimal.Decimal(float(np.spacing(float(exact)))) * decimal.Decimal("0.51"), (base, exponent)


# fp32 in two parts, and rounding with random bits: what the native tests say of C++


@triton.jit
def parts_kernel(values, numbers, remainders, joined, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number, remainder = arithmetic.part(tl.load(values + i))
    tl.store(numbers + i, number)
    tl.store(remainders + i, remainder)
    tl.store(joined + i, arithmetic.join(number, remainder))


@triton.jit
def join_kernel(numbers, remainders, joined, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(joined + i, arithmetic.join(tl.load(numbers + i), tl.load(remainders + i)))


@triton.jit
def narrow_kernel(values, randoms, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    random = tl.load(randoms + i)
    tl.store(out + i, arithmetic.narrow_stochastically(tl.load(values + i), random, out.dtype.element_ty))


@triton.jit
def random_kernel(numbers, out, BLOCK: tl.constexpr):
    seed, step, position, first = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    counter1, counter2, counter3 = (step >> 32).to(tl.uint32) << 16, step.to(tl.uint32), position.to(tl.uint32)
    i = tl.arange(0, BLOCK)[:, None]
    place = tl.arange(0, 8)[None, :]
    bits = arithmetic.random_bits(key0, key1, counter1, counter2, counter3, first // 8 + i.to(tl.int64), place)
    tl.store(out + i * 8 + place, bits.to(tl.uint16).to(tl.int16, bitcast=True))


def around_every_16_bits(dtype):
    """Every number of a 16-bit dtype as fp32, what lies just beside it and beside the middle to the next; NaN too."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[::7].float().view(torch.int32)
    middle = 2**15 if dtype == BF16 else 2**12
    near = [numbers + offset for offset in (-1, 0, 1, middle - 1, middle, middle + 1)]
    return torch.cat(near)[: len(near) * len(numbers) // 128 * 128].view(F32)


@pytest.mark.parametrize("arch", [80, 90])
def test_parts_join(arch):
    values = around_every_16_bits(BF16)
    numbers, remainders = torch.empty_like(values, dtype=BF16), torch.empty_like(values, dtype=torch.int16)
    joined, nan = torch.empty_like(values), values.isnan()
    with driver.installed(arch, races=True):
        parts_kernel[(len(values) // 128,)](values, numbers, remainders, joined, BLOCK=128, enable_fp_fusion=False)
    assert torch.equal(bits(joined)[~nan], bits(values)[~nan])
    assert numbers[nan].isnan().all() and not remainders[nan].any() and joined[nan].isnan().all()
    away = torch.where(bits(values) & 0xFFFF == 0x8000, bits(values) + 1, bits(values)).view(F32)  # of ties
    assert torch.equal(bits(numbers)[~nan], bits(away.to(BF16))[~nan])


def test_join_follows_what_was_written_from_outside(hopper):
    """Zeros and infinities stay where the remainder of another number would make NaN; NaN stays."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -3e38, 1e-40]
    numbers = torch.tensor(special, dtype=BF16).repeat_interleave(16)
    remainders = torch.tensor([-0x8000, -0x7FFF, -77, -1, 0, 1, 123, 0x7FFF] * 16, dtype=torch.int16)
    joined = torch.empty(128)
    join_kernel[(1,)](numbers, remainders, joined, BLOCK=128, enable_fp_fusion=False)
    wide = bits(numbers).long() & 0xFFFF
    magnitude = (wide & 0x7FFF) << 16
    expected = magnitude + torch.where(magnitude == 0, remainders.clip(min=0), remainders)
    expected = torch.where(magnitude == 0x7F80 << 16, magnitude + remainders.clip(max=0), expected)
    expected = (expected | (wide & 0x8000) << 16).to(torch.int32)
    nan = numbers.isnan()
    assert torch.equal(bits(joined)[~nan], expected[~nan]) and joined[nan].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_rounding_with_random_bits(arch, dtype):
    """Up where the random bits reach what the probability says; what 16 bits hold stays."""
    values = around_every_16_bits(dtype)
    magnitudes = torch.arange((0x7F80 if dtype == BF16 else 0x7C00) + 1).to(torch.int16).view(dtype).double()
    magnitudes[-1] = 2 * magnitudes[-2] - magnitudes[-3]  # what infinity would be as a number
    wanted = values.double().abs()
    below = torch.searchsorted(magnitudes, wanted.nan_to_num(0), right=True) - 1
    above = (below + 1).clip(max=len(magnitudes) - 1)
    share = ((wanted - magnitudes[below]) / (magnitudes[above] - magnitudes[below])).nan_to_num(0, 0, 0)
    turn = 2**16 - (share * 2**16).floor().long()
    sign, nan = bits(values).long() >> 16 & 0x8000, values.isnan()
    for random in (0 * turn, (turn - 1).clip(max=2**16 - 1), turn.clip(max=2**16 - 1), 0 * turn + 2**16 - 1):
        got, random16 = torch.empty_like(values, dtype=dtype), random.to(torch.uint16)
        with driver.installed(arch, races=True):
            narrow_kernel[(len(values) // 128,)](values, random16, got, BLOCK=128, enable_fp_fusion=False)
        expected = (sign | below + (random >= turn)).to(torch.int32).to(torch.int16)
        assert torch.equal(bits(got)[~nan], expected[~nan]) and got[nan].isnan().all()


def philox(counter, key):
    """Philox 4x32-10 of Salmon et al. (SC 2011) in Python's integers."""
    (a, b, c, d), (e, f) = counter, key
    for _ in range(10):
        low, high = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = high >> 32 ^ b ^ e, high & 0xFFFFFFFF, low >> 32 ^ d ^ f, low & 0xFFFFFFFF
        e, f = (e + 0x9E3779B9) & 0xFFFFFFFF, (f + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


PLACES = [(0, 1, 0, 0), (2**64 - 1, 2**48 - 1, 2**32 - 1, 2**50 + 8), (2**40 + 3, 7, 2, 2**35 - 64)]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_random_bits(hopper, place):
    """Those of csrc/step/philox.h; the published words of Random123's kat_vectors are the reference's too."""
    digits = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox(*digits) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    numbers, got = torch.from_numpy(np.array(place, np.uint64).astype(np.int64)), torch.empty(1024, dtype=torch.int16)
    random_kernel[(1,)](numbers, got, BLOCK=128, enable_fp_fusion=False)
    seed, step, position, first = place
    for element, found in enumerate(got.tolist(), first):
        counter = element >> 3 & 0xFFFFFFFF, element >> 35 | step >> 32 << 16, step & 0xFFFFFFFF, position
        word = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[element % 8 // 2]
        assert found & 0xFFFF == word >> 16 * (element % 2) & 0xFFFF


# What the machine code says

FLOATING = re.compile(r"\b[a-z0-9]+(?:\.\w+)*\.f(?:16|32|64)(?:x2)?\b")
INEXACT = re.compile(r"\.(?:approx|full|ftz|rz|rm|rp)\b")

# For each algorithm and mask, the operations of an element as the formula has them, and how many scalars it takes. But
# in fp32 Adam divides by its bias correction with multiplications, by two more scalars.
OPERATIONS = {
    ("sgd", 0b0): ({"fma": 2, "mul": 1}, 3),
    ("sgd", 0b1): ({"fma": 4, "mul": 2}, 6),
    ("adagrad", 0b1): ({"fma": 2, "mul": 2, "div": 1, "sqrt": 1, "add": 2}, 4),
    ("rmsprop", 0b001): ({"fma": 2, "mul": 4, "div": 1, "sqrt": 1, "add": 2}, 6),
    ("rmsprop", 0b011): ({"fma": 3, "mul": 4, "div": 1, "sqrt": 1, "add": 2}, 7),
    ("rmsprop", 0b101): ({"fma": 4, "mul": 4, "div": 1, "sqrt": 1, "add": 2, "sub": 1}, 8),
    ("rmsprop", 0b111): ({"fma": 5, "mul": 4, "div": 1, "sqrt": 1, "add": 2, "sub": 1}, 9),
    ("adam", 0b011): ({"fma": 3, "mul": 5, "div": 2, "sqrt": 1, "add": 2, "sub": 1}, 10),
    ("adam", 0b111): ({"fma": 3, "mul": 5, "div": 2, "sqrt": 1, "add": 2, "sub": 1}, 10),
}
MULTIPLIED = {"fma": 3, "mul": 1, "div": -1}


@pytest.mark.parametrize("kernel", KERNELS, ids=name_of)
def test_instructions_and_bytes_of_an_element(hopper, kernel, monkeypatch):
    """Of aligned tensors of whole chunks: exact arithmetic, no more of it than the formula has; the widest accesses."""
    algorithm, used, dtype, state_dtype = kernel
    operations, scalars = OPERATIONS[algorithm, used]
    if algorithm == "adam" and compute_dtype(dtype) == F32:
        operations = {name: count + MULTIPLIED.get(name, 0) for name, count in operations.items()}
        scalars += 2
    t, hypers = ROWS[algorithm][1]
    hypers = hypers | {"weight_decay": 0.5, "decoupled_weight_decay": False}
    monkeypatch.setitem(ROWS, algorithm, [(t, hypers)])
    hopper.options["counts"] = True
    programs = 8
    elements = programs * CHUNK
    aligned = [16 // x.itemsize for x in (dtype, dtype, *3 * [state_dtype])]  # to 16 bytes and no more
    tensors = Tensors(kernel, [elements], [aligned])
    tensors.launch(hopper)
    (launch,) = hopper.launches
    executed, memory = launch.machine.instructions, launch.machine.memory

    floating = set(FLOATING.findall(launch.ptx))
    assert not [opcode for opcode in floating if INEXACT.search(opcode)]
    suffix = f".rn.f{8 * compute_dtype(dtype).itemsize}"
    arithmetic_executed = {x for x in executed if re.match(r"(add|sub|mul|mad|fma|div|rcp|r?sqrt)\.(.*\.)?f\d", x)}
    counts = {opcode: executed[opcode] / elements for opcode in arithmetic_executed}
    assert counts == {operation + suffix: count for operation, count in operations.items()}

    # how many loads and stores of how many bytes a vector of elements needs: param and grad, then states
    vector = 16 // max(dtype.itemsize, state_dtype.itemsize)
    loads, stores, states = Counter(), Counter(), used.bit_count()
    for itemsize, load, store in ((dtype.itemsize, 2, 1), (state_dtype.itemsize, states, states)):
        loads[vector * itemsize] += load
        stores[vector * itemsize] += store
    assert memory["store bytes"] == sum(width * n for width, n in stores.items()) * elements // vector
    # a warp stores consecutive bytes, here from the middle of one 32-byte sector to the middle of another
    assert memory["store sectors"] == memory["store bytes"] // 32 + memory["store requests"]
    # each lane also reads its entry of the work list, its row of the table and its scalars, one by one
    shared = programs * multi_tensor.THREADS * vector / elements
    loads[8] += (5 + states) * shared
    loads[compute_dtype(dtype).itemsize] += scalars * shared
    for name, expected in (("ld", loads), ("st", stores)):
        assert {width: n * vector / elements for width, n in accesses(executed)[name].items()} == expected


def bytes_per_element(kernel):
    """Of the tensors, and of the arrays."""
    programs = 16
    tensors = Tensors(kernel, [programs * CHUNK])
    with driver.installed(90, counts=True) as gpu:
        tensors.launch(gpu)
    memory = gpu.launches[-1].machine.memory
    tensor_bytes = sum(x.nbytes * (1 if i == 1 else 2) for i, x in enumerate(tensors.tensors[0]))  # grad is only read
    array_bytes = (memory["load bytes"] + memory["store bytes"] - tensor_bytes) / multi_tensor.THREADS
    return tensor_bytes / (programs * CHUNK), array_bytes / (programs * CHUNK)


def instructions_per_element(kernel, code):
    """Of a turn of the loop, and of the whole program for a full chunk."""
    elements = CHUNK / multi_tensor.THREADS  # of a thread
    per_turn = multi_tensor.THREAD_BYTES / compute_dtype(kernel[2]).itemsize
    # the fast path has one turn of it
    return code.loop / per_turn, (code.fast_path + code.loop * (elements / per_turn - 1)) / elements


def test_adam_leaves_room_on_sm_90(hopper):
    """Registers for 1024 threads of each multiprocessor, and so few instructions that memory stays the limit."""
    kernel = ("adam", 0b011, F32, F32)
    code = sass.report(multi_tensor.update_launcher(*kernel, device=90).compiled)
    assert code.registers <= 64 and code.spills == 0
    assert code.loads[16] == 8 and code.stores[16] == 6
    assert instructions_per_element(kernel, code)[1] <= 50
    assert sum(bytes_per_element(kernel)) <= 28.75


ROCM = [GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx1100", 32)]


ROCM_KERNELS = [*FULL_F32_KERNELS, ("adam", 3, F64, F64), ("adam", 3, BF16, BF16), ("adam", 3, BF16, F32)]


@pytest.mark.parametrize("target", ROCM, ids=lambda target: target.arch)
@pytest.mark.parametrize("kernel", ROCM_KERNELS, ids=name_of)
def test_compiles_for_rocm(kernel, target):
    """Nothing that may be fused or approximated, subnormals kept, no spills, the widest accesses."""
    _, used, dtype, state_dtype = kernel
    asm = compiled_for(target, *multi_tensor.update_kernel(*kernel, target.warp_size)).asm
    operations = re.findall(r"= (f(?:add|sub|mul|div)\b.*|.*call .*@llvm\.(?:fma|sqrt)\..*)", asm["llir"])
    assert operations
    assert not re.search(r"\b(fast|contract|reassoc|arcp|afn|nnan|ninf|nsz)\b|!fpmath", "\n".join(operations))
    # Triton 3.6 takes a square root by way of rsq, for which arithmetic.sqrt prepares where torch is one for ROCm
    approximate = "rcp|sqrt" if triton.__version__.startswith("3.6.") else "rcp|rsq|sqrt"
    assert not re.search(rf"llvm\.amdgcn\.({approximate})|__ocml", asm["llir"])
    assert re.search(r"denorm_mode_32 3", asm["amdgcn"]) and re.search(r"denorm_mode_16_64 3", asm["amdgcn"])
    assert set(re.findall(r"[sv]gpr_spill_count: +(\d+)", asm["amdgcn"])) == {"0"}
    per_thread = multi_tensor.THREAD_BYTES // compute_dtype(dtype).itemsize
    operands = [dtype.itemsize] * 2 + [state_dtype.itemsize] * used.bit_count()
    wide = operands.count(max(operands))
    accesses = per_thread * max(operands) // 16
    for op, count in (("load", wide), ("store", wide - (operands[1] == max(operands)))):  # grad is only read
        found = re.findall(rf"(?:buffer|global)_{op}_(?:dwordx4|b128)\b", asm["amdgcn"])
        assert found and len(found) % (count * accesses) == 0  # in each copy of a loop the compiler makes


@pytest.mark.parametrize("target", ROCM, ids=lambda target: target.arch)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("algorithm", MASKS)
def test_prepare_compiles_for_rocm(algorithm, dtype, target):
    asm = compiled_for(target, *multi_tensor.prepare_kernel(algorithm, dtype)).asm
    assert set(re.findall(r"[sv]gpr_spill_count: +(\d+)", asm["amdgcn"])) == {"0"}
    assert not re.search(r"llvm\.amdgcn\.(rcp|rsq)|__ocml", asm["llir"])


def compiled_for(target, kernel, arguments, constants, warps):
    """Compile ahead of time for a GPU that is not there."""
    kinds = {torch.int64: "*i64", F32: "*fp32", F64: "*fp64"}
    names = kernel.arg_names

    def type_of(x):
        return kinds[x] if isinstance(x, torch.dtype) else "i64" if isinstance(x, int) else tuple(map(type_of, x))

    types = [type_of(x) for x in arguments]
    signature = dict(zip(names, [*types, *("constexpr" for _ in constants)], strict=True))
    values = {(len(arguments) + i,): value for i, value in enumerate(constants)}
    source = triton.compiler.ASTSource(kernel, signature, values, {})
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": False})

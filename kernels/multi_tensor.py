"""The GPU machinery: a kernel that steps every tensor of a launch, one that prepares its scalars, and launching them.

It finds the elements of many tensors, loads them, hands them to an algorithm's `update` and stores what comes back. It
knows no optimizer, only modules that have SLOTS, SCALARS, HYPERS, `update` and `scalars`. Filling the arrays below,
uploading them, streams and devices are the caller's.

    launcher = update_launcher("adam", 0b011, torch.float32, torch.float32, device=0)    # compiles once
    launcher.launch(programs, stream, work, table, scalars, words)                       # integers, all of them

A launch serves the tensors that share the algorithm, the state slots in use (a bit mask), the dtype of the param, that
of its state and that of its grad, which is the param's, or fp32 of 16-bit params. It reads three arrays in device
memory, each aligned to 8 bytes. In one buffer and in this order they need one upload, of what lies behind the first
change: work changes with the shapes, table with the addresses, scalars with every step.

    work     int64[programs]              row << 32 | chunk: one program steps the elements from chunk * CHUNK up to
                                          (chunk + 1) * CHUNK of the tensor in this row of the table, all moved
                                          by the few by which it is not aligned. Each chunk of each tensor once, in
                                          any order.
    table    int64[rows, 4 + len(SLOTS)]  a row per tensor: numel; its row of scalars; the addresses of param and grad;
                                          the address of each state slot in the order of SLOTS, 0 if it is not in use.
                                          All of them dense, in the same element order, aligned to their dtype.
                                          With AVERAGE one column more: the address of the param's running average;
                                          with COMPANION another: the address of what the param's 16 bits lack;
                                          with DRAWS three: seed, position and step count (csrc/step/rows.h, Draws).
    scalars  T[rows, len(SCALARS)]        in the order of SCALARS; tensors may share a row. T is fp64 for fp64
                                          parameters, else fp32.

Where all tensors share one row of scalars, it comes with the launch, so that nothing needs an upload: the address of
scalars is 0 then, and `words` are the row's, int64 each, `scalars_words` of them. Else they are zeros.

What a step does beside the update, as csrc/step/rows.h has it in Stages, is for kernels of their own, whose launch
brings more words behind those:

    FACTORS  0, 1 or 2   so many addresses, as in `hypers` below: numbers by which each gradient is multiplied where it
                         is loaded, one after the other, each time rounded to its dtype. In memory it stays as it is.
    AVERAGE  bool        the bits of an fp64 number: the weight of the param, as it is stored, in its running average,
                         of dtype T, which becomes torch.lerp of both.
    COMPANION  bool      no word. The update is of the param's master: of bf16, joined with an int16 remainder; of fp16,
                         an fp32 number, which begins anew where the param is not it, rounded. The average is the
                         master's.
    DRAWS    0, 1 or 2   no word. The param, of 16 bits, is rounded with random bits; 2: for the step count there is the
                         address of one that `prepare` counts.
    SKIPS    bool        an address, as in `hypers` below, of found_inf: where it is not 0, nothing is written.

The host cannot change what a captured graph reads from it, so `prepare` counts the steps and computes the scalars on
the device, from an array of addresses; the update follows on the same stream and reads row i of scalars for row i.
With SKIPS it has the address of found_inf, too, and counts no step where that is not 0; else 0 stands for it.

    hypers   int64[rows, 1 + len(HYPERS)] device addresses of the step count and of each hyper-parameter in the order
                                          of HYPERS. They hold fp64 numbers, or fp32 where 1 is added to the address.
                                          Rows may share hyper-parameters but not step counts, which go up by one; an
                                          algorithm without one gets a cell of its own, 0 before the first step.
"""

import functools
import importlib

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from .arithmetic import join, lerp, narrow_stochastically, part, random_bits

CHUNK = 4096  # elements per program: what it does once is then a tenth of Adam's instructions; to be tuned on hardware
THREADS = 128  # per program
THREAD_BYTES = 32  # of the compute type in a thread's registers, for each tensor: 8 fp32 or 4 fp64 numbers
VECTOR_BYTES = 16  # the widest load and store
EVICTION = ""  # of what is loaded and stored from the caches: "evict_first", "evict_last"; to be tuned on hardware
AN_INT64 = 2**62 + 1  # that Triton takes for no narrower integer and no multiple of anything


@triton.jit
def _pointer(address, base, dtype: tl.constexpr):
    return address.to(tl.pointer_type(dtype)) + base


@triton.jit
def _aligned_pointer(address, base, dtype: tl.constexpr, VEC: tl.constexpr):
    # Triton takes the hint only on a pointer, and only where it is made. Without it nothing is 128 bits wide.
    return tl.multiple_of(address.to(tl.pointer_type(dtype)) + base, VEC * (dtype.primitive_bitwidth // 8))


@triton.jit
def _off(address, dtype: tl.constexpr, VEC: tl.constexpr):
    """How many elements an address is behind one at which a vector may begin."""
    itemsize: tl.constexpr = dtype.primitive_bitwidth // 8
    return (address & (VEC * itemsize - 1)) // itemsize


@triton.jit
def _scalar(words, i: tl.constexpr, T: tl.constexpr):
    if T == tl.float64:
        return words[i].to(tl.float64, bitcast=True)
    else:
        return (words[i // 2] >> 32 * (i % 2)).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def scaled(grad, factor, dtype: tl.constexpr):
    """A gradient of T times a number, as if it were stored."""
    return (grad * factor).to(dtype).to(grad.dtype)


@triton.jit
def master_of(number, companion):
    """The fp32 number behind a 16-bit one: csrc/step/companions.h says of what."""
    if number.dtype == tl.bfloat16:
        return join(number, companion)
    else:
        followed = companion.to(tl.float16).to(tl.uint16, bitcast=True) == number.to(tl.uint16, bitcast=True)
        return tl.where(followed, companion, number.to(tl.float32))


@triton.jit
def _random(draws, element, leading):
    """16 random bits of each element. Those of a row of them, at most 8 behind the leading one, lie in two blocks."""
    block, place = element >> 3, element & 7
    first = leading >> 3
    random = random_bits(draws[0], draws[1], draws[2], draws[3], draws[4], first, place)
    if len(element.shape) == 2:
        next_one = random_bits(draws[0], draws[1], draws[2], draws[3], draws[4], first + 1, place)
        random = tl.where(block == first, random, next_one)
    return random


@triton.jit
def _step(param_ptr, grad_ptr, state_ptrs, average_ptr, companion_ptr, offsets, mask, h, factors, weight,
          draws, element, leading,
          update: tl.constexpr, USED: tl.constexpr, SLOTS: tl.constexpr, FACTORS: tl.constexpr, AVERAGE: tl.constexpr,
          COMPANION: tl.constexpr, DRAWS: tl.constexpr, T: tl.constexpr, EVICTION: tl.constexpr):
    number = tl.load(param_ptr + offsets, mask, eviction_policy=EVICTION)
    if COMPANION:
        param = master_of(number, tl.load(companion_ptr + offsets, mask, eviction_policy=EVICTION))
    else:
        param = number.to(T)
    grad = tl.load(grad_ptr + offsets, mask, eviction_policy=EVICTION).to(T)
    for i in tl.static_range(FACTORS):
        grad = scaled(grad, factors[i], grad_ptr.dtype.element_ty)
    state = ()
    for slot in tl.static_range(SLOTS):
        if (USED >> slot) & 1:
            state = state + (tl.load(state_ptrs[slot] + offsets, mask, eviction_policy=EVICTION).to(T),)
        else:
            state = state + (0,)
    if AVERAGE:
        average = tl.load(average_ptr + offsets, mask, eviction_policy=EVICTION)
    param, state = update(param, grad, state, h, USED)
    value = param
    if COMPANION and param_ptr.dtype.element_ty == tl.bfloat16:
        number, companion = part(param)
    else:
        if DRAWS:
            number = narrow_stochastically(param, _random(draws, element, leading), param_ptr.dtype.element_ty)
        else:
            number = param.to(param_ptr.dtype.element_ty)
        companion = param
        if not COMPANION:
            value = number.to(T)
    tl.store(param_ptr + offsets, number, mask, eviction_policy=EVICTION)
    if COMPANION:
        tl.store(companion_ptr + offsets, companion, mask, eviction_policy=EVICTION)
    for slot in tl.static_range(SLOTS):
        if (USED >> slot) & 1:
            rounded = state[slot].to(state_ptrs[slot].dtype.element_ty)
            tl.store(state_ptrs[slot] + offsets, rounded, mask, eviction_policy=EVICTION)
    if AVERAGE:
        tl.store(average_ptr + offsets, lerp(average, value, weight), mask, eviction_policy=EVICTION)


@triton.jit(do_not_specialize=["work", "table", "scalars", "words"])
def multi_tensor_update(work, table, scalars, words,
                        update: tl.constexpr, USED: tl.constexpr, SLOTS: tl.constexpr, SCALARS: tl.constexpr,
                        PARAM: tl.constexpr, STATE: tl.constexpr,
                        CHUNK: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, TAIL: tl.constexpr,
                        EVICTION: tl.constexpr, FACTORS: tl.constexpr, AVERAGE: tl.constexpr,
                        GRAD: tl.constexpr, COMPANION: tl.constexpr, DRAWS: tl.constexpr, SKIPS: tl.constexpr):
    """One program: one chunk of one tensor, BLOCK elements at a time in vectors of VEC, the rest TAIL at a time."""
    T: tl.constexpr = scalars.dtype.element_ty
    entry = tl.load(work + tl.program_id(0))
    COLUMNS: tl.constexpr = 4 + SLOTS + AVERAGE + COMPANION + (3 if DRAWS else 0)
    row = table + (entry >> 32) * COLUMNS
    BESIDE: tl.constexpr = tl.int16 if PARAM == tl.bfloat16 else tl.float32  # dtype of a companion
    base = (entry & 0xffffffff) * CHUNK
    numel = tl.load(row) - base
    in_memory = scalars.to(tl.int64) != 0
    scalars += tl.load(row + 1) * SCALARS
    h = ()
    for i in tl.static_range(SCALARS):
        h = h + (tl.load(scalars + i, in_memory, _scalar(words, i, T)),)
    param = tl.load(row + 2)
    grad = tl.load(row + 3)
    off = _off(param, PARAM, VEC)
    unlike = off ^ _off(grad, GRAD, VEC)
    state = ()
    for slot in tl.static_range(SLOTS):
        address = tl.load(row + 4 + slot)
        if (USED >> slot) & 1:
            unlike |= off ^ _off(address, STATE, VEC)
        state = state + (address,)
    average = tl.load(row + 4 + SLOTS) if AVERAGE else param
    if AVERAGE:
        unlike |= off ^ _off(average, T, VEC)
    companion = tl.load(row + 4 + SLOTS + AVERAGE) if COMPANION else param
    if COMPANION:
        unlike |= off ^ _off(companion, BESIDE, VEC)
    draws = ()
    if DRAWS:
        seed, position, count = tl.load(row + COLUMNS - 3), tl.load(row + COLUMNS - 2), tl.load(row + COLUMNS - 1)
        if DRAWS == 2:
            count = number_at(count).to(tl.int64)
        draws = (seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
                 (count >> 32).to(tl.uint32) << 16, count.to(tl.uint32), position.to(tl.uint32))
    options: tl.constexpr = (SCALARS * T.primitive_bitwidth + 63) // 64  # the words behind the scalars'
    factors = ()
    for i in tl.static_range(FACTORS):
        factors = factors + (number_at(words[options + i]).to(T),)
    weight = words[options + FACTORS].to(tl.float64, bitcast=True).to(T) if AVERAGE else 0

    # Operands that are off by as many elements have their vectors at the same places: from `off` elements before the
    # tensor on. There its chunks begin, and the last one, which would lose as many at its end, keeps them. The vector
    # of the elements `before` the tensor is left out; its own ones are stepped with the rest, one by one.
    off = tl.where(unlike == 0, off, 0)
    numel = tl.where(numel > CHUNK, CHUNK, numel + off).to(tl.int32)
    if SKIPS:
        numel = tl.where(number_at(words[options + FACTORS + AVERAGE]) == 0, numel, 0)
    base -= off
    before = tl.where(base < 0, off, 0).to(tl.int32)
    vectors = tl.where(unlike == 0, numel // VEC, 0)
    first = tl.where(before == 0, 0, 1)
    param_ptr = _aligned_pointer(param, base, PARAM, VEC)
    grad_ptr = _aligned_pointer(grad, base, GRAD, VEC)
    state_ptrs = [_aligned_pointer(address, base, STATE, VEC) for address in state]
    average_ptr = _aligned_pointer(average, base, T, VEC)
    companion_ptr = _aligned_pointer(companion, base, BESIDE, VEC)
    # The mask must be constant along a vector, and be seen to be: a mask on the rows of a two-dimensional block is.
    vector = tl.arange(0, BLOCK // VEC)[:, None]
    column = tl.arange(0, VEC)[None, :]
    for start in range(0, vectors, BLOCK // VEC):
        mask = (start + vector >= first) & (start + vector < vectors) & (column >= 0)
        leading = base + (start + vector) * VEC
        _step(param_ptr, grad_ptr, state_ptrs, average_ptr, companion_ptr, vector * VEC + column, mask,
              h, factors, weight, draws, leading + column, leading,
              update, USED, SLOTS, FACTORS, AVERAGE, COMPANION, DRAWS, T, EVICTION)
        param_ptr += BLOCK
        grad_ptr += BLOCK
        state_ptrs = [pointer + BLOCK for pointer in state_ptrs]
        average_ptr += BLOCK
        companion_ptr += BLOCK

    param_ptr = _pointer(param, base, PARAM)
    grad_ptr = _pointer(grad, base, GRAD)
    state_ptrs = [_pointer(address, base, STATE) for address in state]
    average_ptr = _pointer(average, base, T)
    companion_ptr = _pointer(companion, base, BESIDE)
    covered = tl.maximum(vectors - first, 0) * VEC  # by vectors
    for start in range(0, numel - covered, TAIL):
        offsets = start + tl.arange(0, TAIL)
        offsets += tl.where(offsets < first * VEC, 0, covered)
        mask = (offsets < numel) & (offsets >= before)
        _step(param_ptr, grad_ptr, state_ptrs, average_ptr, companion_ptr, offsets, mask,
              h, factors, weight, draws, base + offsets, base + offsets,
              update, USED, SLOTS, FACTORS, AVERAGE, COMPANION, DRAWS, T, EVICTION)


@triton.jit
def _pointers(address):
    """A number's fp32 and fp64 pointers, and which it is: for masks, since branches would make every load wait."""
    single = (address & 1) != 0
    return (address - 1).to(tl.pointer_type(tl.float32)), address.to(tl.pointer_type(tl.float64)), single


@triton.jit
def number_at(address):
    single_ptr, double_ptr, single = _pointers(address)
    return tl.where(single, tl.load(single_ptr, single, 0.0).to(tl.float64), tl.load(double_ptr, single == 0, 0.0))


@triton.jit
def _count(address, steps):
    single_ptr, double_ptr, single = _pointers(address)
    single_step = tl.load(single_ptr, single, 0.0) + steps
    double_step = tl.load(double_ptr, single == 0, 0.0) + steps
    tl.debug_barrier()  # all lanes have read before one writes
    tl.store(single_ptr, single_step, single)
    tl.store(double_ptr, double_step, single == 0)
    return tl.where(single, single_step.to(tl.float64), double_step)


@triton.jit(do_not_specialize=["hypers", "scalars", "found_inf"])
def multi_tensor_prepare(hypers, scalars, found_inf, compute: tl.constexpr, HYPERS: tl.constexpr, SCALARS: tl.constexpr,
                         SKIPS: tl.constexpr):
    """One program: the step count and the scalars of one row."""
    T: tl.constexpr = scalars.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    hypers += program * (1 + HYPERS)
    scalars += program * SCALARS
    addresses = ()
    for i in tl.static_range(HYPERS):
        addresses = addresses + (tl.load(hypers + 1 + i),)
    steps = tl.where(number_at(found_inf) == 0, 1, 0) if SKIPS else 1
    step = _count(tl.load(hypers), steps)
    h = compute([number_at(address) for address in addresses], step, T)
    for i in tl.static_range(SCALARS):
        tl.store(scalars + i, h[i].to(T))


class Launcher:
    """A kernel compiled for the current device and loaded there; `launch` does not compile, check, allocate or wait."""

    def __init__(self, kernel, arguments, constants, warps):
        # `/` and `sqrt` are never fused, but a * b + c would be.
        self.compiled = kernel.warmup(*arguments, *constants, grid=(1,), num_warps=warps, enable_fp_fusion=False)
        self._run = self.compiled.run  # loads it
        self._kernel = (self.compiled.function, self.compiled.packed_metadata, None, None, None)  # no profiler's hooks
        self._constants = constants

    def launch(self, programs, stream, *arguments):
        """Run `programs` > 0 programs on `stream` (its handle) of the device, on arrays at these addresses on it."""
        self._run(programs, 1, 1, stream, *self._kernel, *arguments, *self._constants)


@functools.cache
def update_launcher(algorithm, used, dtype, state_dtype, device, *beside):
    """The Launcher of (work, table, scalars, words) for a module of this package, a mask of its SLOTS and two dtypes.

    The dtypes are torch's; device is the index of the device, which must be the current one; beside: what
    `update_kernel` takes behind the warp size.
    """
    warp_size = driver.active.get_current_target().warp_size
    return Launcher(*update_kernel(algorithm, used, dtype, state_dtype, warp_size, *beside))


@functools.cache
def prepare_launcher(algorithm, dtype, device, skips=False):
    """The Launcher of (hypers, scalars, found_inf), one program per row, for params of a torch dtype; else as above."""
    return Launcher(*prepare_kernel(algorithm, dtype, skips))


def update_kernel(
    algorithm,
    used,
    dtype,
    state_dtype,
    warp_size,
    factors=0,
    average=False,
    grad_dtype=None,
    companion=False,
    draws=0,
    skips=False,
):
    """What there is to compile: the kernel, arguments like those of a launch, its constants, and warps per program.

    A pointer is given by the dtype behind it. The last are FACTORS, AVERAGE, the gradients' dtype where it is not the
    params', COMPANION, DRAWS and SKIPS.
    """
    grad_dtype = dtype if grad_dtype is None else grad_dtype
    module = importlib.import_module(f".{algorithm}", __package__)
    compute = compute_dtype(dtype)
    block = THREADS * THREAD_BYTES // compute.itemsize
    wide = average or (companion and dtype == torch.float16)
    vector = VECTOR_BYTES // max(t.itemsize for t in (dtype, state_dtype, grad_dtype, compute if wide else dtype))
    tail = THREADS  # no fewer, or several threads would do the same element
    constants = (module.update, used, len(module.SLOTS), len(module.SCALARS), _triton(dtype), _triton(state_dtype),
                 CHUNK, block, vector, tail, EVICTION, factors, average, _triton(grad_dtype), companion, draws, skips)
    words = (scalars_words(algorithm, dtype) + factors + average + skips) * (AN_INT64,)
    return multi_tensor_update, (torch.int64, torch.int64, compute, words), constants, THREADS // warp_size


def prepare_kernel(algorithm, dtype, skips=False):
    """The same for `prepare`. One warp: everything in it is a single number."""
    module = importlib.import_module(f".{algorithm}", __package__)
    constants = (module.scalars, len(module.HYPERS), len(module.SCALARS), skips)
    return multi_tensor_prepare, (torch.int64, compute_dtype(dtype), AN_INT64), constants, 1


def table_columns(algorithm, average=False, companion=False, draws=False):
    """How many words a row of the table has."""
    return 4 + len(importlib.import_module(f".{algorithm}", __package__).SLOTS) + average + companion + 3 * draws


def scalars_words(algorithm, dtype):
    """How many words of 8 bytes a row of scalars takes."""
    module = importlib.import_module(f".{algorithm}", __package__)
    return -(-len(module.SCALARS) * compute_dtype(dtype).itemsize // 8)


def compute_dtype(dtype):
    """T, the dtype of the arithmetic and of the scalars, for parameters of a torch dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _triton(dtype):
    return getattr(tl, str(dtype).removeprefix("torch."))

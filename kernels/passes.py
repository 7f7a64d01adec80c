"""The GPU's passes beside the step: the norm of many tensors, and clipping, clamping and averaging them.

    launcher = norm_launcher(SQUARES, torch.float32, device=0)                     # compiles once
    launcher.launch(programs, stream, work, table, partials, 0)                    # integers, all of them

Each pass runs over two arrays in device memory, aligned to 8 bytes. Filling and uploading them is the caller's.

    work     int64[programs]  row << 32 | chunk, as in multi_tensor.py
    table    int64[rows, 3]   numel; the address of what is written; that of what is read (0 if nothing else). Dense, in
                              the same element order, aligned to their dtype, which those of one launch share.

A norm takes two launches. `norm_launcher`'s leaves a number of each chunk, `finish_launcher`'s one program joins them,
and makes the coefficient of clip_grad_norm_, which `pass_launcher("scale", ...)` or a step's update then reads, and a
flag of what is not finite. Nothing is waited for, and the order of all sums depends on the shapes alone. The first also
reads the table of a step, whose gradients it may multiply by a factor as the update does.

A lane sums in a pair of numbers, the second what the first lost. For all dtypes but float64 they are fp32, and squares
lose nothing either: that is as exact as fp64, which on some GPUs has 1/64 of the speed. What overflows fp32, or is so
small that squares lose bits, is summed again from numbers scaled by a power of two. A chunk leaves an fp64 number.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from .arithmetic import div, lerp, maximum, neg, sqrt
from .multi_tensor import (
    AN_INT64,
    CHUNK,
    THREAD_BYTES,
    THREADS,
    VECTOR_BYTES,
    Launcher,
    _aligned_pointer,
    _pointer,
    _triton,
    compute_dtype,
    number_at,
    scaled,
)

# The norms, by the numbers of csrc/step/isa.h: sums of magnitudes, of squares, the largest magnitude. Or it is known.
SUM, SQUARES, LARGEST, GIVEN = (tl.constexpr(number) for number in range(4))
PARTIALS = 1024  # that one turn of the last launch joins
COLUMNS = 3  # of the table


@triton.jit
def _chunk(work, table, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's row of the table, its numel, and the first of its elements."""
    entry = tl.load(work + tl.program_id(0))
    row = table + (entry >> 32) * COLUMNS
    base = (entry & 0xffffffff) * CHUNK
    return row, tl.minimum(tl.load(row) - base, CHUNK).to(tl.int32), base


# ---- norms


@triton.jit
def _two_sum(a, b):
    """a + b, and what its rounding lost. Knuth, The Art of Computer Programming 2, 4.2.2."""
    sum = a + b
    other = sum - a
    return sum, (a - (sum - other)) + (b - other)


@triton.jit
def _include(high, low, value, NORM: tl.constexpr, EXACT: tl.constexpr):
    if NORM == LARGEST:
        return maximum(high, tl.abs(value)), low
    elif NORM == SUM:
        high, lost = _two_sum(high, tl.abs(value))
        return high, low + lost
    else:
        square = value * value
        high, lost = _two_sum(high, square)
        if not EXACT:
            lost += tl.fma(value, value, neg(square))
        return high, low + lost


@triton.jit
def _add(high, low, other_high, other_low):
    high, lost = _two_sum(high, other_high)
    return high, (low + other_low) + lost


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _join(high, low, NORM: tl.constexpr):
    """Of all lanes one pair."""
    high, low = tl.ravel(high), tl.ravel(low)
    if NORM == LARGEST:
        return tl.reduce(high, 0, maximum), tl.full([], 0.0, high.dtype)
    else:
        return tl.reduce((high, low), 0, _add)


@triton.jit
def _value(pointer, mask, factor, scale, FACTORS: tl.constexpr, T: tl.constexpr):
    value = tl.load(pointer, mask, 0.0).to(T)
    if FACTORS:
        value = tl.where(mask, scaled(value, factor, pointer.dtype.element_ty), 0.0)  # the factor may be infinite
    return value * scale


@triton.jit
def _sum_chunk(address, base, numel, factor, scale, FACTORS: tl.constexpr, NORM: tl.constexpr, EXACT: tl.constexpr,
               PARAM: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, TAIL: tl.constexpr):
    """A pair of the chunk. Which lane takes which element does not depend on the address, how it is loaded does."""
    vectors = numel // VEC
    wide = tl.where((address & 15) != 0, 0, vectors)
    vector = tl.arange(0, BLOCK // VEC)[:, None]
    column = tl.arange(0, VEC)[None, :]
    high = tl.zeros([BLOCK // VEC, VEC], T)
    low = tl.zeros([BLOCK // VEC, VEC], T)
    pointer = _aligned_pointer(address, base, PARAM, VEC)
    for start in range(0, wide, BLOCK // VEC):
        mask = (start + vector < wide) & (column >= 0)
        value = _value(pointer + (vector * VEC + column), mask, factor, scale, FACTORS, T)
        high, low = _include(high, low, value, NORM, EXACT)
        pointer += BLOCK
    pointer = _pointer(address, base, PARAM)
    for start in range(wide, vectors, BLOCK // VEC):
        place = start + vector
        mask = (place < vectors) & (column >= 0)
        value = _value(pointer + (place * VEC + column), mask, factor, scale, FACTORS, T)
        high, low = _include(high, low, value, NORM, EXACT)
    high, low = _join(high, low, NORM)

    offsets = vectors * VEC + tl.arange(0, TAIL)  # fewer than VEC are left
    value = _value(pointer + offsets, offsets < numel, factor, scale, FACTORS, T)
    rest_high, rest_low = _include(tl.zeros([TAIL], T), tl.zeros([TAIL], T), value, NORM, EXACT)
    rest_high, rest_low = _join(rest_high, rest_low, NORM)
    if NORM == LARGEST:
        return maximum(high, rest_high), low
    else:
        return _add(high, low, rest_high, rest_low)


@triton.jit
def _whole(high, low):
    """The pair as fp64 number. What an infinite sum lost is not a number."""
    return high.to(tl.float64) + tl.where(high - high == 0, low, 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["work", "table", "partials", "factor"])
def partial_norms(work, table, partials, factor, NORM: tl.constexpr, COLUMNS: tl.constexpr, READ: tl.constexpr,
                  FACTORS: tl.constexpr, PARAM: tl.constexpr, T: tl.constexpr,
                  CHUNK: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, TAIL: tl.constexpr):
    """One program: a number of one chunk, to add to the others; or of which to take the largest.

    The address of what is read is in column READ of the table. With FACTORS, 0 or 1, it is multiplied by the number at
    the address `factor`, which is as those of multi_tensor.py.
    """
    row, numel, base = _chunk(work, table, COLUMNS, CHUNK)
    address = tl.load(row + READ)
    number = number_at(factor).to(T) if FACTORS else 0
    EXACT: tl.constexpr = T == tl.float64 or PARAM != tl.float32  # 16-bit numbers have exact squares in fp32
    high, low = _sum_chunk(address, base, numel, number, 1.0, FACTORS, NORM, EXACT, PARAM, T, BLOCK, VEC, TAIL)
    partial = _whole(high, low)
    if NORM != LARGEST and T == tl.float32:
        # Below 2 ** -77 the bits that squares may have lost matter; scaled by 2 ** 90 they have all. And the largest,
        # scaled by 2 ** -80, leave a finite sum.
        tiny = high < 2.0**-77
        if tiny | (high - high != 0):
            scale = tl.where(tiny, 2.0**90, 2.0**-80)
            unscale = tl.where(tiny, 2.0**-90, 2.0**80).to(tl.float64)
            high, low = _sum_chunk(address, base, numel, number, scale, FACTORS, NORM, EXACT, PARAM,
                                   T, BLOCK, VEC, TAIL)
            partial = _whole(high, low) * unscale
            if NORM == SQUARES:
                partial = partial * unscale
    tl.store(partials + tl.program_id(0), partial)


@triton.jit(do_not_specialize=["partials", "count", "max_norm", "norm", "coefficient"])
def finish_norm(partials, count, max_norm, norm, coefficient, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the norm, unless it is given, rounded once; min(max_norm / (norm + 1e-6), 1) with torch's bits.

    Behind this coefficient 1 if the norm, before it is rounded, is not finite, else 0.
    """
    T: tl.constexpr = norm.dtype.element_ty
    if NORM == GIVEN:
        value = tl.load(norm)
        whole = value.to(tl.float64)
    else:
        lanes = tl.zeros([BLOCK], tl.float64)
        for start in range(0, count, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            partial = tl.load(partials + offsets, offsets < count, 0.0)
            lanes = maximum(lanes, partial) if NORM == LARGEST else lanes + partial
        whole = tl.reduce(lanes, 0, maximum) if NORM == LARGEST else tl.reduce(lanes, 0, _plus)
        value = (sqrt(whole) if NORM == SQUARES else whole).to(T)
        tl.store(norm, value)
    # A reciprocal and a product, which is how torch divides a number by a tensor.
    scale = div(tl.full([], 1.0, T), value + tl.full([], 1e-6, T)) * max_norm.to(tl.float64, bitcast=True).to(T)
    tl.store(coefficient, tl.where(scale > 1, 1.0, scale).to(tl.float64))
    tl.store(coefficient + 1, tl.where(whole - whole == 0, 0.0, 1.0).to(tl.float64))


# ---- passes that write


@triton.jit
def scale(param, grad, factor):
    return param * factor


@triton.jit
def clamp(param, grad, limit):
    """A limit that 16 bits do not hold is rounded when it is stored, to the bits of one that was rounded before."""
    param = tl.where(param < neg(limit), neg(limit), param)
    return tl.where(limit < param, limit, param)


@triton.jit
def average(param, grad, weight):
    return lerp(param, grad, weight)


@triton.jit
def _write(param_ptr, grad_ptr, offsets, mask, number, update: tl.constexpr, PAIR: tl.constexpr, PARAM: tl.constexpr,
           T: tl.constexpr):
    param = tl.load(param_ptr + offsets, mask).to(T)
    grad = tl.load(grad_ptr + offsets, mask).to(T) if PAIR else param
    tl.store(param_ptr + offsets, update(param, grad, number).to(PARAM), mask)


@triton.jit(do_not_specialize=["work", "table", "number"])
def multi_tensor_pass(work, table, number, update: tl.constexpr, PAIR: tl.constexpr, BY_ADDRESS: tl.constexpr,
                      COLUMNS: tl.constexpr, PARAM: tl.constexpr, T: tl.constexpr,
                      CHUNK: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, TAIL: tl.constexpr):
    """One program: an update of one chunk, by an fp64 number or the one at an address, which is a factor."""
    row, numel, base = _chunk(work, table, COLUMNS, CHUNK)
    param, grad = tl.load(row + 1), tl.load(row + 2)
    if BY_ADDRESS:
        value = tl.load(number.to(tl.pointer_type(tl.float64)))
        numel = tl.where(value == 1, 0, numel)  # nothing is read or written then
    else:
        value = number.to(tl.float64, bitcast=True)
    h = value.to(T)
    vectors = numel // VEC
    if ((param | grad if PAIR else param) & 15) != 0:
        vectors = 0
    param_ptr = _aligned_pointer(param, base, PARAM, VEC)
    grad_ptr = _aligned_pointer(grad, base, PARAM, VEC)
    vector = tl.arange(0, BLOCK // VEC)[:, None]
    column = tl.arange(0, VEC)[None, :]
    for start in range(0, vectors, BLOCK // VEC):
        _write(param_ptr, grad_ptr, vector * VEC + column, (start + vector < vectors) & (column >= 0),
               h, update, PAIR, PARAM, T)
        param_ptr += BLOCK
        grad_ptr += BLOCK

    param_ptr = _pointer(param, base, PARAM)
    grad_ptr = _pointer(grad, base, PARAM)
    for start in range(vectors * VEC, numel, TAIL):
        offsets = start + tl.arange(0, TAIL)
        _write(param_ptr, grad_ptr, offsets, offsets < numel, h, update, PAIR, PARAM, T)


PASSES = {"scale": (scale, False, True), "clamp": (clamp, False, False), "average": (average, True, False)}


def norm_kernel(norm, dtype, warp_size, columns=COLUMNS, read=2, factors=0):
    """What there is to compile, as in multi_tensor.py, for tensors of a torch dtype."""
    arguments = torch.int64, torch.int64, torch.float64, AN_INT64
    return partial_norms, arguments, (norm, columns, read, factors, *_sizes(dtype)), THREADS // warp_size


def finish_kernel(norm, dtype, warp_size):
    """The same for the last launch of a norm of this dtype, fp64 or fp32. A thread has four numbers."""
    arguments = torch.float64, AN_INT64, AN_INT64, dtype, torch.float64
    return finish_norm, arguments, (norm, PARTIALS), PARTIALS // 4 // warp_size


def pass_kernel(name, dtype, warp_size):
    """The same for a pass of PASSES."""
    arguments = torch.int64, torch.int64, AN_INT64
    return multi_tensor_pass, arguments, (*PASSES[name], COLUMNS, *_sizes(dtype)), THREADS // warp_size


def _sizes(dtype):
    compute = compute_dtype(dtype)
    block, vector = THREADS * THREAD_BYTES // compute.itemsize, VECTOR_BYTES // dtype.itemsize
    return _triton(dtype), _triton(compute), CHUNK, block, vector, THREADS


@functools.cache
def norm_launcher(norm, dtype, device, factors=0):
    """The Launcher of (work, table, partials: fp64[programs], factor)."""
    return _launcher(norm_kernel, norm, dtype, COLUMNS, 2, factors)


@functools.cache
def step_norm_launcher(norm, dtype, device, columns, factors):
    """The same of a step's gradients, by the work and the table of multi_tensor.py, of so many columns."""
    return _launcher(norm_kernel, norm, dtype, columns, 3, factors)


@functools.cache
def finish_launcher(norm, dtype, device):
    """The Launcher, of one program, of (partials, count, max_norm, norm: T[1], coefficient and flag: fp64[2])."""
    return _launcher(finish_kernel, norm, dtype)


@functools.cache
def pass_launcher(name, dtype, device):
    """The Launcher of (work, table, number): the address of "scale"'s factor, the bits of fp64 numbers for others."""
    return _launcher(pass_kernel, name, dtype)


def _launcher(kernel, kind, dtype, *options):
    return Launcher(*kernel(kind, dtype, driver.active.get_current_target().warp_size, *options))

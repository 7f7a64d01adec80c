"""The test tools themselves: the PTX interpreter against exact arithmetic, its traps, and the stand-in drivers."""

import math
import operator
import os
import shutil
import struct
import subprocess
import sys
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tools import ptx, ptx_ops
from tests.tools.ptx_ops import NUMPY, bits_of

try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from tests.tools import driver, sass
except ImportError:
    triton = None
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed: pip install triton")

THREADS = 128
HEADER = ".version 8.0\n.target sm_90a\n.address_size 64\n"
REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<29>; .reg .b64 %rd<29>;"


def kernel(body, parameters, threads=THREADS, shared=""):
    """A kernel whose body finds its 64-bit parameters in %rd20, %rd21, ... and its index among all threads in %r28."""
    names = [f"kernel_param_{i}" for i in range(parameters)]
    loads = "".join(f"ld.param.b64 %rd{20 + i}, [{name}]; " for i, name in enumerate(names))
    index = f"mov.u32 %r27, %ctaid.x; mov.u32 %r28, %tid.x; mad.lo.s32 %r28, %r27, {threads}, %r28;"
    declared = ", ".join(f".param .u64 {name}" for name in names)
    entry = f".visible .entry kernel({declared}) .reqntid {threads}"
    return ptx.parse(f"{HEADER} {shared} {entry} {{ {REGISTERS} {loads} {index} {body} ret; }}")


def run(body, *arrays, programs=1, threads=THREADS, shared="", **options):
    """Run a body on arrays, which are all that it may touch unless the options say otherwise."""
    options.setdefault("ranges", [(array.ctypes.data, array.nbytes) for array in arrays])
    machine = ptx.Machine(kernel(body, len(arrays), threads, shared), **options)
    return machine.launch((programs,), [struct.pack("<Q", array.ctypes.data) for array in arrays])


def aligned(count, dtype):
    """Zeros at an address that is a multiple of 32."""
    data = np.zeros(count * np.dtype(dtype).itemsize + 32, np.uint8)
    start = -data.ctypes.data % 32
    return data[start : start + count * np.dtype(dtype).itemsize].view(dtype)


# Every opcode, on edge and random operands, against Python's integers and fractions

INTEGERS = ["s16", "u16", "s32", "u32", "s64", "u64"]
FLOATS = {"f16": (11, 15), "bf16": (8, 127), "f32": (24, 127), "f64": (53, 1023)}  # precision, largest exponent
RELATIONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def rounded(exact, kind):
    """The number of a format nearest to a fraction, ties to even."""
    precision, largest = FLOATS[kind]
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    quantum = Fraction(2) ** (max(exponent, 1 - largest) - precision + 1)
    nearest = round(magnitude / quantum) * quantum
    value = math.inf if nearest >= Fraction(2) ** (largest + 1) else float(nearest)
    return value if exact > 0 else -value


def correctly_rounded(function, kind):
    def reference(*values):
        if all(map(math.isfinite, values)):
            try:
                if exact := function(*map(Fraction, values)):
                    return rounded(exact, kind)
            except ZeroDivisionError:
                pass
        # nothing is rounded where zeros, infinities or NaNs decide
        with np.errstate(all="ignore"):
            return float(function(*map(np.float64, values)))

    return reference


def fma(a, b, c):
    return c if math.isinf(c) and math.isfinite(a) and math.isfinite(b) else a * b + c


def square_root(kind):
    def reference(a):
        if not 0 < a < math.inf:
            return a if a == 0 or a > 0 else math.nan
        with localcontext(Context(prec=100)):
            return rounded(Fraction(Decimal(a).sqrt()), kind)

    return reference


def extremum(pick, propagate):
    def reference(a, b):
        if math.isnan(a) or math.isnan(b):
            return math.nan if propagate or math.isnan(a) and math.isnan(b) else b if math.isnan(a) else a
        return pick(a, b, key=lambda x: (x, math.copysign(1, x)))

    return reference


def float_comparison(relation, unordered):
    def reference(a, b):
        return unordered if math.isnan(a) or math.isnan(b) else RELATIONS[relation](a, b)

    return reference


def truncating_quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def picked_bytes(a, b, selector):
    """Of prmt: four of the eight bytes of a and b, or 0 or 255 by the sign of one."""
    data = int(a).to_bytes(4, "little") + int(b).to_bytes(4, "little")
    nibbles = [int(selector) >> 4 * i & 15 for i in range(4)]
    picked = [data[n & 7] if n < 8 else 255 * (data[n & 7] >> 7) for n in nibbles]
    return int.from_bytes(bytes(picked), "little")


def to_integer(kind, source):
    limits = np.iinfo(NUMPY[kind])
    nan = 0 if (bits_of(kind), source) == (32, "f32") else 1 << bits_of(kind) - 1

    def reference(a):
        if math.isnan(a):
            return nan
        return int(limits.max if a > limits.max else limits.min if a < limits.min else int(a))

    return reference


def narrowed(kind):
    def reference(a):
        if math.isnan(a):
            return 0x7FFF
        value = rounded(Fraction(a), kind) if a and math.isfinite(a) else a
        if kind == "bf16":
            return struct.unpack("<I", struct.pack("<f", value))[0] >> 16
        return struct.unpack("<H", struct.pack("<e", value))[0]

    return reference


def half(kind, bits):
    """The value of a 16-bit float."""
    if kind == "bf16":
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def largest_half(kind):
    def reference(*bits):
        if any(math.isnan(half(kind, x)) for x in bits):
            return 0x7FFF
        return max(bits, key=lambda x: (half(kind, x), math.copysign(1, half(kind, x))))

    return reference


def single(bits):
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def single_bits(value):
    return 0x7FFFFFFF if math.isnan(value) else struct.unpack("<I", struct.pack("<f", value))[0]


def cases():
    """(opcode, type of the result, types of the operands, the result as a Python number) of every modelled opcode."""
    for kind in INTEGERS:
        sign, bits = kind[0], bits_of(kind)
        yield f"add.{kind}", kind, [kind] * 2, operator.add
        yield f"sub.{kind}", kind, [kind] * 2, operator.sub
        yield f"mul.lo.{kind}", kind, [kind] * 2, operator.mul
        yield f"mul.hi.{kind}", kind, [kind] * 2, lambda a, b, bits=bits: a * b >> bits
        yield f"mad.lo.{kind}", kind, [kind] * 3, lambda a, b, c: a * b + c
        yield f"min.{kind}", kind, [kind] * 2, min
        yield f"max.{kind}", kind, [kind] * 2, max
        yield f"div.{kind}", kind, [kind] * 2, truncating_quotient
        yield f"rem.{kind}", kind, [kind] * 2, lambda a, b: a - truncating_quotient(a, b) * b
        yield f"shl.{kind}", kind, [kind, "u32"], lambda a, n: a << min(n, 64)
        yield f"shr.{kind}", kind, [kind, "u32"], operator.rshift
        yield f"selp.{kind}", kind, [kind, kind, "pred"], lambda a, b, p: a if p else b
        for relation, compare in RELATIONS.items():
            yield f"setp.{relation}.{kind}", "pred", [kind] * 2, compare
        if bits < 64:
            wide = sign + str(2 * bits)
            yield f"mul.wide.{kind}", wide, [kind] * 2, operator.mul
            yield f"mad.wide.{kind}", wide, [kind, kind, wide], lambda a, b, c: a * b + c
        if sign == "s":
            yield f"neg.{kind}", kind, [kind], operator.neg
            yield f"abs.{kind}", kind, [kind], abs
        for to in ("f32", "f64"):
            reference = correctly_rounded(lambda a: a, to)
            yield f"cvt.rn.{to}.{kind}", to, [kind], lambda a, reference=reference: reference(a) if a else 0.0
            if bits > 16:
                yield f"cvt.rzi.{kind}.{to}", kind, [to], to_integer(kind, to)
    for to, source in product([*INTEGERS, "u8", "s8"], repeat=2):
        yield f"cvt.{to}.{source}", to, [source], lambda a: a
    for kind in ("b16", "b32", "b64"):
        yield f"shl.{kind}", kind, [kind, "u32"], lambda a, n: a << min(n, 64)
        yield f"shr.{kind}", kind, [kind, "u32"], operator.rshift
        yield f"selp.{kind}", kind, [kind, kind, "pred"], lambda a, b, p: a if p else b
        for relation in ("eq", "ne"):
            yield f"setp.{relation}.{kind}", "pred", [kind] * 2, RELATIONS[relation]
    yield "prmt.b32", "b32", ["b32"] * 3, picked_bytes
    for kind in ("u32", "u64"):
        yield f"bfe.{kind}", kind, [kind, "u32", "u32"], lambda a, at, n: a >> (at & 255) & (1 << (n & 255)) - 1
    for kind in ("pred", "b16", "b32", "b64"):
        yield f"and.{kind}", kind, [kind] * 2, operator.and_
        yield f"or.{kind}", kind, [kind] * 2, operator.or_
        yield f"xor.{kind}", kind, [kind] * 2, operator.xor
        yield f"not.{kind}", kind, [kind], lambda a: ~int(a)
    for kind in ("f32", "f64"):
        word, sign_bit = f"b{bits_of(kind)}", 1 << bits_of(kind) - 1
        yield f"add.rn.{kind}", kind, [kind] * 2, correctly_rounded(operator.add, kind)
        yield f"sub.rn.{kind}", kind, [kind] * 2, correctly_rounded(operator.sub, kind)
        yield f"mul.rn.{kind}", kind, [kind] * 2, correctly_rounded(operator.mul, kind)
        yield f"div.rn.{kind}", kind, [kind] * 2, correctly_rounded(operator.truediv, kind)
        yield f"rcp.rn.{kind}", kind, [kind], correctly_rounded(lambda a: 1 / a, kind)
        yield f"fma.rn.{kind}", kind, [kind] * 3, correctly_rounded(fma, kind)
        yield f"sqrt.rn.{kind}", kind, [kind], square_root(kind)
        yield f"min.{kind}", kind, [kind] * 2, extremum(min, False)
        yield f"max.{kind}", kind, [kind] * 2, extremum(max, False)
        yield f"neg.{kind}", word, [word], lambda a, sign_bit=sign_bit: a ^ sign_bit
        yield f"abs.{kind}", word, [word], lambda a, sign_bit=sign_bit: a & ~sign_bit
        yield f"selp.{kind}", word, [word, word, "pred"], lambda a, b, p: a if p else b
        yield f"setp.num.{kind}", "pred", [kind] * 2, lambda a, b: not math.isnan(a) and not math.isnan(b)
        yield f"setp.nan.{kind}", "pred", [kind] * 2, lambda a, b: math.isnan(a) or math.isnan(b)
        for relation in RELATIONS:
            yield f"setp.{relation}.{kind}", "pred", [kind] * 2, float_comparison(relation, False)
            yield f"setp.{relation}u.{kind}", "pred", [kind] * 2, float_comparison(relation, True)
    yield "min.NaN.f32", "f32", ["f32"] * 2, extremum(min, True)
    yield "max.NaN.f32", "f32", ["f32"] * 2, extremum(max, True)
    yield "cvt.f64.f32", "f64", ["f32"], lambda a: a
    yield "cvt.rn.f32.f64", "f32", ["f64"], correctly_rounded(lambda a: a, "f32")
    for kind in ("f16", "bf16"):
        narrow = narrowed(kind)
        add, subtract, multiply_add = (correctly_rounded(f, "f32") for f in (operator.add, operator.sub, fma))
        yield f"cvt.f32.{kind}", "f32", ["b16"], lambda a, kind=kind: half(kind, a)
        yield f"max.NaN.{kind}", "b16", ["b16"] * 2, largest_half(kind)
        yield f"abs.{kind}", "b16", ["b16"], lambda a: a & 0x7FFF
        yield f"abs.{kind}x2", "b32", ["b32"], lambda a: a & 0x7FFF7FFF
        yield f"cvt.rn.{kind}.f32", "b16", ["f32"], narrow
        yield f"cvt.rn.{kind}x2.f32", "b32", ["f32"] * 2, lambda a, b, f=narrow: f(a) << 16 | f(b)
        yield f"add.rn.f32.{kind}", "f32", ["b16", "f32"], lambda a, c, k=kind, f=add: f(half(k, a), c)
        yield f"sub.rn.f32.{kind}", "f32", ["b16", "f32"], lambda a, c, k=kind, f=subtract: f(half(k, a), c)
        yield (
            f"fma.rn.f32.{kind}",
            "f32",
            ["b16", "b16", "f32"],
            lambda a, b, c, k=kind, f=multiply_add: f(half(k, a), half(k, b), c),
        )
    for name, count, function in (
        ("add", 2, operator.add),
        ("sub", 2, operator.sub),
        ("mul", 2, operator.mul),
        ("fma", 3, fma),
    ):
        scalar = correctly_rounded(function, "f32")

        def packed(*pairs, scalar=scalar):
            low = scalar(*(single(pair) for pair in pairs))
            high = scalar(*(single(pair >> 32) for pair in pairs))
            return single_bits(high) << 32 | single_bits(low)

        yield f"{name}.rn.f32x2", "b64", ["b64"] * count, packed


CASES = {opcode: case for opcode, *case in cases()}


def edges(kind):
    """Values of a type at which something changes: limits, halfway cases of the narrower types, zeros, NaNs."""
    if kind == "pred":
        return np.array([False, True])
    bits = bits_of(kind)
    if kind[0] in "sub":
        values = [0, 1, 2, 3, 7, 15, 16, 31, 32, 33, 63, 64, 1 << bits - 1, (1 << bits - 1) - 1, (1 << bits) - 1]
        words = [v % (1 << bits) for v in values]
        if bits == 16:  # float16: largest, infinity, NaN, smallest, largest subnormal, one; the same of bfloat16
            words += [0x7BFF, 0xFC00, 0x7E01, 0x0001, 0x83FF, 0x3C00, 0x7F7F, 0xFF80, 0x7FC1, 0x007F, 0xBF80]
    else:
        precision, largest = FLOATS[kind]
        mantissa, one = precision - 1, (1 << bits - 2) - (1 << precision - 1)
        infinity = (2 * largest + 1) << mantissa
        words = [0, 1, 2, (1 << mantissa) - 1, 1 << mantissa, (1 << mantissa) + 1]  # zero, subnormals, smallest normals
        words += [one - 1, one, one + 1, infinity - 1, infinity, infinity + 1, infinity | 1 << mantissa - 1]
        words += [int(np.array(v, NUMPY[kind]).view(f"u{bits // 8}")) for v in (0.1, 3, 1e-30, 2.0**31, 2.0**63, 65504)]
        # halfway between neighbours of bfloat16 and float16, or of float32, and just beside
        if kind == "f32":
            halfway = [0x3F808000, 0x3F818000, 0x8000, 0x7F7F8000, 0x3F801000, 0x3F803000, 0x33000000, 0x477FF000]
        else:
            halfway = [0x3FF0000010000000, 0x3FF0000030000000, 0x3690000000000000, 0x47EFFFFFF0000000]
        words += [word + step for word in halfway for step in (-1, 0, 1)]
        words += [word | 1 << bits - 1 for word in words]
    return np.array(words, f"u{bits // 8}").view(NUMPY[kind])


def random_values(kind, count, rng):
    """Half of them any bit pattern, half of ordinary size, so that sums neither vanish nor absorb a term."""
    if kind == "pred":
        return rng.random(count) < 0.5
    size = bits_of(kind) // 8
    patterns = np.frombuffer(rng.bytes(size * count), f"u{size}").view(NUMPY[kind])
    ordinary = rng.normal(size=count) if kind[0] == "f" else rng.integers(0, 100, count)
    return np.where(rng.random(count) < 0.5, patterns, ordinary.astype(NUMPY[kind]))


def operands(kinds, rng):
    """Columns of operands: edges with one another and random values; for a fma sums that two roundings get wrong."""
    columns = [edges(kind) for kind in kinds]
    if len(kinds) == 3:
        chosen = [column[rng.integers(0, len(column), 1000)] for column in columns]
    else:
        chosen = [grid.ravel() for grid in np.meshgrid(*columns)]
    columns = [np.concatenate([c, random_values(kind, 500, rng)]) for c, kind in zip(chosen, kinds, strict=True)]
    if len(kinds) == 3 and kinds[0] in ("f32", "f64"):
        a, b, c = columns
        dtype = c.dtype.type
        cancelling = a, b, -(a * b)
        # c plus not quite half of its last bit: (1 + tiny) * (1 - tiny) is less than 1 by tiny squared
        sums = rng.normal(size=1000).astype(dtype)
        tiny = np.ldexp(dtype(1), -rng.integers(13, 23, 1000) * (2 if dtype is np.float64 else 1))
        tied = np.spacing(sums) / 2 * (1 + tiny), 1 - tiny, sums
        columns = [np.concatenate(x) for x in zip(columns, cancelling, tied, strict=True)]
    padding = -len(columns[0]) % THREADS
    return [np.concatenate([column, column[:padding]]) for column in columns]


def evaluate(opcode, result, kinds, columns):
    """Run an opcode on columns of operands, one per thread."""
    register = {1: "%p", 8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}
    body, names = "", []
    for i, kind in enumerate(kinds):
        bits, name = bits_of(kind), register[bits_of(kind)] + str(i + 1)
        size = max(8, bits)
        body += f"mad.wide.u32 %rd10, %r28, {size // 8}, %rd{20 + i}; "
        if kind == "pred":
            body += f"ld.global.b8 %rs8, [%rd10]; setp.ne.b16 {name}, %rs8, 0; "
        else:
            body += f"ld.global.b{size} {name}, [%rd10]; "
        names.append(name)
    size, name = max(8, bits_of(result)), register[bits_of(result)] + "7"
    body += f"{opcode} {name}, {', '.join(names)}; mad.wide.u32 %rd10, %r28, {size // 8}, %rd{20 + len(kinds)}; "
    if result == "pred":
        body += f"selp.b16 %rs8, 1, 0, {name}; "
        name = "%rs8"
    body += f"st.global.b{size} [%rd10], {name}; "
    out = np.zeros(len(columns[0]), NUMPY[result])
    run(body, *map(np.ascontiguousarray, columns), out, programs=len(out) // THREADS)
    return out


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("opcode", CASES)
def test_opcode(opcode):
    result, kinds, reference = CASES[opcode]
    columns = operands(kinds, np.random.default_rng(len(opcode)))
    if opcode.startswith(("div.s", "div.u", "rem.")):
        columns[1] = np.where(columns[1] == 0, columns[1].dtype.type(5), columns[1])
    values = [reference(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    actual = evaluate(opcode, result, kinds, columns)
    if result in ("f32", "f64"):
        expected = np.array(values, np.float64).astype(NUMPY[result])
        nan = np.isnan(expected)
        if result == "f32" and not opcode.startswith("cvt."):  # the one NaN of single-precision arithmetic
            expected = np.where(nan, np.uint32(0x7FFFFFFF).view(np.float32), expected)
        else:
            assert np.isnan(actual[nan]).all()
            expected = np.where(nan, actual, expected)
    else:
        expected = np.array([int(v) % (1 << bits_of(result)) for v in values], f"u{max(1, bits_of(result) // 8)}")
    word = f"u{actual.itemsize}"
    wrong = np.flatnonzero(actual.view(word) != expected.view(word))
    assert not len(wrong), [(values[i], actual[i], [column[i] for column in columns]) for i in wrong[:3]]


def test_every_form_is_tested():
    for pattern, _ in ptx_ops._FORMS:
        assert any(pattern.fullmatch(opcode) for opcode in CASES), pattern.pattern


# Registers, memory and control flow


def test_a_narrow_value_is_extended_by_its_own_sign():
    source, out = np.full(THREADS, -2, np.int8), np.zeros((2, THREADS), np.int32)
    body = """cvt.u64.u32 %rd1, %r28; add.s64 %rd1, %rd1, %rd20; ld.global.s8 %r1, [%rd1]; ld.global.u8 %r2, [%rd1];
        mad.wide.u32 %rd2, %r28, 4, %rd21; st.global.b32 [%rd2], %r1; st.global.b32 [%rd2+512], %r2;"""
    run(body, source, out)
    assert (out[0] == -2).all() and (out[1] == 254).all()


@pytest.mark.parametrize("bits, count", [(16, 1), (16, 2), (16, 4), (32, 1), (32, 2), (32, 4), (64, 1), (64, 2)])
def test_vectors_are_loaded_and_stored_in_order(bits, count):
    source, out = aligned(THREADS * count, f"u{bits // 8}"), aligned(THREADS * count, f"u{bits // 8}")
    source[:] = np.random.default_rng(0).integers(0, 1 << bits, len(source), np.uint64)
    registers = ", ".join({16: "%rs", 32: "%r", 64: "%rd"}[bits] + str(i + 1) for i in range(count))
    vector = f".v{count}" if count > 1 else ""
    size = count * bits // 8
    body = f"""mad.wide.u32 %rd10, %r28, {size}, %rd20; mad.wide.u32 %rd11, %r28, {size}, %rd21;
        ld.global{vector}.b{bits} {{ {registers} }}, [ %rd10 + 0 ];
        st.global{vector}.b{bits} [ %rd11 + 0 ], {{ {registers} }};"""
    machine = run(body, source, out, counts=True)
    assert (out == source).all()
    assert machine.instructions[f"ld.global{vector}.b{bits}"] == THREADS
    assert machine.memory["load bytes"] == machine.memory["store bytes"] == source.nbytes
    assert machine.memory["load requests"] == THREADS // 32
    assert machine.memory["load sectors"] == source.nbytes // 32


def test_sectors_of_a_strided_load():
    source = aligned(32 * 8, np.float32)
    machine = run("mad.wide.u32 %rd1, %r28, 32, %rd20; ld.global.b32 %r1, [%rd1];", source, threads=32, counts=True)
    assert machine.memory == {"load bytes": 128, "load sectors": 32, "load requests": 1}


@pytest.mark.parametrize("hints", ["L1::evict_first", "cs", "L1::evict_last.L2::cache_hint"])
def test_cache_hints_change_nothing(hints):
    data = np.arange(THREADS, dtype=np.float32)
    policy = ", %rd3" if hints.endswith("cache_hint") else ""
    body = f"""createpolicy.fractional.L2::evict_first.b64 %rd3, 1.0; mad.wide.u32 %rd1, %r28, 4, %rd20;
        ld.global.{hints}.b32 {{ %r1 }}, [ %rd1 + 0 ]{policy}; add.s32 %r1, %r1, 1;
        st.global.{hints}.b32 [ %rd1 + 0 ], {{ %r1 }}{policy};"""
    run(body, data)
    assert (data.view(np.int32) == np.arange(THREADS, dtype=np.float32).view(np.int32) + 1).all()


def test_packing_puts_the_first_register_lowest():
    out = np.zeros((THREADS, 2), np.uint64)
    body = """mov.u16 %rs1, 1; mov.b32 %r1, {%rs1, %rs1}; mov.b32 %r2, 0f3F800000; mov.b64 %rd1, {%r1, %r2};
        mov.b64 {%rs1, %rs2, %rs3, %rs4}, %rd1; mov.b64 {_, %r3}, %rd1; mov.b32 {%rs4, _}, %r3;
        mov.b64 %rd2, {%rs4, %rs3, %rs2, %rs1};
        mad.wide.u32 %rd3, %r28, 16, %rd20; st.global.v2.b64 [%rd3], {%rd1, %rd2};"""
    run(body, out)
    assert (out == [0x3F80000000010001, 0x0001000100000000]).all()


def test_branches_and_loops_diverge_and_join():
    """Each thread halves or triples its number until it is 1, and counts."""
    start, out = np.arange(1, 3 * THREADS + 1, dtype=np.int32), np.zeros(3 * THREADS, np.int32)
    body = """mad.wide.u32 %rd1, %r28, 4, %rd20; ld.global.b32 %r1, [%rd1]; mov.b32 %r2, 0;
        $L_loop: setp.eq.s32 %p1, %r1, 1; @%p1 bra $L_end;
        add.s32 %r2, %r2, 1; and.b32 %r3, %r1, 1; setp.ne.b32 %p2, %r3, 0; @%p2 bra $L_odd;
        shr.u32 %r1, %r1, 1; bra.uni $L_loop;
        $L_odd: mad.lo.s32 %r1, %r1, 3, 1; bra.uni $L_loop;
        $L_end: mad.wide.u32 %rd2, %r28, 4, %rd21; bar.sync 0; st.global.b32 [%rd2], %r2;"""
    machine = run(body, start, out, programs=3, counts=True)

    def steps(n):
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    assert (out == [steps(int(n)) for n in start]).all()
    assert machine.instructions["and.b32"] == out.sum()


def test_predicates_choose_the_lanes_that_execute():
    out = np.zeros((THREADS, 2), np.int32)
    body = """setp.lt.u32 %p1, %r28, 40; mov.b32 %r1, 1; @%p1 mov.b32 %r1, 2; @!%p1 mov.b32 %r2, 3;
        mad.wide.u32 %rd1, %r28, 8, %rd20; st.global.v2.b32 [%rd1], {%r1, %r2}; setp.ge.u32 %p2, %r28, 100; @%p2 ret;
        st.global.b32 [%rd1], 7;"""
    machine = run(body, out, counts=True)
    index = np.arange(THREADS)
    assert (out[:, 0] == np.where(index < 100, 7, 1)).all()
    assert (out[:, 1] == np.where(index < 40, -1, 3)).all()  # never written: all ones
    assert machine.instructions == {
        **machine.instructions,
        "mov.b32": THREADS + 40 + 88,
        "ret": THREADS,
        "st.global.b32": 100,
    }


def test_a_copy_of_a_register_is_independent():
    out = np.zeros((THREADS, 2), np.int32)
    body = """add.s32 %r1, %r28, 0; mov.b32 %r2, %r1; setp.lt.u32 %p1, %r28, 40; @%p1 mov.b32 %r1, -1;
        mad.wide.u32 %rd1, %r28, 8, %rd20; st.global.v2.b32 [%rd1], {%r1, %r2};"""
    run(body, out)
    index = np.arange(THREADS)
    assert (out[:, 0] == np.where(index < 40, -1, index)).all() and (out[:, 1] == index).all()


def test_programs_know_their_place_in_the_grid():
    out = np.zeros((5, 3, 2, 6), np.int32)
    place = "".join(
        f"mov.u32 %r{i}, %{name}; "
        for i, name in enumerate(("ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x", "nctaid.y", "nctaid.z"))
    )
    store = "".join(f"st.global.b32 [%rd1+{4 * i}], %r{i}; " for i in range(6))
    body = f"""{place} mad.lo.s32 %r10, %r2, %r4, %r1; mad.lo.s32 %r10, %r10, %r3, %r0;
        mad.wide.s32 %rd1, %r10, 24, %rd20; {store}"""
    machine = ptx.Machine(kernel(body, 1, threads=1), ranges=[(out.ctypes.data, out.nbytes)])
    machine.launch((2, 3, 5), [struct.pack("<Q", out.ctypes.data)])
    z, y, x = np.indices((5, 3, 2))
    assert (out == np.stack([x, y, z, 0 * x + 2, 0 * x + 3, 0 * x + 5], axis=-1)).all()


def test_batches_do_not_matter():
    out = [np.zeros(THREADS * 7, np.int32) for _ in range(2)]
    for lanes, array in zip((1, 1 << 20), out, strict=True):
        run("mad.wide.u32 %rd1, %r28, 4, %rd20; st.global.b32 [%rd1], %r28;", array, programs=7, lanes=lanes)
    assert (out[0] == np.arange(THREADS * 7)).all() and (out[1] == out[0]).all()


SHARED = ".shared .align 16 .b8 scratch[512];"
EXCHANGE = """mov.b32 %r1, scratch; mov.u32 %r5, %tid.x; shl.b32 %r2, %r5, 2; add.s32 %r3, %r1, %r2;
    st.shared.b32 [%r3], %r28; {barrier} xor.b32 %r2, %r2, 4; add.s32 %r3, %r1, %r2; ld.shared.b32 %r4, [%r3];
    mad.wide.u32 %rd1, %r28, 4, %rd20; st.global.b32 [%rd1], %r4;"""


def test_threads_exchange_through_shared_memory():
    out = np.zeros(2 * THREADS, np.int32)
    run(EXCHANGE.format(barrier="bar.sync 0;"), out, programs=2, shared=SHARED, races=True)
    assert (out == np.arange(2 * THREADS) ^ 1).all()


@pytest.mark.parametrize("mask", [1, 2, 16, 21])
def test_threads_exchange_with_others_of_their_warp(mask):
    body = f"""shfl.sync.bfly.b32 %r1, %r28, {mask}, 31, -1; mad.wide.u32 %rd1, %r28, 4, %rd20;
        st.global.b32 [%rd1], %r1;"""
    out = np.zeros(2 * THREADS, np.int32)
    run(body, out, programs=2)
    assert (out == np.arange(2 * THREADS) ^ mask).all()


def test_unpacking_leaves_out_what_is_not_named():
    out = np.zeros(1, np.int32)
    run("mov.b64 %rd1, 0x700000005; mov.b64 {_, %r1}, %rd1; st.global.b32 [%rd20], %r1;", out)
    assert out == 7


# What must not happen

OWN_WORD = "mad.wide.u32 %rd1, %r28, 4, %rd20;"


@pytest.mark.parametrize(
    "trap, body",
    [
        (ptx.Misaligned, "add.s64 %rd1, %rd20, 4; ld.global.v2.b32 {%r1, %r2}, [%rd1];"),
        (ptx.Misaligned, "add.s64 %rd1, %rd20, 2; st.global.b32 [%rd1], 0;"),
        (ptx.Misaligned, "mov.b32 %r1, 2; ld.shared.b32 %r2, [%r1];"),
        (ptx.OutOfBounds, "mad.wide.u32 %rd1, %r28, 4, %rd20; ld.global.b32 %r1, [%rd1+4];"),
        (ptx.OutOfBounds, "mad.wide.u32 %rd1, %r28, 4, %rd20; st.global.b32 [%rd1+-4], 0;"),
        (ptx.OutOfBounds, "mov.b64 %rd1, 0; ld.global.b32 %r1, [%rd1];"),
        (ptx.OutOfBounds, "mov.b32 %r1, 512; ld.shared.b32 %r2, [%r1];"),
        (ptx.Race, "st.global.b32 [%rd20], 0;"),
        (ptx.Race, f"{OWN_WORD} st.global.b32 [%rd1], 0; ld.global.b32 %r1, [%rd20];"),
        (ptx.Race, f"{OWN_WORD} ld.global.b32 %r1, [%rd20]; st.global.b32 [%rd1], 0;"),
        (ptx.Race, f"{OWN_WORD} st.global.b16 [%rd1+2], 0; and.b64 %rd1, %rd1, -8; ld.global.b64 %rd2, [%rd1];"),
        (ptx.Race, EXCHANGE.format(barrier="")),
        (ptx.Divergence, "setp.lt.u32 %p1, %r28, 5; @%p1 bar.sync 0;"),
        (
            ptx.Divergence,
            "setp.lt.u32 %p1, %r28, 5; @%p1 bra $L_if; bar.sync 0; bra $L_end; $L_if: bar.sync 0; $L_end:",
        ),
        (ptx.Divergence, "setp.lt.u32 %p1, %r28, 5; @%p1 ret; bar.sync 0;"),
        (ptx.Divergence, "setp.lt.u32 %p1, %r28, 5; @%p1 shfl.sync.bfly.b32 %r1, %r28, 1, 31, -1;"),
        (ptx.Divergence, "setp.lt.u32 %p1, %r28, 16; @%p1 ret; shfl.sync.bfly.b32 %r1, %r28, 1, 31, -1;"),
        (ptx.Endless, "$L_here: bra $L_here;"),
        (ptx.PTXError, "add.s32 %r1, %r2, 1;"),  # %r2 was never written
        (ptx.PTXError, "mov.b32 %r1, 0; div.s32 %r2, 5, %r1;"),
        (ptx.PTXError, "bra $L_end; ret; $L_end: @%p1 bra $L_end;"),
    ],
)
def test_trap(trap, body):
    words = aligned(THREADS, np.int32)
    with pytest.raises(trap) as error:
        run(body, words, shared=SHARED, races=True)
    assert type(error.value) is trap


def test_a_barrier_orders_only_the_threads_of_one_program():
    body = "setp.eq.s32 %p1, %r28, {writer}; @%p1 st.global.b32 [%rd20], 5; bar.sync 0; ld.global.b32 %r1, [%rd20];"
    run(body.format(writer=0), np.zeros(1, np.int32), races=True)
    with pytest.raises(ptx.Race):
        run(body.format(writer=0), np.zeros(1, np.int32), programs=2, races=True)


def test_a_barrier_of_another_program_orders_nothing():
    """Each program writes a word of its own and reads it, but only the first one has a barrier in between."""
    body = """mov.u32 %r1, %ctaid.x; mad.wide.u32 %rd1, %r1, 4, %rd20; mov.u32 %r2, %tid.x; setp.eq.s32 %p1, %r2, 0;
        @%p1 st.global.b32 [%rd1], 5; setp.eq.s32 %p2, %r1, 0; @%p2 bar.sync 0; ld.global.b32 %r3, [%rd1];"""
    run(body, np.zeros(1, np.int32), programs=1, races=True)
    with pytest.raises(ptx.Race):
        run(body, np.zeros(2, np.int32), programs=2, races=True)


def test_tensors_that_touch_are_not_one():
    data = aligned(8, np.float32)
    with pytest.raises(ptx.OutOfBounds):
        run("ld.global.b32 %r1, [%rd20];", data, ranges=[])
    for split, error in ((16, None), (8, ptx.OutOfBounds)):
        ranges = [(data.ctypes.data, split), (data.ctypes.data + split, 32 - split)]
        try:
            run("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd20];", data, ranges=ranges)
        except ptx.OutOfBounds as trapped:
            assert type(trapped) is error
        else:
            assert error is None


@pytest.mark.parametrize(
    "body",
    [
        "mul.f32 %r1, %r2, %r3;",  # without .rn the assembler may fuse it into an fma
        "add.f64 %rd1, %rd2, %rd3;",
        "fma.rn.ftz.f32 %r1, %r2, %r3, %r4;",
        "fma.rz.f32 %r1, %r2, %r3, %r4;",
        "div.full.f32 %r1, %r2, %r3;",
        "div.approx.f32 %r1, %r2, %r3;",
        "sqrt.approx.ftz.f32 %r1, %r2;",
        "rsqrt.approx.f32 %r1, %r2;",
        "ex2.approx.f32 %r1, %r2;",
        "mul.rn.f16 %rs1, %rs2, %rs3;",
        "max.NaN.f64 %rd1, %rd2, %rd3;",
        "setp.lt.ftz.f32 %p1, %r1, %r2;",
        "setp.lt.and.s32 %p1, %r1, %r2, %p2;",
        "setp.lt.b32 %p1, %r1, %r2;",
        "cvt.rz.bf16.f32 %rs1, %r1;",
        "cvt.f32.f64 %r1, %rd1;",
        "cvt.rni.s32.f32 %r1, %r2;",
        "cvt.sat.u8.u32 %rs1, %r1;",
        "ld.global.nc.b32 %r1, [%rd20];",
        "ld.volatile.global.b32 %r1, [%rd20];",
        "ld.local.b32 %r1, [%rd20];",
        "ld.global.v4.b64 {%rd1, %rd2, %rd3, %rd4}, [%rd20];",
        "ld.global.v3.b32 {%r1, %r2, %r3}, [%rd20];",
        "ld.global.v2.b32 {%r1, %r2, %r3}, [%rd20];",
        "ld.global.b32 %r1, [%rd20], %rd1;",
        "ld.global.b32 %r1, [%r2];",
        "ld.global.b64 %r1, [%rd20];",
        "st.global.b64 [%rd20], %r1;",
        "atom.global.add.u32 %r1, [%rd20], 1;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 15;",  # a part of the warp
        "shfl.sync.bfly.b32 %r1, %r2, 32, 31, -1;",
        "shfl.sync.down.b32 %r1, %r2, 1, 31, -1;",
        "bar.sync 1;",
        "add.s32 %rd1, %rd2, %rd3;",  # registers of another width
        "add.s64 %rd1, %r2, %rd3;",
        "add.s32 %r1, %r2;",
        "add.s32 %r1, %r2, 0d3FF0000000000000;",
        "add.rn.f64 %rd1, %rd2, 0f3F800000;",
        "mov.b64 %rd1, {%r1, %r2, %r3};",
        "ld.param.b64 %rd1, [kernel_param_1];",
        "ld.param.b64 %rd1, [kernel_param_0+4];",
        "ld.param.b32 %r1, [kernel_param_0+8];",
        "mov.u32 %r1, scratch;",
        "mov.u32 %r1, %clock;",
        "add.s32 %r1, %r2, %r29;",  # only %r0 to %r28 are declared
        "add.s32 5, %r1, %r2;",
        "bra $L_nowhere;",
        "call foo;",
        "trap;",
        "{ add.s32 %r1, %r2, %r3; }",
        ".local .b8 depot[8];",
    ],
)
def test_refusal(body):
    with pytest.raises(ptx.PTXError) as error:
        ptx.Machine(kernel(body, 1))
    assert type(error.value) in (ptx.Refused, ptx.PTXError)


def test_a_part_of_a_parameter_is_loaded():
    out = np.zeros((THREADS, 2), np.uint32)
    body = """ld.param.b32 %r1, [kernel_param_0]; ld.param.b32 %r2, [kernel_param_0+4];
        mad.wide.u32 %rd3, %r28, 8, %rd20; st.global.v2.b32 [%rd3], {%r1, %r2};"""
    run(body, out)
    assert (out.view(np.uint64) == out.ctypes.data).all()


def test_a_launch_must_fit_the_kernel():
    machine = ptx.Machine(kernel("", 1))
    for arguments in ([], [bytes(4)], [bytes(8), bytes(8)]):
        with pytest.raises(ptx.PTXError, match="parameters"):
            machine.launch((1,), arguments)
    with pytest.raises(ptx.PTXError, match="threads"):
        machine.launch((1,), [bytes(8)], threads=64)


# The stand-in driver: a real kernel from Triton's source to memory

if triton:

    @triton.jit
    def add_scaled(out_ptr, x_ptr, n, alpha, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n
        out = tl.load(out_ptr + offsets, mask)
        wide = tl.float64 if out.dtype == tl.float64 else tl.float32
        x = tl.load(x_ptr + offsets, mask).to(wide)
        tl.store(out_ptr + offsets, tl.fma(x, alpha.to(wide), out.to(wide)).to(out.dtype), mask)


def samples(dtype, n=1001):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(dtype) for _ in range(2)]


@needs_triton
@pytest.mark.parametrize(
    "arch, dtype",
    [*product((80, 90, 100), (torch.float32, torch.bfloat16)), (90, torch.float16), (90, torch.float64)],
)
def test_a_kernel_launched_on_cpu_tensors_runs(arch, dtype):
    out, x = samples(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    # 0.5 times anything is exact: one rounding to the wide type, one to the stored
    expected = (out.to(wide) + 0.5 * x.to(wide)).to(dtype)
    with driver.installed(arch, ranges=[out, x], races=True, counts=True) as gpu:
        add_scaled[(4,)](out, x, 1001, 0.5, BLOCK=256, num_warps=2, enable_fp_fusion=False)
    assert torch.equal(out, expected)
    (launch,) = gpu.launches
    assert (launch.name, launch.grid, launch.num_warps) == ("add_scaled", (4, 1, 1), 2)
    assert launch.parameters[:2] == [struct.pack("<Q", tensor.data_ptr()) for tensor in (out, x)]
    assert f".target sm_{arch}" in launch.ptx
    assert launch.machine.memory["load bytes"] == 2 * out.nbytes
    assert launch.machine.memory["store bytes"] == out.nbytes


@needs_triton
def test_a_compiled_kernel_runs_on_raw_addresses_and_compiles_nothing_again():
    out, x = samples(torch.float32)
    expected = out + 0.5 * x + 0.25 * x
    with driver.installed(ranges=[out, x]) as gpu:
        compiled = add_scaled[(4,)](out, x, 1001, 0.5, BLOCK=256, enable_fp_fusion=False)
        loaded = len(driver._functions)
        compiled.run(
            4, 1, 1, 0, compiled.function, compiled.packed_metadata, None, None, None,
            out.data_ptr(), x.data_ptr(), 1001, 0.25, 256,
        )  # fmt: skip
        assert len(gpu.launches) == 2 and len(driver._functions) == loaded
    assert torch.equal(out, expected)


@needs_triton
def test_a_trap_reaches_the_caller_of_a_launch():
    out, x = samples(torch.float32)
    with driver.installed(ranges=[out, x[:-1]]), pytest.raises(ptx.OutOfBounds, match="program 3, thread"):
        add_scaled[(4,)](out, x, 1001, 0.5, BLOCK=256, enable_fp_fusion=False)


@needs_triton
def test_launches_can_be_recorded_only_and_the_driver_is_given_back():
    out, x = samples(torch.float32)
    before, active = out.clone(), triton.runtime.driver._active
    with driver.installed(execute=False) as gpu:
        add_scaled[(4,)](out, x, 1001, 0.5, BLOCK=256, enable_fp_fusion=False)
        add_scaled[(0,)](out, x, 1001, 0.5, BLOCK=256, enable_fp_fusion=False)
    assert torch.equal(out, before) and [launch.machine for launch in gpu.launches] == [None]
    assert triton.runtime.driver._active is active


# The stub libcuda under Triton's own launcher. In a process of its own, since nothing after it may look for CUDA.

if triton:

    @triton.jit
    def store_sum(out_ptr, small, large, single, double: "fp64", flag, BLOCK: tl.constexpr):  # noqa: F821
        total = small + large.to(tl.float64) + single + double + flag.to(tl.float64)
        tl.store(out_ptr + tl.arange(0, BLOCK), total.to(tl.float32))


def launches_of_all_argument_types(installed):
    """Name, grid, warps and packed arguments of a launch by a tensor and one by its address."""
    out = torch.zeros(64)
    arguments = (-3, 1 << 40, 0.1, 0.1, True, 64)
    with installed() as gpu:
        compiled = store_sum[(2,)](out, *arguments, num_warps=2, enable_fp_fusion=False)
        handles = compiled.function, compiled.packed_metadata, None, None, None
        compiled.run(1, 2, 3, 0, *handles, out.data_ptr(), *arguments)
    return [
        (launch.name, launch.grid, launch.num_warps, [value.hex() for value in launch.parameters[1:]])
        for launch in gpu.launches
        if launch.parameters[0] == struct.pack("<Q", out.data_ptr())
    ]


def compare_launchers():
    from tests.tools import stub_driver

    packed = launches_of_all_argument_types(lambda: driver.installed(execute=False))
    assert len(packed) == 2 and len(packed[0][3]) == 7  # five numbers and two pointers to scratch memory
    assert launches_of_all_argument_types(lambda: stub_driver.installed(record=True)) == packed
    with stub_driver.installed() as gpu:
        store_sum[(1,)](torch.zeros(64), -3, 1 << 40, 0.1, 0.1, True, 64, num_warps=2, enable_fp_fusion=False)
    assert not gpu.launches


@needs_triton
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler to build the stub with")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real libcuda is loaded")
def test_the_c_launcher_packs_what_the_stand_in_packs():
    code = "from tests import test_ptx_tools; test_ptx_tools.compare_launchers()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# Machine code


@needs_triton
@pytest.mark.parametrize(
    "backend, arch, warp",
    [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64), ("hip", "gfx1100", 32)],
)
def test_report_of_machine_code(backend, arch, warp):
    signature = {"out_ptr": "*fp32", "x_ptr": "*fp32", "n": "i32", "alpha": "fp32", "BLOCK": "constexpr"}
    for aligned_to, width in ((16, 16), (4, 4)):
        attributes = {(i,): [["tt.divisibility", aligned_to]] for i in range(3)}
        source = triton.compiler.ASTSource(add_scaled, signature, {"BLOCK": 1024}, attributes)
        options = {"num_warps": 4, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
        report = sass.report(compiled)
        vectors = 1024 // (4 * warp) * 4 // width
        assert report.loads == {width: 2 * vectors} and report.stores == {width: vectors}
        assert report.spills == 0 and 8 <= report.registers <= 64
        if backend == "cuda":
            elements = 1024 // (4 * warp)
            assert 3 * vectors + elements < report.fast_path < 3 * vectors + elements + 60
            assert report.loop is None


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x0 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;  /* 0x0 */
        /*0030*/               @P1 BRA 0x60 ;                        /* 0x0 */
        /*0040*/                   CALL.REL.NOINC 0x100 ;            /* 0x0 */
        /*0050*/                   STL [R1], R9 ;                    /* 0x0 */
        /*0060*/                   FADD R4, R4, R5 ;                 /* 0x0 */
        /*0070*/                   FADD R5, R4, R5 ;                 /* 0x0 */
        /*0080*/                   FADD R6, R4, R5 ;                 /* 0x0 */
        /*0090*/                   FADD R7, R4, R5 ;                 /* 0x0 */
        /*00a0*/                   FADD R4, R4, R5 ;                 /* 0x0 */
        /*00b0*/                   STG.E.128 desc[UR4][R2.64], R4 ;  /* 0x0 */
        /*00c0*/                   IADD3 R2, R2, 0x10, RZ ;          /* 0x0 */
        /*00d0*/               @P2 BRA 0x10 ;                        /* 0x0 */
        /*00e0*/                   NOP ;                             /* 0x0 */
        /*00f0*/                   EXIT ;                            /* 0x0 */
        /*0100*/                   RET.REL.NODEC R9 0x0 ;            /* 0x0 */
        /*0110*/                   BRA 0xb0 ;                        /* 0x0 */
"""


@needs_triton
def test_the_fast_path_leaves_out_subroutines():
    report = sass._read_sass(SASS, registers=40)
    assert (report.loads, report.stores, report.spills) == ({16: 1, 2: 1}, {16: 1}, 1)
    assert report.fast_path == 14  # all but 0x40, 0x50, 0x100 and 0x110
    assert report.loop == 11  # 0x10 to 0x30, 0x60 to 0xd0

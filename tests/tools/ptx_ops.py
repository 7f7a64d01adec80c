"""What each modelled PTX opcode computes, as exact functions of numpy values.

Only forms whose bits PTX specifies are here: integer arithmetic, and floating point that rounds correctly (.rn).
`mul.f32` (which ptxas may fuse), .ftz, .approx and .full are absent on purpose, so a kernel that has one is refused.
Memory, control flow and vector moves need more than values; they are in ptx.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

Value = Any  # a numpy array with one element per lane, or a numpy scalar where all lanes agree

NUMPY: dict[str, Any] = {
    "pred": np.bool_,
    "f16": np.float16,
    "bf16": np.uint16,  # numpy has no bfloat16: its bits
    "f32": np.float32,
    "f64": np.float64,
    **{f"u{bits}": np.dtype(f"u{bits // 8}").type for bits in (8, 16, 32, 64)},
    **{f"b{bits}": np.dtype(f"u{bits // 8}").type for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}").type for bits in (8, 16, 32, 64)},
}


def bits_of(kind: str) -> int:
    """Width of a PTX type, which is also the width of its registers: 1 for predicates."""
    return 1 if kind == "pred" else 8 * np.dtype(NUMPY[kind]).itemsize


@dataclass(frozen=True)
class Operation:
    """`result = compute(*operands)`, with the PTX types in which operands are read and the result is written."""

    result: str
    operands: tuple[str, ...]
    compute: Callable[..., Value]


_FORMS: list[tuple[re.Pattern[str], Callable[..., Operation]]] = []


def form(pattern: str) -> Callable[[Callable[..., Operation]], Callable[..., Operation]]:
    """Register the builder of all opcodes that match; it is called with the pattern's groups."""

    def register(build: Callable[..., Operation]) -> Callable[..., Operation]:
        _FORMS.append((re.compile(pattern), build))
        return build

    return register


def find(opcode: str) -> Operation | None:
    """The operation of an opcode with all its modifiers, or None if it is not modelled."""
    for pattern, build in _FORMS:
        if match := pattern.fullmatch(opcode):
            return build(*match.groups())
    return None


# Integers


@form(r"(add|sub|mul\.lo|min|max|div|rem)\.([su](?:16|32|64))")
def _integer(op: str, kind: str) -> Operation:
    functions: dict[str, Any] = {
        "add": np.add,
        "sub": np.subtract,
        "mul.lo": np.multiply,
        "min": np.minimum,
        "max": np.maximum,
        "div": quotient,
        "rem": lambda a, b: a - quotient(a, b) * b,
    }
    return Operation(kind, (kind, kind), functions[op])


@form(r"(neg|abs)\.(s(?:16|32|64))")
def _integer_sign(op: str, kind: str) -> Operation:
    return Operation(kind, (kind,), np.negative if op == "neg" else np.abs)


@form(r"mad\.lo\.([su](?:16|32|64))")
def _multiply_add(kind: str) -> Operation:
    return Operation(kind, (kind, kind, kind), lambda a, b, c: a * b + c)


@form(r"(mul|mad)\.wide\.([su])(16|32)")
def _wide(op: str, sign: str, bits: str) -> Operation:
    narrow, wide = sign + bits, sign + str(2 * int(bits))

    def product(a: Value, b: Value) -> Value:
        return a.astype(NUMPY[wide]) * b.astype(NUMPY[wide])

    if op == "mul":
        return Operation(wide, (narrow, narrow), product)
    return Operation(wide, (narrow, narrow, wide), lambda a, b, c: product(a, b) + c)


@form(r"mul\.hi\.([su](?:16|32|64))")
def _high_half(kind: str) -> Operation:
    def high(a: Value, b: Value) -> Value:
        product = np.asarray(a).astype(object) * np.asarray(b).astype(object)
        return np.asarray(product >> bits_of(kind)).astype(NUMPY[kind])

    return Operation(kind, (kind, kind), high)


@form(r"(and|or|xor|not)\.(pred|b16|b32|b64)")
def _bitwise(op: str, kind: str) -> Operation:
    functions: dict[str, Any] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    return Operation(kind, (kind,) * (1 if op == "not" else 2), functions[op])


@form(r"(shl|shr)\.([bsu](?:16|32|64))")
def _shift(op: str, kind: str) -> Operation:
    """The amount is an unsigned 32-bit number, clamped to the width: shifting further empties the register."""
    bits = bits_of(kind)

    def shift(value: Value, amount: Value) -> Value:
        step = np.minimum(amount, bits - 1).astype(value.dtype)
        shifted = value << step if op == "shl" else value >> step
        return shifted if kind[0] == "s" and op == "shr" else np.where(amount < bits, shifted, value.dtype.type(0))

    return Operation(kind, (kind, "u32"), shift)


@form(r"bfe\.(u32|u64)")
def _bit_field(kind: str) -> Operation:
    """So many bits from a position on, both given by the lowest byte of a number; beyond the register they are 0."""
    shift_right, shift_left = _shift("shr", kind).compute, _shift("shl", kind).compute

    def extract(value: Value, position: Value, length: Value) -> Value:
        field = shift_right(value, position & np.uint32(255))
        return field & ~shift_left(np.full_like(field, -1 % (1 << bits_of(kind))), length & np.uint32(255))

    return Operation(kind, (kind, "u32", "u32"), extract)


def quotient(a: Value, b: Value) -> Value:
    """Division that truncates towards zero, as C's."""
    if np.any(b == 0):
        raise ZeroDivisionError("integer division by zero")
    floor = a // b
    return floor + ((floor * b != a) & ((a < 0) != (b < 0)))


# Comparison and selection

_COMPARE: dict[str, Callable[[Value, Value], Value]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@form(r"setp\.(?:(eq|ne)\.(b16|b32|b64)|(eq|ne|lt|le|gt|ge)\.([su](?:16|32|64)))")
def _compare_integers(*groups: str | None) -> Operation:
    relation, kind = filter(None, groups)
    return Operation("pred", (kind, kind), _COMPARE[relation])


@form(r"setp\.(eq|ne|lt|le|gt|ge)(u?)\.(f32|f64)")
def _compare_floats(relation: str, unordered: str, kind: str) -> Operation:
    """A NaN makes the plain relations false (ne too, unlike C's) and those with a u true."""

    def compare(a: Value, b: Value) -> Value:
        nan = np.isnan(a) | np.isnan(b)
        return _COMPARE[relation](a, b) | nan if unordered else _COMPARE[relation](a, b) & ~nan

    return Operation("pred", (kind, kind), compare)


@form(r"setp\.(num|nan)\.(f32|f64)")
def _compare_nan(relation: str, kind: str) -> Operation:
    if relation == "nan":
        return Operation("pred", (kind, kind), lambda a, b: np.isnan(a) | np.isnan(b))
    return Operation("pred", (kind, kind), lambda a, b: ~np.isnan(a) & ~np.isnan(b))


@form(r"selp\.([bsu](?:16|32|64)|f32|f64)")
def _select(kind: str) -> Operation:
    return Operation(kind, (kind, kind, "pred"), lambda a, b, predicate: np.where(predicate, a, b))


@form(r"prmt\.b32")
def _permute(*_: str) -> Operation:
    """Four bytes picked from the eight of b and a, a's being the lower ones; with its bit 3, only the sign of one."""

    def compute(a: Value, b: Value, selector: Value) -> Value:
        both = np.uint64(b) << np.uint64(32) | np.uint64(a)
        picked = np.uint32(0)
        for i in range(4):
            nibble = selector >> np.uint32(4 * i)
            byte = np.uint32(both >> (np.uint64(8) * (np.uint64(nibble) & np.uint64(7))) & np.uint64(0xFF))
            sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
            picked = picked | np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return picked

    return Operation("b32", ("b32", "b32", "b32"), compute)


# Floating point: one rounding to nearest even per operation


@form(r"(add|sub|mul|div|fma|sqrt|rcp)\.rn\.(f32|f64)")
def _arithmetic(op: str, kind: str) -> Operation:
    functions: dict[str, Any] = {
        "add": (2, np.add),
        "sub": (2, np.subtract),
        "mul": (2, np.multiply),
        "div": (2, np.divide),
        "fma": (3, fma32 if kind == "f32" else fma64),
        "sqrt": (1, np.sqrt),
        "rcp": (1, lambda a: np.divide(NUMPY[kind](1), a)),
    }
    count, function = functions[op]
    return Operation(kind, (kind,) * count, canonical(function) if kind == "f32" else function)


@form(r"(add|sub|mul|fma)\.rn\.f32x2")
def _packed(op: str) -> Operation:
    """Two float32 in a 64-bit register (sm_100 and later)."""
    single = _arithmetic(op, "f32")

    def packed(*pairs: Value) -> Value:
        low, high = (
            single.compute(*((pair >> np.uint64(shift)).astype(np.uint32).view(np.float32) for pair in pairs))
            for shift in (0, 32)
        )
        return low.view(np.uint32).astype(np.uint64) | high.view(np.uint32).astype(np.uint64) << np.uint64(32)

    return Operation("b64", ("b64",) * len(single.operands), packed)


@form(r"(add|sub|fma)\.rn\.f32\.(f16|bf16)")
def _mixed(op: str, half: str) -> Operation:
    """All operands but the last are 16-bit floats, widened exactly (sm_100 and later)."""
    single = _arithmetic(op, "f32")

    def mixed(*values: Value) -> Value:
        return single.compute(*(widen(value, half) for value in values[:-1]), values[-1])

    return Operation("f32", (half,) * (len(single.operands) - 1) + ("f32",), mixed)


@form(r"(min|max)(?:(\.NaN)\.(f32)|\.(f32|f64))")
def _extremum(op: str, propagate: str | None, *kinds: str | None) -> Operation:
    """-0 is below +0; a NaN loses against a number unless .NaN makes it win."""
    (kind,) = filter(None, kinds)
    function = {
        ("min", False): np.fmin,
        ("max", False): np.fmax,
        ("min", True): np.minimum,
        ("max", True): np.maximum,
    }[op, bool(propagate)]

    def extremum(a: Value, b: Value) -> Value:
        signs = np.signbit(a) | np.signbit(b) if op == "min" else np.signbit(a) & np.signbit(b)
        zero = np.where(signs, NUMPY[kind](-0.0), NUMPY[kind](0))
        return np.where((a == 0) & (b == 0), zero, function(a, b))

    return Operation(kind, (kind, kind), canonical(extremum) if kind == "f32" else extremum)


@form(r"(neg|abs)\.(f32|f64)")
def _float_sign(op: str, kind: str) -> Operation:
    return Operation(kind, (kind,), np.negative if op == "neg" else np.abs)


@form(r"max\.NaN\.(f16|bf16)")
def _short_maximum(half: str) -> Operation:
    """One of the two; or the one NaN of 16-bit arithmetic."""
    maximum = _extremum("max", ".NaN", "f32", None).compute

    def largest(a: Value, b: Value) -> Value:
        wide_a, wide_b = widen(a, half), widen(b, half)
        is_a = maximum(wide_a, wide_b).view(np.uint32) == wide_a.view(np.uint32)
        return np.where(np.isnan(wide_a) | np.isnan(wide_b), np.uint16(0x7FFF), np.where(is_a, *bits(a, b)))

    def bits(*values: Value) -> list[Value]:
        return [np.asarray(value).view(np.uint16) for value in values]

    return Operation("b16", (half, half), largest)


@form(r"abs\.b?f16(x2)?")
def _short_magnitude(pair: str | None) -> Operation:
    kind = "b32" if pair else "b16"
    return Operation(kind, (kind,), lambda a: a & NUMPY[kind](0x7FFF7FFF if pair else 0x7FFF))


# Conversions


@form(r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))")
def _convert_integer(to: str, source: str) -> Operation:
    """Truncates, or extends by the source's sign."""
    return Operation(to, (source,), lambda a: a.astype(NUMPY[to]))


@form(r"cvt\.rn\.(f32|f64)\.([su](?:16|32|64))")
def _integer_to_float(to: str, source: str) -> Operation:
    return Operation(to, (source,), lambda a: a.astype(NUMPY[to]))


@form(r"cvt\.rzi\.([su](?:32|64))\.(f32|f64)")
def _float_to_integer(to: str, source: str) -> Operation:
    """Saturates. A NaN becomes 0, or the sign bit alone as soon as either type has 64 bits."""
    limits = np.iinfo(NUMPY[to])
    nan = 0 if (bits_of(to), source) == (32, "f32") else 1 << bits_of(to) - 1

    def convert(a: Value) -> Value:
        high, low = a >= float(limits.max), a <= float(limits.min)
        safe = np.where(high | low | np.isnan(a), 0, a).astype(NUMPY[to])
        number = np.where(high, limits.max, np.where(low, limits.min, safe)).astype(NUMPY[to])
        return np.where(np.isnan(a), np.array(nan, f"u{bits_of(to) // 8}").view(NUMPY[to]), number)

    return Operation(to, (source,), convert)


@form(r"cvt\.(?:(f64)\.(f32)|rn\.(f32)\.(f64))")
def _between_floats(*groups: str | None) -> Operation:
    to, source = filter(None, groups)
    return Operation(to, (source,), lambda a: a.astype(NUMPY[to]))


@form(r"cvt\.f32\.(f16|bf16)")
def _widen(source: str) -> Operation:
    return Operation("f32", (source,), lambda a: widen(a, source))


@form(r"cvt\.rn\.(f16|bf16)\.f32")
def _narrow(to: str) -> Operation:
    return Operation("b16", ("f32",), lambda a: narrow(a, to))


@form(r"cvt\.rn\.(f16|bf16)x2\.f32")
def _narrow_pair(to: str) -> Operation:
    """The first operand goes to the upper half."""
    return Operation(
        "b32",
        ("f32", "f32"),
        lambda high, low: narrow(high, to).astype(np.uint32) << np.uint32(16) | narrow(low, to).astype(np.uint32),
    )


def widen(value: Value, kind: str) -> Value:
    """float16 or bfloat16 to float32, exactly."""
    if kind == "f16":
        return value.astype(np.float32)
    return (value.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(value: Value, kind: str) -> Value:
    """float32 to the bits of the nearest float16 or bfloat16, ties to even; every NaN becomes 0x7fff."""
    if kind == "f16":
        bits = value.astype(np.float16).view(np.uint16)
    else:
        word = value.view(np.uint32)
        tie_to_even = np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1))
        bits = (word + tie_to_even >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), bits)


# Exact arithmetic that numpy does not have


def canonical(function: Callable[..., Value]) -> Callable[..., Value]:
    """Single-precision instructions return one NaN, 0x7fffffff, whatever NaN went in."""
    canonical_nan = np.uint32(0x7FFFFFFF).view(np.float32)

    def compute(*values: Value) -> Value:
        result = function(*values)
        nan = np.isnan(result)
        return np.where(nan, canonical_nan, result) if nan.any() else result

    return compute


def two_sum(a: Value, b: Value) -> tuple[Value, Value]:
    """The rounded sum and its rounding error: their sum is a + b exactly (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def two_product(a: Value, b: Value) -> tuple[Value, Value]:
    """The rounded product of float64s and its rounding error, exactly unless something over- or underflows (Dekker)."""

    def split(x: Value) -> tuple[Value, Value]:
        upper = x * 134217729.0  # 2**27 + 1: two halves of 26 bits
        high = upper - (upper - x)
        return high, x - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def add_to_odd(a: Value, b: Value) -> Value:
    """a + b in float64 rounded to odd: if inexact, the neighbour whose last bit is 1.

    Rounding the result again, to a format at least two bits narrower, gives the correctly rounded a + b.
    """
    total, error = two_sum(np.atleast_1d(a), np.atleast_1d(b))
    bits = total.view(np.int64)
    move = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    towards_error = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(move, bits + towards_error, bits).view(np.float64)


def fma32(a: Value, b: Value, c: Value) -> Value:
    """a * b + c with one rounding: the product of float32s is exact in float64."""
    product = a.astype(np.float64) * b.astype(np.float64)
    result = add_to_odd(product, c.astype(np.float64)).astype(np.float32)
    return result if np.ndim(product) or np.ndim(c) else result[0]


def fma64(a: Value, b: Value, c: Value) -> Value:
    """a * b + c with one rounding (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008)."""
    shape = np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c))
    a, b, c = (np.broadcast_to(np.atleast_1d(x), shape or (1,)) for x in (a, b, c))
    product = a * b
    # with a zero, an infinity or a NaN, two roundings do; only a * b may overflow where c is already infinite
    result = np.where(np.isfinite(a) & np.isfinite(b) & ~np.isfinite(c), c, product + c)
    ordinary = np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & (a != 0) & (b != 0)
    # far enough from overflow and underflow for the error-free transformations
    low, high = 2.0**-900, 2.0**900
    moderate = ordinary & (abs(c) < high)
    for x in (a, b, product):
        moderate &= (abs(x) > low) & (abs(x) < high)
    product_high, product_low = two_product(a[moderate], b[moderate])
    sum_high, sum_low = two_sum(c[moderate], product_low)
    total_high, total_low = two_sum(product_high, sum_high)
    result[moderate] = total_high + add_to_odd(sum_low, total_low)
    for i in zip(*np.nonzero(ordinary & ~moderate), strict=True):
        result[i] = _exact_fma(float(a[i]), float(b[i]), float(c[i]))
    return result if shape else result[0]


def _exact_fma(a: float, b: float, c: float) -> float:
    """For finite numbers; slow."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")

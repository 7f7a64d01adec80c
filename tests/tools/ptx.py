"""A strict PTX interpreter: runs a kernel as Triton emits it on this process's own memory, so that no GPU is needed.

    machine = ptx.Machine(ptx.parse(text), ranges=[param, grad], races=True, counts=True)
    machine.launch(grid=(8,), parameters=[struct.pack("<Q", param.data_ptr()), ...])
    machine.instructions["fma.rn.f32"], machine.memory["load bytes"]

All threads of many programs (CTAs) advance together: a register is a numpy array with one element per thread
("lane"), or a numpy scalar while every lane holds the same. Arithmetic is exact (ptx_ops.py); what is not modelled is
refused when the machine is made. It raises where a GPU would fault or give an arbitrary answer: misaligned access,
access outside the given ranges, a race between two threads, a barrier that not all threads of a program reach, a
register never written.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.tools import ptx_ops
from tests.tools.ptx_ops import NUMPY, Operation, Value, bits_of
from tests.tools.ptx_parse import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    PTXError,
    Register,
    Symbol,
    Vector,
    parse,
)

__all__ = ["Divergence", "Endless", "Kernel", "Machine", "Misaligned", "OutOfBounds", "PTXError", "Race"]
__all__ += ["Refused", "parse"]


class Refused(PTXError):
    """The kernel has an instruction that the interpreter does not model."""


class Misaligned(PTXError):
    """An access is not aligned to its size."""


class OutOfBounds(PTXError):
    """An access is not wholly inside one of the given ranges."""


class Race(PTXError):
    """Two threads touch a byte, one of them writes, and no barrier orders them.

    But for lanes of a warp that store the same by one instruction.
    """


class Divergence(PTXError):
    """A barrier is not reached by all threads of a program."""


class Endless(PTXError):
    """The kernel does not come to an end."""


Lanes = Any  # which lanes execute: ALL, NONE, or an array of their indices
ALL: Lanes = slice(None)
NONE: Lanes = None
Execute = Callable[["Machine", Lanes], None]

LOWEST_ADDRESS, HIGHEST_ADDRESS = 1 << 12, 1 << 48


class _Access(NamedTuple):
    """For the race check: which lanes touched how many bytes where, in which barrier epoch."""

    address: np.ndarray
    bytes: int
    thread: np.ndarray
    epoch: np.ndarray
    store: bool


class Machine:
    """Runs one kernel.

    kernel: the parsed kernel; ptx.Refused is raised if it has an instruction that is not modelled
    ranges: what may be touched, as tensors or (address, bytes) pairs; None allows everything, as a wild pointer would
    races: look for races at the end of each launch
    counts: count executed instructions per opcode (`instructions`), and in `memory` the bytes, 32-byte sectors and warp
        requests of loads and stores, one unit per thread that executes
    steps: instructions that a batch of programs may issue before Endless is raised
    lanes: threads that advance together; bounds memory use, and small enough to stay in the cache
    """

    def __init__(
        self,
        kernel: Kernel,
        ranges: Iterable[Any] | None = None,
        races: bool = False,
        counts: bool = False,
        steps: int = 200_000,
        lanes: int = 1 << 15,
    ) -> None:
        self.kernel = kernel
        self.ranges = None if ranges is None else _merge_ranges(ranges)
        self.races, self.counts, self.steps, self.lanes = races, counts, steps, lanes
        self.instructions: Counter[str] = Counter()
        self.memory: Counter[str] = Counter()
        self._steps = [(instruction, _bind(instruction, kernel)) for instruction in kernel.instructions]
        self._views: dict[tuple[str, int], np.ndarray] = {}

    def launch(
        self, grid: Sequence[int], parameters: Sequence[bytes], threads: int | None = None, shared: int = 0
    ) -> "Machine":
        """Run all programs of the grid.

        parameters: the packed bytes of each kernel parameter, little endian
        threads: per program, where the PTX does not say (.reqntid)
        shared: bytes of dynamic shared memory per program
        """
        kernel = self.kernel
        if threads is not None and kernel.threads not in (None, threads):
            raise PTXError(f"launched with {threads} threads, compiled for {kernel.threads}")
        self._threads = kernel.threads or threads or 1
        sizes = list(kernel.parameters.values())
        if sizes != [len(value) for value in parameters]:
            raise PTXError(f"parameters have {[len(value) for value in parameters]} bytes, the kernel expects {sizes}")
        self._parameters = dict(zip(kernel.parameters, parameters, strict=True))
        self._grid = (*grid, 1, 1)[:3]
        programs = int(np.prod(self._grid))
        self._shared_bytes = max(shared, kernel.shared_bytes)
        self._shared = np.zeros((programs, -(-self._shared_bytes // 16) * 16), np.uint8)
        self._log: list[_Access] = []
        batch = max(1, self.lanes // self._threads)
        with np.errstate(all="ignore"):
            for first in range(0, programs, batch):
                self._run(np.arange(first, min(programs, first + batch)))
        if self.races:
            _check_races(self._log, self._threads)
        return self

    # Control flow

    def _run(self, programs: np.ndarray) -> None:
        """Run a batch of programs to their end.

        Lanes that have diverged wait at the instruction they come to next. The earliest always goes first, so that
        lanes meet again where the branches of an `if` or a loop join.
        """
        thread = np.tile(np.arange(self._threads, dtype=np.uint32), len(programs))
        self._program = np.repeat(programs, self._threads)
        self._thread = self._program * self._threads + thread
        self._epoch = np.zeros(len(thread), np.int32)  # barriers passed
        self._registers = self._special_registers(thread)
        waiting: dict[int, Lanes] = {0: ALL}
        for _ in range(self.steps):
            if not waiting:
                return
            here = min(waiting)
            for successor, lanes in self._step(here, waiting.pop(here)):
                waiting[successor] = self._join(waiting[successor], lanes) if successor in waiting else lanes
        raise Endless(f"still running after {self.steps} instructions")

    def _special_registers(self, thread: np.ndarray) -> dict[str, Value]:
        x, y, z = map(np.uint32, self._grid)
        program = self._program.astype(np.uint32)
        one, zero = np.uint32(1), np.uint32(0)
        axes = {
            "tid": (thread, zero, zero),
            "ntid": (np.uint32(self._threads), one, one),
            "ctaid": (program % x, program // x % y, program // (x * y)),
            "nctaid": (x, y, z),
        }
        return {f"%{name}.{axis}": value[i] for name, value in axes.items() for i, axis in enumerate("xyz")}

    def _step(self, here: int, lanes: Lanes) -> list[tuple[int, Lanes]]:
        """Execute one instruction; where its lanes go next."""
        if here == len(self._steps):
            raise PTXError("ran past the last instruction")
        instruction, execute = self._steps[here]
        try:
            taken, others = self._split(instruction, lanes)
            if taken is NONE:
                return [(here + 1, lanes)]
            if self.counts:
                self.instructions[instruction.opcode] += self._size(taken)
            if execute is not None:
                execute(self, taken)
                return [(here + 1, lanes)]
        except PTXError as error:
            raise type(error)(f"{instruction.text}: {error}") from None
        stay = [] if others is NONE else [(here + 1, others)]
        if instruction.opcode == "ret":
            return stay
        return [(self.kernel.labels[_label(instruction)], taken), *stay]

    def _split(self, instruction: Instruction, lanes: Lanes) -> tuple[Lanes, Lanes]:
        """The lanes that execute an instruction and the others, by its predicate."""
        if instruction.predicate is None:
            return lanes, NONE
        chosen = self._read(instruction.predicate.name, "pred", lanes) ^ instruction.negated
        if chosen.all():
            return lanes, NONE
        if not chosen.any():
            return NONE, lanes
        indices = self._indices(lanes)
        return indices[chosen], indices[~chosen]

    def _indices(self, lanes: Lanes) -> np.ndarray:
        return np.arange(len(self._thread)) if lanes is ALL else lanes

    def _size(self, lanes: Lanes) -> int:
        return len(self._thread) if lanes is ALL else len(lanes)

    def _join(self, some: Lanes, others: Lanes) -> Lanes:
        joined = np.union1d(self._indices(some), self._indices(others))
        return ALL if len(joined) == len(self._thread) else joined

    def _barrier(self, lanes: Lanes) -> None:
        arrived = np.zeros(len(self._thread), bool)
        arrived[lanes] = True
        if (np.isin(self._program, self._program[lanes]) & ~arrived).any():
            raise Divergence("not all threads of the program are here")
        self._epoch = self._epoch + arrived  # a new array: the log keeps the old one

    def _shuffle(self, value: Value, mask: int, lanes: Lanes) -> Value:
        """What the lane has whose number in the warp differs by the bits of a mask."""
        thread = self._thread[lanes]
        if len(thread) % 32 or (thread.reshape(-1, 32)[:, -1] - thread[::32] != 31).any() or (thread[::32] % 32).any():
            raise Divergence("not all threads of the warp are here")
        return np.broadcast_to(value, len(thread))[np.arange(len(thread)) ^ mask]

    # Registers: unsigned bit patterns (bool for predicates), never changed in place

    def _read(self, name: str, kind: str, lanes: Lanes) -> Value:
        value = self._registers.get(name)
        if value is None:
            raise PTXError(f"{name} is read before it is written")
        if value.ndim and lanes is not ALL:
            value = value[lanes]
        if kind == "pred":
            return value
        if 8 * value.itemsize != bits_of(kind):
            value = value.astype(f"u{bits_of(kind) // 8}")
        return value.view(NUMPY[kind])

    def _write(self, register: Register, value: Value, lanes: Lanes) -> None:
        """Write a value to a register of its width or wider, extending it by its own sign."""
        value = np.asarray(value)
        if register.bits > 1:
            if 8 * value.itemsize < register.bits:
                value = value.astype(f"{value.dtype.kind}{register.bits // 8}")
            value = value.view(f"u{register.bits // 8}")
        if lanes is not ALL:
            old = self._registers.get(register.name)
            # lanes that never write a register hold ones, NaN in any float format
            new = np.full(len(self._thread), -1 % (1 << register.bits), value.dtype) if old is None else old
            new = np.array(np.broadcast_to(new, len(self._thread)))
            new[lanes] = value
            value = new
        self._registers[register.name] = value[()]

    # Memory

    def _load(self, space: str, kind: str, count: int, address: Value, lanes: Lanes) -> np.ndarray:
        """Vectors of `count` values, one row per lane."""
        address = self._check_access(space, address, count * bits_of(kind) // 8, lanes, store=False)
        return self._cells(kind, count)[address]

    def _store(self, space: str, kind: str, values: Sequence[Value], address: Value, lanes: Lanes) -> None:
        address = self._check_access(space, address, len(values) * bits_of(kind) // 8, lanes, store=True)
        stored = np.stack(np.broadcast_arrays(*values, address)[:-1], axis=1)
        self._cells(kind, len(values))[address] = stored
        if self.races:  # lanes of a warp may store the same together, as Triton has them do: that is one store
            access = self._log[-1]
            _, first, place = np.unique(address, return_index=True, return_inverse=True)
            leader = first[place]
            again = (leader != np.arange(len(address))) & (access.thread // 32 == access.thread[leader] // 32)
            again &= (stored.view(f"u{stored.itemsize}") == stored[leader].view(f"u{stored.itemsize}")).all(axis=1)
            fields = access.address[~again], access.bytes, access.thread[~again], access.epoch[~again], True
            self._log[-1] = _Access(*fields)

    def _cells(self, kind: str, count: int) -> np.ndarray:
        if (kind, count) not in self._views:
            self._views[kind, count] = _all_memory(kind, count)
        return self._views[kind, count]

    def _check_access(self, space: str, address: Value, size: int, lanes: Lanes, store: bool) -> np.ndarray:
        """Check and record an access of `size` bytes per lane; the index of each lane's cell in `_all_memory`."""
        address = np.broadcast_to(address, self._size(lanes)).astype(np.int64)
        thread = self._thread[lanes]

        def check(fault: np.ndarray, error: type[PTXError], text: str) -> None:
            if fault.any():
                first = int(np.flatnonzero(fault)[0])
                program, lane = divmod(int(thread[first]), self._threads)
                raise error(f"{int(address[first]):#x} {text} (program {program}, thread {lane}; {fault.sum()} in all)")

        check(address % size != 0, Misaligned, f"is not {size}-byte aligned")
        if space == "shared":
            check(address + size > self._shared_bytes, OutOfBounds, "is outside shared memory")
            address = address + self._shared.ctypes.data + self._program[lanes] * self._shared.shape[1]
        elif self.ranges is not None:
            starts, ends = self.ranges
            candidate = np.searchsorted(starts, address, "right") - 1
            check(address + size > ends[candidate], OutOfBounds, "is outside the given ranges")
        check((address < LOWEST_ADDRESS) | (address >= HIGHEST_ADDRESS), OutOfBounds, "is no address")
        if self.races:
            self._log.append(_Access(address, size, thread, self._epoch[lanes], store))
        if self.counts:
            name = "store" if store else "load"
            warp = thread // 32
            self.memory[f"{name} bytes"] += size * len(address)
            self.memory[f"{name} sectors"] += len(np.unique(np.stack([warp, address // 32]), axis=1).T)
            self.memory[f"{name} requests"] += len(np.unique(warp))
        index: np.ndarray = (address - LOWEST_ADDRESS) // size
        return index


def _all_memory(kind: str, count: int) -> np.ndarray:
    """All memory of this process as an array of vectors of `count` values, the first at LOWEST_ADDRESS."""

    class Memory:
        __array_interface__ = {
            "version": 3,
            "typestr": np.dtype(NUMPY[kind]).str,
            "shape": ((HIGHEST_ADDRESS - LOWEST_ADDRESS) // (count * bits_of(kind) // 8), count),
            "data": (LOWEST_ADDRESS, False),
        }

    return np.asarray(Memory())


def _merge_ranges(ranges: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the given ranges in order, overlapping ones joined; those that only touch stay apart."""
    pairs = sorted(r if isinstance(r, tuple) else (r.data_ptr(), r.numel() * r.element_size()) for r in ranges)
    merged = [[0, 0]]  # an empty one below all addresses
    for start, size in pairs:
        if start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], start + size)
        elif size:
            merged.append([start, start + size])
    starts, ends = np.array(merged, np.int64).T
    return starts, ends


def _check_races(log: Sequence[_Access], threads: int) -> None:
    """Raise Race if two threads touch the same bytes and one writes, unless a barrier of their program is between."""
    if not log:
        return
    # accesses are aligned powers of two, so two of them share bytes only if they share a unit of the smallest one
    unit = min(access.bytes for access in log)
    where = np.concatenate([np.add.outer(a.address // unit, np.arange(a.bytes // unit)).ravel() for a in log])
    thread, epoch, store = (
        np.concatenate([np.repeat(np.broadcast_to(getattr(a, field), a.address.shape), a.bytes // unit) for a in log])
        for field in ("thread", "epoch", "store")
    )
    for keys, owner, name in (((where,), thread // threads, "program"), ((epoch, where), thread, "thread")):
        order = np.lexsort(keys)
        changes = [np.diff(key[order]) != 0 for key in keys]
        first = np.flatnonzero(np.concatenate([[True], np.logical_or.reduce(changes)]))
        owners = owner[order]
        shared = np.minimum.reduceat(owners, first) != np.maximum.reduceat(owners, first)
        raced = shared & np.logical_or.reduceat(store[order], first)
        if raced.any():
            address = int(where[order][first][raced][0]) * unit
            raise Race(f"{address:#x} is written by one {name} and touched by another ({raced.sum()} places in all)")


# From syntax to something that runs

_CACHE_HINTS = r"(?:\.(?:ca|cg|cs|cv|wb|wt|L1::evict_\w+|L1::no_allocate))*"
_MEMORY = re.compile(
    rf"(ld|st)\.(global|shared){_CACHE_HINTS}(\.L2::cache_hint)?(?:\.v([24]))?\.([busf](?:8|16|32|64))"
)


def _bind(instruction: Instruction, kernel: Kernel) -> Execute | None:
    """The function that executes an instruction on some lanes, or None for branches and returns."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in ("bra", "bra.uni", "ret"):
        if opcode != "ret" and _label(instruction) not in kernel.labels:
            raise Refused(f"no such label: {instruction.text}")
        return None
    try:
        if operation := ptx_ops.find(opcode):
            return _bind_operation(operation, operands, wider=opcode.startswith("cvt."), kernel=kernel)
        if match := _MEMORY.fullmatch(opcode):
            name, space, hint, count, kind = match.groups()
            if int(count or 1) * bits_of(kind) > 128:
                raise Refused("more than 128 bits at once")
            bind = _bind_load if name == "ld" else _bind_store
            return bind(space, kind, int(count or 1), operands[:-1] if hint else operands, kernel)
        if match := re.fullmatch(r"ld\.param\.([busf](?:16|32|64))", opcode):
            return _bind_parameter(match[1], operands, kernel)
        if match := re.fullmatch(r"mov\.(pred|[bus](?:16|32|64)|f32|f64)", opcode):
            return _bind_move(match[1], operands, kernel)
        if opcode == "cvta.to.global.u64":  # global addresses are generic ones
            return _bind_move("u64", operands, kernel)
        if opcode == "bar.sync" and operands == (Immediate(0),):
            return Machine._barrier
        if opcode == "shfl.sync.bfly.b32" and operands[3:] == (Immediate(31), Immediate(-1)):
            return _bind_shuffle(operands, kernel)
        if re.fullmatch(r"createpolicy\.fractional\.L2::evict_\w+\.b64", opcode):  # a hint, which nothing here reads
            return lambda machine, lanes: None
    except (Refused, ValueError) as error:
        raise Refused(f"{instruction.text}: {error}") from None
    raise Refused(f"not modelled: {instruction.text}")


def _label(instruction: Instruction) -> str:
    (target,) = instruction.operands
    return target.name if isinstance(target, Symbol) else ""


def _register(operand: Operand, kind: str, wider: bool = False) -> Register:
    """The operand as a register of a type's width; cvt, ld and st take wider ones for integers."""
    if not isinstance(operand, Register):
        raise Refused(f"{operand} is not a register")
    if operand.bits != bits_of(kind) and not (wider and kind[0] in "bsu" and operand.bits > bits_of(kind)):
        raise Refused(f"{operand.name} has {operand.bits} bits, not those of {kind}")
    return operand


def _reader(operand: Operand, kind: str, kernel: Kernel, wider: bool = False) -> Callable[[Machine, Lanes], Value]:
    """A function that reads an operand as a PTX type."""
    if isinstance(operand, Register):
        name = _register(operand, kind, wider).name
        return lambda machine, lanes: machine._read(name, kind, lanes)
    if isinstance(operand, Immediate):
        if operand.bits not in (None, bits_of(kind)):
            raise Refused(f"a {operand.bits}-bit constant read as {kind}")
        value = operand.value
    elif isinstance(operand, Symbol) and operand.name in kernel.shared:
        value = kernel.shared[operand.name]
    else:
        raise Refused(f"{operand} is not a value")
    bits = np.array(value % (1 << bits_of(kind)), "?" if kind == "pred" else f"u{bits_of(kind) // 8}")
    constant = bits.view(NUMPY[kind])[()]
    return lambda machine, lanes: constant


def _items(operand: Operand, count: int) -> tuple[Operand, ...]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise Refused(f"{len(items)} operands in place of {count}")
    return items


def _bind_operation(operation: Operation, operands: Sequence[Operand], wider: bool, kernel: Kernel) -> Execute:
    destination, *sources = operands
    register = _register(destination, operation.result, wider)
    readers = [_reader(source, kind, kernel, wider) for source, kind in zip(sources, operation.operands, strict=True)]

    def execute(machine: Machine, lanes: Lanes) -> None:
        try:
            value = operation.compute(*(read(machine, lanes) for read in readers))
        except ZeroDivisionError as error:
            raise PTXError(str(error)) from None
        machine._write(register, value, lanes)

    return execute


def _part(kind: str, items: Sequence[Operand]) -> str:
    """The type of the parts into which a register of a type is cut."""
    bits, remainder = divmod(bits_of(kind), len(items))
    if remainder or f"u{bits}" not in NUMPY:
        raise Refused(f"{kind} in {len(items)} parts")
    return f"u{bits}"


def _bind_move(kind: str, operands: Sequence[Operand], kernel: Kernel) -> Execute:
    """A copy, or the packing or unpacking of a register from or into narrower ones, the lowest bits first.

    `_` takes a part that nobody needs.
    """
    destination, source = operands
    if isinstance(destination, Vector):
        part = _part(kind, destination.items)
        registers = [None if item == Symbol("_") else _register(item, part) for item in destination.items]
        read = _reader(source, f"u{bits_of(kind)}", kernel)

        def unpack(machine: Machine, lanes: Lanes) -> None:
            value = read(machine, lanes)
            for i, register in enumerate(registers):
                if register is not None:
                    bits = value >> value.dtype.type(i * bits_of(part))
                    machine._write(register, bits.astype(NUMPY[part]), lanes)

        return unpack
    register = _register(destination, kind)
    if isinstance(source, Vector):
        part = _part(kind, source.items)
        readers = [_reader(item, part, kernel) for item in source.items]
        whole = NUMPY[f"u{bits_of(kind)}"]

        def pack(machine: Machine, lanes: Lanes) -> None:
            value = whole(0)
            for i, read_part in enumerate(readers):
                value = value | read_part(machine, lanes).astype(whole) << whole(i * bits_of(part))
            machine._write(register, value, lanes)

        return pack
    read = _reader(source, kind, kernel)
    return lambda machine, lanes: machine._write(register, read(machine, lanes), lanes)


def _bind_shuffle(operands: Sequence[Operand], kernel: Kernel) -> Execute:
    destination, source, mask, *_ = operands
    register, read = _register(destination, "b32"), _reader(source, "b32", kernel)
    if not isinstance(mask, Immediate) or not 0 < mask.value < 32:
        raise Refused(f"{mask} is no lane of a warp")
    return lambda machine, lanes: machine._write(
        register, machine._shuffle(read(machine, lanes), mask.value, lanes), lanes
    )


def _bind_parameter(kind: str, operands: Sequence[Operand], kernel: Kernel) -> Execute:
    """A parameter, or an aligned part of one."""
    destination, address = operands
    register = _register(destination, kind)
    if not isinstance(address, Address) or not isinstance(address.base, Symbol):
        raise Refused("not the address of a parameter")
    name, size = address.base.name, bits_of(kind) // 8
    at, remainder = divmod(address.offset, size)
    if remainder or not 0 <= at < kernel.parameters.get(name, 0) // size:
        raise Refused(f"no parameter {name} with these bytes")

    def load(machine: Machine, lanes: Lanes) -> None:
        machine._write(register, np.frombuffer(machine._parameters[name], NUMPY[kind])[at], lanes)

    return load


def _bind_address(operand: Operand, space: str, kernel: Kernel) -> Callable[[Machine, Lanes], Value]:
    if not isinstance(operand, Address):
        raise Refused(f"{operand} is not an address")
    base, offset = operand.base, np.int64(operand.offset)
    short = space == "shared" and isinstance(base, Register) and base.bits == 32
    read = _reader(base, "u32" if short else "u64", kernel)
    return lambda machine, lanes: read(machine, lanes).astype(np.int64) + offset


def _bind_load(space: str, kind: str, count: int, operands: Sequence[Operand], kernel: Kernel) -> Execute:
    destination, source = operands
    registers = [_register(item, kind, wider=True) for item in _items(destination, count)]
    address = _bind_address(source, space, kernel)

    def load(machine: Machine, lanes: Lanes) -> None:
        values = machine._load(space, kind, count, address(machine, lanes), lanes)
        for i, register in enumerate(registers):
            machine._write(register, np.ascontiguousarray(values[:, i]), lanes)

    return load


def _bind_store(space: str, kind: str, count: int, operands: Sequence[Operand], kernel: Kernel) -> Execute:
    destination, source = operands
    readers = [_reader(item, kind, kernel, wider=True) for item in _items(source, count)]
    address = _bind_address(destination, space, kernel)

    def store(machine: Machine, lanes: Lanes) -> None:
        values = [read(machine, lanes) for read in readers]
        machine._store(space, kind, values, address(machine, lanes), lanes)

    return store

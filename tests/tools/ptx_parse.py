"""Read the PTX text of one kernel into instructions.

Only the syntax is settled here, strictly: a directive, an operand or a register that Triton's PTX does not have is
refused. What an opcode computes is in ptx_ops.py, and running the instructions is left to ptx.py.
"""

import re
from dataclasses import dataclass

SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]")


class PTXError(RuntimeError):
    """The kernel does something that the interpreter does not model, or that a GPU would not forgive."""


@dataclass(frozen=True)
class Register:
    """A register; a predicate is 1 bit wide. Special registers (%tid.x) are registers that nobody writes."""

    name: str
    bits: int


@dataclass(frozen=True)
class Immediate:
    """A constant's bit pattern; float constants carry their width, integers take the width of whatever reads them."""

    value: int
    bits: int | None = None


@dataclass(frozen=True)
class Symbol:
    """A label to branch to, a shared array, a kernel parameter, or a cache policy's number."""

    name: str


@dataclass(frozen=True)
class Address:
    base: "Register | Symbol"
    offset: int


@dataclass(frozen=True)
class Vector:
    items: "tuple[Operand, ...]"


Operand = Register | Immediate | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """`@!predicate opcode operands;` with the modifiers left in the opcode, as in `ld.global.v4.b32`."""

    text: str
    opcode: str
    operands: tuple[Operand, ...]
    predicate: Register | None
    negated: bool


@dataclass(frozen=True)
class Kernel:
    """One `.entry`.

    parameters: bytes of each, by name
    threads: of a program (CTA), if the text says so
    shared: offset of each shared array, by name; shared_bytes: of those whose size is given
    labels: index of the instruction that follows
    """

    name: str
    target: str
    parameters: dict[str, int]
    threads: int | None
    shared: dict[str, int]
    shared_bytes: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> Kernel:
    """The only kernel of a PTX module."""
    text = re.sub(r"//[^\n]*", "", text)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", text, re.S))
    target = re.search(r"\.target\s+(\w+)", text)
    if len(entries) != 1 or target is None:
        raise PTXError(f"expected one .entry and a .target, found {len(entries)} entries")
    entry = entries[0]
    name, parameters, attributes = entry.groups()
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", attributes)
    shared, shared_bytes = _shared_arrays(text)
    instructions, labels = _body(text[entry.end() : _closing_brace(text, entry.end())])
    return Kernel(
        name=name,
        target=target[1],
        parameters=_parameters(parameters),
        threads=int(threads[1]) if threads else None,
        shared=shared,
        shared_bytes=shared_bytes,
        instructions=tuple(instructions),
        labels=labels,
    )


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise PTXError("the kernel's body has no end")


def _parameters(text: str) -> dict[str, int]:
    parameters = {}
    for declaration in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"\.param\s+\.[busf](\d+)(?:\s+\.ptr[\s.\w]*?)?\s+([\w$]+)", declaration)
        if match is None:
            raise PTXError(f"parameter not modelled: {declaration}")
        parameters[match[2]] = int(match[1]) // 8
    return parameters


def _shared_arrays(text: str) -> tuple[dict[str, int], int]:
    """Offsets of the shared arrays, and the bytes of those whose size the text gives (the launch gives the other's)."""
    offsets: dict[str, int] = {}
    end = 0
    for align, name, size in re.findall(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d*)\]", text):
        end += -end % int(align or 1)
        offsets[name] = end
        end += int(size or 0)
    return offsets, end


def _body(text: str) -> tuple[list[Instruction], dict[str, int]]:
    text = re.sub(r"^\s*\.loc\b[^\n]*$", "", text, flags=re.M)
    declared: dict[str, tuple[int, int]] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in map(str.strip, text.split(";")):
        while label := re.match(r"([\w$]+):\s*(?!:)", statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :]
        if declaration := re.fullmatch(r"\.reg\s+\.(?:pred|[busf](\d+))\s+(%[a-z]+)<(\d+)>", statement):
            declared[declaration[2]] = int(declaration[1] or 1), int(declaration[3])
        elif statement and not statement.startswith(".pragma"):
            instructions.append(_instruction(statement, declared))
    return instructions, labels


def _instruction(text: str, declared: dict[str, tuple[int, int]]) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", text, re.S)
    if match is None:
        raise PTXError(f"statement not modelled: {text}")
    negated, predicate, opcode, rest = match.groups()
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest or "")
    return Instruction(
        text=" ".join(text.split()),
        opcode=opcode,
        operands=tuple(_operand(operand, declared) for operand in operands),
        predicate=_register(predicate, declared) if predicate else None,
        negated=bool(negated),
    )


def _register(name: str, declared: dict[str, tuple[int, int]]) -> Register:
    if SPECIAL.fullmatch(name):
        return Register(name, 32)
    match = re.fullmatch(r"(%[a-z]+)(\d+)", name)
    bits, count = declared.get(match[1], (0, 0)) if match else (0, 0)
    if match is None or int(match[2]) >= count:
        raise PTXError(f"register not declared: {name}")
    return Register(name, bits)


def _operand(text: str, declared: dict[str, tuple[int, int]]) -> Operand:
    if text.startswith("%"):
        return _register(text, declared)
    if text.startswith("{"):
        items = filter(None, map(str.strip, text[1:-1].split(",")))
        return Vector(tuple(_operand(item, declared) for item in items))
    if text.startswith("["):
        return _address(text, declared)
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Immediate(int(match[1], 16), 32)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(int(match[1], 16), 64)
    if match := re.fullmatch(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?", text):
        return Immediate(int(match[1], 0))
    if re.fullmatch(r"[\w$.]+", text):
        return Symbol(text)
    raise PTXError(f"operand not modelled: {text}")


def _address(text: str, declared: dict[str, tuple[int, int]]) -> Address:
    match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
    base = _operand(match[1], declared) if match else None
    if match is None or not isinstance(base, Register | Symbol):
        raise PTXError(f"address not modelled: {text}")
    return Address(base, int(match[2] or "0", 0))

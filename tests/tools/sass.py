"""Read what the assemblers made of a compiled kernel: registers, spills, widths of accesses, lengths of its fast paths.

    report = sass.report(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={...}))
    report.registers, report.spills, report.loads[16], report.loop / elements_per_thread

The assemblers are in the triton wheel (ptxas for NVIDIA, LLVM for AMD), and cuobjdump is. No GPU is needed.
"""

import re
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Report:
    """Of one kernel.

    registers: of 32 bits, per thread (vector registers on AMD)
    spills: instructions that access spilled registers (NVIDIA), or spilled registers (AMD)
    loads, stores: instructions that access global memory, by bytes per thread
    fast_path: instructions of a thread that passes each of the widest accesses once, from the first to EXIT
    loop: of these, the instructions of one pass of the loop around the widest accesses; None if there is no such loop

    The last two are for NVIDIA only. They leave out what division and square root do with unusual operands.
    """

    registers: int
    spills: int
    loads: Counter[int]
    stores: Counter[int]
    fast_path: int | None = None
    loop: int | None = None


def report(compiled: Any) -> Report:
    """Of what triton.compile or JITFunction.warmup returned."""
    if "amdgcn" in compiled.asm:
        return _read_amdgcn(compiled.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run([CUOBJDUMP, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        )
    (registers,) = re.findall(r"\bREG:(\d+)", usage)
    return _read_sass(sass, int(registers))


# NVIDIA


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str


def _read_sass(text: str, registers: int) -> Report:
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", text)
    instructions = [Instruction(int(address, 16), *rest) for address, *rest in lines]
    widths = {
        name: [(i, _sass_width(x.opcode)) for i, x in enumerate(instructions) if x.opcode.startswith(name)]
        for name in ("LDG", "STG")
    }
    widest = max(width for accesses in widths.values() for _, width in accesses)
    stops = sorted(i for accesses in widths.values() for i, width in accesses if width == widest)
    return Report(
        registers=registers,
        spills=sum(x.opcode.startswith(("LDL", "STL")) for x in instructions),
        loads=Counter(width for _, width in widths["LDG"]),
        stores=Counter(width for _, width in widths["STG"]),
        fast_path=_fast_path(instructions, stops),
        loop=_loop(instructions, stops),
    )


def _sass_width(opcode: str) -> int:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((sizes[part] for part in opcode.split(".") if part in sizes), 4)


def _fast_path(instructions: Sequence[Instruction], stops: Sequence[int]) -> int:
    """Instructions on the shortest way from the first one through all stops to an EXIT."""
    following = _successors(instructions)
    exits = {i for i, x in enumerate(instructions) if x.opcode == "EXIT"}
    length = _through(following, 0, stops, exits)
    if length is None:
        raise ValueError("no way through all of the widest accesses")
    return length + 1


def _loop(instructions: Sequence[Instruction], stops: Sequence[int]) -> int | None:
    """Instructions on the shortest way from the first stop through the others back to it."""
    return _through(_successors(instructions), stops[0], stops[1:], {stops[0]})


def _through(following: Sequence[Sequence[int]], here: int, stops: Sequence[int], goals: set[int]) -> int | None:
    """Steps from here through all stops, in order, to the nearest goal; None if there is no way."""
    length = 0
    for targets in [*({stop} for stop in stops), goals]:
        distance, queue = dict.fromkeys(following[here], 1), deque(following[here])
        while queue and queue[0] not in targets:
            for there in following[queue[0]]:
                if there not in distance:
                    distance[there] = distance[queue[0]] + 1
                    queue.append(there)
            queue.popleft()
        if not queue:
            return None
        here = queue[0]
        length += distance[here]
    return length


def _successors(instructions: Sequence[Instruction]) -> list[list[int]]:
    """The instructions that may come after each one.

    A CALL is a jump, as ptxas also uses it for. Where it is not one, it calls the slow path of a division or square
    root, whose RET leads nowhere here.
    """
    index = {x.address: i for i, x in enumerate(instructions)}
    following = []
    for i, x in enumerate(instructions):
        jump, end = x.opcode.startswith(("BRA", "CALL")), x.opcode.startswith(("EXIT", "RET"))
        conditional = x.predicate or jump and re.match(r"!?U?P\d", x.operands)
        targets = re.findall(r"0x([0-9a-f]+)", x.operands)[-1:] if jump else []
        after = [index[int(target, 16)] for target in targets]
        if i + 1 < len(instructions) and (conditional or not (jump or end)):
            after.append(i + 1)
        following.append(after)
    return following


# AMD


def _read_amdgcn(text: str) -> Report:
    def field(name: str) -> int:
        (value,) = re.findall(rf"^\s*\.{name}:\s+(\d+)", text, re.M)
        return int(value)

    def accesses(kind: str) -> Counter[int]:
        return Counter(map(_amdgcn_width, re.findall(rf"\b(?:global|buffer|flat)_{kind}_(\w+)", text)))

    return Report(
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count") + field("sgpr_spill_count"),
        loads=accesses("load"),
        stores=accesses("store"),
    )


def _amdgcn_width(suffix: str) -> int:
    """Of `dwordx4` (CDNA), `b128` (RDNA) and their like."""
    if match := re.fullmatch(r"dword(?:x(\d))?", suffix):
        return 4 * int(match[1] or 1)
    if match := re.search(r"[bui](\d+)$", suffix):
        return int(match[1]) // 8
    if re.search(r"short|byte", suffix):
        return 2 if "short" in suffix else 1
    raise ValueError(f"width of {suffix}?")

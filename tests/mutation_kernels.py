"""Do the tests of the kernels notice a wrong instruction? `python -m tests.mutation_kernels [how many]`

Changes one instruction at a time in the PTX of the fp32 Adam kernel and runs the checks of test_kernels.py on each such
mutant: values against the reference, accesses against the bounds of the tensors, races, and the widths of accesses.
A mutant that passes is either in HARMLESS, with the reason why nothing could notice it, or a gap in the tests.
"""

import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

from fastopt.kernels import multi_tensor
from fastopt.kernels.multi_tensor import CHUNK

from tests.test_kernels import F32, ROWS, Tensors, in_one_buffer
from tests.tools import driver, ptx

KERNEL = ("adam", 0b011, F32, F32)

# (what is there, what takes its place), on one line of PTX
SUBSTITUTIONS = [
    # arithmetic
    (r"\badd\.rn\.f32", "sub.rn.f32"),
    (r"\bsub\.rn\.f32", "add.rn.f32"),
    (r"\bmul\.rn\.f32", "add.rn.f32"),
    (r"\bdiv\.rn\.f32", "mul.rn.f32"),
    (r"\bdiv\.rn\.f32 (.*), (.*), (.*);", r"div.rn.f32 \1, \3, \2;"),
    (r"\bsub\.rn\.f32 (.*), (.*), (.*);", r"sub.rn.f32 \1, \3, \2;"),
    (r"\bfma\.rn\.f32 (.*), (.*), (.*), (.*);", r"fma.rn.f32 \1, \2, \4, \3;"),
    (r"\bfma\.rn\.f32 (.*), (.*), (.*), (.*);", r"mul.rn.f32 \1, \2, \3;"),
    (r"\bsqrt\.rn\.f32", "mov.b32"),
    (r"\bselp\.(\w+) (.*), (.*), (.*), (.*);", r"selp.\1 \2, \4, \3, \5;"),
    # comparisons and predicates
    (r"\bsetp\.lt\.", "setp.le."),
    (r"\bsetp\.lt\.", "setp.gt."),
    (r"\bsetp\.le\.", "setp.lt."),
    (r"\bsetp\.gt\.", "setp.ge."),
    (r"\bsetp\.ge\.", "setp.gt."),
    (r"\bsetp\.(eq|neu?)\.", lambda m: "setp.eq." if m[1] != "eq" else "setp.ne."),
    (r"@%p", "@!%p"),
    (r"@!%p", "@%p"),
    (r"@!?%p\d+ (?=ld|st)", ""),
    # integers and addresses
    (r"\badd\.s64", "sub.s64"),
    (r"\badd\.s32", "sub.s32"),
    (r"\bsub\.s64", "add.s64"),
    (r"\bor\.b(32|64)", r"and.b\1"),
    (r"\band\.b(32|64)", r"or.b\1"),
    (r"\bshl\.b32", "shr.u32"),
    (r"\bshl\.b64", "shr.u64"),
    (r"\bshr\.([us])(32|64)", r"shl.b\2"),
    (r"\bmin\.s64", "max.s64"),
    (r"\bmul\.(?:lo|wide)\.\w+ .*", None),
    (r", (\d+);", lambda m: f", {int(m[1]) + 1};"),
    (r", (\d+);", lambda m: f", {int(m[1]) * 2};"),
    (r", -(\d+);", lambda m: f", -{int(m[1]) * 2};"),
    (r"\+ 0 \]", "+ 4 ]"),
    # a missing instruction
    (r"(@!?%p\d+ )?st\.global.*", None),
    (r"@!?%p\d+ bra.*", None),
    (r"\bmov\.u(?:32|64) (%\w+), 0x0;", r"mov.u32 \1, 0x1;"),
]

# Mutants that nothing can notice: (original line, mutated line, why). In brackets behind a line are the opcodes of the
# instructions that use its result.
HARMLESS = [
    (
        r"mov\.u32 %r\d+, 0x0;.*",
        r".*",
        "what a thread finds in the register of a load that is masked off: it stores nothing",
    ),
    (
        r"setp\.(lt|ge)\.s32 .*\['bra'\]",
        r"setp\.(le|gt)\.s32 .*",
        "one more turn of a loop, in which every thread is masked off",
    ),
    (r"@%p\d+ bra .*", r";?", "enters a loop that has nothing to do, with every thread masked off"),
    (r"shr\.s32 .*, 31; \['shr\.u32'\]", r"shr\.s32 .*, (32|62);", "shifts by more than 31 are shifts by 31"),
    (
        r"(shr\.u32 .*, 30; \['add\.s32'\]|add\.s32 .*; \['shr\.s32'\])",
        r".*",
        "rounds numel // VEC for negative numel, which there is none: adds 0 otherwise",
    ),
    (
        r"and\.b32 .*, 2147483647; \['setp\.eq\.b32'\]",
        r".*, 4294967294;",
        "lerp_from_grad is 0 or 1: its sign and its lowest bit are never set",
    ),
    (r"and\.b64 .*, 12; .*", r".*, 13;", "the address of a float32 is a multiple of 4: its lowest bits are 0"),
    (r"and\.b64 .*, 17592186040320;.*", r".*, 17592186040321;", "these bits of the chunk times CHUNK are 0"),
    (
        r"fma\.rn\.f32 .*\['fma\.rn\.f32', 'neg\.f32'\]",
        r"mul\.rn\.f32 .*",
        "divide_root without the rest of the reciprocal: exact for every root tried, but no longer by a proof",
    ),
]


INSTRUCTION = re.compile(r"\s*(?:@!?(%\w+)\s+)?([a-z][\w.]*)\s*(.*);")


def mutants(text: str) -> Iterator[tuple[str, str, str]]:
    """(the original line, the changed line, the whole changed text)"""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("$L__func_begin"))
    end = next(i for i, line in enumerate(lines) if line.startswith("$L__func_end"))
    code = {i: match for i in range(start, end) if (match := INSTRUCTION.match(lines[i]))}
    for i, instruction in code.items():
        for pattern, replacement in SUBSTITUTIONS:
            changed = re.sub(pattern, replacement or "", lines[i], count=1)
            if changed != lines[i]:
                described = f"{' '.join(lines[i].split())} {users(instruction, code.values())}"
                yield described, " ".join(changed.split()), "\n".join([*lines[:i], changed, *lines[i + 1 :]])


def users(instruction: re.Match[str], code: Iterable[re.Match[str]]) -> list[str]:
    """The opcodes of the instructions that read the register which this one writes."""
    register = instruction[3].partition(",")[0].strip()
    opcodes = set()
    for predicate, opcode, operands in (other.groups() for other in code):
        read = operands if opcode.startswith("st.") else operands.partition(",")[2]
        if register in re.findall(r"%\w+", f"{predicate} {read}"):
            opcodes.add(opcode)
    return sorted(opcodes)


class Checks:
    """What test_kernels.py does to this kernel, in a few launches."""

    def __init__(self):
        # each row of hyper-parameters on a whole block and a tail; each tensor off alignment, the one before it on it,
        # and all of them alike
        sizes = [CHUNK + extra for extra in (3, 2, 1, 130)] + [129, 1, 131, 5, 130]
        sizes += [CHUNK + extra for extra in (-1, 5, 7, 0)]
        aligned = (0, 0, 0, 0)
        offsets = 4 * [aligned] + [(1, 0, 0, 0), aligned, (0, 1, 0, 0), aligned, (0, 0, 1, 0), aligned, (0, 0, 0, 1)]
        offsets += [(1, 1, 1, 1), (3, 3, 3, 3)]
        self.launches = [
            (Tensors(KERNEL, sizes, offsets), 0),
            (Tensors(KERNEL, [64, 61, 70, 67, 132], special=True), 0),
            *((Tensors(KERNEL, [131, CHUNK], only=only), 0) for only in range(len(ROWS[KERNEL[0]]))),
            (Tensors(KERNEL, [CHUNK + 7, 5]), 2**31 + 3),
        ]
        self.expected = [tensors.expected() for tensors, _ in self.launches]
        self.before = [[[x.clone() for x in row] for row in tensors.tensors] for tensors, _ in self.launches]
        self.widths = None
        self.widths = self.run_all(ptx.parse(original()))

    def verdict(self, text: str) -> str:
        """How the mutant was noticed; "survived" if it was not."""
        try:
            kernel = ptx.parse(text)
            ptx.Machine(kernel)
        except Exception:
            return "not PTX"
        try:
            widths = self.run_all(kernel)
        except AssertionError:
            return "wrong values"
        except ptx.PTXError as error:
            return type(error).__name__
        return "survived" if widths == self.widths else "other accesses"

    def run_all(self, kernel: ptx.Kernel) -> Counter[str]:
        widths: Counter[str] = Counter()
        for (tensors, first_chunk), expected, before in zip(self.launches, self.expected, self.before, strict=True):
            for row, values in zip(tensors.tensors, before, strict=True):
                for tensor, value in zip(row, values, strict=True):
                    tensor.copy_(value)
            arrays = tensors.arrays(first_chunk)
            buffer, addresses = in_one_buffer(arrays)
            ranges = [(address, len(part)) for address, part in zip(addresses, arrays, strict=True)]
            ranges += [tensor for row in tensors.tensors for tensor in row]
            machine = ptx.Machine(kernel, ranges=ranges, races=True, counts=True, steps=5000)
            addresses, words = tensors.with_scalars(addresses, arrays[2])
            numbers = (*addresses, *words, 0, 0)
            parameters = [number.to_bytes(8, "little", signed=True) for number in numbers]
            machine.launch((len(arrays[0]) // 8,), parameters, threads=multi_tensor.THREADS)
            tensors.compare(expected)
            widths += Counter({op: n for op, n in machine.instructions.items() if re.match(r"(ld|st)\.global\.v", op)})
            del buffer
        return widths


def original() -> str:
    with driver.installed(90) as gpu:
        return multi_tensor.update_launcher(*KERNEL, device=gpu.arch).compiled.asm["ptx"]


def harmless(line: str, changed: str) -> str | None:
    return next((why for old, new, why in HARMLESS if re.fullmatch(old, line) and re.fullmatch(new, changed)), None)


def main() -> int:
    every = list(mutants(original()))
    random.Random(0).shuffle(every)
    chosen = every[: int(sys.argv[1])] if len(sys.argv) > 1 else every
    checks = Checks()
    verdicts: Counter[str] = Counter()
    gaps = []
    for line, changed, text in chosen:
        verdict = checks.verdict(text)
        if verdict == "survived" and harmless(line, changed):
            verdict = "harmless: " + harmless(line, changed)
        elif verdict == "survived":
            gaps.append((line, changed))
        verdicts[verdict] += 1
    print(f"{len(chosen)} of {len(every)} mutants of {'-'.join(map(str, KERNEL))}, sm_90")
    for verdict, count in verdicts.most_common():
        print(f"{count:5} {verdict}")
    for line, changed in gaps:
        print(f"not noticed: {line}   ->   {changed or 'nothing'}")
    return bool(gaps)


if __name__ == "__main__":
    sys.exit(main())

"""Prints what the GPU kernels cost by their machine code, without a GPU: `python -m tests.report_kernels`.

registers, spills  of a thread
instr/el           instructions of a thread per element, on the path that aligned tensors take: of one turn of the loop
                   over a chunk, and of the whole program for a full chunk
bytes/el           of device memory per element: of the tensors, counted in the PTX interpreter; and of the work list,
                   the table and the scalars, which all threads of a program read at the same addresses
loads, stores      instructions in the code by the bytes a thread accesses at once. The widest are those of the loop;
                   the narrow ones, of the arrays and of the tail, are many where a compiler copies a loop

Then those of Adam with what a step does beside the update, and with parameters of 16 bits that keep more.
"""

from collections import Counter

import triton
from fastopt.kernels import multi_tensor
from fastopt.kernels.multi_tensor import CHUNK, THREADS
from triton.backends.compiler import GPUTarget

from tests.test_kernels import (
    BF16,
    F32,
    F64,
    KERNELS,
    MASKS,
    bytes_per_element,
    compiled_for,
    instructions_per_element,
    name_of,
)
from tests.tools import sass

TARGETS = [
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
    GPUTarget("hip", "gfx1100", 32),
]


def widths(accesses: Counter[int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in sorted(accesses.items(), reverse=True))


def report_options() -> None:
    print(f"\n{'Adam':49} {'target':8} {'registers':>9} {'spills':>6}  loads; stores")
    for name, (dtypes, options) in WITH_OPTIONS.items():
        for target in TARGETS:
            kernel = multi_tensor.update_kernel("adam", 0b011, *dtypes, target.warp_size, **options)
            code = sass.report(compiled_for(target, *kernel))
            arch = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
            accesses = f"{widths(code.loads)}; {widths(code.stores)}"
            print(f"{name:49} {arch:8} {code.registers:9} {code.spills:6}  {accesses}")


def main() -> None:
    print(f"Triton {triton.__version__}, {CHUNK} elements and {THREADS} threads a program\n")
    print(
        f"{'kernel':33} {'target':8} {'registers':>9} {'spills':>6} {'instr/el: loop':>14} {'program':>8} "
        f"{'bytes/el':>8} {'arrays':>6}  loads; stores"
    )
    for kernel in KERNELS:
        if kernel[1] not in (MASKS[kernel[0]][0], MASKS[kernel[0]][-1]) or kernel[2:] not in SHOWN:
            continue
        tensor_bytes, array_bytes = bytes_per_element(kernel)
        for target in TARGETS:
            code = sass.report(compiled_for(target, *multi_tensor.update_kernel(*kernel, target.warp_size)))
            loop = program = "-"
            if code.loop:
                loop, program = (f"{count:.2f}" for count in instructions_per_element(kernel, code))
            arch = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
            print(
                f"{name_of(kernel):33} {arch:8} {code.registers:9} {code.spills:6} {loop:>14} {program:>8} "
                f"{tensor_bytes:8.2f} {array_bytes:6.2f}  {widths(code.loads)}; {widths(code.stores)}"
            )
    report_options()


SHOWN = [(F32, F32), (F64, F64), (BF16, BF16), (BF16, F32), (F32, BF16)]
WITH_OPTIONS = {
    "float32, clipped": ((F32, F32), {"factors": 1}),
    "float32, unscaled and clipped": ((F32, F32), {"factors": 2}),
    "float32, unscaled and clipped, averages": ((F32, F32), {"factors": 2, "average": True}),
    "bfloat16, remainder": ((BF16, BF16), {"companion": True}),
    "bfloat16, remainder, float32 state": ((BF16, F32), {"companion": True}),
    "bfloat16, remainder, float32 state and gradients": ((BF16, F32), {"companion": True, "grad_dtype": F32}),
    "bfloat16, stochastic rounding": ((BF16, BF16), {"draws": 1}),
    "bfloat16, stochastic rounding, float32 state": ((BF16, F32), {"draws": 1}),
}

if __name__ == "__main__":
    main()

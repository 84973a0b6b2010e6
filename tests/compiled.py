"""Compiles Triton's kernels, with the sizes of LLaDA-8B, for GPUs that need not be there; prints what each takes.

In a process of its own: where Triton interprets, it cannot compile.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dilaserve.models import kernels as of_layers
from dilaserve.worker import kernels as of_logits

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
KERNELS = {  # the types of what a kernel is given, "*" of the model's; the program's sizes; warps
    of_logits.sweep: ("* *i64 *fp32 i32 i32 fp32", {"VOCAB": 126464, "BLOCK": 8192}, 8),
    of_logits.lay_out_row: ("*i64 *i64 *i64 *i64 *i64 *i32 *i32 i32 i32", {"WIDTH": 32, "DEPTH": 2}, 1),
    of_logits.unmask_row: ("*i64 *fp64 *i32 *fp32 *i64 *i64 *fp32 i32 i32 i32 i32", {"WIDTH": 32}, 1),
    of_layers.add_norm_rows: ("* * * * * i32 fp32", {"BLOCK": 4096}, 8),
    of_layers.place_heads: ("* *fp32 *i64 * * * i32", {"Q": 4, "KV": 4, "DIM": 128, "HALF": 64}, 1),
    of_layers.gate_rows: ("* * i32 i32", {"BLOCK": 2048}, 4),
}

DTYPES = ("bf16", "fp16", "fp32")


def compiled(kernel, dtype, capability):
    types, sizes, warps = KERNELS[kernel]
    names = kernel.arg_names
    given = [f"*{dtype}" if kind == "*" else kind for kind in types.split()]
    signature = dict(zip(names, [*given, *["constexpr"] * len(sizes)], strict=True))
    constants = {(names.index(name),): size for name, size in sizes.items()}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def takes(ptx, capability):
    """Registers of a thread, and bytes that do not fit into them."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [PTXAS, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilt = sum(map(int, re.findall(r"(\d+) bytes spill", told)))
    return int(re.search(r"Used (\d+) registers", told)[1]), spilt


def main():
    for capability in map(int, sys.argv[1:]):
        for kernel in KERNELS:
            for dtype in DTYPES if "*" in KERNELS[kernel][0].split() else DTYPES[:1]:
                registers, spilt = takes(compiled(kernel, dtype, capability).asm["ptx"], capability)
                print(f"{kernel.__name__} {dtype} sm_{capability}: {registers} registers, {spilt} bytes spilt")


if __name__ == "__main__":
    main()

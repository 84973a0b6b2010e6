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

SHARED = 99 * 1024  # bytes that a program has on the smallest of these GPUs (8.6, 8.9 and 12.0)
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
# what a kernel is given: the model's tensors as "*", or "*16" if never in float32, multiples of 16 as ":16"; its sizes;
# warps; stages
KERNELS = {
    of_logits.sweep: ("* *i64 *fp32 i32 i32 fp32", {"VOCAB": 126464, "BLOCK": 8192}, 8, 1),
    of_logits.lay_out_row: ("*i64 *i64 *i64 *i64 *i64 *i32 *i32 i32 i32", {"WIDTH": 32, "DEPTH": 2}, 1, 1),
    of_logits.unmask_row: ("*i64 *fp64 *i32 *fp32 *i64 *i64 *fp32 i32 i32 i32 i32", {"WIDTH": 32}, 1, 1),
    of_layers.add_norm_rows: ("* * * * * i32 fp32", {"BLOCK": 4096}, 8, 1),
    of_layers.place_heads: ("* *fp32 *i64 * * * i32", {"Q": 4, "KV": 4, "DIM": 128, "TURNED": 64, "HALF": 64}, 1, 1),
    of_layers.gate_rows: ("* * i32 i32", {"BLOCK": 2048}, 4, 1),
    of_layers.attend_row: (
        "*16 *16 *16 *i32 *i32 *16 *fp32 *fp32 i32 i32 i32 fp32",
        {"QUERIES": 32, "DIM": 128, "WIDE": 128, "BLOCK": 64, "SPLITS": 4},
        4,
        3,
    ),
    of_layers.join_parts: ("*fp32 *fp32 *16 i32", {"DIM": 128, "WIDE": 128, "SPLITS": 4}, 1, 1),
}
DTYPES = ("bf16", "fp16", "fp32")


def dtypes_of(kernel):
    types = KERNELS[kernel][0].split()
    return DTYPES if "*" in types else DTYPES[:1]


def compiled(kernel, dtype, capability):
    types, sizes, warps, stages = KERNELS[kernel]
    names = kernel.arg_names
    given = [f"*{dtype}" if kind in ("*", "*16") else kind for kind in types.split()]
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(given) if kind[0] == "*" or ":" in kind}
    signature = dict(zip(names, [*(kind.split(":")[0] for kind in given), *["constexpr"] * len(sizes)], strict=True))
    constants = {(names.index(name),): size for name, size in sizes.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=target, options=options)


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
            for dtype in dtypes_of(kernel):
                made = compiled(kernel, dtype, capability)
                registers, spilt = takes(made.asm["ptx"], capability)
                assert made.metadata.shared <= SHARED
                print(f"{kernel.__name__} {dtype} sm_{capability}: {registers} registers, {spilt} bytes spilt")


if __name__ == "__main__":
    main()

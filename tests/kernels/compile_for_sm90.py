"""Compile every Triton kernel for an H200 without one and print what ptxas says, as JSON.

Run by test_compile.py in its own process: kernels imported under the interpreter do not compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tapct_kernels.masked_gather import _backward_kernel as gather_backward
from tapct_kernels.masked_gather import _forward_kernel as gather_forward
from tapct_kernels.patch_embed import _forward_kernel as patch_forward
from tapct_kernels.patch_embed import _row_grad_kernel as patch_row_grad
from tapct_kernels.patch_embed import _weight_grad_kernel as patch_weight_grad

GEOMETRY = {"R": 5, "Y": 224, "X": 224, "PZ": 4, "PY": 8, "PX": 8, "IS_HU": True, "HAS_MASK": True}
HU = dict.fromkeys(("low", "high", "mean", "std"), "fp32")
WARPS_8 = {"num_warps": 8, "num_stages": 3}
WARPS_4 = {"num_warps": 4}

# The launches of ViT-S and ViT-B training: bf16 products, float32 tokens, and bf16 tokens.
KERNELS = {
    "patch_embed forward": (
        patch_forward,
        {"x_ptr": "*i16", "weight_ptr": "*bf16", "bias_ptr": "*fp32", "pos_ptr": "*fp32"}
        | {"mask_token_ptr": "*fp32", "mask_ptr": "*i1", "prefix_ptr": "*fp32", "out_ptr": "*fp32"}
        | {"N": "i32", "num_tiles": "i32", "L": "i32", "D": "i32"}
        | HU,
        GEOMETRY | {"BLOCK_N": 128, "BLOCK_D": 128, "BLOCK_K": 64},
        WARPS_8,
    ),
    "patch_embed weight gradient": (
        patch_weight_grad,
        {"grad_ptr": "*bf16", "x_ptr": "*i16", "mask_ptr": "*i1", "out_SDK_ptr": "*fp32"}
        | {"N": "i32", "L": "i32", "D": "i32"}
        | HU,
        GEOMETRY | {"ROWS": 4096, "BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_K": 128},
        WARPS_8,
    ),
    "patch_embed row gradient": (
        patch_row_grad,
        {"grad_ptr": "*fp32", "mask_ptr": "*i1", "rows_TD_ptr": "*fp32", "kept_SD_ptr": "*fp32"}
        | {"masked_SD_ptr": "*fp32", "B": "i32", "T": "i32", "D": "i32"},
        {"R": 5, "HAS_MASK": True, "BLOCK_T": 8, "BLOCK_D": 128},
        WARPS_4,
    ),
    "masked_gather forward": (
        gather_forward,
        {"x_ptr": "*bf16", "index_ptr": "*i64", "weight_ptr": "*fp32", "bias_ptr": "*fp32"}
        | {"out_ptr": "*bf16", "M": "i32", "L": "i32", "D": "i32", "R": "i32", "eps": "fp32"},
        {"BLOCK_M": 4, "BLOCK_D": 1024},
        WARPS_4,
    ),
    "masked_gather backward": (
        gather_backward,
        {"grad_ptr": "*bf16", "x_ptr": "*bf16", "index_ptr": "*i64", "weight_ptr": "*fp32"}
        | {"grad_x_ptr": "*bf16", "weight_SD_ptr": "*fp32", "bias_SD_ptr": "*fp32"}
        | {"M": "i32", "L": "i32", "D": "i32", "R": "i32", "eps": "fp32", "num_tiles": "i32"},
        {"BLOCK_M": 4, "BLOCK_D": 1024},
        WARPS_4,
    ),
}


def compile_kernel(kernel, types, constants, options):
    signature = {
        name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
    }
    # As the launcher would: allocations are 16-byte aligned, and so is the width.
    aligned = [n for n, t in types.items() if t.startswith("*") or n == "D"]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(compiled):
    """Read registers, stack and shared memory of the cubin, and its instructions of interest."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    sass, ttgir = compiled.asm["sass"], compiled.asm["ttgir"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "hgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "hmma": len(re.findall(r"\bHMMA\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E\.(?:\w+\.)*128\b", sass)),
        "two_byte_loads": len(re.findall(r"\bLDG(?:STS)?\.E\.(?:\w+\.)*[US]16\b", sass)),
        # a left operand that is a tensor, not a memory descriptor, comes from registers
        "dots_from_registers": len(re.findall(r"warp_group_dot [^\n]*: tensor<", ttgir)),
    }


json.dump({name: resources(compile_kernel(*spec)) for name, spec in KERNELS.items()}, sys.stdout)

"""Compile what the op library launches for GPUs that are not here; print what ptxas made of it.

    python tests/kernels/compile_kernels.py [--write | --op OP] [ARCH ...]

ARCH is 90 by default, and 80, 90 and 100 to write. Each module of ``launches`` runs its ops on meta
tensors of training shapes, for sm_90 once per candidate configuration. A driver that only names its
target takes the place of CUDA's: Triton specialises and compiles exactly as it would there, and
nothing is launched. Prints one JSON row per kernel; with --write into kernels/resources.jsonl, the
table that test_compile.py holds later compilations to. Needs a process that never imported a kernel
under TRITON_INTERPRET.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tapct_kernels import tuning

HOPPER = 90
HERE = Path(__file__).resolve().parent
OPS = sorted(path.stem for path in (HERE / "launches").glob("*.py"))
TABLE = HERE.parent.parent / "kernels" / "resources.jsonl"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class NamedTarget:
    """A driver without a device; its device number is the architecture, which keys the caches."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compiled_kernels(arch: int, ops: Sequence[str]) -> Iterator[tuple[str, str, str, Any]]:
    """Yield op, launch, configuration and the compiled kernel, each kernel of an op once."""
    driver.set_active(NamedTarget(arch))
    run = JITFunction.run
    seen = set()
    for op in ops:
        launches = importlib.import_module(f"launches.{op}").LAUNCHES
        for launch, call in launches.items():
            made: list[tuple[str, Any]] = []

            def compile_only(self: Any, *args: Any, **options: Any) -> Any:
                kernel = run(self, *args, **(options | {"warmup": True}))
                blocks = {k: v for k, v in options.items() if re.match(r"BLOCK|num_", k)}
                made.append((" ".join(f"{k}={v}" for k, v in blocks.items()), kernel))  # noqa: B023
                return kernel

            with mock.patch.object(JITFunction, "run", compile_only):
                # Tuning is for Hopper; on others the default has to do, or a GPU of theirs.
                for _ in tuning.each_config(call) if arch == HOPPER else [call()]:
                    pass
            for config, kernel in made:
                if (op, kernel.hash) not in seen:  # two widths may share a kernel
                    seen.add((op, kernel.hash))
                    yield op, launch, config, kernel


def hot_part(sass: str) -> str:
    """Return the instructions inside loops, or all where nothing loops."""
    lines = sass.splitlines()
    labels = {line[:-1].strip(): i for i, line in enumerate(lines) if re.match(r"\s*LBB\d+:", line)}
    looped: set[int] = set()
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA (LBB\d+)", line)
        # the endless loop behind the last instruction branches to itself
        if target and labels.get(target[1], i) < i - 1:
            looped.update(range(labels[target[1]], i))
    return "\n".join(lines[i] for i in sorted(looped)) if looped else sass


def resources(kernel: Any) -> dict[str, int]:
    """Read registers, stack and shared memory of the cubin, and its instructions of interest."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sass, ttgir = kernel.asm["sass"], kernel.asm["ttgir"]

    def of(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", usage)
        assert found is not None
        return int(found[1])

    def count(pattern: str, text: str = sass) -> int:
        return len(re.findall(pattern, text))

    return {
        "registers": of("REG"),
        "stack": of("STACK") + of("LOCAL"),
        "spills": count(r"\b(?:LDL|STL)\b"),
        "shared": kernel.metadata.shared,
        "hgmma": count(r"\bHGMMA\b"),
        "hmma": count(r"\bHMMA\b"),
        "loads_16_bytes": count(r"\bLDG(?:STS)?\.E\.(?:\w+\.)*128\b") + count(r"\bUTMALDG\b"),
        # two bytes of a mask in an epilogue are no harm; a loop that reads its operands so is
        "loads_2_bytes": count(r"\bLDG(?:STS)?\.E\.(?:\w+\.)*[US]16\b", hot_part(sass)),
        # a left operand that is a tensor, not a memory descriptor, comes from registers
        "dots_from_registers": len(re.findall(r"warp_group_dot [^\n]*: tensor<", ttgir)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--op", choices=OPS, help="only this one")
    parser.add_argument("archs", nargs="*", type=int, metavar="ARCH")
    args = parser.parse_args()
    lines = []
    with ThreadPoolExecutor(2) as pool:
        for arch in args.archs or ((80, HOPPER, 100) if args.write else (HOPPER,)):
            found = list(compiled_kernels(arch, [args.op] if args.op else OPS))
            usages = pool.map(resources, [kernel for *_, kernel in found])
            for (op, launch, config, kernel), usage in zip(found, usages, strict=True):
                names = {"sm": arch, "op": op, "kernel": kernel.metadata.name, "launch": launch}
                versions = {"triton": triton.__version__}
                lines.append(json.dumps(names | {"config": config} | usage | versions))
    if args.write:
        TABLE.write_text("".join(line + "\n" for line in sorted(set(lines))))
    else:
        sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

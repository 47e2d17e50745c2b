"""Compile the Triton kernels for GPUs without having one, and print registers and spills. See docs/gpu.md.

    python tools/benchmarks/kernels.py
    python tools/benchmarks/kernels.py --architecture 90

Spilled registers are kept in memory, which is slow. The RoI layers are compiled for four levels with 256 channels in
bfloat16, and 7 x 7 bins.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maskrcnn.ops.kernels import Pooling, nms, roi
from maskrcnn.ops.roi import RoIAlignConfig, RoIPoolConfig, RoIWarpConfig
from maskrcnn.runtime.console import run_main

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
LEVELS, SIZE, MAP = 4, 7, "bf16"

LAYERS = {
    "roi_align": RoIAlignConfig().pooling(),
    "roi_align, one point per cell": RoIAlignConfig(sampling_ratio=0).pooling(),
    "roi_align, maximum": RoIAlignConfig(aggregate="maximum").pooling(),
    "roi_warp": RoIWarpConfig().pooling(),
    "roi_pool": RoIPoolConfig().pooling(),
    "roi_pool, floor": RoIPoolConfig(rounding="floor").pooling(),
}


class Source(NamedTuple):
    """A kernel with the types of its arguments and the values of its constants."""

    kernel: Any
    types: Mapping[str, str | tuple[str, ...]]  # as in Triton: *fp32 is a pointer
    constants: Mapping[str, Any]
    launch: Mapping[str, Any]  # options


class Usage(NamedTuple):
    """What a compiled kernel uses."""

    registers: int  # of a thread
    spill_stores: int  # bytes of a thread
    spill_loads: int
    shared: int  # bytes of a program
    threads: int  # of a program


def sources() -> Iterator[tuple[str, Source]]:
    """Yield the name of each kernel, and the kernel."""
    integers = dict.fromkeys(("classes", "counts", "kept"), "*i64")
    types = {"boxes": "*fp32", **integers, "threshold": "fp32", "length": "i32", "limit": "i32"}
    yield "nms", Source(nms.greedy_nms_kernel, types, {"BLOCK": nms.BLOCK}, nms.LAUNCH)
    for name, pooling in LAYERS.items():
        yield f"{name}, forward", _of_layer(pooling, backward=False)
        yield f"{name}, backward", _of_layer(pooling, backward=True)


def _of_layer(pooling: Pooling, *, backward: bool) -> Source:
    results = {"sums": ("*fp32",) * LEVELS, "grad": f"*{MAP}"} if backward else {"pooled": f"*{MAP}"}
    kernel = roi.pool_backward_kernel if backward else roi.pool_kernel
    types = {
        "maps": (f"*{MAP}",) * LEVELS,
        **results,
        "heights": ("fp32",) * LEVELS,
        "widths": ("fp32",) * LEVELS,
        "scales": ("fp32",) * LEVELS,
        "boxes": "*fp32",
        "images": "*i64",
        "levels": "*i64",
        "channels": "i32",
    }
    settings = {name.upper(): value for name, value in pooling._asdict().items()}
    return Source(kernel, types, {"SIZE": SIZE, **settings, "BLOCK": roi.CHANNELS}, roi.LAUNCH)


def compile_kernel(source: Source, architecture: int) -> Usage:
    """Compile a kernel for a GPU, such as 90 for an H100."""
    signature = {**source.types, **dict.fromkeys(source.constants, "constexpr")}
    compiled = triton.compile(
        ASTSource(source.kernel, signature, dict(source.constants), attrs=dict(_aligned(source.types))),
        target=GPUTarget("cuda", architecture, 32),
        options=dict(source.launch),
    )
    registers, stores, loads = _usage(compiled.asm["ptx"], architecture)
    return Usage(registers, stores, loads, compiled.metadata.shared, 32 * compiled.metadata.num_warps)


def _aligned(types: Mapping[str, str | tuple[str, ...]]) -> Iterator[tuple[tuple[int, ...], list]]:
    """Yield the arguments that are multiples of 16 bytes, or 16 channels, as they are when a model runs."""
    divisible = [["tt.divisibility", 16]]
    for index, (name, kind) in enumerate(types.items()):
        if isinstance(kind, tuple):
            yield from (((index, inner), divisible) for inner, each in enumerate(kind) if each.startswith("*"))
        elif kind.startswith("*") or name == "channels":
            yield (index,), divisible


def _usage(ptx: str, architecture: int) -> tuple[int, int, int]:
    """Return registers, and bytes of spill stores and loads, as the assembler of NVIDIA in Triton's package counts."""
    nvidia = triton.knobs.nvidia
    assembler = (nvidia.ptxas_blackwell if architecture >= 100 else nvidia.ptxas).path
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [assembler, "-v", "--fmad=false", f"--gpu-name={target[1]}", str(path), "-o", f"{path}.cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spills is not None, report
    assert registers is not None, report
    return int(registers[1]), int(spills[1]), int(spills[2])


def run(argv: Sequence[str] | None = None) -> None:
    """Print a table of all kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, help="by default all of them")
    args = parser.parse_args(argv)
    architectures = [args.architecture] if args.architecture else ARCHITECTURES
    print(f"Triton {triton.__version__}, torch {torch.__version__}\n")
    print("| kernel | GPU | threads of a program | registers | spill stores, loads | shared memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, source in sources():
        for architecture in architectures:
            usage = compile_kernel(source, architecture)
            spills = f"{usage.spill_stores}, {usage.spill_loads}"
            print(f"| {name} | sm_{architecture} | {usage.threads} | {usage.registers} | {spills} | {usage.shared} |")


if __name__ == "__main__":
    run_main(run)

"""Count the operations of a training step on a GPU and the bytes that they read and write. No GPU is needed.

    python tools/benchmarks/gpu_counts.py configs/coco/mask_rcnn_r50_fpn_1x.yaml

Fake tensors stand for those on a GPU (gpu_audit.py). Counted is the second of two steps of the training loop, with
clipping, averaged weights and diagnostics. An operation of torch that computes something is one kernel or a few; views
and allocations are not counted. The bytes are those of its tensors, each of which is read or written once, and where it
reads rows of a table, those of the rows; caches are not taken into account. Fake tensors hide some of what is grouped
on a GPU: there, clipping takes a few kernels for all gradients, not two for each.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, ClassVar
from unittest import mock

import gpu_audit
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from maskrcnn.cli.arguments import add_config_arguments, whole_number
from maskrcnn.config import read_config
from maskrcnn.engine.step import TrainingStep
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.runtime.console import run_main

NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
READS_ROWS = ("index", "gather", "embedding", "index_select")  # of their first tensor


class _Counting(gpu_audit._Operations):
    """Counts operations and bytes by part, since the newest step began."""

    operations: ClassVar[Counter[str]] = Counter()
    bytes: ClassVar[Counter[str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        returned = func._schema.returns
        is_view = bool(returned) and all(each.alias_info and not each.alias_info.is_write for each in returned)
        name = func.overloadpacket.__name__
        read = (result, *args[1:]) if name in READS_ROWS else args
        tensors = [value for value in tree_leaves((read, kwargs, result)) if isinstance(value, Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors)
        if on_gpu and not is_view and func.namespace != "prim" and name not in NO_KERNEL:
            place = _part(gpu_audit._place())
            self.operations[place] += 1
            self.bytes[place] += sum(map(_stored_bytes, tensors))
        return result


def _stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; an element that is repeated by strides of 0 counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return tensor.element_size() * torch.Size(sizes).numel()


def _part(place: str) -> str:
    """Return the file of a place in the forward pass; the backward pass is one part."""
    return "backward pass" if place.startswith("backward of") else str(PurePath(place.partition(":")[0]))


def count(config: ExperimentConfig, shape: gpu_audit.Shape) -> tuple[Counter[str], Counter[str]]:
    """Return the operations and bytes of a training step, by part."""
    start = TrainingStep.start

    def counted(step: TrainingStep, *arguments: Any, **options: Any) -> None:
        _Counting.operations.clear()
        _Counting.bytes.clear()
        start(step, *arguments, **options)

    with (
        mock.patch.object(gpu_audit, "_Operations", _Counting),
        mock.patch.object(TrainingStep, "start", counted),
    ):
        gpu_audit.audit_training(config, shape, iterations=2)
    return Counter(_Counting.operations), Counter(_Counting.bytes)


def run(argv: Sequence[str] | None = None) -> None:
    """Print the counts as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    for name, default in gpu_audit.Shape(batch=16)._asdict().items():
        parser.add_argument(f"--{name}", type=whole_number(1, 2**16), default=default)
    args = parser.parse_args(argv)
    config = read_config(args.config, ExperimentConfig, args.overrides)
    operations, amounts = count(config, gpu_audit.Shape(args.batch, args.objects, args.height, args.width))
    print("| part | operations | GB |\n| --- | ---: | ---: |")
    for part, number in operations.most_common():
        print(f"| {part} | {number} | {amounts[part] / 1e9:.2f} |")
    print(f"| **all** | {operations.total()} | {amounts.total() / 1e9:.1f} |")


if __name__ == "__main__":
    run_main(run)

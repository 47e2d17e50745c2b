"""List where training and inference on a GPU make the host wait for it. No GPU is needed.

    python tools/benchmarks/gpu_audit.py configs/coco/mask_rcnn_r50_fpn_1x.yaml
    python tools/benchmarks/gpu_audit.py configs/shapes/mask_rcnn_r18_fpn.yaml --batch 2 --height 256 --width 256

`FakeTensorMode` gives tensors that say they are on a GPU and have shapes, but no values. An operation that makes the
host wait is recorded with the line of this project that called it: one whose result depends on values of the GPU in
shape or as a number, and a blocking copy. It gets a plausible result, so that one run finds all of them.

Audited are three iterations of the training loop with clipping, averaged weights and a log record each, and `detect`.
The operations that the GPU runs are counted, too: each starts at least one kernel, if nothing is compiled. Not audited:
the loading of batches, several processes, and what `detect` returns on its way to the host.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskrcnn.cli.arguments import add_config_arguments, whole_number
from maskrcnn.config import read_config
from maskrcnn.engine import loop
from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.ema import ExponentialAverage
from maskrcnn.engine.metrics import SilentWriter
from maskrcnn.engine.step import TrainingStep
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.runtime.console import run_main
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import AxisAlignedMap, Batch, ImageBatch, MaskTables, Targets

PACKAGE = Path(__file__).parents[2] / "maskrcnn"
aten = torch.ops.aten


class Waits(Counter[tuple[str, str]]):
    """How often the host waits: (`models/rpn.py:12`, operation)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0  # of the GPU, without views and new tensors that are not filled

    def clear(self) -> None:
        """Begin again."""
        super().clear()
        self.operations = 0


class Shape(NamedTuple):
    """The size of the audited batch."""

    batch: int = 2  # images
    objects: int = 25  # in each image
    height: int = 800  # px, a multiple of the model's `size_divisor`
    width: int = 1344


# ---- What is audited


def audit_training(config: ExperimentConfig, shape: Shape, *, iterations: int = 3) -> Waits:
    """Count the synchronisations of so many iterations of the training loop, each of which is logged."""
    model = config.model.build(num_classes=80, pretrained=False)
    with audit(autocast=config.training.precision == "bf16") as waits:
        to_fake_gpu(model)
        batch = _batch(shape)
        device = torch.device("cuda")
        optimizer = config.training.optimizer.build(model, batch_size=shape.batch)
        state = TrainingState(model, optimizer, average=ExponentialAverage(model, decay=0.999))
        skips = config.training.skip_non_finite
        step = TrainingStep(state, Processes(device), clip_norm=1.0, skips=skips)
        waits.clear()  # those of the preparation happen once
        counted = Waits()

        def load() -> Iterator[list[Batch]]:
            yield from itertools.repeat([batch], iterations)
            counted.update(waits)  # before the loop ends, for which the host waits
            counted.operations = waits.operations
            raise _Enough

        with contextlib.suppress(_Enough):
            loop.train(
                step,
                load(),
                lambda iteration: 1.0,
                start=0,
                iterations=iterations + 1,
                intervals=loop.Intervals(log=1),
                writer=SilentWriter(),
            )
    return counted


class _Enough(Exception):  # noqa: N818 (not an error)
    """Ends the training loop."""


def audit_detection(config: ExperimentConfig, shape: Shape) -> Waits:
    """Count the synchronisations of `MaskRCNN.detect`."""
    model = config.model.build(num_classes=80, pretrained=False).eval()
    with audit(autocast=config.training.precision == "bf16") as waits:
        to_fake_gpu(model)
        images = _batch(shape).images.to("cuda")
        waits.clear()
        model.detect(images)
    return waits


def _batch(shape: Shape) -> Batch:
    """Return a batch without values, on the host."""
    count, objects, height, width = shape
    boxes = torch.empty(count, objects, 4)
    labels = torch.empty(count, objects, dtype=torch.int64)
    pairs = torch.empty(count, objects, 2)
    masks = MaskTables(
        torch.empty(1000, dtype=torch.int32), torch.empty_like(labels), pairs.long(), pairs, torch.empty(count, 2)
    )
    return Batch(
        image_ids=tuple(range(count)),
        images=ImageBatch(
            torch.empty(count, 3, height, width, dtype=torch.uint8),
            torch.empty(count, 2, dtype=torch.int64),
            torch.empty(count, dtype=torch.int64),
        ),
        targets=Targets(boxes, labels, masks, labels.bool()),
        maps=(AxisAlignedMap(),) * count,
        original_sizes=((height, width),) * count,
    )


# ---- How


@contextlib.contextmanager
def audit(*, autocast: bool = False) -> Iterator[Waits]:
    """Count the synchronisations in the block, in which tensors can be created on the device "cuda".

    Args:
        autocast: use bfloat16 autocast; `torch.autocast` disables itself on a machine without a GPU.
    """
    waits = Waits()
    with ExitStack() as stack:
        for owner, name, replacement in (
            (Tensor, "backward", _backward),
            (FakeTensor, "tolist", _tolist(waits)),
            (torch.cuda, "Event", _event(waits)),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (loop, "peak_memory", lambda device: 0.0),
            (loop, "logger", mock.Mock()),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_Operations(waits))
        stack.enter_context(_autocast(enabled=autocast))
        yield waits


def describe(waits: Waits) -> str:
    """Return one line for each place."""
    return "\n".join(f"{place}: {operation}, {count} times" for (place, operation), count in waits.items())


def to_fake_gpu(model: nn.Module) -> None:
    """Replace parameters and buffers by fake ones on a GPU, with the same strides; call it inside `audit`."""
    replaced: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            strided = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
            is_parameter = isinstance(tensor, nn.Parameter)
            replaced[id(tensor)] = nn.Parameter(strided, tensor.requires_grad) if is_parameter else strided
        return replaced[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})


# ---- What makes the host wait


class _Operations(TorchDispatchMode):
    """Records operations whose result depends on values, and copies between host and GPU that block; counts all."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = self._run(func, args, kwargs)
        is_free = func.is_view or func.overloadpacket.__name__ in FREE or func.namespace == "prim"
        self.waits.operations += not is_free and any(map(_on_gpu, tree_leaves((args, kwargs, result))))
        return result

    def _run(self, func: Any, args: Sequence, kwargs: dict) -> Any:
        gpu = any(map(_on_gpu, tree_leaves((args, kwargs))))
        if func in SIZED_BY_VALUES:
            if gpu:
                self.waits[_place(), func.overloadpacket.__name__] += 1
            return SIZED_BY_VALUES[func](*args, **kwargs)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default):
            return self._index(func, args, kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copy(func, args, kwargs)
        if func.overloadpacket.__name__.startswith("_fused_"):  # of the optimizers; there is no fake kernel
            return None
        return func(*args, **kwargs)

    def _index(self, func: Any, args: Sequence, kwargs: dict) -> Any:
        if not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            return func(*args, **kwargs)
        if _on_gpu(args[0]):
            self.waits[_place(), f"boolean {func.overloadpacket.__name__}"] += 1
        if func is not aten.index.Tensor:
            return args[0]
        (mask,) = args[1]
        return args[0].new_empty(mask.numel(), *args[0].shape[mask.dim() :])

    def _copy(self, func: Any, args: Sequence, kwargs: dict) -> Any:
        result = func(*args, **kwargs)
        source, target = (args[0], result) if func is aten._to_copy.default else (args[1], args[0])
        asynchronous = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
        if _on_gpu(source) != _on_gpu(target) and not asynchronous:
            self.waits[_place(), "copy to the host" if _on_gpu(source) else "copy to the GPU"] += 1
        return result


def _tolist(waits: Waits) -> Callable[[Tensor], list]:
    def tolist(tensor: Tensor) -> list:
        if _on_gpu(tensor):
            waits[_place(), "tolist"] += 1
        return getattr(tensor, "plausible", None) or np.ones(tuple(tensor.shape)).tolist()

    return tolist


def _event(waits: Waits) -> type:
    """Return a class in place of `torch.cuda.Event`: waiting for an event is fine if a newer one has been recorded."""

    class Event:
        newest: Event | None = None

        def record(self) -> None:
            Event.newest = self

        def synchronize(self) -> None:
            if Event.newest is self:
                waits[_place(), "wait for the newest event"] += 1

    return Event


def _nonzero(tensor: Tensor) -> Tensor:
    return tensor.new_empty(max(1, tensor.numel() // 4), tensor.dim(), dtype=torch.int64)


def _bincount(tensor: Tensor, weights: Tensor | None = None, minlength: int = 1) -> Tensor:
    counts = tensor.new_empty(minlength)
    counts.plausible = [len(tensor), *[0] * (minlength - 1)]  # type: ignore[attr-defined]
    return counts


def _unique(tensor: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    values, inverse = tensor.new_empty(tensor.numel()), torch.empty_like(tensor, dtype=torch.int64)
    return values, inverse, torch.empty_like(values, dtype=torch.int64)


SIZED_BY_VALUES: dict[Any, Callable] = {
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: lambda tensor, mask: tensor.new_empty(tensor.numel()),
    aten._unique2.default: _unique,
    aten.unique_consecutive.default: _unique,
    aten.bincount.default: _bincount,
    aten.repeat_interleave.Tensor: lambda repeats, output_size=None: repeats.new_empty(output_size or len(repeats)),
    aten._local_scalar_dense.default: lambda tensor: 1.0 if tensor.is_floating_point() else 1,
    aten.equal.default: lambda tensor, other: True,
    torch.ops.torchvision.nms.default: lambda boxes, scores, threshold: boxes.new_empty(
        max(1, len(boxes) // 4), dtype=torch.int64
    ),
}


# They start no kernel.
FREE = {"alias", "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


def _on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _place() -> str:
    """Return the innermost line of this project that is being run, or the node of the backward pass."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno}"
        if frame.f_code is _backward.__code__ and "node" in frame.f_locals:
            return f"backward of {frame.f_locals['node'].name()}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside of the project"


@contextlib.contextmanager
def _autocast(*, enabled: bool) -> Iterator[None]:
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


# ---- The backward pass


def _backward(root: Tensor) -> None:
    """Run the backward pass of a scalar. torch's engine asks the driver about the GPU; this loop calls its nodes."""
    gradients: dict[Any, list[Tensor | None]] = {root.grad_fn: [torch.ones_like(root)]}
    with torch.no_grad():
        for node in _topological(root.grad_fn):
            inputs = gradients.pop(node, None)
            if inputs is None:
                continue
            if hasattr(node, "variable"):  # a leaf
                (gradient,) = inputs
                node.variable.grad = gradient if node.variable.grad is None else node.variable.grad + gradient
                continue
            outputs = (node.apply if isinstance(node, BackwardCFunction) else node)(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            # torchvision's kernels take their tensors first; only these have a successor.
            outputs = outputs[: len(node.next_functions)]
            for (successor, number), gradient in zip(node.next_functions, outputs, strict=True):
                if successor is not None and gradient is not None:
                    metadata = successor._input_metadata
                    received = gradients.setdefault(successor, [None] * len(metadata))
                    before, shape = received[number], metadata[number].shape
                    gradient = gradient.sum_to_size(shape).to(metadata[number].dtype)  # after broadcasting
                    received[number] = gradient if before is None else before + gradient


def _topological(root: Any) -> list[Any]:
    """Return the nodes of an autograd graph, each before those that it passes gradients to."""
    order: list[Any] = []
    visited, stack = set(), [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in visited:
            visited.add(node)
            stack.append((node, True))
            stack.extend((successor, False) for successor, _ in node.next_functions if successor is not None)
    return order[::-1]


# ---- The command


def run(argv: Sequence[str] | None = None) -> None:
    """Print the synchronisations of training and of `detect`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    for name, default in Shape()._asdict().items():
        parser.add_argument(f"--{name}", type=whole_number(1, 2**16), default=default)
    args = parser.parse_args(argv)
    config = read_config(args.config, ExperimentConfig, args.overrides)
    shape = Shape(args.batch, args.objects, args.height, args.width)
    training = audit_training(config, shape)
    detection = audit_detection(config, shape)
    for title, waits in (("three training iterations", training), ("detect", detection)):
        print(f"{title}: {waits.total()} synchronisations, {waits.operations} operations\n{describe(waits)}\n")


if __name__ == "__main__":
    run_main(run)

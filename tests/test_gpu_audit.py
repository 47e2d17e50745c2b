"""The training loop and `detect` on a GPU never make the host wait, as far as that shows without a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskrcnn.config import read_config
from maskrcnn.engine import step
from maskrcnn.engine.feeding import copied_to
from maskrcnn.experiment import ExperimentConfig

REPOSITORY = Path(__file__).parents[1]


def load_tool(name: str) -> ModuleType:
    path = REPOSITORY / "tools" / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("gpu_audit")


WAITING: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "where": (lambda x: torch.where(x > 0), "nonzero"),
    "item": (lambda x: x[0, 0].item(), "_local_scalar_dense"),
    "a condition": (lambda x: bool(x.any()), "_local_scalar_dense"),
    "tolist": (lambda x: x.tolist(), "tolist"),
    "a bool index": (lambda x: x[x > 0], "boolean index"),
    "writing at a bool index": (lambda x: x.__setitem__(x > 0, x.flatten()), "boolean index_put_"),
    "numbers to the GPU": (lambda x: x.new_tensor((1.0, 2.0)), "copy to the GPU"),
    "a copy to the host": (lambda x: x.cpu(), "copy to the host"),
    "unique": (lambda x: x.unique(return_inverse=True), "_unique2"),
    "bincount": (lambda x: x.long().flatten().bincount(minlength=3), "bincount"),
    "NMS of torchvision": (lambda x: torch.ops.torchvision.nms(x, x[:, 0], 0.5), "nms"),
}


@pytest.mark.parametrize(("work", "operation"), WAITING.values(), ids=WAITING)
def test_what_waits_is_found(tool: ModuleType, work: Callable[[Tensor], Any], operation: str) -> None:
    with tool.audit() as waits:
        work(torch.empty(8, 4, device="cuda"))
    assert [name for _, name in waits.elements()] == [operation]


def test_what_does_not_wait_is_not_counted(tool: ModuleType) -> None:
    with tool.audit() as waits:
        x = torch.empty(8, 4, device="cuda")
        mask = x > 0.5
        torch.where(mask, x, 0).masked_fill(mask, -torch.inf).topk(3, dim=0)
        x[:, torch.arange(2, device="cuda")] = x[:, :2] * 2
        x.to("cpu", non_blocking=True)
        torch.empty(3).to("cuda", non_blocking=True)
        torch.empty(3).nonzero()  # on the host
    assert not waits


def test_the_backward_pass_runs(tool: ModuleType) -> None:
    with tool.audit() as waits:
        layers = nn.Sequential(nn.Linear(3, 5, device="cuda"), nn.ReLU(), nn.Linear(5, 2, device="cuda"))
        outputs = layers(torch.empty(4, 3, device="cuda"))
        rows = outputs[torch.empty(6, dtype=torch.int64, device="cuda")]  # used twice, and broadcast
        (outputs.sum() + (rows * torch.ones((), device="cuda", requires_grad=True)).mean()).backward()
    assert not waits
    for parameter in layers.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape


def test_operations_of_the_gpu_are_counted(tool: ModuleType) -> None:
    with tool.audit() as waits:
        x = torch.empty(8, 4, device="cuda")
        (x.view(4, 8).t() + 1).sum()
        torch.zeros(3) + 1  # on the host
        torch.zeros(3, device="cuda")
    assert waits.operations == 3


def test_kernels_need_fewer_operations(tool: ModuleType) -> None:
    shape = tool.Shape(batch=2, objects=3, height=64, width=64)
    training, detection = [], []
    for kernels in ("torchvision", "triton"):
        config = read_config(REPOSITORY / "tests" / "tiny_fpn.yaml", ExperimentConfig, [f"model.kernels={kernels}"])
        training.append(tool.audit_training(config, shape, iterations=1))
        detection.append(tool.audit_detection(config, shape))
    for without, with_kernels in (training, detection):
        assert not with_kernels, tool.describe(with_kernels)
        assert with_kernels.operations < without.operations - 100


def test_a_training_iteration_has_no_synchronisation(tool: ModuleType) -> None:
    config = read_config(REPOSITORY / "tests" / "tiny_fpn.yaml", ExperimentConfig)
    waits = tool.audit_training(config, tool.Shape(batch=2, objects=3, height=64, width=64))
    assert not waits, tool.describe(waits)


MODELS = {
    "c4": [
        "model.backbone={out_features: [res4], res5_on_regions: true}",
        "model.box_head={kind: mean}",
        "model.mask_head={kind: fcn, pool_size: 14, depth: 0}",
    ],
    "dc5 in bf16": ["model.backbone.res5_dilation=2", "training.precision=bf16"],
    "vgg": [
        "model.backbone={kind: vgg, depth: 11, out_features: [conv5], weights: none}",
        "model.mask_head=null",
        "evaluation.best_metric=box/AP",
    ],
    "roi_warp": ["model.roi={kind: roi_warp, aggregate: maximum}", "training.skip_non_finite=2"],
    "roi_pool": ["model.roi={kind: roi_pool, rounding: floor}", "model.mask_head={kind: mlp, output: softmax}"],
    "adaptive": ["model.roi={kind: roi_align, sampling_ratio: 0}", "model.mask_head.class_agnostic=true"],
    "torchvision": ["model.mask_head.target=torchvision", "model.roi={kind: roi_pool}", "model.rpn.sparse_loss=false"],
    "adamw": ["training.optimizer={kind: adamw}", "model.loss_normalizer=batch"],
    "triton, one map": ["model.kernels=triton", "model.roi={kind: roi_warp, aggregate: maximum}"],
    "triton, bf16": ["model.kernels=triton", "model.roi={kind: roi_pool}", "training.precision=bf16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_no_kind_of_model_has_a_synchronisation(tool: ModuleType, settings: list[str]) -> None:
    config = read_config(REPOSITORY / "tests" / "tiny.yaml", ExperimentConfig, settings)
    shape = tool.Shape(batch=2, objects=3, height=64, width=64)
    waits = tool.audit_training(config, shape, iterations=1) + tool.audit_detection(config, shape)
    assert not waits, tool.describe(waits)


def test_batches_are_copied_beside_the_steps(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream of their own, for which the step waits, and not the host."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = "main" if name == "main" else "side"

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def used(stream: Stream) -> Iterator[None]:
        calls.append(f"on {stream.name}")
        yield

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", used)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: calls.append(f"used by {stream.name}"))
    with tool.audit() as waits:
        batch = tool._batch(tool.Shape(batch=2, objects=3, height=64, width=64))
        ((copied,),) = copied_to(torch.device("cuda"), [[batch]])
        tensors = [*copied.images.tensors(), *copied.targets.tensors()]
        assert all(tensor.is_cuda for tensor in tensors)
    assert not waits, tool.describe(waits)
    assert calls == ["on side", "on side", "main waits for side", *["used by main"] * len(tensors)]
    loader = [[batch]]
    assert copied_to(torch.device("cpu"), loader) is loader


def test_a_wait_for_the_newest_step_is_found(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "LAG", 0)
    config = read_config(REPOSITORY / "tests" / "tiny_fpn.yaml", ExperimentConfig)
    waits = tool.audit_training(config, tool.Shape(batch=1, objects=1, height=64, width=64), iterations=1)
    assert [name for _, name in waits.elements()] == ["wait for the newest event"]


def test_detection_has_no_synchronisation(tool: ModuleType) -> None:
    config = read_config(REPOSITORY / "tests" / "tiny_fpn.yaml", ExperimentConfig)
    waits = tool.audit_detection(config, tool.Shape(batch=2, objects=3, height=64, width=64))
    assert not waits, tool.describe(waits)


def test_operations_and_bytes_are_counted(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second step, in which folded norms and anchors are there already."""
    monkeypatch.setitem(sys.modules, "gpu_audit", tool)
    counts = load_tool("gpu_counts")
    config = read_config(REPOSITORY / "tests" / "tiny_fpn.yaml", ExperimentConfig)
    operations, amounts = counts.count(config, tool.Shape(batch=1, objects=2, height=64, width=64))
    assert operations["backward pass"] > 100
    assert amounts["models/backbones/resnet.py"] > 0
    assert "ops/anchors.py" not in operations
    repeated = torch.zeros(3, 1).expand(3, 100)
    assert counts._stored_bytes(repeated) == 12

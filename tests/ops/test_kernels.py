"""The Triton kernels, as far as they can be tested without a GPU: in an interpreter, and compiled."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from launcher import Launcher
from pydantic import ValidationError

from maskrcnn.errors import InputError
from maskrcnn.models.mask_rcnn import MaskRCNNConfig
from maskrcnn.ops import kernels
from maskrcnn.ops.roi import RoILayerConfig, RoIPoolConfig

REPOSITORY = Path(__file__).parents[2]
GPU, CPU = torch.device("cuda"), torch.device("cpu")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch has no Triton on Windows")


@needs_triton
@pytest.mark.parametrize("selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_results_in_the_interpreter(selection: str) -> None:
    """In a new process, since Triton must know that it interprets when it is imported."""
    launcher = Launcher()
    ended = launcher.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", selection, "tests/ops/kernels_interpreted.py",
        environment={"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    launcher.close()
    assert ended.status == 0, ended.out + ended.err


# ---- Compiled


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = REPOSITORY / "tools" / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("kernels_tool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@needs_triton
@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("name", ["roi_align, forward", "roi_align, backward"])
def test_compiled_for_an_h100(name: str, tool: ModuleType) -> None:
    usage = tool.compile_kernel(dict(tool.sources())[name], 90)
    assert usage.registers < 128
    assert usage.spill_stores == usage.spill_loads == 0


@needs_triton
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_all_are_compiled_without_spills(architecture: int, tool: ModuleType) -> None:
    for name, source in tool.sources():
        usage = tool.compile_kernel(source, architecture)
        assert usage.spill_stores == usage.spill_loads == 0, name


@needs_triton
def test_the_table(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tool, "compile_kernel", lambda source, architecture: tool.Usage(60, 0, 8, 512, 32))
    tool.run(["--architecture", "90"])
    out = capsys.readouterr().out
    assert "| roi_pool, floor, backward | sm_90 | 32 | 60 | 0, 8 | 512 |" in out
    assert out.count("| sm_90 |") == 13


class H100:
    """Stands for the driver of a GPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@needs_triton
@pytest.mark.usefixtures("compiled_anew")
def test_a_launch_compiles_a_kernel_once_for_maps_of_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the launch itself."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from maskrcnn.ops.kernels import roi

    compiled, original = [], JITFunction.run

    def run(self: JITFunction, *arguments: Any, warmup: bool, **options: Any) -> None:
        compiled.append(original(self, *arguments, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(driver, "_active", H100())
    none = torch.zeros(3, dtype=torch.int64)
    for height, width in ((48, 64), (49, 80)):
        maps = [torch.zeros(2, 256, height // step, width // step).requires_grad_() for step in (1, 2)]
        pooling = kernels.Pooling("average", samples=2)
        pooled = roi.pool_levels(maps, torch.zeros(3, 4), none, none, stride=4, size=2, pooling=pooling)
        pooled.sum().backward()
    forward, backward, *again = compiled
    assert again == [forward, backward]
    assert "st.global" in forward.asm["ptx"]
    assert "atom.global" in backward.asm["ptx"]


# ---- The key `model.kernels`


def test_auto_takes_the_operators_that_gpus_have_run() -> None:
    assert MaskRCNNConfig().kernels == "auto"
    assert not kernels.uses_triton("auto")
    assert not kernels.uses_triton("torchvision")
    assert kernels.uses_triton("triton")
    with pytest.raises(ValidationError, match=r"'auto', 'torchvision' or 'triton'"):
        MaskRCNNConfig.model_validate({"kernels": "cuda"})


TINY = {
    "backbone": {"kind": "resnet", "depth": 18, "width": 8, "weights": "none"},
    "neck": {"kind": "fpn", "channels": 8},
    "box_head": {"kind": "fc", "width": 8},
    "mask_head": {"kind": "fcn", "depth": 1, "width": 8, "roi": {"kind": "roi_pool", "rounding": "floor"}},
}


def test_the_key_reaches_nms_and_roi_layers() -> None:
    model = MaskRCNNConfig.model_validate(TINY | {"kernels": "triton"}).build(2)
    assert model.rpn.selector.triton
    assert model.selector.triton
    assert model.box_pooler.pooling == kernels.Pooling("average", samples=2)
    assert model.mask_pooler.pooling == kernels.Pooling("cells", "floor")
    model = MaskRCNNConfig.model_validate(TINY).build(2)
    assert not model.rpn.selector.triton
    assert not model.selector.triton
    assert model.box_pooler.pooling is model.mask_pooler.pooling is None


def test_a_layer_of_another_package_needs_no_kernel() -> None:
    assert RoILayerConfig.pooling(RoIPoolConfig()) is None


@pytest.mark.parametrize("choice", ["auto", "torchvision"])
def test_operators_of_torchvision_run_everywhere(choice: kernels.Kernels) -> None:
    kernels.require(choice, CPU, deterministic=True)


def test_kernels_that_cannot_run_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"needs a GPU of CUDA, but the device is cpu; set model\.kernels to auto"):
        kernels.require("triton", CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"triton is not installed here; set model\.kernels to auto"):
        kernels.require("triton", GPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    kernels.require("triton", GPU)
    with pytest.raises(InputError, match=r"deterministic is true.*any order"):
        kernels.require("triton", GPU, deterministic=True)


def test_the_package_can_be_imported_without_triton() -> None:
    package = REPOSITORY / "maskrcnn"
    importing = [path for path in package.rglob("*.py") if "import triton" in path.read_text(encoding="utf-8")]
    assert sorted(path.relative_to(package).as_posix() for path in importing) == [
        "ops/kernels/nms.py",
        "ops/kernels/roi.py",
    ]

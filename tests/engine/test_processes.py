"""Two processes compute the same as one process with the batches of both.

The first half of this file is the worker: `python tests/engine/test_processes.py OUT DEVICE`, started twice with
the environment variables of torchrun, calls `work` and writes the results of the main process to OUT.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from launcher import Launcher
from PIL import Image
from torch import Tensor

from maskrcnn.data.loader import BatchSampler, training_loader
from maskrcnn.data.transforms import Compose, HorizontalFlip, RandomApply, Resize
from maskrcnn.engine.checkpoint import TrainingState, load_checkpoint
from maskrcnn.engine.graphs import Execution
from maskrcnn.engine.metrics import read_records
from maskrcnn.engine.optimizer import SGDConfig, set_learning_rate
from maskrcnn.engine.step import TrainingStep
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.models.mask_rcnn import MaskRCNNConfig
from maskrcnn.models.norms import SyncBatchNorm, build_norm
from maskrcnn.runtime.processes import Exchange, Processes, is_shared, processes, sum_over_processes
from maskrcnn.structures import ClassTable, Example, MaskCrop

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
WORLD = 2
STEPS = 6
BATCH = 4  # images over all processes
IMAGES = STEPS * BATCH  # one epoch: each image is used once

SIDE = 64  # px

# The last layers start near zero, so that the steps amplify no rounding.
SMALL: dict[str, Any] = {
    "rpn": {
        "anchor_sizes": [[8], [16], [32], [48], [64]],
        "training": {"pre_nms_top_n": 30, "post_nms_top_n": 20},
        "inference": {"pre_nms_top_n": 30, "post_nms_top_n": 10},
        "batch_size_per_image": 16,
    },
    "sampling": {"batch_size_per_image": 16},
    "box_head": {"kind": "fc", "width": 16, "initialization": "detectron2"},
    "mask_head": {"kind": "fcn", "depth": 1, "width": 8, "initialization": "detectron2"},
    "detection": {"score_threshold": 0.0, "detections_per_image": 5},
}
RESNET: dict[str, Any] = {"kind": "resnet", "depth": 18, "width": 8, "freeze": 0, "weights": "none"}
FPN: dict[str, Any] = {"backbone": {**RESNET, "norm": "none"}, "neck": {"kind": "fpn", "channels": 32}}
SYNC = {
    "backbone": {**RESNET, "norm": "sync_bn"},
    "neck": {"kind": "fpn", "channels": 32, "norm": "sync_bn"},
}
C4 = {
    "backbone": {**RESNET, "out_features": ["res4"], "res5_on_regions": True, "norm": "sync_bn"},
    "neck": {"kind": "none"},
    "rpn": {**SMALL["rpn"], "anchor_sizes": [[8, 16, 32, 48]]},
    "box_head": {"kind": "mean", "initialization": "detectron2"},
    # With its own RoI layer, stage 5 and its norms run on the positives only, of which there may be none.
    "mask_head": {
        "kind": "fcn",
        "depth": 0,
        "width": 8,
        "initialization": "detectron2",
        "roi": {"kind": "roi_align", "sampling_ratio": 1},
    },
}


class Training(NamedTuple):
    """A training to compare."""

    model: Mapping[str, Any]  # model settings
    empty: bool = False  # whether the images of the second process have no objects
    accumulation_steps: int = 1  # of each of two processes
    exchange: Exchange = "fp32"
    # Small if norms of few RoIs amplify rounding, which soon changes the selected proposals.
    lr: float = 0.02


TRAININGS = {
    "frozen norms": Training({**FPN, "backbone": {**RESNET, "norm": "frozen_bn"}}),
    "group norm": Training({**FPN, "neck": {"kind": "fpn", "channels": 32, "norm": "gn"}}),
    "one process without objects": Training(FPN, empty=True),
    "gradient accumulation": Training(FPN, accumulation_steps=2),
    "gradients sent in bf16": Training(FPN, exchange="bf16"),
    "shared batch norm": Training(SYNC, lr=0.002),
    "shared batch norm of regions, one process without objects": Training(C4, empty=True, lr=0.002),
}


# ---- The worker


class Noise:
    """Noise images of one size with one to three objects each; if `empty`, those of the second process have none."""

    classes = ClassTable(("a", "b", "c"), (1, 2, 3))

    def __init__(self, empty: bool) -> None:
        stream = BatchSampler(self.image_sizes(), batch_size=BATCH, seed=0, rank=1, world=WORLD)
        second_process = {draw.image for draws in islice(stream, STEPS) for draw in draws}
        assert len(second_process) == IMAGES // WORLD
        self._empty: set[int] = second_process if empty else set()

    def __len__(self) -> int:
        return IMAGES

    def image_sizes(self) -> np.ndarray:
        return np.full((IMAGES, 2), SIDE)

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        pixels = torch.from_numpy(rng.integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8))
        count = 0 if index in self._empty else int(rng.integers(1, 4))
        corners = rng.integers(0, SIDE // 2, (count, 2))
        boxes = np.concatenate([corners, corners + rng.integers(8, SIDE // 2, (count, 2))], axis=1)
        masks = tuple(MaskCrop(x1, y1, np.tri(y2 - y1, x2 - x1, dtype=np.uint8)) for x1, y1, x2, y2 in boxes.tolist())
        labels = torch.from_numpy(rng.integers(1, 4, count))
        return Example(index, pixels, torch.tensor(boxes, dtype=torch.float32), labels, masks)


def train(group: Processes, name: str) -> dict[str, Tensor]:
    """Train with momentum and gradient clipping; return the state dict."""
    training = TRAININGS[name]
    torch.manual_seed(group.rank)  # the initial weights differ until the model is wrapped
    model = MaskRCNNConfig.model_validate({**SMALL, **training.model}).build(3)
    optimizer = SGDConfig(lr=training.lr, base_batch=BATCH).build(model, batch_size=BATCH)
    state = TrainingState(model, optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
    execution = Execution(gradient_exchange=training.exchange, accumulates=training.accumulation_steps > 1)
    step = TrainingStep(state, group, clip_norm=1.0, execution=execution)
    loader = training_loader(
        Noise(training.empty),  # type: ignore[arg-type]  # training needs only these methods of a dataset
        Compose((RandomApply(HorizontalFlip(), 0.5), Resize((SIDE,), SIDE))),
        batch_size=BATCH,
        seed=0,
        workers=0,
        size_divisor=model.size_divisor,
        rank=group.rank,
        world=group.world,
        grad_accum_steps=training.accumulation_steps if group.world > 1 else 1,
    )
    norms = []
    for iteration, batches in enumerate(islice(loader, STEPS), start=1):
        set_learning_rate(optimizer, 1.0)
        norms.append(step(batches, iteration).gradient_norm)
    assert max(norms) > 1, "no gradient was clipped"
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def evaluation(group: Processes, out: Path) -> dict[str, Any]:
    """Evaluate five images in batches of two: three on the first process, two on the second."""
    scenes = {"kind": "shapes", "length": 5, "height": SIDE, "width": SIDE}
    config = ExperimentConfig.model_validate(
        {
            "model": {**SMALL, **FPN, "backbone": {**RESNET, "norm": "bn"}},
            "data": {
                "train": scenes,
                "validation": scenes,
                "validation_transforms": [{"kind": "resize", "short_side": [SIDE], "long_side": SIDE}],
            },
            "training": {"workers": 0},
            "evaluation": {"batch_size": 2},
        }
    )
    torch.manual_seed(3)
    dataset = config.data.build_validation()
    model = config.model.build(len(dataset.classes))
    if not group.is_main:  # as running statistics differ between processes
        for buffer in model.buffers():
            buffer += 1
    metrics, _ = config.evaluator(dataset).timed(config.predictor(model, dataset.classes), out, group)
    return {"all": group.gather(json.dumps(metrics.summary()))}


def collectives(group: Processes) -> dict[str, Any]:
    rank = group.rank
    values = torch.tensor([1.0, float(rank)], requires_grad=True)
    (sum_over_processes(values) * (rank + 1)).sum().backward()
    return {
        "max": group.max(3 * rank),
        "any": [group.any(False), group.any(rank == 1), group.any(True)],
        "any on device": [bool(group.any_on_device(torch.tensor(flag))) for flag in (False, rank == 1, True)],
        "gather": group.gather({"rank": rank}),
        "broadcast": group.gather(group.broadcast(f"from {rank}")),
        "from_main": group.gather(group.from_main(lambda: os.environ["RANK"])),
        "mean": group.gather(group.mean(torch.tensor([rank, 4.0])).tolist()),
        "not finite": group.gather(group.mean(torch.tensor([float("nan") if rank else 1.0])).tolist()),
        "gradient of a sum": group.gather(values.grad.tolist() if values.grad is not None else None),
    }


def normalised(norm: torch.nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of `norm`, and the gradient of a weighted sum of it with respect to `features`."""
    features = features.detach().requires_grad_()
    output = norm(features)
    weights = torch.arange(output[0].numel(), device=output.device).view_as(output[0])
    (output * weights).sum().backward()
    assert features.grad is not None
    return output.detach().cpu(), features.grad.cpu()


def norm_on_gpus(group: Processes, out: Path) -> None:
    """Normalize six feature maps: five on the first process and one on the second, then six and none."""
    torch.manual_seed(0)
    features = torch.randn(6, 4, 3, 3).to(group.device)
    for first in (5, 6):
        norm = build_norm("sync_bn", 4).to(group.device)
        local_features = features[:first] if group.is_main else features[first:]
        results = group.gather(normalised(norm, local_features))
        if results is not None:
            output, gradient = (torch.cat(tensors) for tensors in zip(*results, strict=True))
            state = {name: value.cpu() for name, value in norm.state_dict().items()}
            torch.save({"output": output, "gradient": gradient, "state": state}, out / f"{first}.pt")


def work(group: Processes, out: Path) -> None:
    if group.device.type == "cuda":
        norm_on_gpus(group, out)
        return
    results = {
        "trainings": {name: train(group, name) for name in TRAININGS},
        "evaluation": evaluation(group, out),
        "collectives": collectives(group),
    }
    if group.is_main:
        torch.save(results, out / "results.pt")


if __name__ == "__main__":
    warnings.simplefilter("error")
    folder, device = sys.argv[1:]
    with processes(torch.device(device)) as joined:
        work(joined, Path(folder))
    sys.exit()


# ---- Tests


def run(launcher: Launcher, out: Path, device: str) -> None:
    """Start this file twice, as torchrun would, and check that both succeed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": "tests"}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(WORLD)]
    running = [launcher.start(__file__, out, device, environment=rank) for rank in ranks]
    try:
        ended = [process.end() for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.status for process in ended] == [0] * WORLD, "\n".join(process.err for process in ended)


@pytest.fixture(scope="module")
def two_processes(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of two processes."""
    out = tmp_path_factory.mktemp("two_processes")
    run(launcher, out, "cpu")
    return out


@pytest.fixture(scope="module")
def results_of_two(two_processes: Path) -> dict[str, Any]:
    return torch.load(two_processes / "results.pt")


# Training.


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Use one thread, as the two processes do. Other numbers of threads round differently, and norms amplify this."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_what_one_does(name: str, results_of_two: dict[str, Any]) -> None:
    expected, weights = train(Processes(CPU), name), results_of_two["trainings"][name]
    assert expected.keys() == weights.keys()
    if TRAININGS[name].exchange == "bf16":  # 8 bits of each gradient, by which the learning rate of 0.02 is multiplied
        assert any(not torch.equal(weights[key], value) for key, value in expected.items())
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-2, atol=1e-3)
        return
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-5 if "running_var" in key else 1e-6)


def test_the_heads_have_no_norms() -> None:
    """Only stage 5 of a C4 model normalizes RoIs. All other norms run on feature maps, which every process has."""
    for settings, stages in ((SYNC, ("neck.",)), (C4, ("region_stage.",))):
        model = MaskRCNNConfig.model_validate({**SMALL, **settings}).build(3)
        norms = [name for name, module in model.named_modules() if isinstance(module, SyncBatchNorm)]
        assert norms
        assert all(name.startswith(("backbone.", *stages)) for name in norms)


def test_alone_a_shared_norm_is_a_batch_norm() -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 4, 5, 6)
    shared, plain = build_norm("sync_bn", 4), build_norm("bn", 4)
    torch.testing.assert_close(shared(features), plain(features), rtol=0, atol=0)
    torch.testing.assert_close(shared.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason=f"needs {WORLD} GPUs")
def test_gpus_share_the_statistics_of_a_norm(launcher: Launcher, tmp_path: Path) -> None:
    run(launcher, tmp_path, "cuda")
    torch.manual_seed(0)
    norm = build_norm("bn", 4)
    output, gradient = normalised(norm, torch.randn(6, 4, 3, 3))
    for first in (5, 6):
        result = torch.load(tmp_path / f"{first}.pt")
        torch.testing.assert_close(result["output"], output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["gradient"], gradient, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result["state"], dict(norm.state_dict()), rtol=1e-4, atol=1e-5)


# Evaluation.


def test_two_processes_evaluate_what_one_does(
    results_of_two: dict[str, Any], two_processes: Path, tmp_path: Path
) -> None:
    expected = evaluation(Processes(CPU), tmp_path)["all"][0]
    assert results_of_two["evaluation"]["all"] == [expected, expected]
    results = (tmp_path / "results.json").read_text()
    assert len({result["image_id"] for result in json.loads(results)}) == 5
    assert (two_processes / "results.json").read_text() == results
    assert (two_processes / "metrics.json").read_text() == (tmp_path / "metrics.json").read_text()


# Collective operations.


def test_collective_operations(results_of_two: dict[str, Any]) -> None:
    results = results_of_two["collectives"]
    assert results["max"] == 3
    assert results["any"] == results["any on device"] == [False, True, True]
    assert results["gather"] == [{"rank": 0}, {"rank": 1}]
    assert results["broadcast"] == ["from 0", "from 0"]
    assert results["from_main"] == ["0", "0"]
    assert results["mean"] == [[0.5, 4.0], [0.5, 4.0]]
    assert [math.isnan(value) for (value,) in results["not finite"]] == [True, True]
    # The losses of the processes are the sum and twice the sum, so the total gradient is 3.
    assert results["gradient of a sum"] == [[3.0, 3.0], [3.0, 3.0]]


def test_a_process_alone_needs_no_others() -> None:
    group, model, values = Processes(CPU), torch.nn.Linear(2, 1), torch.tensor([1.0, 2.0])
    group.wait()
    group.share_buffers(model)
    assert (group.is_main, group.max(7), group.any(True), group.any(False)) == (True, 7, True, False)
    assert (group.gather("x"), group.broadcast("x"), group.from_main(lambda: "x")) == (["x"], "x", "x")
    assert group.wrap(model) is model
    assert group.mean(values) is values
    assert group.any_on_device(values > 1).tolist() == [False, True]


# Environment variables of torchrun.


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the given variables and delete the other variables of torchrun."""

    def set_all(**variables: str) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize("variables", [{}, {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_joins_nothing(environment: Callable[..., None], variables: dict[str, str]) -> None:
    environment(**variables)
    with processes(torch.device("cpu")) as group:
        assert group == Processes(CPU, rank=0, world=1)
        assert not is_shared()


@pytest.mark.parametrize(
    ("variables", "device", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "cpu", "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: start several"),
        (TORCHRUN, "cuda:1", "--device cuda:1 names one GPU"),
        (TORCHRUN, "cuda", "process 1 of this machine needs a GPU of its own, but there are 1: start at most 1"),
    ],
)
def test_inconsistent_environment_variables_are_refused(
    environment: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    device: str,
    message: str,
) -> None:
    environment(**variables)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=re.escape(message)), processes(torch.device(device)):
        pass


# Runs started by torchrun.

EXPERIMENT = f"""
base: {Path(__file__).parents[1] / "tiny.yaml"}
data:
  train: {{kind: coco, annotations: train.json, images: images}}
  validation: {{kind: coco, annotations: train.json, images: images}}
training:
  workers: 1
  optimizer: {{kind: sgd, lr: 0.002, base_batch: 2}}
  schedule: {{iterations: 200, warmup_iterations: 2}}
  evaluate_every: 1000
  checkpoint_every: 1000
"""


def experiment(folder: Path, *, broken: bool = False) -> Path:
    """Write an experiment with eight images, of which the last is truncated if `broken`."""
    (folder / "images").mkdir()
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for number in range(1, 9):
        path = folder / "images" / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
        images.append({"id": number, "file_name": path.name, "width": SIDE, "height": SIDE})
        shape = {"segmentation": [[8, 8, 40, 8, 40, 40, 8, 40]], "bbox": [8, 8, 32, 32], "area": 1024, "iscrowd": 0}
        annotations.append({"id": number, "image_id": number, "category_id": 1, **shape})
    if broken:
        path.write_bytes(path.read_bytes()[:1000])
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "experiment.yaml").write_text(EXPERIMENT)
    return folder / "experiment.yaml"


def start(config: Path, *arguments: str, world: int) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command = [sys.executable, *torchrun, str(REPOSITORY / "tools" / "train.py"), str(config), *arguments]
    return subprocess.Popen(
        [*command, "--device", "cpu", "--set", f"data.root={config.parent}", "--out", str(config.parent / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_signal_stops_all_and_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    running = start(config, world=2)
    while running.poll() is None and not (metrics.exists() and len(read_records(metrics)) >= 3):
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=600)
    assert running.returncode != 0
    stopped = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").iteration
    assert 3 <= stopped < 200, output
    assert len(re.findall(f"SIGTERM: stopped after iteration {stopped}, which is saved", output)) == 2, output

    resumed = start(config, "--resume", world=1)
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, output
    steps = [record["iteration"] for record in read_records(metrics) if record["kind"] == "train"]
    assert steps == list(range(1, 201))


@pytest.mark.slow
def test_an_error_on_one_process_stops_all_and_is_shown(tmp_path: Path) -> None:
    running = start(experiment(tmp_path, broken=True), world=2)
    output, _ = running.communicate(timeout=600)
    assert running.returncode == 1
    assert re.search(r"error: .*8\.png", output), output

"""Two processes do what one does with the batches of both.

The first half of this file is what they run: `python tests/training/test_distributed.py OUT DEVICE`, started twice with
torchrun's variables, does `work` and leaves what the main process found in OUT.
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
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maskrcnn.data.loader import BatchSampler, training_loader
from maskrcnn.data.transforms import TransformsConfig
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.inference import Predictor, evaluate_predictor
from maskrcnn.models.mask_rcnn import MaskRCNNConfig
from maskrcnn.models.norms import SyncBatchNorm, build_norm
from maskrcnn.structures import ClassTable, Example, MaskCrop
from maskrcnn.training.checkpoint import TrainingState, load_checkpoint
from maskrcnn.training.distributed import Processes, is_shared, processes, sum_over_processes
from maskrcnn.training.metrics import read_records
from maskrcnn.training.optimizer import SGDConfig, set_learning_rate
from maskrcnn.training.step import TrainingStep

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
WORLD = 2
STEPS = 10
BATCH = 4  # images of all processes
IMAGES = STEPS * BATCH  # one epoch: each image is seen once

SIDE = 64  # px

SMALL: dict[str, Any] = {
    "rpn": {
        "anchor_sizes": [[8], [16], [32], [48], [64]],
        "training": {"pre_nms_top_n": 30, "post_nms_top_n": 20},
        "inference": {"pre_nms_top_n": 30, "post_nms_top_n": 10},
        "samples": 16,
    },
    "sampling": {"batch_size_per_image": 16},
    "box_head": {"kind": "fc", "width": 16},
    "mask_head": {"kind": "fcn", "depth": 1, "width": 8},
    "detection": {"score_threshold": 0.0, "detections_per_image": 5},
}
RESNET: dict[str, Any] = {"kind": "resnet", "depth": 18, "width": 8, "freeze": 0, "weights": "none"}
FPN = {**RESNET, "output": "fpn", "norm": "none", "fpn": {"channels": 32}}
SYNC = {"backbone": {**FPN, "norm": "sync_bn", "fpn": {"channels": 32, "norm": "sync_bn"}}}
C4 = {
    "backbone": {**RESNET, "output": "c4", "norm": "sync_bn"},
    "rpn": {**SMALL["rpn"], "anchor_sizes": [[8, 16, 32, 48]]},
    "box_head": {"kind": "mean"},
    # A RoI layer of its own: stage 5, with its norms, reads the positives by themselves, and there may be none.
    "mask_head": {"kind": "fcn", "depth": 0, "width": 8, "roi": {"kind": "roi_align", "sampling_ratio": 1}},
}


class Training(NamedTuple):
    """What is trained, and how."""

    model: Mapping[str, Any]  # its settings
    empty: bool = False  # whether the images of the second process have no objects
    parts: int = 1  # in which each of two processes computes its share of a batch
    # Small, where rounding would soon turn a choice between two proposals: the norms of few regions magnify it.
    lr: float = 0.02


TRAININGS = {
    "frozen norms": Training({"backbone": {**FPN, "norm": "frozen_bn"}}),
    "group norm": Training({"backbone": {**FPN, "fpn": {"channels": 32, "norm": "gn"}}}),
    "one process without objects": Training({"backbone": FPN}, empty=True),
    "in two parts": Training({"backbone": FPN}, parts=2),
    "shared batch norm": Training(SYNC, lr=0.002),
    "shared batch norm of regions, one process without objects": Training(C4, empty=True, lr=0.002),
}


# ---- What each process does


class Noise:
    """Noisy images of one size, with one to three objects each; if `empty`, those of the second process have none."""

    classes = ClassTable(("a", "b", "c"), (1, 2, 3))

    def __init__(self, empty: bool) -> None:
        stream = BatchSampler(self.image_sizes(), batch_size=BATCH, seed=0, rank=1, world=WORLD)
        second = {draw.image for draws in islice(stream, STEPS) for draw in draws}
        assert len(second) == IMAGES // WORLD
        self._empty: set[int] = second if empty else set()

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
    """Take ten steps with momentum and clipping; return the weights."""
    training = TRAININGS[name]
    torch.manual_seed(group.rank)  # wrapping the model must make them start alike
    model = MaskRCNNConfig.model_validate({**SMALL, **training.model}).build(3)
    optimizer = SGDConfig(lr=training.lr, base_batch=BATCH).build(model, batch_size=BATCH)
    state = TrainingState(model, optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
    step = TrainingStep(state, group, clip_norm=1.0)
    loader = training_loader(
        Noise(training.empty),  # type: ignore[arg-type]  # what trains needs no more of a dataset
        TransformsConfig(short_side=(SIDE,), long_side=SIDE).build(),
        batch_size=BATCH,
        seed=0,
        workers=0,
        size_divisor=model.size_divisor,
        rank=group.rank,
        world=group.world,
        grad_accum_steps=training.parts if group.world > 1 else 1,
    )
    norms = []
    for iteration, batches in enumerate(islice(loader, STEPS), start=1):
        set_learning_rate(optimizer, 1.0)
        norms.append(step(batches, iteration).gradient_norm)
    assert max(norms) > 1, "clipping must have something to do"
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def evaluation(group: Processes, out: Path) -> dict[str, Any]:
    """Five images in batches of two: the first process has three of them, the second one two."""
    scenes = {"kind": "shapes", "length": 5, "height": SIDE, "width": SIDE}
    config = ExperimentConfig.model_validate(
        {
            "model": {**SMALL, "backbone": {**FPN, "norm": "bn"}},
            "data": {
                "train": scenes,
                "validation": scenes,
                "validation_transforms": {"short_side": [SIDE], "long_side": SIDE, "flip": 0},
            },
            "training": {"workers": 0},
            "evaluation": {"batch_size": 2},
        }
    )
    torch.manual_seed(3)
    dataset = config.data.build_validation()
    model = config.model.build(len(dataset.classes))
    if not group.is_main:  # batch norms see other images on each process
        for buffer in model.buffers():
            buffer += 1
    predictor = Predictor.of(config, model, dataset.classes, CPU)
    figures, _ = evaluate_predictor(config, predictor, dataset, out, group)
    return {"all": group.gather(json.dumps(figures.summary()))}


def collectives(group: Processes) -> dict[str, Any]:
    rank = group.rank
    share = torch.tensor([1.0, float(rank)], requires_grad=True)
    (sum_over_processes(share) * (rank + 1)).sum().backward()
    return {
        "max": group.max(3 * rank),
        "any": [group.any(False), group.any(rank == 1), group.any(True)],
        "gather": group.gather({"rank": rank}),
        "broadcast": group.gather(group.broadcast(f"from {rank}")),
        "from_main": group.gather(group.from_main(lambda: os.environ["RANK"])),
        "mean": group.gather(group.mean(torch.tensor([rank, 4.0])).tolist()),
        "not finite": group.gather(group.mean(torch.tensor([float("nan") if rank else 1.0])).tolist()),
        "gradient of a sum": group.gather(share.grad.tolist() if share.grad is not None else None),
    }


def normalised(norm: torch.nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """What `norm` makes of `features`, and the gradient of a sum that weighs each cell of it differently."""
    features = features.detach().requires_grad_()
    output = norm(features)
    weights = torch.arange(output[0].numel(), device=output.device).view_as(output[0])
    (output * weights).sum().backward()
    assert features.grad is not None
    return output.detach().cpu(), features.grad.cpu()


def norm_on_gpus(group: Processes, out: Path) -> None:
    """Six maps: the first process has five, the second one; then one has all six, the other none."""
    torch.manual_seed(0)
    features = torch.randn(6, 4, 3, 3).to(group.device)
    for first in (5, 6):
        norm = build_norm("sync_bn", 4).to(group.device)
        share = features[:first] if group.is_main else features[first:]
        found = group.gather(normalised(norm, share))
        if found is not None:
            output, gradient = (torch.cat(parts) for parts in zip(*found, strict=True))
            state = {name: value.cpu() for name, value in norm.state_dict().items()}
            torch.save({"output": output, "gradient": gradient, "state": state}, out / f"{first}.pt")


def work(group: Processes, out: Path) -> None:
    if group.device.type == "cuda":
        norm_on_gpus(group, out)
        return
    findings = {
        "trainings": {name: train(group, name) for name in TRAININGS},
        "evaluation": evaluation(group, out),
        "collectives": collectives(group),
    }
    if group.is_main:
        torch.save(findings, out / "findings.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, device = sys.argv[1:]
    with processes(torch.device(device)) as joined:
        work(joined, Path(folder))
    sys.exit()


# ---- What must come out


def run(command: list[str]) -> None:
    """Start `command` twice, as torchrun would, and see both succeed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * WORLD, "\n".join(said)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes left."""
    out = tmp_path_factory.mktemp("together")
    run([sys.executable, "-W", "error", __file__, str(out), "cpu"])
    return out


@pytest.fixture(scope="module")
def findings(together: Path) -> dict[str, Any]:
    return torch.load(together / "findings.pt")


# Training.


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As in each of the two processes: more threads round otherwise, and norms magnify that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_what_one_does(name: str, findings: dict[str, Any]) -> None:
    alone, shared = train(Processes(CPU), name), findings["trainings"][name]
    assert alone.keys() == shared.keys()
    for key, value in alone.items():
        torch.testing.assert_close(shared[key], value, rtol=1e-5, atol=1e-5 if "running_var" in key else 1e-6)


def test_the_heads_have_no_norms() -> None:
    """Only stage 5 of a C4 model normalises regions; elsewhere what is shared are maps, which every process has."""
    for settings, stages in ((SYNC, ()), (C4, ("res5.",))):
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
def test_gpus_share_the_statistics_of_a_norm(tmp_path: Path) -> None:
    run([sys.executable, __file__, str(tmp_path), "cuda"])
    torch.manual_seed(0)
    norm = build_norm("bn", 4)
    output, gradient = normalised(norm, torch.randn(6, 4, 3, 3))
    for first in (5, 6):
        found = torch.load(tmp_path / f"{first}.pt")
        torch.testing.assert_close(found["output"], output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["gradient"], gradient, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["state"], dict(norm.state_dict()), rtol=1e-4, atol=1e-5)


# Evaluation.


def test_two_processes_find_and_measure_what_one_does(findings: dict[str, Any], together: Path, tmp_path: Path) -> None:
    alone = evaluation(Processes(CPU), tmp_path)["all"][0]
    assert findings["evaluation"]["all"] == [alone, alone]
    results = (tmp_path / "results.json").read_text()
    assert len({result["image_id"] for result in json.loads(results)}) == 5
    assert (together / "results.json").read_text() == results
    assert (together / "metrics.json").read_text() == (tmp_path / "metrics.json").read_text()


# What the processes tell each other.


def test_what_passes_between_processes(findings: dict[str, Any]) -> None:
    found = findings["collectives"]
    assert found["max"] == 3
    assert found["any"] == [False, True, True]
    assert found["gather"] == [{"rank": 0}, {"rank": 1}]
    assert found["broadcast"] == ["from 0", "from 0"]
    assert found["from_main"] == ["0", "0"]
    assert found["mean"] == [[0.5, 4.0], [0.5, 4.0]]
    assert [math.isnan(value) for (value,) in found["not finite"]] == [True, True]
    # The loss of the first process is the sum, that of the second twice the sum: together they change threefold.
    assert found["gradient of a sum"] == [[3.0, 3.0], [3.0, 3.0]]


def test_a_process_alone_needs_no_others() -> None:
    alone, model, values = Processes(CPU), torch.nn.Linear(2, 1), torch.tensor([1.0, 2.0])
    alone.wait()
    alone.share_buffers(model)
    assert (alone.is_main, alone.max(7), alone.any(True), alone.any(False)) == (True, 7, True, False)
    assert (alone.gather("x"), alone.broadcast("x"), alone.from_main(lambda: "x")) == (["x"], "x", "x")
    assert alone.wrap(model) is model
    assert alone.mean(values) is values


# What torchrun says.


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the variables given, and no others of torchrun's."""

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
def test_what_torchrun_says_must_make_sense(
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


# Whole runs, as torchrun starts them.

EXPERIMENT = """
model:
  backbone: {kind: resnet, depth: 18, width: 8, output: c5, freeze: 0, weights: none}
  rpn:
    anchor_sizes: [[32]]
    batch_size_per_image: 8
    training: {pre_nms_top_n: 8, post_nms_top_n: 8}
    inference: {pre_nms_top_n: 8, post_nms_top_n: 8}
  sampling: {batch_size_per_image: 8}
  box_head: {kind: fc, width: 16}
  mask_head: {kind: fcn, pool_size: 7, depth: 1, width: 8}
data:
  train: {kind: coco, annotations: train.json, images: images}
  validation: {kind: coco, annotations: train.json, images: images}
  train_transforms: {short_side: [64], long_side: 64}
  validation_transforms: {short_side: [64], long_side: 64, flip: 0}
training:
  batch_size: 2
  workers: 1
  optimizer: {kind: sgd, lr: 0.002, base_batch: 2}
  schedule: {kind: cosine, iterations: 200, warmup_iterations: 2}
  evaluate_every: 1000
  checkpoint_every: 1000
  log_every: 1
evaluation: {pictures: 1}
"""


def experiment(folder: Path, *, broken: bool = False) -> Path:
    """A configuration and its eight images, of which the last may be cut short."""
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
    said, _ = running.communicate(timeout=600)
    assert running.returncode != 0
    stopped = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").iteration
    assert 3 <= stopped < 200, said
    assert len(re.findall(f"SIGTERM: stopped after iteration {stopped}, which is saved", said)) == 2, said

    resumed = start(config, "--resume", world=1)
    said, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, said
    steps = [record["iteration"] for record in read_records(metrics) if record["kind"] == "train"]
    assert steps == list(range(1, 201))


@pytest.mark.slow
def test_what_is_wrong_on_one_process_ends_all_and_reaches_the_user(tmp_path: Path) -> None:
    running = start(experiment(tmp_path, broken=True), world=2)
    said, _ = running.communicate(timeout=600)
    assert running.returncode == 1
    assert re.search(r"error: .*8\.png", said), said

"""Training with plain arguments: the same steps as the command's, and nothing else of the program changes."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import maskrcnn
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.loader import training_loader
from maskrcnn.data.transforms import Resize
from maskrcnn.engine.checkpoint import load_checkpoint
from maskrcnn.runtime.processes import Processes
from maskrcnn.training_run import train_experiment

TINY = Path(__file__).parents[1] / "tiny.yaml"
OVERRIDES = [
    "training.optimizer={kind: sgd, lr: 0.02, base_batch: 2}",
    "training.schedule.iterations=3",
    "training.loggers=[]",
    "evaluation.pictures=0",
]


def config() -> maskrcnn.experiment.ExperimentConfig:
    return maskrcnn.load_config(TINY, OVERRIDES)


def trainer(dataset: DetectionDataset) -> maskrcnn.Trainer:
    settings = config()
    torch.manual_seed(settings.training.seed)
    model = settings.model.build(len(dataset.classes))
    return maskrcnn.Trainer(
        model,
        dataset,
        settings.data.build_train_transform(dataset),
        optimizer=settings.training.optimizer.build(model, batch_size=2),
        schedule=settings.training.schedule.build(),
        iterations=3,
        batch_size=2,
        options=maskrcnn.TrainerOptions(seed=settings.training.seed, clip_norm=settings.training.clip_norm),
    )


@pytest.mark.usefixtures("logging_restored")
def test_it_takes_the_steps_of_the_command(tmp_path: Path) -> None:
    train_experiment(config(), tmp_path / "run", resume=False, init=None, processes=Processes(torch.device("cpu")))
    stored = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").model
    library = trainer(config().data.build_train())
    library.fit()
    assert library.model.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in library.model.state_dict().items())


def test_the_program_is_left_alone() -> None:
    dataset = config().data.build_train()
    own = trainer(dataset)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    root = logging.getLogger()
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"], torch.get_num_threads()
    before = root.handlers[:], root.level, torch.are_deterministic_algorithms_enabled()
    own.fit()
    evaluation = maskrcnn.Evaluator(dataset)(maskrcnn.Predictor(own.model, dataset.classes, own.transform))
    assert 0 <= evaluation.summary()["mask/AP"] <= 1
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], states[1])
    assert torch.get_num_threads() == states[2]
    assert (root.handlers, root.level, torch.are_deterministic_algorithms_enabled()) == before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_plain_optimizer_and_a_loop_of_ones_own() -> None:
    """The two trainings of docs/library.md."""
    dataset = config().data.build_train()
    model = config().model.build(len(dataset.classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    weights = [model.box_head.cls_score.weight.clone()]
    resize = Resize((64,), 64)
    maskrcnn.Trainer(model, dataset, resize, optimizer=optimizer, iterations=1, batch_size=2).fit()
    weights.append(model.box_head.cls_score.weight.clone())
    batches = training_loader(dataset, resize, batch_size=2, seed=0, workers=0, size_divisor=model.size_divisor)
    for _, (batch,) in zip(range(2), batches, strict=False):
        losses = model(batch.images.to("cpu"), batch.targets.to("cpu"))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert losses.total.isfinite()
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], model.box_head.cls_score.weight)


def test_names_of_the_package() -> None:
    assert set(maskrcnn.__all__) <= set(dir(maskrcnn))
    assert maskrcnn.__version__
    assert all(getattr(maskrcnn, name) is not None for name in maskrcnn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Predicter'"):
        _ = maskrcnn.Predicter

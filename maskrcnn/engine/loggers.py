"""Loggers: where the numbers and pictures of a training go besides `metrics.jsonl`."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from maskrcnn.config import Part
from maskrcnn.errors import InputError

TENSORBOARD_FOLDER = "tensorboard"


class Logger:
    """Base class of loggers; its methods do nothing. Only the main process of a training has loggers."""

    def log_config(self, text: str, iteration: int) -> None:
        """Record the resolved configuration, as YAML, of a run that starts or resumes after `iteration` steps."""

    def log_numbers(self, numbers: Mapping[str, float], iteration: int) -> None:
        """Record finite numbers by name, such as `train/loss` or `evaluation/mask/AP`, after `iteration` steps.

        A resumed run repeats the records after its checkpoint.
        """

    def log_pictures(self, pictures: Mapping[str, np.ndarray], iteration: int) -> None:
        """Record pictures by image id, (H, W, 3) uint8 RGB. Called after the numbers of each evaluation."""

    def close(self) -> None:
        """Write what is left."""


class LoggerConfig(Part):
    """Base class of the configs of loggers, an extension point."""

    @abstractmethod
    def build(self, run_dir: Path, *, start: int) -> Logger:
        """Return the logger of the run in `run_dir`, which starts or resumes after `start` steps."""


class TensorBoardConfig(LoggerConfig):
    """TensorBoard events in the folder `tensorboard` of the run directory."""

    kind: Literal["tensorboard"] = "tensorboard"

    def build(self, run_dir: Path, *, start: int) -> TensorBoard:
        """Return the logger. Events after `start` steps are dropped."""
        return TensorBoard(run_dir / TENSORBOARD_FOLDER, start=start)


class TensorBoard(Logger):
    """Writes TensorBoard events."""

    def __init__(self, folder: Path, *, start: int) -> None:
        self._events = SummaryWriter(str(folder), purge_step=start + 1)

    def log_config(self, text: str, iteration: int) -> None:
        """Add the configuration as text, so that the events can be read without the run directory."""
        # Not `add_hparams`, which creates another TensorBoard run each time that training resumes.
        self._events.add_text("config", f"```yaml\n{text}```", iteration)

    def log_numbers(self, numbers: Mapping[str, float], iteration: int) -> None:
        """Add each number to its curve."""
        for name, value in numbers.items():
            self._events.add_scalar(name, value, iteration)

    def log_pictures(self, pictures: Mapping[str, np.ndarray], iteration: int) -> None:
        """Add the pictures as `pictures/IMAGE_ID`, and flush."""
        for name, picture in pictures.items():
            self._events.add_image(f"pictures/{name}", picture, iteration, dataformats="HWC")
        self._events.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._events.close()


class WandbConfig(LoggerConfig):
    """Weights & Biases. A resumed run continues its own record. Needs `pip install wandb`."""

    kind: Literal["wandb"] = "wandb"
    project: str
    entity: str | None = None  # user or team; null uses the default of the account
    mode: Literal["online", "offline"] = "online"  # "offline" writes to the folder `wandb` of the run directory

    def build(self, run_dir: Path, *, start: int) -> Wandb:
        """Return the logger.

        Raises:
            InputError: the package wandb is not installed.
        """
        return Wandb(self, run_dir)


class Wandb(Logger):
    """Sends numbers and pictures to Weights & Biases."""

    def __init__(self, config: WandbConfig, run_dir: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError("training.loggers: kind wandb needs the package: pip install wandb") from error
        self._image = wandb.Image
        id_file = run_dir / "wandb_id.txt"  # a resumed run has the id of its first start
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            dir=str(run_dir),
            name=run_dir.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
        )

    def log_config(self, text: str, iteration: int) -> None:
        """Store the configuration as text."""
        self._run.config.update({"yaml": text}, allow_val_change=True)

    def log_numbers(self, numbers: Mapping[str, float], iteration: int) -> None:
        """Log the numbers at the step `iteration`."""
        self._run.log(dict(numbers), step=iteration)

    def log_pictures(self, pictures: Mapping[str, np.ndarray], iteration: int) -> None:
        """Log the pictures as `pictures/IMAGE_ID`."""
        self._run.log({f"pictures/{name}": self._image(picture) for name, picture in pictures.items()}, step=iteration)

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()

"""The folder that a run leaves behind, and whom it belongs to.

```
config.yaml      the resolved configuration        checkpoints/   last.pt to resume from, best.pt
environment.txt  versions, hardware, command       evaluation/    metrics.json, results.json (COCO's format)
train.log        what the console said             predictions/   pictures
metrics.jsonl    one JSON object a record          tensorboard/   events
```
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from maskrcnn.config import Section, differences, to_dict, to_yaml
from maskrcnn.errors import InputError
from maskrcnn.training.metrics import FILE_NAME as METRICS_FILE

LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "pycocotools", "faster-coco-eval", "pydantic")


class RunDirectory:
    """Paths inside a run's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.log = root / "train.log"
        self.metrics = root / METRICS_FILE
        self.environment = root / "environment.txt"
        self.checkpoints = root / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.evaluation = root / "evaluation"
        self.predictions = root / "predictions"

    def claim(self, config: Section, *, resume: bool) -> None:
        """Make the folder this experiment's. A run that never took a step leaves it free for another.

        Raises:
            InputError: it holds another experiment, or this one and `resume` is false, or nothing that `resume` could
                go on with, or it cannot be written.
        """
        try:
            self._claim(config, resume=resume)
        except OSError as error:
            raise InputError(f"{self.root}: cannot write the run here ({error.strerror})") from error

    def _claim(self, config: Section, *, resume: bool) -> None:
        if self.started:
            self._check_same(config)
            if not resume:
                raise InputError(
                    f"{self.root} already holds this experiment: add --resume to go on with it, or name another "
                    "folder with --out"
                )
        elif resume and not self.config.exists():
            raise InputError(f"{self.root} holds no run to resume (no {self.config.name}); leave --resume away")
        elif not self.config.exists() and self.root.exists() and any(self.root.iterdir()):
            raise InputError(f"{self.root} is not empty and no run of ours: name another folder with --out")
        for folder in (self.checkpoints, self.evaluation, self.predictions):
            folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(to_yaml(config), encoding="utf-8")

    @property
    def started(self) -> bool:
        """Whether there is something to lose: a checkpoint, or records of steps on the way to one."""
        return self.last.exists() or (self.metrics.exists() and self.metrics.stat().st_size > 0)

    def _check_same(self, config: Section) -> None:
        stored = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        changed = differences(stored, to_dict(config))
        if changed:
            listed = "\n  ".join(changed)
            raise InputError(
                f"{self.root} holds another experiment; its {self.config.name} differs from this one in\n  {listed}\n"
                "name another folder with --out"
            )

    def contents(self) -> str:
        """Where everything lies, for people to read."""
        return "\n".join(
            [
                f"the run is in {self.root}:",
                f"  {self.predictions / 'overview.png'}: ground truth beside prediction",
                f"  {self.evaluation / 'metrics.json'}: the figures above, and the AP of each class",
                f"  {self.checkpoints / 'best.pt'}: the weights of the best evaluation",
                f"  tensorboard --logdir {self.root}: the curves; {self.metrics}: their numbers",
            ]
        )

    def describe_environment(self, *, seed: int, device: torch.device) -> None:
        """Add to `environment.txt` what someone needs to repeat the run; one block each time that it starts."""
        lines = [
            f"command: {shlex.join([Path(sys.executable).name, *sys.argv])}",
            f"seed: {seed}",
            *environment(device),
        ]
        with self.environment.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")


def environment(device: torch.device) -> list[str]:
    """Commit, hardware and versions, one line each."""
    return [
        f"commit: {_commit()}",
        f"device: {torch.cuda.get_device_name(device) if device.type == 'cuda' else _cpu_name()}",
        f"threads: {torch.get_num_threads()}",
        f"python: {platform.python_version()} on {platform.system()} {platform.machine()}",
        *(f"{library}: {version(library)}" for library in LIBRARIES),
    ]


def _commit() -> str:
    """The commit of the code that runs, and whether it was changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (the code is not in a git checkout)"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if (cpuinfo.exists())
        else []
    )
    return f"{names[0] if names else platform.processor() or 'CPU'} ({os.cpu_count()} cores)"

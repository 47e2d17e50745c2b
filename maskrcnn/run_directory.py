"""The folder that a run leaves behind, and whom it belongs to.

```
config.yaml      the resolved configuration        checkpoints/   last.pt to resume from, best.pt
environment.txt  versions, hardware, command       evaluation/    metrics.json, results.json (COCO's format)
train.log        what the console said             predictions/   pictures
metrics.jsonl    one JSON object a record          tensorboard/   events
```
"""

from __future__ import annotations

import errno
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch

from maskrcnn.config import Section, load_config, to_dict, to_yaml
from maskrcnn.errors import InputError
from maskrcnn.resume_rules import Changes, changes
from maskrcnn.training.checkpoint import Checkpoint, load_checkpoint, temporary_of, write_atomically
from maskrcnn.training.metrics import FILE_NAME as METRICS_FILE

# What decides how many threads compute, on which GPUs, and whether GPU libraries may choose algorithms freely.
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # full, over quota, too large, read-only
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

    def claim(self, config: Section, *, resume: bool) -> str:
        """Make the folder this experiment's. A run that never took a step leaves it free for another.

        Returns:
            What a run that goes on has otherwise than before, by the keys of its configuration; empty if nothing.

        Raises:
            InputError: it holds another experiment, or this one and `resume` is false, or nothing that `resume` could
                go on with, or cannot go on under this configuration (`resume_rules`), or it cannot be written.
        """
        try:
            return self._claim(config, resume=resume)
        except OSError as error:
            raise InputError(f"{self.root}: cannot write the run here ({error.strerror})") from error

    def _claim(self, config: Section, *, resume: bool) -> str:
        found = ""
        if self.started:
            found = self._go_on(config) if resume else self._refuse_to_start_again(config)
        elif resume and not self.config.exists():
            raise InputError(f"{self.root} holds no run to resume (no {self.config.name}); leave --resume away")
        elif not self.config.exists() and self._holds_foreign_files():
            raise InputError(f"{self.root} is not empty and no run of ours: name another folder with --out")
        # Before anything else, so that what a kill leaves behind is known for ours.
        write_atomically(self.config, lambda file: file.write(to_yaml(config).encode()))
        for folder in (self.checkpoints, self.evaluation, self.predictions):
            folder.mkdir(exist_ok=True)
        return found

    def _holds_foreign_files(self) -> bool:
        ours = temporary_of(self.config)  # of a run that was killed at its very start
        return self.root.exists() and any(path != ours for path in self.root.iterdir())

    @property
    def started(self) -> bool:
        """Whether there is something to lose: a checkpoint, or records of steps on the way to one."""
        return self.last.exists() or (self.metrics.exists() and self.metrics.stat().st_size > 0)

    def _go_on(self, config: Section) -> str:
        """Describe what changed since the run was last started; InputError where that would corrupt it."""
        found = self._changes(config)
        if found.refused:
            raise InputError(
                f"{self.root}: the run cannot go on under another configuration than its {self.config.name}:\n"
                f"{found.describe()}\nkeep what may not change as it was, or begin another run with --out, "
                f"if you like from the weights of this one: --init {self.last}"
            )
        return found.describe()

    def _refuse_to_start_again(self, config: Section) -> NoReturn:
        found = self._changes(config).describe()
        if found:
            raise InputError(
                f"{self.root} holds another experiment; its {self.config.name} differs from this one:\n{found}\n"
                "name another folder with --out"
            )
        raise InputError(
            f"{self.root} already holds this experiment: add --resume to go on with it, or name another folder with "
            "--out"
        )

    def _changes(self, config: Section) -> Changes:
        """What differs from the stored configuration, in which keys that are newer than it have their defaults."""
        return changes(to_dict(load_config(self.config, type(config))), to_dict(config))

    def last_checkpoint(self) -> Checkpoint | None:
        """Read the checkpoint to go on from; None before there is one.

        Raises:
            InputError: it is damaged; the message names those that could take its place.
        """
        if not self.last.exists():
            return None
        try:
            return load_checkpoint(self.last)
        except InputError as error:
            files = sorted(self.checkpoints.glob("*.pt"), reverse=True)
            others = [file.name for file in files if not file.samefile(self.last)]  # one is but a name of the same file
            advice = f"copy one of these over it: {', '.join(others)}; or " if others else ""
            raise InputError(f"{error}\nTo go on, {advice}delete it to begin the run anew") from error

    @contextmanager
    def explaining_full_disks(self) -> Iterator[None]:
        """Name the run, or the file, where a write fails in this block: not every library does."""
        try:
            yield
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            advice = f"{error.strerror}; make room, then go on from the last checkpoint with --resume"
            raise OSError(error.errno, advice, str(error.filename or self.root)) from error

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
    """Commit, hardware, versions and what else decides the numbers, one line each."""
    return [
        f"commit: {_commit()}",
        f"device: {_gpu(device) if device.type == 'cuda' else _cpu_name()}",
        *(_gpu_software() if device.type == "cuda" else [f"cpu kernels: {torch.backends.cpu.get_cpu_capability()}"]),
        f"processes: {os.environ.get('WORLD_SIZE', '1')}",  # torchrun sets it
        f"threads: {torch.get_num_threads()}",
        f"deterministic: {str(torch.are_deterministic_algorithms_enabled()).lower()}",
        f"float32 products: {torch.get_float32_matmul_precision()}",
        *(f"{name}: {os.environ[name]}" for name in VARIABLES if name in os.environ),
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


def _gpu(device: torch.device) -> str:
    found = torch.cuda.get_device_properties(device)
    return f"{found.name} ({found.total_memory / 2**30:.1f} GiB, compute capability {found.major}.{found.minor})"


def _gpu_software() -> list[str]:
    """Driver, CUDA and cuDNN, and how cuDNN chooses."""
    driver = Path("/proc/driver/nvidia/version")  # Linux alone
    cudnn = torch.backends.cudnn
    return [
        f"driver: {driver.read_text().splitlines()[0] if driver.exists() else 'unknown'}",
        f"cuda: {torch.version.cuda}",
        f"cudnn: {cudnn.version()} (benchmark: {str(cudnn.benchmark).lower()})",
    ]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if (cpuinfo.exists())
        else []
    )
    return f"{names[0] if names else platform.processor() or 'CPU'} ({os.cpu_count()} cores)"

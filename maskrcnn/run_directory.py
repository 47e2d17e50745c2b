"""The files of a run directory, and the checks that keep a run from overwriting another one.

```
config.yaml      the resolved configuration        checkpoints/   last.pt to resume from, best.pt
environment.txt  data, versions, command         evaluation/    metrics.json, results.json (COCO's format)
train.log        the console log                   predictions/   pictures
metrics.jsonl    one JSON object per record        tensorboard/   events
```
"""

from __future__ import annotations

import errno
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch

from maskrcnn.config import Section, read_config, to_dict, to_yaml
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.provenance import describe
from maskrcnn.engine.checkpoint import Checkpoint, load_checkpoint
from maskrcnn.engine.metrics import FILE_NAME as METRICS_FILE
from maskrcnn.errors import InputError
from maskrcnn.resume_rules import Changes, changes
from maskrcnn.runtime.files import temporary_of, write_text
from maskrcnn.runtime.outputs import LOCK, MARKER, explaining, locked

# Number of threads, choice of GPUs, and settings of the GPU libraries that affect the numerical results.
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)
# Disk full, over quota, file too large, read-only file system.
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
RUN = "[]"  # content of the marker of a run directory: to other commands, none of its files is one of theirs
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "pycocotools", "faster-coco-eval", "pydantic")


class RunDirectory:
    """The paths of a run directory, and the operations on its files."""

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

    @contextmanager
    def lock(self, config: Section, *, resume: bool) -> Iterator[None]:
        """Hold the lock of the run directory, so that one process at a time writes the run; see `outputs.locked`.

        Raises:
            InputError: another process holds the lock, or the folder is not one that `claim` takes.
        """
        with explaining(self.root):
            self._require_own(config, resume=resume)  # first: other folders get no lock file
        with locked(self.root):
            yield

    def claim(self, config: Section, *, resume: bool) -> str:
        """Create the run directory, or check that it belongs to this experiment, and store the configuration.

        A directory of a run without any training step can be claimed by another experiment.

        Args:
            config: the configuration of the experiment.
            resume: whether to resume the run in the directory.

        Returns:
            The changes to the configuration of a resumed run as text; empty if there are none.

        Raises:
            InputError: the directory holds another experiment, this experiment and `resume` is False, no run to resume,
                a run that cannot be resumed with this configuration (`resume_rules`), or it is not writable.
        """
        with explaining(self.root):
            return self._claim(config, resume=resume)

    def _claim(self, config: Section, *, resume: bool) -> str:
        changes_text = ""
        self._require_own(config, resume=resume)
        if self.started:
            changes_text = self._check_resumable(config) if resume else self._raise_already_started(config)
        # Written first, so that after a kill the folder is recognized as a run directory.
        write_text(self.config, to_yaml(config))
        write_text(self.root / MARKER, RUN)
        for folder in (self.checkpoints, self.evaluation, self.predictions):
            folder.mkdir(exist_ok=True)
        return changes_text

    def _require_own(self, config: Section, *, resume: bool) -> None:
        """Raise InputError if the folder holds other files than a run, or no run to resume."""
        if self.started:
            return
        if self.config.exists():
            if not self._is_marked() and self.config.read_text(encoding="utf-8") != to_yaml(config):
                raise InputError(f"{self.config} was not written by a run: choose another folder with --out")
        elif resume:
            raise InputError(f"{self.root} holds no run to resume (no {self.config.name}); omit --resume")
        elif self._has_other_files():
            raise InputError(f"{self.root} is not empty and not a run directory: choose another folder with --out")

    def _has_other_files(self) -> bool:
        """Return whether the folder has files that do not come from a run."""
        # The temporary file is left by a run that was killed while it wrote the configuration.
        own = {temporary_of(self.config), self.root / LOCK}
        return self.root.exists() and any(path not in own for path in self.root.iterdir())

    def _is_marked(self) -> bool:
        """Return whether the folder was claimed by a run before; a `config.yaml` alone may be the user's."""
        marker = self.root / MARKER
        return marker.is_file() and marker.read_text(encoding="utf-8") == RUN

    @property
    def started(self) -> bool:
        """Whether the run has a checkpoint or recorded metrics."""
        return self.last.exists() or (self.metrics.exists() and self.metrics.stat().st_size > 0)

    def _check_resumable(self, config: Section) -> str:
        """Return the changes to the configuration as text. Raises InputError if a changed key must not change."""
        changed = self._changes(config)
        if changed.refused:
            raise InputError(
                f"{self.root}: the run cannot be resumed with this configuration, which differs from its "
                f"{self.config.name}:\n{changed.describe()}\nrestore the keys that may not change, or start another "
                f"run with --out; to start it from the weights of this run, add --init {self.last}"
            )
        return changed.describe()

    def _raise_already_started(self, config: Section) -> NoReturn:
        """Raise the InputError for a run directory that is in use."""
        changes_text = self._changes(config).describe()
        if changes_text:
            raise InputError(
                f"{self.root} holds another experiment; its {self.config.name} differs from this one:\n"
                f"{changes_text}\nchoose another folder with --out"
            )
        raise InputError(
            f"{self.root} already holds this experiment: add --resume to continue it, or choose another folder with "
            "--out"
        )

    def _changes(self, config: Section) -> Changes:
        """Return the changes from the stored configuration, where missing (newer) keys have their default values."""
        return changes(to_dict(read_config(self.config, type(config))), to_dict(config))

    def last_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint to resume from, or None if there is none.

        Raises:
            InputError: the checkpoint is damaged. The message names the checkpoints that can replace it.
        """
        if not self.last.exists():
            return None
        try:
            return load_checkpoint(self.last)
        except InputError as error:
            files = sorted(self.checkpoints.glob("*.pt"), reverse=True)
            # The newest `iteration_N.pt` may be a hard link to `last.pt`.
            others = [file.name for file in files if not file.samefile(self.last)]
            advice = f"copy one of these over it: {', '.join(others)}; or " if others else ""
            raise InputError(f"{error}\nTo resume, {advice}delete it to restart the run from the beginning") from error

    @contextmanager
    def explaining_full_disks(self) -> Iterator[None]:
        """Add the path and advice to errors of a full or read-only disk; not every library names the file."""
        try:
            yield
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            advice = f"{error.strerror}; make room, then go on from the last checkpoint with --resume"
            raise OSError(error.errno, advice, str(error.filename or self.root)) from error

    def contents(self) -> str:
        """Return a text that lists the main files of the run."""
        return "\n".join(
            [
                f"the run is in {self.root}:",
                f"  {self.predictions / 'overview.png'}: ground truth beside prediction",
                f"  {self.evaluation / 'metrics.json'}: the metrics above, and the AP of each class",
                f"  {self.checkpoints / 'best.pt'}: the weights of the best evaluation",
                f"  tensorboard --logdir {self.root}: the curves; {self.metrics}: the same numbers",
            ]
        )

    def describe_environment(self, *, seed: int, device: torch.device, data: Mapping[str, DetectionDataset]) -> None:
        """Append command, seed, data and software environment to `environment.txt`, one block for each start.

        `data` has the datasets by the names that they get there.
        """
        lines = [
            f"command: {shlex.join([Path(sys.executable).name, *sys.argv])}",
            f"seed: {seed}",
            *(f"{name} {key}: {text}" for name, dataset in data.items() for key, text in describe(dataset).items()),
            *environment(device),
        ]
        with self.environment.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")


def environment(device: torch.device) -> list[str]:
    """Return commit, hardware, versions and numerical settings, one `name: value` line each."""
    return [
        f"commit: {_commit()}",
        f"device: {_gpu(device) if device.type == 'cuda' else _cpu_name()}",
        *(_gpu_software() if device.type == "cuda" else [f"cpu kernels: {torch.backends.cpu.get_cpu_capability()}"]),
        f"processes: {os.environ.get('WORLD_SIZE', '1')}",  # set by torchrun
        f"threads: {torch.get_num_threads()}",
        f"deterministic: {str(torch.are_deterministic_algorithms_enabled()).lower()}",
        f"float32 products: {torch.get_float32_matmul_precision()}",
        *(f"{name}: {os.environ[name]}" for name in VARIABLES if name in os.environ),
        f"python: {platform.python_version()} on {platform.system()} {platform.machine()}",
        *(f"{library}: {version(library)}" for library in LIBRARIES),
    ]


def _commit() -> str:
    """Return the git commit of the code, with `-dirty` if there are uncommitted changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (the code is not in a git checkout)"


def _gpu(device: torch.device) -> str:
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name} ({gpu.total_memory / 2**30:.1f} GiB, compute capability {gpu.major}.{gpu.minor})"


def _gpu_software() -> list[str]:
    """Return the versions of driver, CUDA and cuDNN, and whether cuDNN benchmarks algorithms."""
    driver = Path("/proc/driver/nvidia/version")  # exists only on Linux
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

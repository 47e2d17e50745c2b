"""Trains the runs of an ablation that are missing, several side by side, each in a process of its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import torch
from tqdm import tqdm

from maskrcnn.ablation.plan import Plan, Run
from maskrcnn.config import to_dict, to_yaml
from maskrcnn.data.loader import batches_per_epoch
from maskrcnn.errors import InputError
from maskrcnn.training.loop import Interrupted, StopRequest
from maskrcnn.training.metrics import last_record

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
SHOWN_LINES = 15  # of the console of a run that failed


class RunsFailed(Exception):  # noqa: N818 (its runs have the errors)
    """Some runs failed; the message has the end of what each said."""


def check_runs(plan: Plan) -> None:
    """Build the data and the model of every variant, so that no mistake shows after hours.

    Raises:
        InputError: with the variant's name.
    """
    checked: set[str] = set()
    for run in plan.runs:
        parts = [to_dict(run.config.data), to_dict(run.config.model)]
        if str(parts) in checked or is_finished(run):
            continue
        checked.add(str(parts))
        try:
            if str(parts[0]) not in checked:
                run.config.data.build_both()
                checked.add(str(parts[0]))
            run.config.model.build(num_classes=1)
        except InputError as error:
            raise InputError(f"variant {run.variant}: {error}") from error


def is_finished(run: Run) -> bool:
    """Whether the run is trained to its end, and evaluated there."""
    record = last_record(run.directory.metrics)
    if record is None or record["kind"] == "train":
        return False
    return record["kind"] == "end" or record["iteration"] == run.config.training.schedule.iterations


def train_missing(plan: Plan, *, jobs: int | None = None) -> None:
    """Train what is not finished: one run on each GPU, or without any, one on each core, or `jobs` at a time.

    A run that stops on an error does not stop the others.

    Raises:
        RunsFailed: at the end, if any failed.
        Interrupted: after SIGINT or SIGTERM, every run saved.
    """
    gpus = list(range(torch.cuda.device_count()))
    cores = os.cpu_count() or 1
    waiting = [run for run in plan.runs if not is_finished(run)]
    places = min(jobs or len(gpus) or cores, max(len(waiting), 1))
    logger.info("%d of %d runs are done; %d at a time", len(plan.runs) - len(waiting), len(plan.runs), places)
    free = [Place(gpus[index % len(gpus)] if gpus else None, max(cores // places, 1)) for index in range(places)]
    with StopRequest() as stop, Progress(plan.runs) as progress, ExitStack() as stack:
        running: list[Job] = []
        failed: list[Job] = []
        while (waiting or running) and stop.signal is None:
            while waiting and free:
                running.append(stack.enter_context(Job(waiting.pop(0), free.pop())))
            time.sleep(POLL_SECONDS)
            ended = [job for job in running if job.process.poll() is not None]
            running = [job for job in running if job not in ended]
            free += [job.place for job in ended]
            failed += [job for job in ended if job.process.returncode != 0]
            progress.show([job.run for job in running])
        for job in running:  # all at once; the stack then waits for one after the other
            job.stop()
    if stop.signal is not None:
        raise Interrupted(stop.signal, "stopped, every run is saved; the same command goes on")
    if failed:
        raise RunsFailed("\n\n".join(job.complaint() for job in failed))


@dataclass(frozen=True)
class Place:
    """Where a run computes."""

    gpu: int | None
    threads: int


class Job:
    """A run and its process; at the end of the `with` block the process is asked to save and stop."""

    def __init__(self, run: Run, place: Place) -> None:
        self.run = run
        self.place = place
        self.console = run.directory.root / "console.txt"

    def __enter__(self) -> Job:
        folder = self.run.directory.root
        folder.mkdir(parents=True, exist_ok=True)
        self.run.directory.config.write_text(to_yaml(self.run.config), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.place.threads)}
        if self.place.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = _visible_gpu(self.place.gpu)
        worker = [sys.executable, "-m", "maskrcnn.ablation.worker", str(self.run.directory.config)]
        with self.console.open("ab") as console:
            # A session of its own, so that Ctrl-C reaches this process alone; a worker stops when its input ends.
            self.process = subprocess.Popen(
                [*worker, "--out", str(folder), "--threads", str(self.place.threads)],
                stdin=subprocess.PIPE, stdout=console, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.process.wait()

    def stop(self) -> None:
        """Ask the process to save and stop."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def complaint(self) -> str:
        """What to tell of a run that failed."""
        lines = self.console.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
        told = "\n  ".join(lines)
        return f"{self.run.name} failed with status {self.process.returncode} ({self.console}):\n  {told}"


def _visible_gpu(index: int) -> str:
    """The name of a GPU for a process of its own; some may be hidden from this one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


class Progress:
    """One line for the whole ablation: iterations done of all, and where each running one stands."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        done = sum(map(_iterations_done, runs))
        self._bar = tqdm(
            initial=done,
            total=sum(map(_iterations, runs)),
            unit="it",
            dynamic_ncols=True,
            disable=None,
            smoothing=0,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, running: Iterable[Run]) -> None:
        """Bring the line up to date."""
        states = [f"{run.name} {_iterations_done(run)}" for run in running]
        finished = sum(map(is_finished, self._runs))
        self._bar.set_postfix_str(f"{finished} of {len(self._runs)} runs done; " + ", ".join(states), refresh=False)
        self._bar.update(sum(map(_iterations_done, self._runs)) - self._bar.n)


def _iterations(run: Run) -> int:
    """How many iterations the run is to have."""
    training = run.config.training
    if training.schedule.epochs is None:
        return training.schedule.num_iterations
    images = len(run.config.data.build_train())
    return training.schedule.resolve(batches_per_epoch(images, training.batch_size)).num_iterations


def _iterations_done(run: Run) -> int:
    record = last_record(run.directory.metrics)
    return 0 if record is None else record["iteration"]

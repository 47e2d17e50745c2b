"""Train the missing runs of an ablation, several in parallel, each in its own process."""

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
from maskrcnn.engine.loop import Interrupted, StopRequest
from maskrcnn.engine.metrics import last_record
from maskrcnn.errors import InputError
from maskrcnn.runtime.files import write_text
from maskrcnn.runtime.threads import chosen_threads, usable_cores

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
REPORT_SECONDS = 60.0  # between two lines about the progress where there is no terminal for a bar
SHOWN_LINES = 15  # lines of console output in the message for a failed run


class RunsFailed(Exception):  # noqa: N818 (it reports the errors of other processes)
    """Some runs failed; the message has the last lines of the console output of each."""


def check_runs(plan: Plan) -> None:
    """Build the data and the model of every variant, so that errors appear before training starts.

    Raises:
        InputError: the data or the model of a variant cannot be built; the message names the variant.
    """
    checked: set[str] = set()
    for run in plan.runs:
        data = str(to_dict(run.config.data))
        data_and_model = data + str(to_dict(run.config.model))
        if data_and_model in checked or is_finished(run):
            continue
        checked.add(data_and_model)
        try:
            if data not in checked:
                run.config.data.build_both()
                checked.add(data)
            run.config.model.build(num_classes=1)
        except InputError as error:
            raise InputError(f"variant {run.variant}: {error}") from error


def is_finished(run: Run) -> bool:
    """Return True if the run has completed its training and the final evaluation."""
    record = last_record(run.directory.metrics)
    if record is None or record["kind"] == "train":
        return False
    return record["kind"] == "end" or record["iteration"] == run.config.training.schedule.iterations


def train_missing(plan: Plan, *, jobs: int | None = None) -> None:
    """Train all runs that are not finished, several in parallel.

    A run that fails does not stop the others.

    Args:
        plan: the ablation.
        jobs: number of runs in parallel; by default one per GPU, or one per CPU core if there is no GPU.

    Raises:
        RunsFailed: at least one run failed; raised after the others have ended.
        Interrupted: SIGINT or SIGTERM arrived; all runs have saved a checkpoint.
    """
    gpus = list(range(torch.cuda.device_count()))
    waiting = [run for run in plan.runs if not is_finished(run)]
    parallel = min(jobs or len(gpus) or usable_cores(), max(len(waiting), 1))
    logger.info("%d of %d runs are finished; %d in parallel", len(plan.runs) - len(waiting), len(plan.runs), parallel)
    threads = threads_per_run(parallel)
    free = [Place(gpus[index % len(gpus)] if gpus else None, threads) for index in range(parallel)]
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
        for job in running:  # signal all of them first; the exit stack then waits for each
            job.stop()
    if stop.signal is not None:
        raise Interrupted(stop.signal, "stopped, every run is saved; repeat the command to continue")
    if failed:
        raise RunsFailed("\n\n".join(job.complaint() for job in failed))


def threads_per_run(parallel: int) -> int:
    """Return the number of CPU threads of each run: `OMP_NUM_THREADS`, or an equal share of the cores."""
    return chosen_threads() or max(usable_cores() // parallel, 1)


@dataclass(frozen=True)
class Place:
    """The GPU and the number of CPU threads of a run."""

    gpu: int | None
    threads: int


class Job:
    """The process of one run. Leaving the `with` block tells the process to save and stop, and waits for its end."""

    def __init__(self, run: Run, place: Place) -> None:
        self.run = run
        self.place = place
        self.console = run.directory.root / "console.txt"

    def __enter__(self) -> Job:
        run_folder = self.run.directory.root
        run_folder.mkdir(parents=True, exist_ok=True)
        write_text(self.run.directory.config, to_yaml(self.run.config))
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.place.threads)}
        if self.place.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = _visible_gpu(self.place.gpu)
        worker = [sys.executable, "-m", "maskrcnn.ablation.worker", str(self.run.directory.config)]
        with self.console.open("ab") as console:
            # A new session, so that Ctrl-C reaches only this process. The worker stops when its standard input ends.
            self.process = subprocess.Popen(
                [*worker, "--out", str(run_folder), "--threads", str(self.place.threads)],
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
        """Tell the process to save a checkpoint and stop."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def complaint(self) -> str:
        """Return the error message of a failed run, with the end of its console output."""
        lines = self.console.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
        output = "\n  ".join(lines)
        return f"{self.run.name} failed with status {self.process.returncode} ({self.console}):\n  {output}"


def _visible_gpu(index: int) -> str:
    """Return the `CUDA_VISIBLE_DEVICES` entry of a GPU that this process knows by `index`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


class Progress:
    """A progress bar over the iterations of all runs, or without a terminal, a line in the log each minute."""

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
        self._reported_at = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, running: Iterable[Run]) -> None:
        """Update the progress bar from the records of the runs."""
        states = [f"{run.name} {_iterations_done(run)}" for run in running]
        finished = sum(map(is_finished, self._runs))
        state = f"{finished} of {len(self._runs)} runs finished; " + ", ".join(states)
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update(sum(map(_iterations_done, self._runs)) - self._bar.n)
        if self._bar.disable and time.monotonic() - self._reported_at >= REPORT_SECONDS:
            self._reported_at = time.monotonic()
            logger.info("%s", state)


def _iterations(run: Run) -> int:
    """Return the length of the run's schedule in iterations."""
    training = run.config.training
    if training.schedule.epochs is None:
        return training.schedule.num_iterations
    images = len(run.config.data.build_train())
    return training.schedule.resolve(batches_per_epoch(images, training.batch_size)).num_iterations


def _iterations_done(run: Run) -> int:
    record = last_record(run.directory.metrics)
    return 0 if record is None else record["iteration"]

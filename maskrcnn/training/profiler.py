"""A trace of a few steps: what the CPU and the GPU do when, to see where the time goes.

chrome://tracing and https://ui.perfetto.dev show it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity

logger = logging.getLogger(__name__)

FOLDER = "profile"
# Counted from the start of the process. The first steps warm up: memory, cuDNN's choices, compilation, data workers.
FIRST, LAST = 10, 20


class Profiler:
    """Records steps 10 to 20 of this process to `profile/steps_10_to_20.json` in the run's folder.

    Use it in a `with` statement, which ends with what there is if training does. A span `ProfilerStep#10` holds the
    tenth step from the end of the ninth on: waiting for data, forward, backward, and whatever came between.
    """

    def __init__(self, run_dir: Path) -> None:
        """Set up; nothing is recorded before step 10, and nothing after step 20."""
        self._path = run_dir / FOLDER / f"steps_{FIRST}_to_{LAST}.json"
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities,
            # torch numbers steps from 0, and warms up for one before the first that counts.
            schedule=torch.profiler.schedule(wait=FIRST - 1, warmup=1, active=LAST - FIRST + 1, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> Profiler:
        self._profile.start()
        self._profile.step()  # number 0 is what comes before the first
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.stop()
        if self._profile.step_num < FIRST:
            logger.warning("training ended before step %d of this process: there is no trace", FIRST)

    def step(self) -> None:
        """Say that a step is done."""
        self._profile.step()

    def _write(self, profile: torch.profiler.profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self._path))
        logger.info("%s: a trace of steps %d to %d, for https://ui.perfetto.dev", self._path, FIRST, LAST)

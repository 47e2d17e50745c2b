"""A profiler trace of a few training steps on CPU and GPU.

Open the trace in chrome://tracing or https://ui.perfetto.dev.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity

logger = logging.getLogger(__name__)

FOLDER = "profile"
# Counted from the start of the process. Earlier steps are warm-up: memory, cuDNN benchmark, compilation, data workers.
FIRST, LAST = 10, 20


class Profiler:
    """Records training steps 10 to 20 of this process in `profile/steps_10_to_20.json` of the run directory.

    Use it in a `with` statement. If training ends before step 20, the trace ends with the last step. A span
    `ProfilerStep#10` begins at the end of step 9, so it includes waiting for data, forward and backward pass, and
    anything in between.
    """

    def __init__(self, run_dir: Path) -> None:
        """Set up the profiler for a run directory."""
        self._path = run_dir / FOLDER / f"steps_{FIRST}_to_{LAST}.json"
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities,
            # torch counts steps from 0 and needs one warm-up step before the first recorded one.
            schedule=torch.profiler.schedule(wait=FIRST - 1, warmup=1, active=LAST - FIRST + 1, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> Profiler:
        self._profile.start()
        self._profile.step()  # step 0 of torch is the time before the first training step
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.stop()
        if self._profile.step_num < FIRST:
            logger.warning("training ended before step %d of this process: no profiler trace was written", FIRST)

    def step(self) -> None:
        """Mark the end of a training step."""
        self._profile.step()

    def _write(self, profile: torch.profiler.profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self._path))
        logger.info("%s: profiler trace of steps %d to %d; open it in https://ui.perfetto.dev", self._path, FIRST, LAST)

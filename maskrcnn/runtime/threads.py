"""CPU threads of a command: as many as there are usable cores, and waiting threads sleep.

Called before torch is imported, because OpenMP reads its settings when it is loaded.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def set_thread_defaults() -> None:
    """Set `OMP_WAIT_POLICY` and `OMP_NUM_THREADS` of this process and its children, unless they are set.

    Idle OpenMP threads spin by default. On a machine with other busy processes, they then take the time that the
    threads with work need. The number of threads is limited where the quota of a container is below that of cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if usable_cores() < affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def usable_cores() -> int:
    """Return the number of cores that this process may use: its CPU affinity, within the CPU quota of its cgroup."""
    quota = _cpu_quota()
    return affinity() if quota is None else max(1, min(affinity(), math.ceil(quota)))


def affinity() -> int:
    """Return the number of cores on which the scheduler may run this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_quota() -> float | None:
    """Return the CPU quota of a container in cores; None without one (cgroup v2, then v1)."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    return None if quota.strip() in ("max", "-1") else int(quota) / int(period)

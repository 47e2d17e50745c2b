"""CPU threads of a command: as many as there are usable cores, and waiting threads sleep.

Called before torch is imported, because OpenMP reads its settings when it is loaded.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")

_defaults: set[str] = set()  # the variables that `set_thread_defaults` has set in this process


def set_thread_defaults() -> None:
    """Set `OMP_WAIT_POLICY` and `OMP_NUM_THREADS` of this process and its children, unless they are set.

    Idle OpenMP threads spin by default. On a machine with other busy processes, they then take the time that the
    threads with work need. The number of threads is limited where the quota of a container is below that of cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if usable_cores() < affinity() and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(usable_cores())
        _defaults.add("OMP_NUM_THREADS")


def chosen_threads() -> int | None:
    """Return the number of threads that the user chose with `OMP_NUM_THREADS`; None without a choice."""
    number = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # "4,2" would be 4, and 2 in nested regions
    return int(number) if number.isdecimal() and "OMP_NUM_THREADS" not in _defaults else None


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

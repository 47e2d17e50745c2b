"""The thread settings that commands start with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskrcnn.ablation.runner import threads_per_run
from maskrcnn.runtime import threads


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_a_quota_limits_the_usable_cores(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(threads, "affinity", lambda: 8)
    assert threads.usable_cores() == cores


def environment_of_a_command(**variables: str) -> list[str]:
    """Return the wait policy and the number of threads with which the command runs."""
    code = (
        "import os, sys; from maskrcnn.runtime import threads; threads.affinity = lambda: 8; "
        "threads._cpu_quota = lambda: 3.0; from maskrcnn import cli; cli.COMMANDS = (); "
        "cli._run = lambda command: print(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS']); cli.main()"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_default_of_a_quota_is_no_choice_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ablation divides the cores among its runs, but does not override the user."""
    monkeypatch.setattr(threads, "affinity", lambda: 64)
    monkeypatch.setattr(threads, "_cpu_quota", lambda: 4.0)
    monkeypatch.setattr(threads, "_defaults", set())
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # restores the variable after the test
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    threads.set_thread_defaults()
    assert threads.chosen_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.set_thread_defaults()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert threads.chosen_threads() is None
    assert threads_per_run(2) == 2


def test_a_command_sets_what_the_user_has_not_set() -> None:
    assert environment_of_a_command() == ["PASSIVE", "3"]
    assert environment_of_a_command(OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="5") == ["ACTIVE", "5"]

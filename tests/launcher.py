"""Processes that run a command.

On Linux they are forked from one that has imported torch, which saves seconds per process and is safe there alone.
Elsewhere each starts anew.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
TIMEOUT = 300  # seconds; only a hanging process takes this long

SERVER = """
import gc, json, os, resource, runpy, sys
import torch
import maskrcnn.training_run

torch.set_num_threads(1)
gc.freeze()  # otherwise each child would copy and collect the imported objects
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    os.setsid()
    writable = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    files = (os.open(os.devnull, os.O_RDONLY), os.open(job["out"], writable), os.open(job["err"], writable))
    for stream, file in enumerate(files):
        os.dup2(file, stream)
    if job["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], resource.RLIM_INFINITY))
    os.environ.update(job["environment"])
    sys.path[1:1] = job["environment"].get("PYTHONPATH", "").split(os.pathsep)
    what, *rest = job["command"]
    sys.argv = [what, *rest]
    if what == "-c":
        del sys.argv[1]
        exec(rest[0], {"__name__": "__main__"})
    elif what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(what)
        runpy.run_path(what, run_name="__main__")
    sys.exit()
"""


class Ended(NamedTuple):
    """The exit status of a process, or minus the number of the signal that killed it, and what it wrote."""

    status: int
    out: str
    err: str


class Process:
    """A running command, which leads a process group of its own."""

    def __init__(self, pid: int, out: Path, err: Path, *, alive: Callable[[], bool], status: Callable[[], int]) -> None:
        self.pid = pid
        self.alive = alive
        self._out, self._err = out, err
        self._status = status  # waits for the end

    @property
    def output(self) -> str:
        """What it has written so far: standard output, then standard error."""
        return self._out.read_text() + self._err.read_text()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` is true or the process has ended."""
        deadline = time.monotonic() + TIMEOUT
        while not condition() and self.alive():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(self.output)
            time.sleep(0.005)

    def kill(self) -> None:
        """Kill its process group, if it still runs."""
        if self.alive():
            os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> Ended:
        """Wait for the end."""
        self.wait_for(lambda: False)
        return Ended(self._status(), self._out.read_text(), self._err.read_text())


def _is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended, on Linux."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Launcher:
    """Starts commands as `python` would, from the root of the repository and with one thread."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()

    def start(self, *command: object, environment: Mapping[str, str] | None = None) -> Process:
        """Start `python *command`."""
        out, err = self._files()
        with out.open("w") as out_file, err.open("w") as err_file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=out_file,
                stderr=err_file, env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                start_new_session=True,
            )  # fmt: skip
        return Process(process.pid, out, err, alive=lambda: process.poll() is None, status=process.wait)

    def run(self, *command: object, environment: Mapping[str, str] | None = None) -> Ended:
        """Run `python *command` to its end."""
        return self.start(*command, environment=environment).end()

    def _files(self) -> tuple[Path, Path]:
        folder = tempfile.mkdtemp(dir=self._folder.name)
        return Path(folder, "out"), Path(folder, "err")

    def close(self) -> None:
        self._folder.cleanup()


class ForkingLauncher(Launcher):
    """Forks the processes from one that has imported torch."""

    def __init__(self) -> None:
        super().__init__()
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._lock = threading.Lock()

    def start(self, *command: object, environment: Mapping[str, str] | None = None, largest_file: int = 0) -> Process:
        """Start `python *command`; a positive `largest_file` limits the size of each file, in bytes."""
        out, err = self._files()
        job = {
            "command": list(map(str, command)), "out": str(out), "err": str(err), "environment": environment or {},
            "largest_file": largest_file,
        }  # fmt: skip
        pid = self._ask(job)
        return Process(pid, out, err, alive=lambda: _is_running(pid), status=lambda: self._ask({"wait": pid}))

    def _ask(self, job: Mapping[str, object]) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with self._lock:
            self._server.stdin.write(json.dumps(job) + "\n")
            self._server.stdin.flush()
            return int(self._server.stdout.readline())

    def close(self) -> None:
        self._server.communicate(timeout=TIMEOUT)
        super().close()

"""The process of one run of an ablation: `python -m maskrcnn.ablation.worker CONFIG --out DIR --threads N`.

It trains the run, or resumes it from its last checkpoint. When its standard input ends, because the parent process
closes it or dies, the worker saves a checkpoint and exits.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from maskrcnn.config import read_config
from maskrcnn.engine.loop import Interrupted
from maskrcnn.experiment import ExperimentConfig, choose_device
from maskrcnn.run_directory import RunDirectory
from maskrcnn.runtime.console import run_main
from maskrcnn.runtime.memory import keep_freed_memory
from maskrcnn.runtime.processes import Processes
from maskrcnn.training_run import train_experiment


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    config = read_config(args.config, ExperimentConfig)
    resume = RunDirectory(args.out).started
    try:
        train_experiment(config, args.out, resume=resume, init=None, processes=Processes(choose_device("auto")))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)


def _stop_at_end_of_input() -> None:
    os.read(sys.stdin.fileno(), 1)  # unbuffered: the lock of `sys.stdin` would block the exit of the main thread
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run_main(main)

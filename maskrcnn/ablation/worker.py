"""The process of one run of an ablation: `python -m maskrcnn.ablation.worker CONFIG --out DIR --threads N`.

It trains, or goes on with what is there, and stops with its state saved when its standard input ends: that is when
the process that started it closes it, or is gone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from maskrcnn.cli import run
from maskrcnn.config import load_config
from maskrcnn.experiment import ExperimentConfig, choose_device
from maskrcnn.run_directory import RunDirectory
from maskrcnn.training.distributed import Processes
from maskrcnn.training.loop import Interrupted
from maskrcnn.training_run import train_experiment


def main() -> None:
    """Parse, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    torch.set_num_threads(args.threads)
    config = load_config(args.config, ExperimentConfig)
    resume = RunDirectory(args.out).started
    try:
        train_experiment(config, args.out, resume=resume, init=None, processes=Processes(choose_device("auto")))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)


def _stop_at_end_of_input() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through a buffered file, whose lock would outlive the main thread
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run(main)

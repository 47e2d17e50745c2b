"""Train and evaluate a model and write the run directory.

    maskrcnn train configs/shapes/mask_rcnn_r18_fpn.yaml --out runs/shapes
    torchrun --standalone --nproc-per-node 8 -m maskrcnn train configs/coco/mask_rcnn_r50_fpn_1x.yaml --out runs/r50_fpn

Exit status: 0 success, 1 failure, 2 invalid input, 130 and 143 stopped by SIGINT and SIGTERM with the state saved.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from maskrcnn.cli.arguments import add_config_arguments, add_device_argument
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--out",
        type=expand,
        help="the run directory; default: runs/NAME, where NAME is the name of CONFIG without suffix",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="resume from the last checkpoint of the run directory")
    start.add_argument(
        "--init", type=expand, metavar="WEIGHTS", help="start a new run from these weights, also of another framework"
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Train."""

    from maskrcnn.config import read_config
    from maskrcnn.engine.loop import Interrupted
    from maskrcnn.experiment import ExperimentConfig, choose_device
    from maskrcnn.runtime.memory import keep_freed_memory
    from maskrcnn.runtime.processes import processes
    from maskrcnn.training_run import train_experiment

    out = args.out or Path("runs") / args.config.stem
    setup_logging()
    keep_freed_memory()
    config = read_config(args.config, ExperimentConfig, args.overrides)
    try:
        with processes(choose_device(args.device)) as group:
            setup_logging(process=group.rank)
            train_experiment(config, out, resume=args.resume, init=args.init, processes=group)
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)

"""Repeat a training step that was skipped because a loss or the gradient was not finite.

    maskrcnn replay-batch runs/shapes/replay/iteration_00000412_process_0.pt

Prints each loss term, the gradient norm, and the parameters whose gradient is not finite, in the order of the model.
Exit status: 0 all values are finite, 1 some are not, 2 invalid input.
"""

from __future__ import annotations

import argparse
import sys

from maskrcnn.cli.arguments import add_device_argument
from maskrcnn.paths import expand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "step", metavar="FILE", type=expand, help="replay file in the folder replay/ of a run directory"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="autocast precision; default: that of the run"
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Repeat the step, and print losses and gradients."""

    from maskrcnn.engine.replay import load_replay
    from maskrcnn.experiment import choose_device
    from maskrcnn.training_run import repeat_step

    result = repeat_step(load_replay(args.step), str(args.step), choose_device(args.device), precision=args.precision)
    for name, value in result.losses.items():
        print(f"{name:15} {value:g}")
    print(f"{'gradient norm':15} {result.gradient_norm:g}")
    for name, fraction in result.broken.items():
        print(f"not finite: {fraction:.1%} of the gradient of {name}")
    sys.exit(0 if result.finite else 1)

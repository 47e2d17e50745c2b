"""Repeat a training step that was not taken because a loss or the gradient was not finite.

    python tools/replay_batch.py runs/shapes/replay/iteration_00000412_process_0.pt

It prints every term of the loss, and the parameters whose gradient is not finite, first in the order of the model.
Exit status: 0 everything is finite here, 1 it is not, 2 wrong input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from maskrcnn.cli import add_device_argument, run


def main() -> None:
    """Parse, repeat the step, print what is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", metavar="FILE", type=Path, help="the stored step, in the folder replay/ of a run")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: the run's")
    add_device_argument(parser)
    args = parser.parse_args()

    from maskrcnn.experiment import choose_device
    from maskrcnn.training.replay import load_replay
    from maskrcnn.training_run import repeat_step

    found = repeat_step(load_replay(args.step), str(args.step), choose_device(args.device), precision=args.precision)
    for name, value in found.losses.items():
        print(f"{name:15} {value:g}")
    print(f"{'gradient norm':15} {found.gradient_norm:g}")
    for name, share in found.broken.items():
        print(f"not finite: {share:.1%} of the gradient of {name}")
    sys.exit(0 if found.finite else 1)


if __name__ == "__main__":
    run(main)

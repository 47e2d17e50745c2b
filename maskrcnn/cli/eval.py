"""Compute COCO box and mask AP of a checkpoint or of a results file.

    maskrcnn eval CONFIG --weights runs/shapes/checkpoints/best.pt
    maskrcnn eval --weights coco.pt --set data.root=datasets/coco
    maskrcnn eval --annotations instances_val2017.json --predictions results.json

Without CONFIG, the configuration is the one that the file of the weights holds. The last form needs no model and no
images.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from maskrcnn.cli.arguments import add_average_argument, add_config_arguments, add_device_argument
from maskrcnn.errors import InputError
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging

AVERAGE_SUFFIXES = {None: "", True: "_ema", False: "_no_ema"}  # of the default folder, by the choice of the weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_config_arguments(parser, optional=True)
    parser.add_argument("--weights", type=expand, metavar="FILE", help="weights of the model")
    add_average_argument(parser)
    parser.add_argument("--annotations", type=expand, metavar="FILE", help="ground truth, a COCO annotation file")
    parser.add_argument("--predictions", type=expand, metavar="FILE", help="detections, a COCO results file")
    parser.add_argument(
        "--backend",
        choices=("faster", "pycocotools"),
        help="COCO evaluation library; default: that of CONFIG, or faster",
    )
    parser.add_argument(
        "--out", type=expand, help="folder for metrics.json; default: beside the weights; with --annotations, no file"
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate, and log the tables."""
    from_checkpoint = args.weights is not None
    from_files = args.annotations is not None and args.predictions is not None
    if from_checkpoint == from_files or (from_files and args.config is not None):
        raise InputError("give either --weights (and CONFIG), or --annotations and --predictions")

    from maskrcnn.config import read_config
    from maskrcnn.engine.evaluator import report
    from maskrcnn.evaluation.results import read_results
    from maskrcnn.experiment import ExperimentConfig, choose_device, evaluate_checkpoint, stored_config
    from maskrcnn.runtime.memory import keep_freed_memory
    from maskrcnn.runtime.outputs import output_folder

    setup_logging()
    keep_freed_memory()
    if from_files:
        results = read_results(args.predictions)
        with output_folder(args.out) if args.out else nullcontext():
            report(args.annotations, results, args.out, backend=args.backend or "faster")
        return
    backend = [f"evaluation.backend={args.backend}"] if args.backend else []
    overrides = [*args.overrides, *backend]
    if args.config is None:
        config = stored_config(args.weights, overrides)
    else:
        config = read_config(args.config, ExperimentConfig, overrides)
    out = args.out or args.weights.parent / f"evaluation_{args.weights.stem}{AVERAGE_SUFFIXES[args.ema]}"
    evaluate_checkpoint(config, args.weights, out, choose_device(args.device), average=args.ema)
    print(f"metrics.json, results.json and pictures are in {out}")

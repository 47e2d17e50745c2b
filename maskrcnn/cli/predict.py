"""Detect and draw objects in your own images.

    maskrcnn predict --weights runs/shapes/checkpoints/best.pt PHOTOS --out found

PHOTOS are images, folders of images, and patterns in quotes, such as 'photos/**/*.jpg'. The images are read ahead by
threads, and memory does not grow with their number. Writes one picture per image, and results.json in COCO's
results format. The model is built from the configuration in the file of the weights; --set changes a key of it, for
example model.detection.score_threshold. Exit status: 0 success, 1 some images could not be read and were skipped,
2 invalid input.
"""

from __future__ import annotations

import argparse
import sys

from maskrcnn.cli.arguments import add_average_argument, add_device_argument, add_set_argument, number, whole_number
from maskrcnn.errors import InputError
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging

GPU_BATCH = 8  # images; on a CPU a batch takes memory and saves no time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("inputs", nargs="+", type=expand, metavar="PHOTOS", help="images, folders, patterns in quotes")
    parser.add_argument("--weights", type=expand, required=True, metavar="FILE", help="weights of the model")
    add_average_argument(parser)
    parser.add_argument("--out", type=expand, required=True, help="folder for the pictures and results.json")
    parser.add_argument(
        "--score", type=number(0, 1), default=0.5, help="omit detections with a lower score (default 0.5)"
    )
    parser.add_argument("--classes", nargs="+", default=(), metavar="NAME", help="keep detections of these classes")
    parser.add_argument(
        "--pictures", action=argparse.BooleanOptionalAction, default=True, help="draw the detections (default)"
    )
    parser.add_argument(
        "--colour-by",
        choices=("instance", "class"),
        default="instance",
        help="a colour for each object, such that objects that touch differ (default), or for each class",
    )
    parser.add_argument(
        "--tile", type=whole_number(32, 100_000), metavar="SIZE", help="cut images into tiles of SIZE x SIZE pixels"
    )
    parser.add_argument(
        "--overlap",
        type=whole_number(0, 100_000),
        metavar="N",
        help="pixels that neighbouring tiles share, at least (default: a quarter of the tile)",
    )
    parser.add_argument(
        "--tta",
        type=_views,
        default=(),
        metavar="VIEWS",
        help="detect in several views of each image and merge: flip, scales (0.75, 1 and 1.25 times the short side) or "
        "short sides in pixels, separated by commas, such as flip,640,800",
    )
    parser.add_argument(
        "--nms",
        choices=("class", "agnostic", "mask"),
        default="class",
        help="suppress detections whose boxes overlap a better one of the class (default), or of any class; or whose "
        "masks overlap a better one of the class",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=("coco", "labelme", "png", "yolo"),
        default=("coco",),
        help="files to write for other tools, beside results.json, which is COCO's format",
    )
    parser.add_argument(
        "--batch-size", type=whole_number(1, 1024), help=f"images at a time (default {GPU_BATCH} on a GPU, else 1)"
    )
    parser.add_argument(
        "--workers",
        type=whole_number(0, 1024),
        help="threads that read images ahead (default: 0 for a few images, else 4)",
    )
    add_set_argument(parser, help="override a key of the stored configuration; may be repeated")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Predict."""
    from maskrcnn.engine.prediction import ImagesSkipped, PredictionOptions, predict_images
    from maskrcnn.engine.predictor import Detector
    from maskrcnn.engine.tiles import TiledDetector
    from maskrcnn.engine.tta import AugmentedDetector, default_short_sides
    from maskrcnn.experiment import load
    from maskrcnn.runtime.memory import keep_freed_memory

    if args.overlap is not None and args.tile is None:
        raise InputError("--overlap needs --tile")
    setup_logging()
    keep_freed_memory()
    predictor = load(args.weights, device=args.device, average=args.ema, overrides=args.overrides)
    batch_size = args.batch_size or (GPU_BATCH if predictor.device.type == "cuda" else 1)
    threshold = predictor.nms_threshold
    if args.nms == "mask":
        predictor = predictor.with_loose_nms()
    detector: Detector = predictor
    if args.tta:
        sides = {int(view) for view in args.tta if view.isdecimal()}
        sides.update(default_short_sides(predictor) if "scales" in args.tta else ())
        detector = AugmentedDetector(predictor, flip="flip" in args.tta, short_sides=tuple(sorted(sides)))
    if args.tile is not None:
        overlap = args.tile // 4 if args.overlap is None else args.overlap
        detector = TiledDetector(detector, args.tile, overlap, batch_size, args.nms, threshold)
    options = PredictionOptions(
        min_score=args.score,
        classes=tuple(args.classes),
        pictures=args.pictures,
        colour_by=args.colour_by,
        formats=tuple(args.format),
        batch_size=batch_size if args.tile is None else 1,
        nms=args.nms,
        nms_threshold=threshold,
        workers=args.workers,
    )
    try:
        predict_images(detector, args.inputs, args.out, options)
    except ImagesSkipped as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def _views(text: str) -> tuple[str, ...]:
    views = tuple(view.strip() for view in text.split(","))
    for view in views:
        if view not in ("flip", "scales") and not (view.isascii() and view.isdecimal() and 32 <= int(view) <= 10_000):
            raise argparse.ArgumentTypeError(
                f"expected flip, scales or short sides from 32 to 10000, separated by commas, got {view[:100]!r}"
            )
    return views

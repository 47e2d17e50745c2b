"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from maskrcnn.paths import expand


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the arguments CONFIG (`args.config`, a Path) and `--set KEY=VALUE` (`args.overrides`, a list of str).

    With `optional`, CONFIG may be omitted (None).
    """
    nargs = "?" if optional else None
    parser.add_argument(
        "config",
        metavar="CONFIG",
        type=expand,
        nargs=nargs,
        help="YAML file or recipe, such as shapes/mask_rcnn_r18_fpn",
    )
    add_set_argument(
        parser, help="override a key of the configuration, such as model.roi.kind=roi_pool; may be repeated"
    )


def add_set_argument(parser: argparse.ArgumentParser, *, help: str) -> None:
    """Add the argument `--set KEY=VALUE` (`args.overrides`, a list of str)."""
    parser.add_argument("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help=help)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument `--device` (`args.device`, a str for `choose_device`)."""
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")


def add_average_argument(parser: argparse.ArgumentParser) -> None:
    """Add the arguments `--ema` and `--no-ema` (`args.ema`, a bool, or None for the choice of the run)."""
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="use the averaged (EMA) weights of the checkpoint, or not; by default those that its best_metric names",
    )


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return the `type` of an argument that is a whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text[:100]!r}")
        return number

    return read


def number(least: float, most: float) -> Callable[[str], float]:
    """Return the `type` of an argument that is a finite number from `least` to `most`."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"expected a number from {least:g} to {most:g}, got {text[:100]!r}")
        return number

    return read


def class_names(text: str) -> tuple[str, ...]:
    """Return the names in a text such as `cat,dog`: the `type` of an argument for classes in their order."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("expected names, each once, separated by commas")
    return names

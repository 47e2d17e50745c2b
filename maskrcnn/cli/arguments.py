"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the arguments CONFIG (`args.config`, a Path) and `--set KEY=VALUE` (`args.overrides`, a list of str).

    With `optional`, CONFIG may be omitted (None).
    """
    nargs = "?" if optional else None
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, nargs=nargs, help="YAML file or recipe, such as shapes/mask_rcnn_r18_fpn"
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

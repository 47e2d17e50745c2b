"""Print the resolved and validated configuration of an experiment, or the JSON Schema of all configurations.

maskrcnn show-config configs/coco/mask_rcnn_r50_fpn_1x.yaml --set model.roi.kind=roi_pool
maskrcnn show-config --schema > configs/schema.json
"""

from __future__ import annotations

import argparse
import json

from maskrcnn.cli.arguments import add_config_arguments
from maskrcnn.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_config_arguments(parser, optional=True)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema for editors instead")


def run(args: argparse.Namespace) -> None:
    """Print."""
    if args.schema == (args.config is not None):
        raise InputError("give either CONFIG or --schema")

    from maskrcnn.config import json_schema, read_config, to_yaml
    from maskrcnn.experiment import ExperimentConfig

    if args.schema:
        print(json.dumps(json_schema(ExperimentConfig), indent=2))
    else:
        print(to_yaml(read_config(args.config, ExperimentConfig, args.overrides)), end="")

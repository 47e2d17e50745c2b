"""Print the resolved and validated configuration of an experiment, or the JSON Schema of all configurations.

python tools/show_config.py configs/coco/mask_rcnn_r50_fpn_1x.yaml --set model.roi.kind=roi_pool
python tools/show_config.py --schema > configs/schema.json
"""

from __future__ import annotations

import argparse
import json

from maskrcnn.cli import add_config_arguments, run


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, optional=True)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema for editors instead")
    args = parser.parse_args()
    if args.schema == (args.config is not None):
        parser.error("give either CONFIG or --schema")

    from maskrcnn.config import json_schema, load_config, to_yaml
    from maskrcnn.experiment import ExperimentConfig

    if args.schema:
        print(json.dumps(json_schema(ExperimentConfig), indent=2))
    else:
        print(to_yaml(load_config(args.config, ExperimentConfig, args.overrides)), end="")


if __name__ == "__main__":
    run(main)

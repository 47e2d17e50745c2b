"""Write COCO annotation files for the Penn-Fudan database of pedestrians (170 street photographs, 423 people).

    python datasets/prepare_penn_fudan.py datasets/PennFudanPed

The argument is the unpacked archive of https://www.cis.upenn.edu/~jshi/ped_html/, with `PNGImages` and `PedMasks`.
`train.json` (120 images) and `val.json` (50) are written into it; of each 17 images in order of their names, the last
five are for validation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from maskrcnn.data.converters import reader
from maskrcnn.data.converters.conversion import Conversion
from maskrcnn.data.converters.splits import require_new, split_by
from maskrcnn.runtime.console import run_main

CYCLE, VALIDATION = 17, 5  # 170 images: 50 of them are for validation


def main() -> None:
    """Parse, read the masks, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the unpacked PennFudanPed folder")
    root = parser.parse_args().root
    require_new(root / name for name in ("train.json", "val.json"))
    data = reader("masks")(Conversion(root / "PedMasks", root / "PNGImages", ("person",)))[""]
    chosen = {image["id"] for image in data["images"] if (image["id"] - 1) % CYCLE >= CYCLE - VALIDATION}
    for name, split in split_by(data, chosen).items():
        path = root / f"{name}.json"
        for number, annotation in enumerate(split["annotations"], start=1):
            annotation["id"] = number
        path.write_text(json.dumps(split), encoding="utf-8")
        print(f"{path}: {len(split['images'])} images, {len(split['annotations'])} people")


if __name__ == "__main__":
    run_main(main)

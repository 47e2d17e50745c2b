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
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as cocoapi

from maskrcnn.errors import InputError
from maskrcnn.runtime.console import run_main

CYCLE, VALIDATION = 17, 5  # 170 images: 50 of them are for validation


def annotate(masks: list[tuple[int, Path]]) -> dict[str, Any]:
    """Return the content of a COCO annotation file for mask images, each with its number as the image's id."""
    images, annotations = [], []
    for image_id, path in masks:
        instances = np.asarray(Image.open(path))  # 0 is background, and the n-th person has the value n
        name = path.name.replace("_mask", "")
        height, width = instances.shape
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for person in np.unique(instances[instances > 0]):
            code = cocoapi.encode(np.asfortranarray(instances == person))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": cocoapi.toBbox(code).tolist(),
                    "area": int(cocoapi.area(code)),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": code["counts"].decode()},
                }
            )
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


def main() -> None:
    """Parse, read the masks, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the unpacked PennFudanPed folder")
    root = parser.parse_args().root
    masks = list(enumerate(sorted((root / "PedMasks").glob("*_mask.png"))))
    if not masks:
        raise InputError(f"{root / 'PedMasks'}: no mask images; unpack PennFudanPed.zip and name its folder")
    parts: dict[str, list[tuple[int, Path]]] = {"train.json": [], "val.json": []}
    for index, path in masks:
        parts["val.json" if index % CYCLE >= CYCLE - VALIDATION else "train.json"].append((index + 1, path))
    for name in parts:
        if (root / name).exists():
            raise InputError(f"{root / name} exists; move it away to write it anew")
    for name, chosen in parts.items():
        data = annotate(chosen)
        (root / name).write_text(json.dumps(data), encoding="utf-8")
        print(f"{root / name}: {len(data['images'])} images, {len(data['annotations'])} people")


if __name__ == "__main__":
    run_main(main)

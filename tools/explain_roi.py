"""Draw what each RoI layer makes of one box: the cells it reads, its bins, its sample points, the pooled numbers.

    python tools/explain_roi.py --map 8x8 --box 1,1,6,8 --output 2x2
    python tools/explain_roi.py --map 25x25 --stride 32 --box 0,0,665,665 --output 7x7 --out object.png
    python tools/explain_roi.py --image photo.jpg --config configs/coco/mask_rcnn_r50_fpn_1x.yaml --box 40,60,300,420

With --map, a cell holds the value 10 x row + column, so that a pooled number tells where it was read. With --image, the
config's backbone reads the photograph, and the map is the one from which the box head would read this box.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from maskrcnn.cli import run
from maskrcnn.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from maskrcnn.data.transforms import Transform
    from maskrcnn.models.mask_rcnn import MaskRCNN

Box = tuple[float, float, float, float]

MOST = 100  # cells a side, of maps and grids: more are not legible


def main() -> None:
    """Parse, read, draw."""
    args = _parser().parse_args()
    if (args.map is None) == (args.image is None):
        raise InputError("give either --map HxW or --image FILE")
    if args.map is not None and (args.config or args.overrides or args.weights):
        raise InputError("--config, --set and --weights need --image FILE: a map of --map has values of its own")
    if args.image is not None and (args.config is None or args.stride is not None):
        raise InputError(
            "--image needs --config FILE, whose backbone gives the map and its stride; leave --stride away"
        )
    if args.out.suffix != ".png":
        raise InputError(f"--out {args.out}: the picture is a PNG; give a name that ends in .png")
    box = _read_box(args.box)
    size = None if args.output is None else _read_size(args.output)
    drawn = _explain_map(args, box, size) if args.image is None else _explain_image(args, box, size)
    _save(drawn, args.out, photograph=args.image is not None)
    print(f"the picture is in {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", required=True, metavar="X1,Y1,X2,Y2", help="in pixels; --box=-5,... with a minus")
    parser.add_argument("--map", metavar="HxW", help="cells of a map to make up")
    parser.add_argument("--stride", type=float, help="pixels per cell of --map (default 1: the box is in cells)")
    parser.add_argument(
        "--output", metavar="SxS", help="the pooled grid (default 7x7; with --image the box head's own)"
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="a photograph, instead of --map")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the experiment whose backbone reads --image")
    parser.add_argument("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="a key of it")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint of its model (default: its own)")
    parser.add_argument("--out", type=Path, default=Path("roi.png"), help="the picture, a PNG (default roi.png)")
    return parser


def _read_box(text: str) -> Box:
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--box {text}: expected four numbers X1,Y1,X2,Y2, such as 1,1,6,8") from None
    if not all(math.isfinite(side) for side in (x1, y1, x2, y2)):
        raise InputError(f"--box {text}: every number must be finite")
    if not (x1 < x2 and y1 < y2):
        raise InputError(f"--box {text}: the box has no area; X2 must be greater than X1, and Y2 than Y1")
    return x1, y1, x2, y2


def _read_sides(option: str, text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise InputError(f"{option} {text}: expected two whole numbers HxW, such as 8x8") from None
    if not (1 <= height <= MOST and 1 <= width <= MOST):
        raise InputError(f"{option} {text}: both numbers must be from 1 to {MOST}")
    return height, width


def _read_size(text: str) -> int:
    height, width = _read_sides("--output", text)
    if height != width:
        raise InputError(f"--output {text}: the RoI layers make square grids; give the same number twice, as in 7x7")
    return height


def _require_inside(box: Box, width: float, height: float, what: str) -> None:
    x1, y1, x2, y2 = box
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        raise InputError(
            f"--box {_numbers(box)}: it lies outside {what} of {width:g} x {height:g} pixels (width, height)"
        )


def _numbers(box: Box) -> str:
    return ",".join(f"{side:g}" for side in box)


def _explain_map(args: argparse.Namespace, box: Box, size: int | None) -> np.ndarray:
    height, width = _read_sides("--map", args.map)
    stride, size = 1.0 if args.stride is None else args.stride, size or 7
    if not 0 < stride < math.inf:
        raise InputError(f"--stride {stride:g}: it must be greater than 0")
    _require_inside(box, width * stride, height * stride, "the map")

    import torch

    from maskrcnn.roi_picture import draw_roi_layers

    values = 10.0 * torch.arange(height)[:, None] + torch.arange(width)
    return draw_roi_layers(
        values,
        box,
        stride=stride,
        size=size,
        title=f"The box ({_numbers(box)}) on a map of {height} x {width} cells, pooled to {size} x {size}",
        notes=[f"stride {stride:g}; the value of a cell is 10 x row + column"],
    )


def _explain_image(args: argparse.Namespace, box: Box, size: int | None) -> np.ndarray:
    from maskrcnn.data.images import read_image
    from maskrcnn.roi_picture import draw_box, draw_roi_layers, shade_map

    pixels = read_image(args.image)
    _require_inside(box, pixels.shape[2], pixels.shape[1], f"{args.image},")
    model, transform, origin = _load_model(args.config, args.overrides, args.weights)
    features, stride, (x1, y1, x2, y2) = _feature_map(model, transform, pixels, box)
    size = size or model.box_pooler.size
    values = features.mean(dim=0)
    in_cells = (x1 / stride, y1 / stride, x2 / stride, y2 / stride)
    return draw_roi_layers(
        values,
        (x1, y1, x2, y2),
        stride=stride,
        size=size,
        title=f"The box ({_numbers(box)}) on {args.image.name}, read at stride {stride}, pooled to {size} x {size}",
        notes=[
            f"{args.config.name}, {origin}; the value of a cell is the mean of its {len(features)} channels",
            f"on the resized image the box is ({x1:.1f}, {y1:.1f}, {x2:.1f}, {y2:.1f})",
        ],
        context=[
            draw_box(pixels.permute(1, 2, 0).contiguous().numpy(), box, "The image and the box"),
            draw_box(
                shade_map(values), in_cells, f"The map at stride {stride}: {len(values)} x {len(values[0])} cells"
            ),
        ],
    )


def _load_model(config_file: Path, overrides: list[str], weights: Path | None) -> tuple[MaskRCNN, Transform, str]:
    """The model of a config, how it wants its images resized, and where its weights are from, in words."""
    import torch

    from maskrcnn.config import load_config
    from maskrcnn.experiment import ExperimentConfig
    from maskrcnn.inference import load_predictor

    config = load_config(config_file, ExperimentConfig, overrides)
    if weights is not None:
        predictor = load_predictor(config, weights, torch.device("cpu"))
        return predictor.model.eval(), predictor.transform, f"weights of {weights.name}"
    torch.manual_seed(0)
    model = config.model.build(num_classes=1)  # of the heads nothing is used
    own = config.model.backbone.weights
    origin = "RANDOM WEIGHTS" if own == "none" else f"the backbone's pretrained weights ({Path(own).name})"
    return model.eval(), config.data.validation_transforms.build(), origin


def _feature_map(model: MaskRCNN, transform: Transform, pixels: Tensor, box: Box) -> tuple[Tensor, int, Box]:
    """The (C, H, W) map that the box head reads a box from, its stride, and the box on the resized image."""
    import numpy as np
    import torch

    from maskrcnn.data.loader import collate
    from maskrcnn.structures import Example, MaskCrop

    no_mask = MaskCrop(0, 0, np.zeros((0, 0), dtype=np.uint8))
    example = Example(1, pixels, torch.tensor([box]), torch.tensor([-1]), (no_mask,))
    resized = transform(example, np.random.default_rng(0))
    images = collate([resized], [0], model.size_divisor).images
    with torch.no_grad():
        features = model.backbone(model.pixels(images))
    level = int(model.box_pooler.assign_levels(resized.boxes)[0])
    x1, y1, x2, y2 = resized.boxes[0].tolist()
    return features[level][0].float(), model.box_pooler.strides[level], (x1, y1, x2, y2)


def _save(drawn: np.ndarray, path: Path, *, photograph: bool) -> None:
    """Write the picture, without a photograph in few colours, which makes the file a third as large."""
    from PIL import Image

    picture = Image.fromarray(drawn)
    if not photograph:
        picture = picture.quantize(64, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


if __name__ == "__main__":
    run(main)

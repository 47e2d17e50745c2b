"""Draw how each RoI layer processes one box: the cells it reads, its bins, its sample points and the pooled values.

    maskrcnn explain-roi --map 8x8 --box 1,1,6,8 --output 2x2
    maskrcnn explain-roi --map 25x25 --stride 32 --box 0,0,665,665 --output 7x7 --out object.png
    maskrcnn explain-roi --image photo.jpg --config configs/coco/mask_rcnn_r50_fpn_1x.yaml --box 40,60,300,420

With --map, the value of a cell is 10 x row + column, so that a pooled value shows its position. With --image, the
backbone of --config computes the feature maps of the image, and the drawn map is the one that the box head uses for the
box.
"""

from __future__ import annotations

import argparse
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from maskrcnn.cli.arguments import add_set_argument, number
from maskrcnn.errors import InputError
from maskrcnn.paths import expand

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from maskrcnn.data.transforms import Transform
    from maskrcnn.models.mask_rcnn import MaskRCNN

Box = tuple[float, float, float, float]

SOFTWARE = "maskrcnn explain-roi"  # in the pictures, which may be overwritten
MOST = 100  # maximum side of maps and output grids, in cells; more are not legible


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--box", required=True, metavar="X1,Y1,X2,Y2", help="box in pixels; write --box=-5,... if X1 is negative"
    )
    parser.add_argument("--map", metavar="HxW", help="height and width in cells of a synthetic feature map")
    parser.add_argument(
        "--stride", type=number(1e-3, 1e4), help="pixels per cell of --map (default 1: --box is in cells)"
    )
    parser.add_argument(
        "--output", metavar="SxS", help="output size of the RoI layer (default 7x7; with --image that of the box head)"
    )
    parser.add_argument("--image", type=expand, metavar="FILE", help="an image, instead of --map")
    parser.add_argument("--config", type=expand, metavar="FILE", help="the experiment whose backbone processes --image")
    add_set_argument(parser, help="set one key of --config; may be repeated")
    parser.add_argument(
        "--weights",
        type=expand,
        metavar="FILE",
        help="a checkpoint of the model (default: the initial weights of the config)",
    )
    parser.add_argument("--out", type=expand, default=Path("roi.png"), help="output file, a PNG (default roi.png)")


def run(args: argparse.Namespace) -> None:
    """Draw and save the figure."""
    if (args.map is None) == (args.image is None):
        raise InputError("give either --map HxW or --image FILE")
    if args.map is not None and (args.config or args.overrides or args.weights):
        raise InputError("--config, --set and --weights need --image FILE; they have no effect on --map")
    if args.image is not None and (args.config is None or args.stride is not None):
        raise InputError(
            "--image needs --config FILE and excludes --stride: the backbone of the config gives the map and its stride"
        )
    if args.out.suffix != ".png":
        raise InputError(f"--out {args.out}: the picture is a PNG; the file name must end in .png")
    _require_own(args.out)
    box = _read_box(args.box)
    size = None if args.output is None else _read_size(args.output)
    figure = _explain_map(args, box, size) if args.image is None else _explain_image(args, box, size)
    _save(figure, args.out, photograph=args.image is not None)
    print(f"the picture is in {args.out}")


def _read_box(text: str) -> Box:
    try:
        x1, y1, x2, y2 = (float(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"--box {text}: expected four numbers X1,Y1,X2,Y2, such as 1,1,6,8") from None
    if not all(math.isfinite(coordinate) for coordinate in (x1, y1, x2, y2)):
        raise InputError(f"--box {text}: every number must be finite")
    if not (x1 < x2 and y1 < y2):
        raise InputError(f"--box {text}: the box has no area; X2 must be greater than X1, and Y2 than Y1")
    return x1, y1, x2, y2


def _read_sides(option: str, text: str) -> tuple[int, int]:
    try:
        height, width = (int(number) for number in text.split("x"))
    except ValueError:
        raise InputError(f"{option} {text}: expected two whole numbers HxW, such as 8x8") from None
    if not (1 <= height <= MOST and 1 <= width <= MOST):
        raise InputError(f"{option} {text}: both numbers must be from 1 to {MOST}")
    return height, width


def _read_size(text: str) -> int:
    height, width = _read_sides("--output", text)
    if height != width:
        raise InputError(f"--output {text}: the RoI layers make square grids; expected two equal numbers, such as 7x7")
    return height


def _require_inside(box: Box, width: float, height: float, what: str) -> None:
    x1, y1, x2, y2 = box
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        raise InputError(
            f"--box {_format_box(box)}: it lies outside {what} of {width:g} x {height:g} pixels (width, height)"
        )


def _format_box(box: Box) -> str:
    return ",".join(f"{coordinate:g}" for coordinate in box)


def _explain_map(args: argparse.Namespace, box: Box, size: int | None) -> np.ndarray:
    height, width = _read_sides("--map", args.map)
    stride, size = 1.0 if args.stride is None else args.stride, size or 7
    _require_inside(box, width * stride, height * stride, "the map")

    import torch

    from maskrcnn.visualization.roi_layers import draw_roi_layers

    values = 10.0 * torch.arange(height)[:, None] + torch.arange(width)
    return draw_roi_layers(
        values,
        box,
        stride=stride,
        size=size,
        title=f"The box ({_format_box(box)}) on a map of {height} x {width} cells, pooled to {size} x {size}",
        notes=[f"stride {stride:g}; the value of a cell is 10 x row + column"],
    )


def _explain_image(args: argparse.Namespace, box: Box, size: int | None) -> np.ndarray:
    from maskrcnn.data.images import read_image
    from maskrcnn.visualization.roi_layers import draw_box, draw_roi_layers, shade_map

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
        title=f"The box ({_format_box(box)}) on {args.image.name}, read at stride {stride}, pooled to {size} x {size}",
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
    """Return the model in evaluation mode, its image transform, and a description of the origin of its weights."""
    import torch

    from maskrcnn.config import read_config
    from maskrcnn.experiment import ExperimentConfig, load_predictor

    config = read_config(config_file, ExperimentConfig, overrides)
    if weights is not None:
        predictor = load_predictor(config, weights, torch.device("cpu"))
        return predictor.model.eval(), predictor.transform, f"weights of {weights.name}"
    torch.manual_seed(0)
    model = config.model.build(num_classes=1)  # the heads are not used
    pretrained = config.model.backbone.weights
    origin = (
        "RANDOM WEIGHTS" if pretrained == "none" else f"the backbone's pretrained weights ({Path(pretrained).name})"
    )
    return model.eval(), config.data.build_validation_transform(), origin


def _feature_map(model: MaskRCNN, transform: Transform, pixels: Tensor, box: Box) -> tuple[Tensor, int, Box]:
    """Return the feature map (C, H, W) that the box head uses for a box, its stride, and the resized box.

    Args:
        model: the model in evaluation mode.
        transform: the image transform of the model.
        pixels: (3, H, W) uint8 RGB.
        box: (x1, y1, x2, y2) in pixels of the image before resizing.
    """
    import numpy as np
    import torch

    from maskrcnn.data.loader import collate
    from maskrcnn.structures import Example, MaskCrop

    empty_mask = MaskCrop(0, 0, np.zeros((0, 0), dtype=np.uint8))
    example = Example(1, pixels, torch.tensor([box]), torch.tensor([-1]), (empty_mask,))
    resized = transform(example, np.random.default_rng(0))
    images = collate([resized], [0], model.size_divisor).images
    with torch.no_grad():
        features = model.features(images)
    level = int(model.box_pooler.assign_levels(resized.boxes)[0])
    x1, y1, x2, y2 = resized.boxes[0].tolist()
    return features[level][0].float(), model.box_pooler.strides[level], (x1, y1, x2, y2)


def _require_own(path: Path) -> None:
    """Raise InputError if a file is in place of the picture that is not an earlier picture of this command."""
    from PIL import Image

    if not os.path.lexists(path):
        return
    with suppress(Exception):  # whatever is wrong with the file, it is not ours
        if path.is_file() and not path.is_symlink():
            with Image.open(path) as picture:
                if picture.info.get("Software") == SOFTWARE:
                    return
    raise InputError(f"--out {path}: the file there was not written by this command; choose another name")


def _save(figure: np.ndarray, path: Path, *, photograph: bool) -> None:
    """Write the figure as a PNG; without a photograph, quantised colours reduce the file to a third."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from maskrcnn.visualization.drawing import save_image

    picture, text = Image.fromarray(figure), PngInfo()
    text.add_text("Software", SOFTWARE)
    if not photograph:
        picture = picture.quantize(64, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(path, picture, optimize=True, pnginfo=text)

"""Draw a sheet that shows the transforms of docs/augmentation.md, each on the same generated scene.

python docs/images/draw_transforms.py --out docs/images/transforms.png
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image

from maskrcnn.data.affine import AffineConfig
from maskrcnn.data.crops import LargeScaleJitterConfig, RandomCropConfig
from maskrcnn.data.mixing import CopyPasteConfig, MosaicConfig
from maskrcnn.data.photometric import ColorJitterConfig, CutoutConfig, GaussianBlurConfig, JpegConfig
from maskrcnn.data.rasters import rasterize_masks
from maskrcnn.data.shapes import ShapesConfig
from maskrcnn.data.transforms import Compose, HorizontalFlipConfig, TransformConfig, VerticalFlipConfig
from maskrcnn.paths import expand
from maskrcnn.visualization.drawing import draw_objects, save_image
from maskrcnn.visualization.sheets import grid, titled

SCENES = ShapesConfig(length=8, seed=6, height=176, width=176, objects=(3, 4), sizes=(0.25, 0.5), noise=0.0)
SEED = 8
COLOURS = 128  # of the file, so that it is small
TRANSFORMS: dict[str, TransformConfig | None] = {
    "the scene": None,
    "horizontal_flip": HorizontalFlipConfig(probability=1.0),
    "vertical_flip": VerticalFlipConfig(probability=1.0),
    "random_crop": RandomCropConfig(size=(0.6, 0.8)),
    "large_scale_jitter": LargeScaleJitterConfig(side=176, scale=(0.6, 0.7)),
    "affine": AffineConfig(degrees=30.0, shear=15.0, probability=1.0),
    "color_jitter": ColorJitterConfig(brightness=0.5, contrast=0.5, saturation=0.9, hue=0.3),
    "gaussian_blur": GaussianBlurConfig(sigma=(2.0, 2.5), probability=1.0),
    "jpeg": JpegConfig(quality=(10, 12), probability=1.0),
    "cutout": CutoutConfig(count=(3, 4), size=(0.2, 0.3), probability=1.0),
    "copy_paste": CopyPasteConfig(),
    "mosaic": MosaicConfig(side=176, probability=1.0),
}


def draw(title: str, config: TransformConfig | None) -> np.ndarray:
    """Return the first scene with its objects after a transform, below a title."""
    dataset = SCENES.build()
    example = dataset[0]
    if config is not None:
        example = config.build_for(dataset, Compose(()))(example, np.random.default_rng(SEED))
    example = rasterize_masks(example)
    image = example.pixels.permute(1, 2, 0).contiguous().numpy()
    picture = draw_objects(image, example.boxes, example.labels, example.masks, dataset.classes.names, scale=1)
    return titled(picture, title)


def main() -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=expand, required=True, help="PNG file to write")
    sheet = grid([draw(title, config) for title, config in TRANSFORMS.items()], columns=4)
    save_image(parser.parse_args().out, Image.fromarray(sheet).quantize(COLOURS))


if __name__ == "__main__":
    main()

"""Reading images: files, and images in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from maskrcnn.errors import InputError
from maskrcnn.paths import open_file


def to_pixels(image: str | Path | Image.Image | np.ndarray | Tensor) -> Tensor:
    """Return an image as (3, H, W) uint8 RGB.

    Args:
        image: a path (see `read_image`), a PIL image, an array (H, W, 3) or a tensor (3, H, W), both uint8 RGB.

    Raises:
        InputError: a file cannot be read, or an array or tensor has another shape or type.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return torch.from_numpy(_as_rgb(ImageOps.exif_transpose(image))).permute(2, 0, 1)
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8 or not pixels.numel():
        raise InputError(
            f"expected an image as a tensor (3, H, W) or an array (H, W, 3) of uint8 RGB values, not "
            f"{type(image).__name__} {tuple(image.shape)} of {str(image.dtype).removeprefix('torch.')}"
        )
    return pixels.cpu()


def read_image(path: Path) -> Tensor:
    """Return an image as (3, H, W) uint8 RGB, with its EXIF orientation applied.

    The memory format is channels-last, which is the fastest for resizing. Pillow returns the same pixels as
    torchvision's decoder, which takes 0.5 ms less per COCO image but is deprecated.

    Raises:
        InputError: the file is missing, unreadable or not an image.
    """
    with open_image(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return torch.from_numpy(_as_rgb(image)).permute(2, 0, 1)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file, of which Pillow reads the header at first, for the time of a `with` block.

    Raises:
        InputError: the file is missing, unreadable or not an image; also for such an error in the block.
    """
    try:
        with open_file(path) as file, Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise InputError(f"{path.absolute()}: no such image file") from None
    except UnidentifiedImageError as error:
        raise InputError(f"{path.absolute()}: cannot be read as an image (its format is unknown)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(f"{path.absolute()}: cannot be read as an image ({reason})") from error


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits per pixel: `convert` would clip values to 255
        grey = (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))

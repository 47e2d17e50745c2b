"""A perceptual hash of images: it survives another encoding and another size, and tells other images apart.

The image is reduced to 64 x 64 grey pixels. Each of the 255 lowest frequencies of its cosine transform, without the
mean, becomes 1 or -1 by its sign, or 0 if it is weak: the noise of an encoder decides the signs of weak ones. Two
images are the same if the cosine of the angle between their hashes is near 1. docs/data.md has the measured rates of
error.

Shapes: N, M images.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

SIDE = 64  # pixels of the reduced image
FREQUENCIES = 16  # along each axis
LENGTH = FREQUENCIES**2 - 1
WEAK = 16.0  # amplitude, in the units of an orthonormal transform of 0..255
LEAST = 8  # strong frequencies; an image with fewer has no structure to compare
SAME = 0.8  # cosine of the hashes of two encodings of one image
BLOCK = 2048  # images that are compared at a time, which limits the memory

_COSINES = np.cos(np.pi * np.outer(np.arange(FREQUENCIES), 2 * np.arange(SIDE) + 1) / (2 * SIDE)) * (2 / SIDE) ** 0.5
_COSINES[0] /= 2**0.5


def perceptual_hash(pixels: Tensor) -> np.ndarray | None:
    """Return the hash of an image, (LENGTH,) int8; None for an image without structure, such as one colour.

    Args:
        pixels: (3, H, W) uint8.
    """
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).convert("L")
    grey = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0), np.float64)
    spectrum = (_COSINES @ grey @ _COSINES.T).ravel()[1:]
    signs = np.where(np.abs(spectrum) > WEAK, np.sign(spectrum), 0).astype(np.int8)
    return signs if np.count_nonzero(signs) >= LEAST else None


def near_pairs(first: np.ndarray, second: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs of indices whose hashes are those of the same image.

    Args:
        first: (N, LENGTH) int8.
        second: (M, LENGTH) int8.
    """
    pairs = []
    others = _normalized(second)
    for start in range(0, len(first), BLOCK):
        rows, columns = np.nonzero(_normalized(first[start : start + BLOCK]) @ others.T >= SAME)
        pairs += [(start + row, column) for row, column in zip(rows.tolist(), columns.tolist(), strict=True)]
    return pairs


def _normalized(hashes: np.ndarray) -> np.ndarray:
    vectors = hashes.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

"""Decoding of COCO polygons and run-length codes (RLE) into cropped binary masks.

RLE lists the lengths of alternating runs of zeros and ones in column-major order, starting with zeros. The decoded
pixels equal those of pycocotools. No array of image size is allocated: this is three times as fast at 640 x 480 pixels,
and faster still at larger sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as cocoapi

from maskrcnn.structures import MaskCrop


def empty_crop() -> MaskCrop:
    """Return an empty mask, with (0, 0) pixels."""
    return MaskCrop(0, 0, np.zeros((0, 0), np.uint8))


def crop_from_polygons(polygons: Sequence[np.ndarray], height: int, width: int) -> MaskCrop:
    """Rasterise the union of polygons and return it as a tight crop.

    Polygons are rasterised in image coordinates because the rounding of pycocotools depends on the absolute position.

    Args:
        polygons: each float64 `(x0, y0, x1, y1, ...)`, in pixels of the image.
        height, width: size of the image.
    """
    codes = cocoapi.frPyObjects(list(polygons), height, width)
    return crop_from_counts(counts_from_string(cocoapi.merge(codes)["counts"]), height)


def crop_from_counts(counts: np.ndarray, height: int) -> MaskCrop:
    """Decode run lengths into a tight crop.

    Args:
        counts: run lengths; their sum is a multiple of `height`.
        height: height of the image.
    """
    edges = np.cumsum(counts, dtype=np.int64)
    starts, stops = edges[:-1:2], edges[1::2]
    nonempty = stops > starts
    if not nonempty.any():
        return empty_crop()
    left, right = int(starts[nonempty][0]) // height, (int(stops[nonempty][-1]) - 1) // height + 1
    runs = np.diff(edges.clip(left * height, right * height), prepend=left * height)
    columns = np.repeat((np.arange(len(runs)) & 1).astype(np.uint8), runs).reshape(right - left, height)
    rows = np.flatnonzero(columns.any(axis=0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return MaskCrop(left, top, np.ascontiguousarray(columns[:, top:bottom].T))


def rle_of_crop(crop: MaskCrop, height: int, width: int) -> dict[str, Any]:
    """Return a mask of an image as COCO's compressed RLE: `{"size": [height, width], "counts": text}`."""
    rows, columns = crop.pixels.shape
    flat = np.zeros(1 + columns * (rows + 1), bool)  # a zero before the first column and one after each ends every run
    flat[1:].reshape(columns, rows + 1)[:, :rows] = crop.pixels.T
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), rows + 1)
    return _rle_of_edges((crop.x + column) * height + crop.y + row, height, width)


def rle_of_runs(starts: np.ndarray, stops: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Return the mask of an image that consists of runs of pixels as COCO's compressed RLE.

    Args:
        starts, stops: first pixel of each run, and the one after its last, in column-major order, int64. The runs
            ascend and do not overlap.
        height, width: size of the image.
    """
    return _rle_of_edges(np.stack([starts, stops], axis=1).ravel(), height, width)


def rle_of_positions(positions: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Return the mask of an image as COCO's compressed RLE.

    Args:
        positions: of the pixels in column-major order, ascending, int64; at least one.
        height, width: size of the image.
    """
    first = np.diff(positions, prepend=-2) != 1
    last = np.diff(positions, append=height * width + 1) != 1
    return rle_of_runs(positions[first], positions[last] + 1, height, width)


def _rle_of_edges(edges: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Encode a mask that begins and ends alternately at these column-major positions, which ascend.

    A run that goes on at the top of the next column may stand there in two pieces: its two equal edges are one.
    """
    edges, count = np.unique(edges, return_counts=True)
    edges = edges[count == 1]
    counts = np.diff(edges, prepend=0, append=height * width)
    runs = counts[: len(counts) - (counts[-1] == 0)].tolist()
    code = cocoapi.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode()}


def counts_from_string(code: bytes) -> np.ndarray:
    """Return the run lengths, int64, of a compressed RLE string.

    Each number is encoded in groups of five bits, least significant first. A group is one character with code 48 plus
    the bits. Bit 5 is set if another group follows; bit 4 of the last group is the sign. From the fourth number on,
    the difference to the number two positions earlier is encoded (`rleToString` in cocoapi's maskApi.c).

    Raises:
        ValueError: the string is empty or truncated, or has a number of more than 60 bits.
    """
    groups = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((groups & 32) == 0)
    if len(last) == 0 or last[-1] != len(groups) - 1:
        raise ValueError("the run-length string is empty or cut off")
    sizes = np.diff(last, prepend=-1)
    if sizes.max() > 12:  # a shift by 64 bits or more is undefined
        raise ValueError("the run-length string has a number of more than 60 bits")
    positions = np.arange(len(groups)) - np.repeat(last - sizes + 1, sizes)  # of each group within its number
    counts = np.add.reduceat((groups & 31) << (5 * positions), last - sizes + 1)
    counts -= ((groups[last] & 16) >> 4) << (5 * sizes)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts

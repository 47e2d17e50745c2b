"""Detection in images far larger than those of the training, cut into tiles that overlap.

An object that a tile shows whole is taken from there, once. One that every tile cuts is put together from its pieces,
which agree where the tiles overlap. A piece that another tile shows away from its borders is left to that tile, which
sees more of the object. So an object comes out as it does in an untiled image, if the
detector finds it, or its pieces, alike in both, and if its pieces meet in the overlaps.

Shapes: H, W image; N detections.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskrcnn.data import mask_crops
from maskrcnn.data.mask_crops import Window
from maskrcnn.engine.instances import Instances
from maskrcnn.engine.predictor import Detector, without_objects
from maskrcnn.engine.suppression import Nms, suppress
from maskrcnn.errors import InputError
from maskrcnn.structures import ClassTable, Example, MaskCrop

SAME = 0.5  # overlap from which two detections show the same object; see `_Merge._overlap`
EDGE = 1 / 32  # of the side of a tile: what ends this close to an inner border may be cut there; models are not exact


@dataclass(frozen=True)
class TiledDetector:
    """Finds objects with another detector in overlapping tiles of an image, and merges what it finds.

    The instances have their masks in pixels (`Instances.pixel_masks`). An image that fits a tile is not cut.
    """

    detector: Detector
    size: int  # pixels, side of a tile
    overlap: int  # pixels that neighbouring tiles share, at least
    batch_size: int = 1  # tiles at a time
    nms: Nms = "class"  # with "agnostic", pieces of different classes can be one object, of the best one's class
    nms_threshold: float = 0.5  # largest overlap of two objects; see `suppress`

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise InputError(f"--overlap {self.overlap}: it must be less than the side of a tile, {self.size}")

    @property
    def classes(self) -> ClassTable:
        """The names of the labels."""
        return self.detector.classes

    @property
    def prepare(self) -> Callable[[Tensor], Example]:
        """See `Detector`: the whole image, which `detect_prepared` cuts."""
        return without_objects

    def detect_prepared(self, examples: Sequence[Example]) -> list[Instances]:
        """Detect objects in each image; see `Detector`."""
        return [self.detect(example.pixels) for example in examples]

    def detect(self, pixels: Tensor) -> Instances:
        """Detect objects in an image, (3, H, W) uint8 RGB. The instances have no image."""
        height, width = pixels.shape[1:]
        tiles = tiles_of(height, width, self.size, self.overlap)
        if len(tiles) == 1:
            return self.detector.detect_prepared([self.detector.prepare(pixels)])[0]
        margin = max(1, round(EDGE * self.size))
        inner = np.array([_inner(tile, height, width, margin) for tile in tiles])
        found = [piece for of_tile in self._detect(pixels, tiles, inner) for piece in of_tile]
        needed = [piece for piece in found if not (piece.cut and _is_within(piece.box, inner).any())]
        merged = _Merge(tiles, needed, agnostic=self.nms == "agnostic").result()
        return suppress(_as_instances(merged, height, width, self.classes), self.nms, self.nms_threshold)

    def _detect(self, pixels: Tensor, tiles: Sequence[Window], inner: np.ndarray) -> Iterator[list[_Piece]]:
        """Yield what is found in each tile; `inner` (tiles, 4) are the regions in which they do not cut."""
        for start in range(0, len(tiles), self.batch_size):
            batch = tiles[start : start + self.batch_size]
            prepared = [self.detector.prepare(pixels[:, y1:y2, x1:x2].contiguous()) for x1, y1, x2, y2 in batch]
            detected = self.detector.detect_prepared(prepared)
            for index, (tile, instances) in enumerate(zip(batch, detected, strict=True), start=start):
                yield _pieces(instances, index, tile, inner[index])


def tiles_of(height: int, width: int, size: int, overlap: int) -> list[Window]:
    """Return the windows of the tiles, evenly spread. A tile is smaller than `size` only if the image is."""
    ys, xs = (_starts(length, size, overlap) for length in (height, width))
    return [(x, y, min(x + size, width), min(y + size, height)) for y in ys for x in xs]


def _starts(length: int, size: int, overlap: int) -> list[int]:
    if length <= size:
        return [0]
    count = -(-(length - overlap) // (size - overlap))
    return [index * (length - size) // (count - 1) for index in range(count)]


@dataclass(frozen=True)
class _Piece:
    """A detection in a tile: an object, or the piece of it that the tile shows."""

    tile: int
    box: tuple[float, float, float, float]  # in pixels of the image
    score: float
    label: int
    mask: MaskCrop | None  # in pixels of the image; None without a mask head
    cut: bool  # whether it ends at a border of the tile that is not one of the image

    def covered(self) -> MaskCrop:
        """Return the mask; without a mask head, the pixels of the box."""
        if self.mask is not None:
            return self.mask
        x1, y1, x2, y2 = (round(value) for value in self.box)
        return MaskCrop(x1, y1, np.ones((max(y2 - y1, 0), max(x2 - x1, 0)), np.uint8))


def _inner(tile: Window, height: int, width: int, margin: int) -> tuple[float, float, float, float]:
    """Return the region of a tile in which a box is not cut: without margins at its borders inside the image."""
    x1, y1, x2, y2 = tile
    return (
        x1 + margin if x1 > 0 else -np.inf,
        y1 + margin if y1 > 0 else -np.inf,
        x2 - margin if x2 < width else np.inf,
        y2 - margin if y2 < height else np.inf,
    )


def _is_within(box: Sequence[float], regions: np.ndarray) -> np.ndarray:
    """Return whether a box lies in each region (..., 4)."""
    return (
        (box[0] >= regions[..., 0])
        & (box[1] >= regions[..., 1])
        & (box[2] <= regions[..., 2])
        & (box[3] <= regions[..., 3])
    )


def _pieces(instances: Instances, index: int, tile: Window, inner: np.ndarray) -> list[_Piece]:
    x, y = tile[:2]
    masks: Sequence[MaskCrop | None] = instances.mask_crops if instances.has_masks else [None] * len(instances)
    pieces = []
    for box, score, label, mask in zip(
        (instances.boxes + torch.tensor([x, y, x, y])).tolist(),
        instances.scores.tolist(),
        instances.labels.tolist(),
        masks,
        strict=True,
    ):
        cut = not _is_within(box, inner)
        moved = None if mask is None else mask._replace(x=mask.x + x, y=mask.y + y)
        pieces.append(_Piece(index, tuple(box), score, label, moved, cut))
    return pieces


class _Merge:
    """Merges the pieces of all tiles: each object once, whole where a tile shows it whole."""

    def __init__(self, tiles: Sequence[Window], pieces: Sequence[_Piece], *, agnostic: bool) -> None:
        self.tiles, self.agnostic = tiles, agnostic
        self.pieces = sorted(pieces, key=lambda piece: -piece.score)
        self.links: dict[int, dict[int, float]] = {index: {} for index in range(len(pieces))}  # with their overlaps
        for first, second in self._neighbours():
            overlap = self._overlap(self.pieces[first], self.pieces[second])
            if overlap >= SAME:
                self.links[first][second] = self.links[second][first] = overlap

    def result(self) -> list[_Piece]:
        """Return the objects by descending score."""
        kept: dict[int, None] = {}  # in their order
        for index, piece in enumerate(self.pieces):
            if not piece.cut and kept.keys().isdisjoint(self.links[index]):
                kept[index] = None
        loose = [
            index
            for index, piece in enumerate(self.pieces)
            if piece.cut and all(self.pieces[other].cut for other in self.links[index])
        ]
        joined = [_joined([self.pieces[index] for index in group]) for group in self._groups(loose)]
        return sorted([*(self.pieces[index] for index in kept), *joined], key=lambda piece: -piece.score)

    def _neighbours(self) -> Iterator[tuple[int, int]]:
        """Yield the pairs of pieces of different tiles whose boxes overlap; of one class, unless agnostic."""
        members: dict[int, list[int]] = {index: [] for index in range(len(self.tiles))}
        for index, piece in enumerate(self.pieces):
            members[piece.tile].append(index)
        for first, second in itertools.combinations(range(len(self.tiles)), 2):
            if members[first] and members[second] and _common(self.tiles[first], self.tiles[second]):
                for pair in itertools.product(members[first], members[second]):
                    one, other = self.pieces[pair[0]], self.pieces[pair[1]]
                    if (self.agnostic or one.label == other.label) and _overlap_boxes(one.box, other.box):
                        yield pair

    def _overlap(self, first: _Piece, second: _Piece) -> float:
        """Return how much two pieces of different tiles agree, 0..1.

        Two whole objects: their IoU. A whole one and a piece: the part of the piece inside it. Two pieces: their IoU
        where both tiles look.
        """
        one, other = first.covered(), second.covered()
        if first.cut and second.cut:
            window = _common(self.tiles[first.tile], self.tiles[second.tile])
            assert window is not None
            return mask_crops.iou(mask_crops.within(one, window), mask_crops.within(other, window))
        if first.cut or second.cut:
            return mask_crops.intersection(one, other) / max(mask_crops.area(one if first.cut else other), 1)
        return mask_crops.iou(one, other)

    def _groups(self, loose: Sequence[int]) -> list[list[int]]:
        """Return the pieces of each object that no tile shows whole: linked, and of different tiles."""
        group_of = {index: [index] for index in loose}
        links = {(first, second): overlap for first in loose for second, overlap in self.links[first].items()}
        for first, second in sorted(links, key=lambda pair: (-links[pair], pair)):
            if second not in group_of or group_of[first] is group_of[second]:
                continue
            together = group_of[first] + group_of[second]
            if len({self.pieces[index].tile for index in together}) == len(together):
                group_of.update(dict.fromkeys(together, together))
        return [group for index, group in group_of.items() if index == min(group)]


def _common(first: Window, second: Window) -> Window | None:
    x1, y1 = max(first[0], second[0]), max(first[1], second[1])
    x2, y2 = min(first[2], second[2]), min(first[3], second[3])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _overlap_boxes(first: Sequence[float], second: Sequence[float]) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _joined(pieces: Sequence[_Piece]) -> _Piece:
    """Return the union of the pieces of an object, with the class and the score of the best one."""
    best = max(pieces, key=lambda piece: piece.score)
    boxes = np.array([piece.box for piece in pieces])
    x1, y1 = boxes[:, :2].min(axis=0).tolist()
    x2, y2 = boxes[:, 2:].max(axis=0).tolist()
    masks = [piece.mask for piece in pieces if piece.mask is not None]
    return _Piece(best.tile, (x1, y1, x2, y2), best.score, best.label, mask_crops.union(masks) if masks else None, True)


def _as_instances(pieces: Sequence[_Piece], height: int, width: int, classes: ClassTable) -> Instances:
    masks = tuple(piece.mask for piece in pieces if piece.mask is not None)
    return Instances(
        boxes=torch.tensor([piece.box for piece in pieces]).reshape(-1, 4),
        scores=torch.tensor([piece.score for piece in pieces]),
        labels=torch.tensor([piece.label for piece in pieces], dtype=torch.int64),
        mask_probabilities=torch.zeros(len(pieces), 0, 0),
        height=height,
        width=width,
        classes=classes,
        pixel_masks=masks if len(masks) == len(pieces) else None,
    )

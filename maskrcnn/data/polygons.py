"""Polygons of binary masks.

The boundary runs along the edges of pixels, so a polygon covers just the pixels of its mask before it is simplified. A
part is a set of pixels that touch along edges. Points are `(x, y)` in continuous pixels of the image; a ring is
`(n, 2)`, without its first point at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from maskrcnn.structures import MaskCrop

TOLERANCE = 0.75  # pixels, the largest distance of a point that is left out; a diagonal of pixels becomes a line

_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # east, south, west, north: a right turn is the next one


def polygons_of(crop: MaskCrop, tolerance: float = TOLERANCE) -> list[np.ndarray]:
    """Return a ring for each part of a mask. A hole is cut free through a line of no width to the outer boundary.

    Args:
        crop: the mask.
        tolerance: largest distance in pixels of a point that the ring leaves out; 0 keeps the boundary exactly.
    """
    rings = _boundaries(crop.pixels.astype(bool))
    outer = [ring for ring in rings if _signed_area(ring) > 0]
    members: list[list[np.ndarray]] = [[ring] for ring in outer]
    for hole in (ring for ring in rings if _signed_area(ring) < 0):
        around = [part for part, ring in enumerate(outer) if _contains(ring, _beside(hole))]
        members[min(around, key=lambda part: _signed_area(outer[part]))].append(hole)
    offset = np.array([crop.x, crop.y], dtype=np.float64)
    return [join([_simplified(ring, tolerance) for ring in part]) + offset for part in members]


def join(rings: Sequence[np.ndarray]) -> np.ndarray:
    """Return one ring of several, connected by lines of no width between their nearest points.

    The area that it encloses is that of the rings: the lines are passed once in each direction.
    """
    first, *rest = rings
    joined = first
    for ring in rest:
        distances = np.square(joined[:, None] - ring).sum(axis=-1)
        here, there = np.unravel_index(int(distances.argmin()), distances.shape)
        around = np.roll(ring, -int(there), axis=0)
        joined = np.concatenate([joined[: here + 1], around, around[:1], joined[here:]])
    return joined


def _boundaries(mask: np.ndarray) -> list[np.ndarray]:
    """Return the corners of all boundaries of an (h, w) mask: clockwise around parts, counter-clockwise around holes.

    With y downwards, the pixels of the mask are on the right hand of the one who walks.
    """
    edges = _edges(np.pad(mask, 1))
    rings = []
    while edges:
        start = next(iter(edges))
        point, step = start, edges[start][0]
        corners = []
        while point in edges and step in edges[point]:
            edges[point].remove(step)
            if not edges[point]:
                del edges[point]
            point = (point[0] + _STEPS[step][0], point[1] + _STEPS[step][1])
            # Where two pixels touch at a corner, a right turn stays with the pixel of this edge.
            choices = edges.get(point, [])
            turned = next((turn for turn in ((step + 1) % 4, step, (step + 3) % 4) if turn in choices), None)
            if turned != step:
                corners.append(point)
            step = step if turned is None else turned
        rings.append(_without_straight(np.array(corners, dtype=np.float64)))
    return rings


def _edges(padded: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """Return the steps along the boundary from each point, for a mask with a margin of one pixel."""
    mask = padded[1:-1, 1:-1]
    sides = (
        (mask & ~padded[:-2, 1:-1], (0, 0)),  # the upper side of a pixel begins at its left end, to the east
        (mask & ~padded[1:-1, 2:], (1, 0)),
        (mask & ~padded[2:, 1:-1], (1, 1)),
        (mask & ~padded[1:-1, :-2], (0, 1)),
    )
    edges: dict[tuple[int, int], list[int]] = defaultdict(list)
    for step, (side, (right, down)) in enumerate(sides):
        rows, columns = side.nonzero()
        for x, y in zip((columns + right).tolist(), (rows + down).tolist(), strict=True):
            edges[x, y].append(step)
    return dict(edges)


def _without_straight(ring: np.ndarray) -> np.ndarray:
    """Return the ring without points in the middle of a straight line, such as that where the walk began."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _signed_area(ring: np.ndarray) -> float:
    following = np.roll(ring, -1, axis=0)
    return float((ring[:, 0] * following[:, 1] - following[:, 0] * ring[:, 1]).sum() / 2)


def _beside(ring: np.ndarray) -> np.ndarray:
    """Return the centre of a pixel of the mask beside the first side of a ring."""
    x, y = np.sign(ring[1] - ring[0])
    return ring[0] + np.array([x - y, y + x]) / 2


def _contains(ring: np.ndarray, point: np.ndarray) -> bool:
    """Return whether a ray from the point to the right crosses the ring an odd number of times."""
    following = np.roll(ring, -1, axis=0)
    crosses = (ring[:, 1] > point[1]) != (following[:, 1] > point[1])  # sides are vertical there
    return bool(np.count_nonzero(crosses & (ring[:, 0] > point[0])) % 2)


def _simplified(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Leave out points by the algorithm of Ramer, Douglas and Peucker; a ring that would vanish stays as it is."""
    far = int(np.square(ring - ring[0]).sum(axis=1).argmax())
    closed = np.concatenate([ring, ring[:1]])
    kept = {0, far}
    spans = [(0, far), (far, len(ring))]
    while spans:
        start, end = spans.pop()
        if end - start < 2:
            continue
        distances = _distances(closed[start + 1 : end], closed[start], closed[end])
        worst = int(distances.argmax())
        if distances[worst] > tolerance:
            middle = start + 1 + worst
            kept.add(middle)
            spans += [(start, middle), (middle, end)]
    return ring[sorted(kept)] if len(kept) >= 3 else ring


def _distances(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the distance of each point (n, 2) from the segment between `start` and `end`, which differ."""
    along = end - start
    part = ((points - start) @ along / (along @ along)).clip(0, 1)
    return np.linalg.norm(points - start - part[:, None] * along, axis=1)

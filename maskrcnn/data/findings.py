"""What can be wrong with a dataset: the kinds of faults, what training does about each, and single findings.

The readers of datasets, the check of the image files before a training, and `maskrcnn inspect-dataset` share the table
`FAULTS`. docs/data.md shows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
Treatment = Literal["refused", "dropped", "kept"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Fault(NamedTuple):
    """A kind of fault."""

    title: str
    severity: Severity  # an error keeps a training from starting, a warning can lower the AP, a note is worth a look
    treatment: Treatment  # what training does: refuse to start, drop the object, or train on it
    remedy: str


class Finding(NamedTuple):
    """A fault at one place of a dataset. Picklable, because worker processes return it."""

    fault: str  # key of `FAULTS`
    text: str
    image_id: int | None = None
    annotation_ids: tuple[int, ...] = ()
    file: str = ""  # name of the image file

    @property
    def message(self) -> str:
        """The text after the ids that it is about, such as `annotation 3 (image 1): ...`."""
        ids = ", ".join(map(str, self.annotation_ids))
        image = "" if self.image_id is None else f"image {self.image_id}"
        place = f"annotation{'s' * (len(self.annotation_ids) > 1)} {ids} ({image})" if ids else image
        return f"{place}: {self.text}" if place else self.text


def messages(findings: Iterable[Finding], treatment: Treatment) -> list[str]:
    """Return the messages of the findings that training treats in this way."""
    return [finding.message for finding in findings if FAULTS[finding.fault].treatment == treatment]


# The objects that training drops, it refuses with `degenerate: refuse`.
FAULTS: dict[str, Fault] = {
    "missing_image": Fault("missing image", "error", "refused", "put the file there, or remove its entry"),
    "unreadable_image": Fault("unreadable image", "error", "refused", "replace the file, or remove its entry"),
    "truncated_image": Fault("truncated or damaged image", "error", "refused", "replace the file, or remove its entry"),
    "size_mismatch": Fault("size that differs from the annotations", "error", "refused", "annotate this very file"),
    "exif_mismatch": Fault(
        "annotations that ignore the EXIF orientation",
        "error",
        "refused",
        "turn the pixels and remove the tag, or turn the annotations",
    ),
    "no_mask": Fault("object without a mask", "note", "kept", "add its `segmentation`; it trains the boxes alone"),
    "invalid_polygon": Fault("polygon with half a point", "error", "refused", "write x, y pairs"),
    "invalid_rle": Fault("run lengths that are no mask of the image", "error", "refused", "write the mask anew"),
    "empty_box": Fault("box without area in the image", "warning", "dropped", "correct or remove the object"),
    "short_polygon": Fault(
        "polygon with fewer than three points", "warning", "dropped", "remove it; the object stays if it has others"
    ),
    "empty_mask": Fault(
        "mask without a pixel", "warning", "dropped", "correct or remove the object: the polygon is outside, or a line"
    ),
}

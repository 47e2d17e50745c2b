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
    twin_id: int | None = None  # the training image that a validation image repeats

    @property
    def message(self) -> str:
        """The text after the ids that it is about, such as `annotation 3 (image 1): ...`."""
        ids = ", ".join(map(str, self.annotation_ids))
        image = "" if self.image_id is None else f"image {self.image_id}"
        place = image
        if ids:
            place = f"annotation{'s' * (len(self.annotation_ids) > 1)} {ids}" + (f" ({image})" if image else "")
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
    "outside_folder": Fault(
        "file name outside the image folder", "error", "refused", "name files relative to the image folder"
    ),
    "duplicate_id": Fault("id that is used twice", "error", "refused", "number the entries anew"),
    "dangling_id": Fault(
        "annotation of an unknown image or class", "error", "refused", "add the entry that it names, or remove it"
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
    "box_mask": Fault(
        "box that disagrees with its mask", "warning", "kept", "write the bounds of the mask as x, y, width, height"
    ),
    "near_duplicate": Fault(
        "object that is annotated twice", "warning", "kept", "remove one: the evaluation counts the other as missed"
    ),
    "dark_image": Fault("nearly black image", "warning", "kept", "stretch its values"),
    "same_image": Fault(
        "image that is in both splits", "warning", "kept", "remove it from one: the metrics are too good"
    ),
    "similar_image": Fault(
        "image that is in both splits, stored in another way",
        "warning",
        "kept",
        "remove it from one: the metrics are too good",
    ),
    "unused_class": Fault(
        "class without an object", "warning", "kept", "leave it out with `classes` beside `annotations`"
    ),
    "unnamed_class": Fault("class without a name of its own", "warning", "kept", "name it"),
    "rare_class": Fault("class with few objects", "note", "kept", "add examples, or balance the classes when sampling"),
    "repeated_image": Fault("image that is twice in a split", "note", "kept", "remove one"),
    "exif_orientation": Fault(
        "EXIF orientation that the size does not prove", "note", "kept", "look whether the masks fit the turned image"
    ),
    "crossing_polygon": Fault("polygon that crosses itself", "note", "kept", "look whether the mask is as meant"),
    "outside_polygon": Fault("polygon that leaves the image", "note", "kept", "none: it is cut at the border"),
    "area_mask": Fault(
        "area that disagrees with the mask", "note", "kept", "count the pixels of the mask: AP by size uses `area`"
    ),
}

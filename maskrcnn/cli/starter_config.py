"""The text of a new configuration for a pair of COCO files."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskrcnn.config.yaml_text import dump
from maskrcnn.data import suggestions
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.coco_file import read_coco_json
from maskrcnn.data.traps import mirrored_pairs
from maskrcnn.errors import InputError, first_of

MOST_CLASSES = 40  # that a comment lists


class Split(NamedTuple):
    """The annotations and the images of a split."""

    annotations: Path
    images: Path


def files_in(folder: Path) -> tuple[Path, Path]:
    """Return the files for training and validation in a folder or its subfolders, which their paths tell apart.

    Raises:
        InputError: there is no such folder, or not one file each.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    paths = [path for pattern in ("*.json", "*/*.json") for path in folder.glob(pattern)]
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    both = [[name for name in names if word in name.lower()] for word in ("train", "val")]
    if any(len(chosen) != 1 for chosen in both) or both[0] == both[1]:
        listed = ", ".join(first_of(names)) or "none"
        raise InputError(
            f"{folder}: expected one JSON file with 'train' and one with 'val' in its path; the files are: {listed}. "
            "Name them with --train and --validation; `maskrcnn convert-dataset FILE --from coco --validation 0.2` "
            "divides one file in two"
        )
    return folder / both[0][0], folder / both[1][0]


def with_images(annotations: Path, folder: Path | None, images: Path | None) -> Split:
    """Return a split with the folder of its images: the user's, or the one that has the first image.

    Raises:
        InputError: the annotations are invalid, or no folder has the image.
    """
    listed = read_coco_json(annotations)["images"]
    if not listed:
        raise InputError(f"{annotations}: it has no image")
    candidates = [images] if images else list(_image_folders(annotations.parent, folder))
    found = next((path for path in candidates if os.path.isfile(path / listed[0]["file_name"])), None)
    if found is None:
        raise InputError(
            f"{annotations}: its image {listed[0]['file_name']!r} is in none of {', '.join(map(str, candidates[:5]))}"
            f"{', ...' if len(candidates) > 5 else ''}; --images names the folder"
        )
    return Split(annotations, found)


def _image_folders(beside: Path, folder: Path | None) -> Iterator[Path]:
    for parent in dict.fromkeys((beside, folder or beside)):
        yield parent
        yield from sorted(path for path in parent.iterdir() if path.is_dir())


def config_lines(
    out: Path, folder: Path | None, splits: Sequence[Split], datasets: Sequence[CocoDataset]
) -> Iterator[str]:
    """Yield the lines of the configuration.

    Args:
        out: path of the new file, for the commands in its comments.
        folder: what its paths are relative to; the working directory if there is none.
        splits, datasets: for training and validation.
    """
    figures, others = (suggestions.Figures.of(dataset.ground_truth()) for dataset in datasets)
    size, schedule = suggestions.image_size(figures), suggestions.schedule(figures)
    anchors, detections = suggestions.anchors(figures, size), suggestions.detections_per_image(figures, others)
    yield "# Written by `maskrcnn init-dataset`; a comment says from which figure of the annotations a value comes."
    yield f"#   maskrcnn inspect-dataset {_printable(shlex.quote(str(out)))} --split train --out pictures"
    yield f"#   maskrcnn train {_printable(shlex.quote(str(out)))} --out {_printable(shlex.quote(f'runs/{out.stem}'))}"
    yield f"base: [base/model/resnet_fpn, {schedule.recipe}]"
    yield "model:"
    yield from _block(anchors.reason, {"rpn": {"anchor_sizes": [[side] for side in anchors.sizes]}})
    yield from _block(detections.reason, {"detection": {"detections_per_image": detections.value}})
    yield "data:"
    yield from _dataset_lines(folder, splits, datasets)
    yield from _block(f"objects: {_class_counts(figures.counts)}", {"num_classes": len(figures.counts)})
    resize = {"kind": "resize", "short_side": [size.short_side], "long_side": size.long_side}
    yield from _block(size.reason, {"validation_transforms": [resize]})
    yield from _flip_lines(datasets[0], resize)
    yield "training:"
    length = {
        "iterations": schedule.iterations,
        "steps": list(schedule.steps),
        "warmup_iterations": schedule.warmup_iterations,
    }
    reason = f"{schedule.reason}; docs/fine_tuning.md says how to choose the length"
    yield from _block(reason, {"batch_size": schedule.batch_size, "schedule": length})
    yield from _block("", {"evaluate_every": schedule.evaluate_every, "checkpoint_every": schedule.evaluate_every})


def _dataset_lines(folder: Path | None, splits: Sequence[Split], datasets: Sequence[CocoDataset]) -> Iterator[str]:
    yield from _block("relative to the folder in which a command runs", {"root": str(folder or ".")})
    for name, split, dataset in zip(("train", "validation"), splits, datasets, strict=True):
        paths = (os.path.relpath(path, folder) if folder else str(path) for path in split)
        values = {"kind": "coco", **dict(zip(Split._fields, paths, strict=True))}
        dropped = dataset.origin().get("dropped degenerate objects", "")
        reason = f"degenerate: {dropped} have a box without area or a polygon of fewer than three points"
        yield from _block(reason if dropped else "", {name: {**values, **({"degenerate": "drop"} if dropped else {})}})


def _flip_lines(train: CocoDataset, resize: dict[str, Any]) -> Iterator[str]:
    pairs = [list(pair) for pair in mirrored_pairs(train.classes)]
    reason = "swap: a horizontal flip turns these classes into each other, by their names" if pairs else ""
    flip = {"kind": "horizontal_flip", **({"swap": pairs} if pairs else {})}
    yield from _block(reason, {"train_transforms": [flip, resize]})


def _class_counts(counts: dict[str, int]) -> str:
    listed = [f"{name} {count}" for name, count in list(counts.items())[:MOST_CLASSES]]
    return ", ".join([*listed, *(["..."] if len(counts) > MOST_CLASSES else [])])


def _block(reason: str, values: dict[str, Any]) -> list[str]:
    """Return the lines of YAML values in a section, after a comment."""
    return textwrap.indent("\n".join([*_comment(reason), dump(values).rstrip()]), "  ").split("\n")


def _comment(text: str) -> list[str]:
    """Return a text as comment lines."""
    return textwrap.wrap(_printable(text), 110, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _printable(text: str) -> str:
    """Return a text with spaces in place of line breaks of any kind: one would end a comment, and begin a key."""
    return "".join(character if character.isprintable() else " " for character in text)

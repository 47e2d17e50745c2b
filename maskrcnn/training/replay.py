"""A step that went wrong, in a file: the weights before it and its batches, so that it can be repeated.

`tools/replay_batch.py` does so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskrcnn.errors import InputError
from maskrcnn.structures import Batch, ClassTable, ImageBatch, MaskTables, Targets
from maskrcnn.training.checkpoint import read_tensors, write_atomically

FORMAT = "maskrcnn replay 1"


class Replay(NamedTuple):
    """What it takes to repeat a step on one process."""

    iteration: int
    model: dict[str, Tensor]  # the state dict before the step
    batches: list[Batch]
    classes: ClassTable
    config: dict[str, Any]  # resolved, in plain types


def save_replay(
    path: Path,
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    iteration: int,
    classes: ClassTable,
    config: Mapping[str, Any],
) -> Path:
    """Write the step of `iteration`, which was not taken; return `path`."""
    content = {
        "format": FORMAT,
        "iteration": iteration,
        "model": dict(model.state_dict()),
        "batches": [_plain(batch) for batch in batches],
        "classes": dataclasses.asdict(classes),
        "config": dict(config),
    }
    write_atomically(path, lambda file: torch.save(content, file))
    return path


def load_replay(path: Path) -> Replay:
    """Read a step. Raises InputError, which names the file, where it holds none."""
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: this is no stored step (training writes one where a loss or gradient is not finite)")
    return Replay(
        content["iteration"],
        content["model"],
        [_batch(stored) for stored in content["batches"]],
        ClassTable(**content["classes"]),
        content["config"],
    )


def _plain(batch: Batch) -> dict[str, Any]:
    """The batch as nested dicts of tensors and tuples, which can be read without running code."""
    return {
        "image_ids": batch.image_ids,
        "images": dataclasses.asdict(batch.images),
        "targets": dataclasses.asdict(batch.targets),
        "scales": batch.scales,
        "original_sizes": batch.original_sizes,
    }


def _batch(stored: dict[str, Any]) -> Batch:
    targets = stored["targets"]
    return Batch(
        image_ids=stored["image_ids"],
        images=ImageBatch(**stored["images"]),
        targets=Targets(targets["boxes"], targets["labels"], MaskTables(**targets["masks"])),
        scales=stored["scales"],
        original_sizes=stored["original_sizes"],
    )

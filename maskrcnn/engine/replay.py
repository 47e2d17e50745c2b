"""Replay files: the weights and batches of a training step whose loss or gradient was not finite.

`tools/replay_batch.py` computes such a step again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskrcnn.errors import InputError
from maskrcnn.runtime.files import read_tensors, write_atomically
from maskrcnn.structures import AxisAlignedMap, Batch, ClassTable, ImageBatch, MaskTables, Targets

FORMAT = "maskrcnn replay 1"


class Replay(NamedTuple):
    """The inputs of a training step on one process."""

    iteration: int
    model: dict[str, Tensor]  # state dict before the step
    batches: list[Batch]
    classes: ClassTable
    config: dict[str, Any]  # resolved configuration in plain types


def save_replay(
    path: Path,
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    iteration: int,
    classes: ClassTable,
    config: Mapping[str, Any],
) -> Path:
    """Write a replay file and return `path`.

    Args:
        path: the file to write.
        model: the model with the weights before the step.
        batches: the batches of the step on this process.
        iteration: the iteration of the step.
        classes: class table of the model.
        config: resolved configuration in plain types.
    """
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
    """Return the content of a replay file.

    Raises:
        InputError: the file cannot be read or is not a replay file. The message names the file.
    """
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: not a replay file (training writes one when a loss or gradient is not finite)")
    return Replay(
        content["iteration"],
        content["model"],
        [_batch(stored) for stored in content["batches"]],
        ClassTable(**content["classes"]),
        content["config"],
    )


def _plain(batch: Batch) -> dict[str, Any]:
    """Return the batch as nested dicts of tensors and tuples, which `weights_only=True` can load."""
    return {
        "image_ids": batch.image_ids,
        "images": dataclasses.asdict(batch.images),
        "targets": dataclasses.asdict(batch.targets),
        "maps": [tuple(each) for each in batch.maps],
        "original_sizes": batch.original_sizes,
    }


def _batch(stored: dict[str, Any]) -> Batch:
    targets = stored["targets"]
    return Batch(
        image_ids=stored["image_ids"],
        images=ImageBatch(**stored["images"]),
        targets=Targets(**{**targets, "masks": MaskTables(**targets["masks"])}),
        maps=tuple(AxisAlignedMap(*each) for each in stored["maps"]),
        original_sizes=stored["original_sizes"],
    )

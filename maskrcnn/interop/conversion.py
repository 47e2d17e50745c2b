"""From the tensors of another framework to weights of this model, with the settings that they need.

Shapes: K classes, A anchors per cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskrcnn.config import validate
from maskrcnn.config.composition import compose, merge
from maskrcnn.config.recipes import find_config
from maskrcnn.config.yaml_text import traced
from maskrcnn.errors import InputError, first_of
from maskrcnn.interop.architecture import anchors_per_cell, model_settings
from maskrcnn.interop.certificate import Certificate
from maskrcnn.interop.layouts import LAYOUTS, Layout
from maskrcnn.interop.names import any_matches, match, to_ours
from maskrcnn.interop.rows import coco_classes
from maskrcnn.models.mask_rcnn import MaskRCNNConfig
from maskrcnn.structures import ClassTable

DATA = "base/data/coco"  # the recipe of the data that published detectors were trained on
EPS = 1e-5  # of frozen norms
RANDOM = "not in the file: random initial values"


@dataclass(frozen=True)
class Converted:
    """Weights of this model. Those of a classifier are of the backbone alone, and have no classes."""

    tensors: dict[str, Tensor]  # by our names
    classes: ClassTable
    config: dict[str, Any]  # of an experiment, in plain types, without defaults
    certificate: Certificate


def convert(
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    class_names: Sequence[str] = (),
    found: Mapping[str, Any] | None = None,
) -> Converted:
    """Convert the state dict of another framework.

    Args:
        tensors: tensors by the names of the other framework.
        source: name of the file in the certificate and in messages.
        class_names: names of the K classes; by default those of COCO if K fits.
        found: keys of an experiment that the file states besides its tensors.

    Raises:
        InputError: the layout is unknown, a tensor has an unknown name or a shape that does not fit, or the number of
            class names is not K.
    """
    layout = recognise(tensors, source)
    renamed, left_out = _rename(tensors, layout, source)
    ours = {new: tensors[old] for old, new in renamed.items()}
    filled = _complete_norms(ours) if layout.affine_norms else {}
    try:
        settings = model_settings({name: tuple(tensor.shape) for name, tensor in ours.items()})
    except InputError as error:
        raise InputError(f"{source}: {layout.name}: {error}") from error
    permuted = _reorder(ours, layout, source)
    classes, assumed = _classes(ours, class_names, source)
    config = _config(layout, settings, found or _pixels(tensors))
    frozen = config["model"]["backbone"]["norm"] == "frozen_bn"
    missing = filled | require_fit(ours, validate(config["model"], MaskRCNNConfig, source=source), len(classes), source)
    return Converted(
        ours,
        classes,
        config,
        Certificate(
            source=source,
            layout=layout.name,
            parity=layout.parity,
            loaded=tuple(old for old, new in renamed.items() if old == new),
            renamed={old: new for old, new in renamed.items() if old != new},
            permuted=permuted,
            left_out=left_out,
            missing=missing,
            conventions=conventions(config),
            assumptions=(*layout.assumptions, *(layout.if_frozen if frozen else ()), *assumed),
        ),
    )


def conventions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of an experiment on which the outputs of a model depend."""
    return {"model": config["model"], "data": {"validation_transforms": config["data"]["validation_transforms"]}}


def recognise(tensors: Mapping[str, Tensor], source: str) -> Layout:
    """Return the layout of a state dict. Raises InputError, which names the known layouts, if it has none of them."""
    names = list(tensors)
    for layout in LAYOUTS:
        if all(any_matches(template, names) for template in layout.signature):
            if layout.refused:
                raise InputError(f"{source}: {layout.name}: {layout.refused}")
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS if not layout.refused)
    raise InputError(
        f"{source}: its {len(names)} tensors ({', '.join(names[:3])}, ...) have the names of no known layout; known "
        f"are {known}"
    )


def _rename(tensors: Mapping[str, Tensor], layout: Layout, source: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return our name of each tensor that is loaded, and the reason for each that is not."""
    renamed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    unknown: list[str] = []
    by_new: dict[str, str] = {}
    for name in tensors:
        reason = next((text for template, text in layout.ignored.items() if match(template, name) is not None), None)
        new = to_ours(name, layout.rules)
        if reason is not None:
            left_out[name] = reason
        elif new is None:
            unknown.append(name)
        elif new not in by_new:
            renamed[name], by_new[new] = new, name
        elif torch.equal(tensors[name], tensors[by_new[new]]):
            left_out[name] = f"the same as {by_new[new]}"
        else:
            raise InputError(f"{source}: {name} and {by_new[new]} are the same tensor, but have different values")
    if unknown:
        raise InputError("\n  ".join([f"{source}: {layout.name}: unknown tensors:", *first_of(unknown)]))
    return renamed, left_out


def _complete_norms(ours: dict[str, Tensor]) -> dict[str, str]:
    """Add the statistics of norms that are a scale and a shift, in place; return what was added, by tensor.

    A variance of 1 - epsilon makes the norm exactly that.
    """
    filled: dict[str, str] = {}
    for name in [name for name in ours if name.endswith(".bias")]:
        prefix = name.removesuffix(".bias")
        for part, value in (("running_mean", 0.0), ("running_var", 1 - EPS)):
            if ours[f"{prefix}.weight"].ndim == 1 and f"{prefix}.{part}" not in ours:
                ours[f"{prefix}.{part}"] = torch.full_like(ours[name], value)
                filled[f"{prefix}.{part}"] = f"{value:g}: the norm is a scale and a shift"
    return filled


def _pixels(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the normalisation of pixels that Detectron2's older files hold."""
    values = [tensors.get(name) for name in ("pixel_mean", "pixel_std")]
    if any(value is None or value.numel() != 3 for value in values):
        return {}
    mean, std = ([round(float(number), 4) for number in value.flatten()] for value in values if value is not None)
    return {"model": {"pixels": {"mean": mean, "std": std}}}


def _reorder(ours: dict[str, Tensor], layout: Layout, source: str) -> dict[str, str]:
    """Bring the rows of predictors into our order, in place; return what was done, by tensor."""
    permuted: dict[str, str] = {}
    if layout.rows is None:
        return permuted
    scores = len(ours["box_head.cls_score.weight"])
    anchors = anchors_per_cell({name: tuple(tensor.shape) for name, tensor in ours.items()})
    for name, tensor in ours.items():
        count = layout.rows.count(name, scores=scores, anchors=anchors)
        if count is None:
            continue
        if len(tensor) != count:
            raise InputError(
                f"{source}: {name} has {len(tensor)} rows, but with {scores} rows of class scores and {anchors} "
                f"anchors per cell it needs {count}; boxes or masks for all classes together are not supported"
            )
        rows = layout.rows.rows(name, scores=scores, anchors=anchors)
        if rows != list(range(count)):
            ours[name] = tensor[rows]
            permuted[name] = f"{len(rows)} of {count} rows" if len(rows) < count else "rows in another order"
    return permuted


def _classes(ours: Mapping[str, Tensor], names: Sequence[str], source: str) -> tuple[ClassTable, list[str]]:
    """Return the classes, and what had to be assumed about them."""
    if "box_head.cls_score.weight" not in ours:
        return ClassTable((), ()), []
    count = len(ours["box_head.cls_score.weight"]) - 1
    if names and len(names) != count:
        raise InputError(f"{source}: the file has {count} classes, but {len(names)} names of classes were given")
    if names and tuple(names) != coco_classes().names:
        return ClassTable(tuple(names), tuple(range(1, count + 1))), []
    if count == len(coco_classes()):
        return coco_classes(), [] if names else ["80 classes are those of COCO in the order of their ids"]
    numbered = tuple(f"class {label}" for label in range(1, count + 1))
    return ClassTable(numbered, tuple(range(1, count + 1))), ["the names of the classes; --classes gives them"]


def _config(layout: Layout, settings: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration: the data, the framework's conventions, and what follows from the tensors."""
    backbone = settings["backbone"]
    changes: list[Mapping[str, Any]] = [{"model": settings}, layout.settings]
    cases = [backbone["norm"], *(["grouped"] if backbone.get("groups", 1) > 1 else [])]
    changes += [layout.cases[case] for case in cases if case in layout.cases]
    changes += [{"evaluation": {"best_metric": "box/AP"}}] if settings.get("mask_head", True) is None else []
    problems: list[str] = []
    recipes = [compose(find_config(Path(name)), problems) for name in (DATA, *layout.bases)]
    assert not problems, problems
    return _plain(reduce(merge, [*recipes, *(traced(change, layout.name) for change in (*changes, found))]))


def require_fit(ours: Mapping[str, Tensor], config: MaskRCNNConfig, num_classes: int, source: str) -> dict[str, str]:
    """Return the tensors of the model that the file lacks, which for a classifier are those of neck and heads.

    Raises:
        InputError: a detector lacks tensors, or a tensor does not have the shape that the model needs.
    """
    with torch.device("meta"):
        expected = config.build(max(1, num_classes), pretrained=False).state_dict()
    problems = [
        f"{name}: {list(tensor.shape)} in the file, {list(expected[name].shape) if name in expected else 'nothing'} in "
        "the model"
        for name, tensor in ours.items()
        if name not in expected or expected[name].shape != tensor.shape
    ]
    missing = [name for name in expected if name not in ours]
    if num_classes or any(name.startswith(("backbone.", "region_stage.")) for name in missing):
        problems += [f"{name}: not in the file" for name in missing]
    if problems:
        raise InputError("\n  ".join([f"{source}: its tensors do not fit together:", *first_of(problems)]))
    return dict.fromkeys(missing, RANDOM)


def _plain(value: Any) -> Any:
    """Return nested mappings as dicts."""
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value

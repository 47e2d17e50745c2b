"""Whether a configuration gives weights the meaning that they were trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from maskrcnn.config import to_dict
from maskrcnn.errors import InputError
from maskrcnn.models.mask_rcnn import MaskRCNNConfig

BATCH_NORMS = ("frozen_bn", "bn", "sync_bn")  # they have the same weights


def require_same_meaning(model: MaskRCNNConfig, trained: MaskRCNNConfig, source: str) -> None:
    """Check the keys that decide what weights mean which are loaded into another model, such as one of other classes.

    Args:
        model: the model to load into.
        trained: the model of the file.
        source: name of the file in the message.

    Raises:
        InputError: such a key differs. The message has the overrides that restore it.
    """
    wanted, given = _meaning(trained), _meaning(model)
    differing = [key for key in wanted if key in given and wanted[key] != given[key]]
    if wanted.get("model.backbone.norm") in BATCH_NORMS and given.get("model.backbone.norm") in BATCH_NORMS:
        differing = [key for key in differing if key != "model.backbone.norm"]
    elif "model.backbone.norm_eps" in differing:
        differing.remove("model.backbone.norm_eps")  # group norms have an epsilon of their own
    if differing:
        lines = [f"{key}: {json.dumps(wanted[key])} in the file, {json.dumps(given[key])} here" for key in differing]
        raise InputError(
            "\n  ".join([f"{source}: the configuration contradicts what the weights need:", *lines])
            + f"\nadd {as_overrides({key: wanted[key] for key in differing})}"
        )


def as_overrides(values: Mapping[str, Any]) -> str:
    """Return the arguments of a command line that set the keys."""
    return " ".join(f"--set '{key}={json.dumps(value)}'" for key, value in values.items())


def _meaning(config: MaskRCNNConfig) -> dict[str, Any]:
    """Return the keys that decide what weights mean, with their values."""
    model = to_dict(config)
    sections: Mapping[str, tuple[str, ...]] = {
        "pixels": ("order", "mean", "std"),
        "backbone": ("kind", "stride_in_1x1", "norm", "norm_eps"),
        "rpn": ("bbox_reg_weights",),
        "box_head": ("bbox_reg_weights",),
    }
    return {
        f"model.{section}.{key}": model[section][key]
        for section, keys in sections.items()
        for key in keys
        if key in model[section]
    }

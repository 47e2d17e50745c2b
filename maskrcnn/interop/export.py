"""From weights of this model to the state dict of another framework."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from maskrcnn.errors import InputError, first_of
from maskrcnn.interop.layouts import Layout
from maskrcnn.interop.names import to_theirs
from maskrcnn.interop.rows import scatter_rows
from maskrcnn.structures import ClassTable


def export(tensors: Mapping[str, Tensor], classes: ClassTable, layout: Layout, *, source: str) -> dict[str, Tensor]:
    """Return the state dict of another framework; `conversion.convert` gives the same tensors back.

    Rows that only the other framework has, such as boxes of background, are zero and never predicted.

    Args:
        tensors: state dict of this model.
        classes: its classes.
        layout: the other framework's.
        source: name of the file in messages.

    Raises:
        InputError: the other framework's model has no place for a tensor.
    """
    names = {name: to_theirs(name, layout.rules) for name in tensors}
    homeless = [name for name, new in names.items() if new is None]
    if homeless or layout.rows is None:
        raise InputError("\n  ".join([f"{source}: {layout.name} has no place for these tensors:", *first_of(homeless)]))
    scores = layout.rows.num_scores(classes)
    anchors = len(tensors["rpn.head.objectness_logits.weight"])
    exported = {}
    for name, tensor in tensors.items():
        count = layout.rows.count(name, scores=scores, anchors=anchors)
        if count is not None:
            tensor = scatter_rows(tensor, name, layout.rows.rows(name, scores=scores, anchors=anchors), count)
        exported[str(names[name])] = tensor.contiguous()
    return exported

"""What a conversion did with each tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from maskrcnn.errors import first_of


@dataclass(frozen=True)
class Certificate:
    """The account of a conversion. Every tensor of the file is in one of `loaded`, `renamed` and `left_out`.

    source: the file.
    layout: what it was recognised as.
    parity: what of the numbers was compared with the other framework.
    loaded: tensors that kept their name.
    renamed: other tensors that were loaded, with the new name.
    permuted: tensors, by their new name, whose rows are in another order or a part of those in the file.
    left_out: tensors that were not loaded, with the reason.
    missing: tensors of the model that the file does not have, with what they are instead.
    conventions: keys of `model` and `data` that follow from the file, with their values.
    assumptions: what the file does not say.
    """

    source: str
    layout: str
    parity: str
    loaded: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    permuted: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    conventions: Mapping[str, Any] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the account in short: counts, reasons, assumptions and parity."""
        taken, in_file = len(self.loaded) + len(self.renamed), self.count
        lines = [
            f"{self.source}: {self.layout}",
            f"  {taken} of {in_file} tensors loaded, {len(self.renamed)} of them under new names, rows of "
            f"{len(self.permuted)} reordered",
            *_groups("left out", self.left_out),
            *_groups("missing", self.missing),
            *(f"  assumed: {assumption}" for assumption in self.assumptions),
            f"  parity: {self.parity}",
        ]
        return "\n".join(lines)

    @property
    def count(self) -> int:
        """The number of tensors in the file."""
        return len(self.loaded) + len(self.renamed) + len(self.left_out)

    def to_dict(self) -> dict[str, Any]:
        """Return the whole account in plain types."""
        return dataclasses.asdict(self)


def _groups(title: str, reasons: Mapping[str, str]) -> list[str]:
    """Return one line for each reason, with the tensors that it applies to."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"  {title}: {len(group)} ({reason}): {', '.join(first_of(group))}" for reason, group in names.items()]

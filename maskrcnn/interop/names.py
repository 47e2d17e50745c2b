"""Templates of tensor names, which translate the names of one framework to those of another, in both directions.

`backbone.layer{i}.{j}.conv{k}.weight` is one of our names, and `backbone.bottom_up.res{i+1}.{j}.conv{k}.weight` that of
the same tensor in Detectron2. A placeholder stands for

- `{i}`, `{j}`, `{k}`: a whole number; `{i+1}` for one more, where `{i}` is at least 0;
- `{p}`: `weight` or `bias`;
- `{norm}`: a tensor of a norm layer;
- `{any}`: any text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

_TEXTS = {"p": "weight|bias", "norm": "weight|bias|running_mean|running_var|num_batches_tracked", "any": ".+"}
_PLACEHOLDER = re.compile(r"\{(\w+)(?:\+(\d+))?\}")


class Rule(NamedTuple):
    """The same tensor in both frameworks; both templates have the same placeholders."""

    ours: str
    theirs: str


def to_ours(name: str, rules: Iterable[Rule]) -> str | None:
    """Return our name of another framework's tensor by the first rule that knows it, or None."""
    return next((fill(rule.ours, values) for rule in rules if (values := match(rule.theirs, name)) is not None), None)


def to_theirs(name: str, rules: Iterable[Rule]) -> str | None:
    """Return the other framework's name of one of our tensors by the first rule that knows it, or None."""
    return next((fill(rule.theirs, values) for rule in rules if (values := match(rule.ours, name)) is not None), None)


def match(template: str, name: str) -> dict[str, str] | None:
    """Return the values of the placeholders, or None if the name does not have the form of the template."""
    found = _pattern(template).fullmatch(name)
    if found is None:
        return None
    values = found.groupdict()
    for placeholder, offset in _offsets(template).items():
        number = int(values[placeholder]) - offset
        if number < 0:
            return None
        values[placeholder] = str(number)
    return values


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return the name that a template stands for with these values."""

    def value(found: re.Match[str]) -> str:
        text, offset = values[found[1]], found[2]
        return str(int(text) + int(offset)) if offset else text

    return _PLACEHOLDER.sub(value, template)


def any_matches(template: str, names: Sequence[str]) -> bool:
    """Return whether one of the names has the form of the template."""
    return any(match(template, name) is not None for name in names)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = _PLACEHOLDER.split(template)  # text, placeholder, offset, text, ...
    pattern = re.escape(parts[0])
    for placeholder, text in zip(parts[1::3], parts[3::3], strict=True):
        pattern += f"(?P<{placeholder}>{_TEXTS.get(placeholder, '[0-9]+')})" + re.escape(text)
    return re.compile(pattern)


@cache
def _offsets(template: str) -> dict[str, int]:
    return {placeholder: int(offset) for placeholder, offset in _PLACEHOLDER.findall(template) if offset}

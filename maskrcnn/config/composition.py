"""Compose a configuration from a file, its base files and command-line overrides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from maskrcnn.config.recipes import SUFFIXES, find_config
from maskrcnn.config.yaml_text import DEEPEST, MOST_BYTES, OVERRIDE, TracedMapping, parse, show, syntax
from maskrcnn.errors import InputError
from maskrcnn.paths import expand, read_file


def compose(path: Path, problems: list[str]) -> TracedMapping:
    """Return the file merged onto its base files.

    Args:
        path: a YAML file.
        problems: gets a line for each duplicate or invalid key.

    Raises:
        InputError: a file cannot be read, is not a YAML mapping, or is its own base.
    """
    return _compose(path, problems, (), {})


def _compose(
    path: Path, problems: list[str], children: tuple[Path, ...], composed: dict[str, TracedMapping]
) -> TracedMapping:
    """Return the file merged onto its base files.

    `children` are the files that led to `path` through `base`, the outermost first; `composed` holds the files that
    are composed already, so that two of them can share a base without doubling the work at each level.
    """
    real = os.path.realpath(path)
    if real in composed:
        return composed[real]
    if real in map(os.path.realpath, children):
        cycle = " -> ".join(str(file) for file in [*children, path])
        raise InputError(f"{children[0]}: base files must not form a cycle: {cycle}")
    document = _read_file(path, children, problems)
    if len(children) == DEEPEST:
        raise InputError(f"{children[0]}: more than {DEEPEST} files are a base of one another")
    bases = [_compose(base, problems, (*children, path), composed) for base in _take_bases(document, path)]
    composed[real] = reduce(merge, [*bases, document])
    return composed[real]


def _read_file(path: Path, children: tuple[Path, ...], problems: list[str]) -> TracedMapping:
    name = f"{path} (a base of {children[-1]})" if children else str(path)
    try:
        document = parse(read_file(path, most=MOST_BYTES).decode(), str(path), problems)
    except OSError as error:
        raise InputError(f"{name}: cannot read the file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: the file is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise InputError(f"{name}: not valid YAML: {syntax(error)}") from error
    if document is None:
        return TracedMapping({}, {})
    if not isinstance(document, TracedMapping):
        raise InputError(f"{name}: expected a mapping (lines of `key: value`), got {show(document)}")
    return document


def _take_bases(document: TracedMapping, path: Path) -> list[Path]:
    """Remove `base` from the document and return its paths."""
    if "base" not in document:
        return []
    base = document.pop("base")
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: base: expected a path or a list of paths, got {show(base)}")
    return [_find_base(name, path.parent) for name in names]


def _find_base(name: str, folder: Path) -> Path:
    """Return the file that a base names: relative to `folder`, or a recipe, whose name has no suffix."""
    path = Path(os.path.normpath(folder / expand(name)))
    return path if path.suffix in SUFFIXES or os.path.lexists(path) else find_config(Path(name))


def merge(below: TracedMapping, above: TracedMapping, path: str = "") -> TracedMapping:
    """Merge two mappings recursively; values of `above` take precedence, and a different `kind` replaces `below`.

    A mapping above a list of parts changes the parts of the kinds that are its keys. `path` is that of the mappings in
    messages, with a dot at its end.

    Raises:
        InputError: a mapping above a list of parts names a kind that is not in the list exactly once.
    """
    if "kind" in below and "kind" in above and below["kind"] != above["kind"]:
        return above
    merged = TracedMapping(below | above, {**below.origins, **above.origins})
    for key in below.keys() & above.keys():
        if isinstance(above[key], TracedMapping):
            if isinstance(below[key], TracedMapping):
                merged[key] = merge(below[key], above[key], f"{path}{key}.")
            elif is_list_of_parts(below[key]):
                merged[key] = _merge_into_list(below[key], above[key], f"{path}{key}.")
    return merged


def is_list_of_parts(value: Any) -> bool:
    """Return whether a value is a list of mappings with a `kind`, at least one."""
    return (
        isinstance(value, list)
        and value != []
        and all(isinstance(item, TracedMapping) and "kind" in item for item in value)
    )


def _merge_into_list(parts: list[TracedMapping], above: TracedMapping, path: str) -> list[TracedMapping]:
    """Return the list with the mapping `above[kind]` merged into its part of each kind that `above` names."""
    parts = list(parts)
    for kind, changes in above.items():
        indices = [index for index, part in enumerate(parts) if part["kind"] == kind]
        if len(indices) != 1 or not isinstance(changes, TracedMapping):
            kinds = ", ".join(str(part["kind"]) for part in parts)
            raise InputError(
                f"{path}{kind}: expected a mapping of keys for the one part of this kind in a list (of {kinds}); "
                f"to change the list itself, write the whole list [{above.origins[kind]}]"
            )
        parts[indices[0]] = merge(parts[indices[0]], changes, f"{path}{kind}.")
    return parts


def read_overrides(overrides: Sequence[str], problems: list[str]) -> TracedMapping:
    """Return all overrides, merged with one another first, so that `kind` may follow the keys of its section."""
    parsed = [_override(override, problems) for override in overrides]
    return reduce(merge, parsed, TracedMapping({}, {}))


def _override(override: str, problems: list[str]) -> TracedMapping:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > DEEPEST or not path.isprintable():
        problems.append(f"{OVERRIDE} {override[:200]}: expected KEY=VALUE, such as model.roi.kind=roi_pool")
        return TracedMapping({}, {})
    try:
        value = parse(text, OVERRIDE, problems)
    except yaml.YAMLError as error:
        problems.append(f"{OVERRIDE} {override}: the value is not valid YAML: {syntax(error)}")
        return TracedMapping({}, {})
    return reduce(lambda inner, key: TracedMapping({key: inner}, {key: OVERRIDE}), reversed(keys), value)

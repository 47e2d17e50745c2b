"""Experiments as YAML: read, compose, override, validate, dump.

A file may name base files with `base:` (one or a list: paths relative to the file itself, or names of recipes). The
bases are merged in order, then the file, then the overrides. Mappings merge key by key; other values are replaced. A
mapping with a different `kind` replaces the mapping that it would merge with. A mapping above a list of parts changes
the parts of the kinds that it names: `train_transforms: {resize: {long_side: 640}}`. The result is validated against a
schema of `Section` classes, after the modules that the key `imports` lists have been imported
(`maskrcnn.config.parts`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from maskrcnn.config.composition import compose, merge, read_overrides
from maskrcnn.config.explanation import explain
from maskrcnn.config.parts import Part, Section, Size, import_parts, rebuild_if_parts_changed
from maskrcnn.config.recipes import find_config
from maskrcnn.config.yaml_text import TracedMapping, dump, traced
from maskrcnn.errors import InputError

__all__ = [
    "Part",
    "Section",
    "Size",
    "differences",
    "json_schema",
    "leaves",
    "read_config",
    "to_dict",
    "to_yaml",
    "validate",
]

S = TypeVar("S", bound=Section)


def read_config(path: Path | str, schema: type[S], overrides: Sequence[str] = ()) -> S:
    """Read `path` with its base files, apply `overrides` and validate the result against `schema`.

    Args:
        path: a YAML file, or the name of a recipe (`maskrcnn.config.recipes`).
        schema: the section class of the whole file.
        overrides: `a.b.c=VALUE` strings, VALUE in YAML. They are merged with one another, later ones taking
            precedence, and then into the file.

    Raises:
        InputError: a file cannot be read or the configuration is invalid; the message has one line per problem, with
            the file and line of its origin.
    """
    problems: list[str] = []
    data = compose(find_config(Path(path)), problems)
    return _validate(data, schema, str(path), overrides, problems)


def validate(data: Mapping[str, Any], schema: type[S], *, source: str, overrides: Sequence[str] = ()) -> S:
    """Validate a configuration that `to_dict` returned, with `overrides` applied; new keys have their defaults.

    Args:
        data: the configuration in plain types.
        schema: its section class.
        source: name of its file in error messages.
        overrides: as for `read_config`.

    Raises:
        InputError: the configuration is invalid; the message has one line per problem.
    """
    return _validate(traced(data, source), schema, source, overrides, [])


def _validate(data: TracedMapping, schema: type[S], source: str, overrides: Sequence[str], problems: list[str]) -> S:
    data = merge(data, read_overrides(overrides, problems))
    failed_imports = import_parts(data)
    problems += failed_imports
    if not failed_imports:  # else each of their kinds would be a problem, too
        rebuild_if_parts_changed(schema)
        try:
            # Strict, so that `true` is not a number. As JSON, since its strict validation accepts a list as a tuple.
            config = schema.model_validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            problems += explain(error, schema, data)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError("\n  ".join([f"{source}: {count}", *problems]))
    return config


def to_dict(config: Section) -> dict[str, Any]:
    """Return the configuration, including defaults, as nested dicts and lists of plain values."""
    return config.model_dump(mode="json")


def to_yaml(config: Section) -> str:
    """Return the configuration, including defaults, as YAML; reading it gives an equal object."""
    return dump(to_dict(config))


def json_schema(schema: type[Section]) -> dict[str, Any]:
    """Return the JSON Schema for editors, which fits complete experiments and base files.

    No key is required, because a base file may contain it. The key `base` is included.
    """
    rebuild_if_parts_changed(schema)
    generated = schema.model_json_schema(schema_generator=_EditorSchema)
    text = {"type": "string"}
    base = {
        "description": "files or recipes to start from, merged in order",
        "anyOf": [text, {"type": "array", "items": text}],
    }
    return generated | {"properties": {"base": base, **generated.get("properties", {})}}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line `path: old -> new` for each key in which two configurations (see `to_dict`) differ."""
    old_values, new_values = leaves(old), leaves(new)
    return [
        f"{key}: {_format_value(old_values, key)} -> {_format_value(new_values, key)}"
        for key in old_values | new_values
        if key not in old_values or key not in new_values or old_values[key] != new_values[key]
    ]


def leaves(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of nested mappings by their dotted keys."""
    return dict(_leaves(mapping))


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _format_value(leaves: Mapping[str, Any], key: str) -> str:
    value = leaves.get(key, "(absent)")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class _EditorSchema(GenerateJsonSchema):
    """JSON Schema of partial files: no key is required, so more than one member of a union may match (`anyOf`)."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return False

    def tuple_schema(self, schema: core_schema.TupleSchema) -> dict[str, Any]:
        generated = super().tuple_schema(schema)
        if schema["items_schema"][0]["type"] != "tagged-union":
            return generated
        by_kind = {"type": "object", "additionalProperties": {"type": "object"}}  # changes a list of a base
        return {"anyOf": [generated, by_kind]}

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> dict[str, Any]:
        return {"anyOf": super().tagged_union_schema(schema)["oneOf"]}

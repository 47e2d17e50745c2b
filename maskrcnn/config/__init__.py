"""Experiments as YAML: read, compose, override, validate, dump.

A file may name parents with `base:` (one path or a list, relative to the file itself). They are merged in order, then
the file, then the overrides: mappings merge key by key, everything else is replaced, and a mapping that names another
`kind` than the one below it replaces it whole. The result is checked against a schema of `Section` classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from maskrcnn.config.composition import compose, merge, read_overrides
from maskrcnn.config.explanation import explain
from maskrcnn.config.yaml_text import dump
from maskrcnn.errors import InputError


class Section(BaseModel):
    """Base of every part of a configuration: immutable, and unknown keys are errors.

    A choice is a section with `kind: Literal["name"]`; the union of the choices of one extension point is written
    `Annotated[A | B, Field(discriminator="kind")]`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Section)


def load_config(path: Path | str, schema: type[S], overrides: Sequence[str] = ()) -> S:
    """Read `path` with its parents, apply `overrides` and check the result against `schema`.

    Args:
        path: a YAML file.
        schema: the section that the whole file describes.
        overrides: `a.b.c=VALUE` each, VALUE in YAML. They are merged with one another, later ones winning, and then
            into the file.

    Raises:
        InputError: with one line per problem, and the place that it comes from.
    """
    problems: list[str] = []
    data = merge(compose(Path(path), problems), read_overrides(overrides, problems))
    try:
        # Strict, so that `true` is no number; as JSON, because there a list is the only way to write a tuple.
        config = schema.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += explain(error, schema, data)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError("\n  ".join([f"{path}: {count}", *problems]))
    return config


def to_dict(config: Section) -> dict[str, Any]:
    """Return the configuration, defaults included, as nested dicts and lists of plain values."""
    return config.model_dump(mode="json")


def to_yaml(config: Section) -> str:
    """Return the configuration, defaults included, as YAML; reading it gives an equal object."""
    return dump(to_dict(config))


def json_schema(schema: type[Section]) -> dict[str, Any]:
    """Return a JSON Schema with which an editor completes and checks whole experiments and parts alike.

    No key is required, because a base may hold it, and `base` is known.
    """
    generated = schema.model_json_schema(schema_generator=_EditorSchema)
    text = {"type": "string"}
    base = {"description": "files to start from, merged in order", "anyOf": [text, {"type": "array", "items": text}]}
    return generated | {"properties": {"base": base, **generated.get("properties", {})}}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line `path: old -> new` for each key in which two configurations (see `to_dict`) differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {_in_line(before, key)} -> {_in_line(after, key)}"
        for key in before | after
        if key not in before or key not in after or before[key] != after[key]
    ]


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _in_line(leaves: Mapping[str, Any], key: str) -> str:
    value = leaves.get(key, "(absent)")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class _EditorSchema(GenerateJsonSchema):
    """JSON Schema of partial files: nothing is required, and so more than one choice of a union may fit."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return False

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> dict[str, Any]:
        return {"anyOf": super().tagged_union_schema(schema)["oneOf"]}

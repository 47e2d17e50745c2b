"""Experiments as YAML: read, compose, override, validate, dump.

A file may name parents with `base:` (one path or a list, relative to the file itself). They are merged in order, then
the file, then the overrides: mappings merge key by key, everything else is replaced, and a mapping that names another
`kind` than the one below it replaces it whole. The result is checked against a schema of `Section` classes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails, core_schema

from maskrcnn.errors import InputError

_TAG = "tag:yaml.org,2002:"  # of YAML's own types
_MERGE = f"{_TAG}merge"  # the key `<<`
_OVERRIDE = "--set"  # where a value came from, when it did not come from a file


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
    data = _merge(_compose(Path(path), problems), _overrides(overrides, problems))
    try:
        # Strict, so that `true` is no number; as JSON, because there a list is the only way to write a tuple.
        config = schema.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += _explain(error, schema, data)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError("\n  ".join([f"{path}: {count}", *problems]))
    return config


def to_dict(config: Section) -> dict[str, Any]:
    """Return the configuration, defaults included, as nested dicts and lists of plain values."""
    return config.model_dump(mode="json")


def to_yaml(config: Section) -> str:
    """Return the configuration, defaults included, as YAML; reading it gives an equal object."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


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


# Reading


class _Mapping(dict[str, Any]):
    """A YAML mapping that knows where each of its keys was written."""

    def __init__(self, items: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        super().__init__(items)
        self.origins = origins


class _Loader(yaml.SafeLoader):
    """Reads the types that JSON knows, and reports keys that YAML would drop or change without a word."""

    def __init__(self, text: str, source: str, problems: list[str]) -> None:
        super().__init__(text)
        self.source = source
        self.problems = problems

    def place(self, node: yaml.Node) -> str:
        return self.source if self.source == _OVERRIDE else f"{self.source}:{node.start_mark.line + 1}"

    def read_mapping(self, node: yaml.MappingNode) -> _Mapping:
        self.check_keys(node)
        self.flatten_mapping(node)  # `<<`: the keys that it brings come first, so that the node's own win
        items, origins = {}, {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            value = self.construct_object(value_node, deep=True)
            if isinstance(key, str):
                items[key], origins[key] = value, self.place(key_node)
        return _Mapping(items, origins)

    def check_keys(self, node: yaml.MappingNode) -> None:
        lines: dict[str, int] = {}
        for key_node in (key for key, _ in node.value if key.tag != _MERGE):
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                written = key_node.value if isinstance(key_node, yaml.ScalarNode) else key
                self.problems.append(f"{self.place(key_node)}: the key '{written}' is not text; put it in quotes")
            elif key in lines:
                self.problems.append(
                    f"{self.place(key_node)}: the key '{key}' is given twice, first on line {lines[key]}"
                )
            else:
                lines[key] = key_node.start_mark.line + 1


class _Dumper(yaml.SafeDumper):
    """Writes lists of plain values on one line, and spells everything out where it is used."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def write_list(self, data: list[Any]) -> yaml.Node:
        plain = not any(isinstance(item, dict) for item in data)
        return self.represent_sequence(f"{_TAG}seq", data, flow_style=plain)


def _prepare_yaml() -> None:
    """Fit PyYAML's tables of types to ours; the tables belong to the classes above alone."""
    wanted = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "merge")}
    _Loader.yaml_constructors = {
        key: read for key, read in yaml.SafeLoader.yaml_constructors.items() if key in wanted or key is None
    }
    _Loader.yaml_implicit_resolvers = {
        letter: [(key, pattern) for key, pattern in table if key in wanted]
        for letter, table in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _Loader.add_constructor(f"{_TAG}map", _Loader.read_mapping)
    _Dumper.add_representer(list, _Dumper.write_list)
    # YAML 1.1 reads 1e-3 and 1.5e3 as text, for want of a point or a sign; YAML 1.2 and people read numbers.
    number = re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
    for side in (_Loader, _Dumper):
        side.add_implicit_resolver(f"{_TAG}float", number, list("-+.0123456789"))


_prepare_yaml()


def _parse(text: str, source: str, problems: list[str]) -> Any:
    """Return the value of a YAML text; duplicate keys go to `problems`, broken syntax raises `yaml.YAMLError`."""
    loader = _Loader(text, source, problems)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _compose(path: Path, problems: list[str], children: tuple[Path, ...] = ()) -> _Mapping:
    """Return the file merged onto its parents; `children` are the files that lead here, first the outermost."""
    if path.resolve() in [child.resolve() for child in children]:
        circle = " -> ".join(str(file) for file in [*children, path])
        raise InputError(f"{children[0]}: base files must not lead back to themselves: {circle}")
    document = _read_file(path, children, problems)
    bases = [_compose(base, problems, (*children, path)) for base in _take_bases(document, path)]
    return reduce(_merge, [*bases, document])


def _read_file(path: Path, children: tuple[Path, ...], problems: list[str]) -> _Mapping:
    where = f"{path} (a base of {children[-1]})" if children else str(path)
    try:
        document = _parse(path.read_text(encoding="utf-8"), str(path), problems)
    except OSError as error:
        raise InputError(f"{where}: cannot read the file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: the file is not text in UTF-8") from error
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {_syntax(error)}") from error
    if document is None:
        return _Mapping({}, {})
    if not isinstance(document, _Mapping):
        raise InputError(f"{where}: expected a mapping (lines of `key: value`), got {_show(document)}")
    return document


def _syntax(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def _take_bases(document: _Mapping, path: Path) -> list[Path]:
    """Remove `base` from the document and return the files that it names."""
    if "base" not in document:
        return []
    base = document.pop("base")
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: base: expected a path or a list of paths, got {_show(base)}")
    return [Path(os.path.normpath(path.parent / name)) for name in names]


def _merge(below: _Mapping, above: _Mapping) -> _Mapping:
    """Return `below` with the keys of `above` on top."""
    if "kind" in below and "kind" in above and below["kind"] != above["kind"]:
        return above
    merged = _Mapping(below | above, {**below.origins, **above.origins})
    for key in below.keys() & above.keys():
        if isinstance(below[key], _Mapping) and isinstance(above[key], _Mapping):
            merged[key] = _merge(below[key], above[key])
    return merged


def _overrides(overrides: Sequence[str], problems: list[str]) -> _Mapping:
    """Return what all overrides say together: first among themselves, so that `kind` may come after its keys."""
    parsed = [_override(override, problems) for override in overrides]
    return reduce(_merge, parsed, _Mapping({}, {}))


def _override(override: str, problems: list[str]) -> _Mapping:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        problems.append(f"{_OVERRIDE} {override}: expected KEY=VALUE, such as model.roi.kind=roi_pool")
        return _Mapping({}, {})
    try:
        value = _parse(text, _OVERRIDE, problems)
    except yaml.YAMLError as error:
        problems.append(f"{_OVERRIDE} {override}: the value is not valid YAML: {_syntax(error)}")
        return _Mapping({}, {})
    return reduce(lambda inner, key: _Mapping({key: inner}, {key: _OVERRIDE}), reversed(keys), value)


# Explaining what does not fit the schema

_EXPECTED = {
    "int_type": "an int",
    "float_type": "a float",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
}


class _Place(NamedTuple):
    """Where an error belongs in the user's terms."""

    path: tuple[str | int, ...]  # keys and list indexes, without the names of union members
    owner: Any  # the type that holds the last key of the path
    choices: list[Any]  # the types allowed there
    union: tuple[str | int, ...] | None  # path of the union without `kind` that the error lies in


def _explain(error: ValidationError, schema: type[Section], data: _Mapping) -> list[str]:
    """Return one line per problem, `path: what is wrong [where it was written]`."""
    groups: dict[Any, list[tuple[_Place, ErrorDetails]]] = {}
    for number, details in enumerate(error.errors(include_url=False)):
        place = _locate(details["loc"], schema, data)
        if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
            place = place._replace(path=(*place.path, "kind"))
        # A union without `kind` gives the errors of all of its members: one problem for the user.
        groups.setdefault(number if place.union is None else place.union, []).append((place, details))
    return [line for group in groups.values() for line in _describe(group, data)]


def _describe(group: list[tuple[_Place, ErrorDetails]], data: _Mapping) -> list[str]:
    inner = [
        (place, details) for place, details in group if place.path != place.union or details["type"] == "value_error"
    ]
    if inner:  # not in such a union, or inside the member whose shape the value has
        return [_line(place.path, _message(place, details), data) for place, details in inner]
    place, details = group[0]
    expected = " or ".join(_expected(each) for _, each in group)
    return [_line(place.path, f"expected {expected}, got {_show(details['input'])}", data)]


def _line(path: tuple[str | int, ...], message: str, data: _Mapping) -> str:
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    origin = _origin(path, data)
    return (f"{dotted}: " if dotted else "") + message + (f" [{origin}]" if origin else "")


def _origin(path: tuple[str | int, ...], value: Any) -> str:
    """Return where the last key of the path that is in the data was written."""
    found = ""
    for part in path:
        if isinstance(value, _Mapping):
            found = value.origins.get(str(part), found)
        value = _child(value, part)
    return found


def _child(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None


def _locate(parts: Sequence[str | int], schema: type[Section], value: Any) -> _Place:
    """Follow the location that pydantic gives, which also names the union members that it tried."""
    path: list[str | int] = []
    owner: Any = schema
    choices: list[Any] = [schema]
    union = None
    for part in parts:
        if len(choices) > 1:  # a union: the part names one of its members
            tagged = [choice for choice in choices if part in _kinds(choice)]
            union = union if tagged else tuple(path)
            choices = tagged or _fitting(choices, value)
            continue
        owner = choices[0] if choices else Any
        choices = _alternatives(_annotation(owner, part))
        path.append(part)
        value = _child(value, part)
    return _Place(tuple(path), owner, choices, union)


def _alternatives(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows, without None."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [choice for member in get_args(annotation) for choice in _alternatives(member)]
    return [] if annotation is NoneType else [annotation]


def _annotation(owner: Any, part: str | int) -> Any:
    """Return the type of a section's field, or of a container's item."""
    if _is_section(owner):
        field = owner.model_fields.get(part)
        return field.annotation if field else Any
    arguments = get_args(owner)
    if isinstance(part, int) and get_origin(owner) is tuple and Ellipsis not in arguments:
        return arguments[part] if part < len(arguments) else Any
    if get_origin(owner) is dict:
        return arguments[1]
    return arguments[0] if arguments else Any


def _is_section(choice: Any) -> bool:
    return get_origin(choice) is None and isinstance(choice, type) and issubclass(choice, Section)


def _kinds(choice: Any) -> tuple[Any, ...]:
    return get_args(_annotation(choice, "kind")) if _is_section(choice) else ()


def _fitting(choices: list[Any], value: Any) -> list[Any]:
    """Return the members of a union that have the shape of the value: sections by `kind`, else one container."""
    if isinstance(value, dict):
        containers = [choice for choice in choices if get_origin(choice) is dict]
        return [choice for choice in choices if _is_section(choice)] or containers[:1]
    return [choice for choice in choices if get_origin(choice) in (list, tuple)][:1]


def _message(place: _Place, details: ErrorDetails) -> str:
    value = details["input"]
    kinds = [kind for choice in place.choices for kind in _kinds(choice)]
    match details["type"]:
        case "missing":
            return "missing"
        case "extra_forbidden":
            return _unknown_key(str(place.path[-1]), place.owner)
        case "union_tag_not_found":
            return f"missing; one of {', '.join(kinds)}"
        case "union_tag_invalid":
            return _not_one_of(value["kind"], kinds)
        case "literal_error":
            return _not_one_of(value, get_args(place.choices[0]))
        case "value_error":
            return str(details["ctx"]["error"])
    return f"expected {_expected(details)}, got {_show(value)}{_hint(details['type'], value, kinds)}"


def _unknown_key(key: str, owner: Any) -> str:
    known = list(owner.model_fields)
    kinds = _kinds(owner)
    unknown = f"unknown key for kind {kinds[0]}" if kinds else "unknown key"
    return unknown + (_suggest(key, known) or f"; known are {', '.join(known)}")


def _not_one_of(value: Any, options: Sequence[Any]) -> str:
    names = [str(option) for option in options]
    given = repr(value) if isinstance(value, str) else _show(value)
    return f"{given} is not one of {', '.join(names)}{_suggest(value, names)}"


def _suggest(word: Any, options: Sequence[str]) -> str:
    close = get_close_matches(str(word), options, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _expected(details: ErrorDetails) -> str:
    """Say what the schema allows; for the rarer errors with pydantic's words, `Input should be greater than 0`."""
    if details["type"] in _EXPECTED:
        return _EXPECTED[details["type"]]
    if details["type"] in ("too_short", "too_long"):
        bounds = details["ctx"]
        least, most = bounds.get("min_length"), bounds.get("max_length")
        return f"at most {most} items" if least is None else f"at least {least} items"
    limit = details["msg"].partition(" should ")[2]
    if not limit.startswith("be "):
        return f"to {limit}" if limit else details["msg"]
    return f"a value {limit[3:]}" if limit.startswith(("be greater", "be less")) else limit[3:]


def _hint(error: str, value: Any, kinds: Sequence[str]) -> str:
    if error == "string_type" and isinstance(value, (int, float)):
        return "; put it in quotes"
    if error in ("int_type", "float_type") and isinstance(value, str) and _is_number(value):
        return "; remove the quotes"
    if error == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if value in kinds:
        return f"; did you mean 'kind: {value}'?"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _show(value: Any) -> str:
    if isinstance(value, str):
        return f"text {value!r}"
    if isinstance(value, dict):
        return "a mapping"
    text = json.dumps(value)
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return f"the list {short}" if isinstance(value, list) else short

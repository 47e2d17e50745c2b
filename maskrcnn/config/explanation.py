"""Turn validation errors into messages for the user: path of the key, problem, suggestion, and origin."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from maskrcnn.config.parts import alternatives, is_section, kinds_of
from maskrcnn.config.yaml_text import TracedMapping, parse, show

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
}


class _Place(NamedTuple):
    """The location of an error in the configuration."""

    path: tuple[str | int, ...]  # keys and list indices, without the names of union members
    owner: Any  # the type that contains the last key of the path
    choices: list[Any]  # the types allowed there
    union: tuple[str | int, ...] | None  # path of the enclosing union without `kind`, if any


def explain(error: ValidationError, schema: type[BaseModel], data: TracedMapping) -> list[str]:
    """Return one line per problem, `path: problem [file:line]`."""
    groups: dict[Any, list[tuple[_Place, ErrorDetails]]] = {}
    for number, details in enumerate(error.errors(include_url=False)):
        place = _locate(details["loc"], schema, data)
        if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
            place = place._replace(path=(*place.path, "kind"))
        # A union without `kind` yields the errors of all its members; they are one problem for the user.
        groups.setdefault(number if place.union is None else place.union, []).append((place, details))
    return [line for group in groups.values() for line in _describe(group, data)]


def _describe(group: list[tuple[_Place, ErrorDetails]], data: TracedMapping) -> list[str]:
    inner = [
        (place, details) for place, details in group if place.path != place.union or details["type"] == "value_error"
    ]
    if inner:  # outside of such a union, or inside the union member that has the shape of the value
        return [_line(place.path, _message(place, details), data) for place, details in inner]
    place, details = group[0]
    expected = " or ".join(_expected(member_details) for _, member_details in group)
    return [_line(place.path, f"expected {expected}, got {show(details['input'])}", data)]


def _line(path: tuple[str | int, ...], message: str, data: TracedMapping) -> str:
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    origin = _origin(path, data)
    return (f"{dotted}: " if dotted else "") + message + (f" [{origin}]" if origin else "")


def _origin(path: tuple[str | int, ...], value: Any) -> str:
    """Return the origin (`file:line` or `--set`) of the last key of the path that is in the data."""
    origin = ""
    for part in path:
        if isinstance(value, TracedMapping):
            origin = value.origins.get(str(part), origin)
        value = _child(value, part)
    return origin


def _child(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None


def _locate(parts: Sequence[str | int], schema: type[BaseModel], value: Any) -> _Place:
    """Convert a location of pydantic, which includes the union members that it tried, to a place."""
    path: list[str | int] = []
    owner: Any = schema
    choices: list[Any] = [schema]
    union = None
    for part in parts:
        # A union: the part names one of its members. An extension point may have a single kind.
        if len(choices) > 1 or (choices and part in kinds_of(choices[0])):
            tagged = [choice for choice in choices if part in kinds_of(choice)]
            union = union if tagged else tuple(path)
            choices = tagged or _fitting(choices, value)
            continue
        owner = choices[0] if choices else Any
        choices = alternatives(_annotation(owner, part))
        path.append(part)
        value = _child(value, part)
    return _Place(tuple(path), owner, choices, union)


def _annotation(owner: Any, part: str | int) -> Any:
    """Return the type of a section's field, or of a container's item."""
    if is_section(owner):
        field = owner.model_fields.get(part)
        return field.annotation if field else Any
    arguments = get_args(owner)
    if isinstance(part, int) and get_origin(owner) is tuple and Ellipsis not in arguments:
        return arguments[part] if part < len(arguments) else Any
    if get_origin(owner) is dict:
        return arguments[1]
    return arguments[0] if arguments else Any


def _fitting(choices: list[Any], value: Any) -> list[Any]:
    """Return the members of a union that have the shape of the value: all sections, or the first container type."""
    if isinstance(value, dict):
        containers = [choice for choice in choices if get_origin(choice) is dict]
        return [choice for choice in choices if is_section(choice)] or containers[:1]
    return [choice for choice in choices if get_origin(choice) in (list, tuple)][:1]


def _message(place: _Place, details: ErrorDetails) -> str:
    value = details["input"]
    kinds = [kind for choice in place.choices for kind in kinds_of(choice)]
    match details["type"]:
        case "missing":
            return "missing"
        case "extra_forbidden":
            return _unknown_key(str(place.path[-1]), place.owner)
        case "union_tag_not_found":
            return f"missing; one of {', '.join(kinds)}"
        case "union_tag_invalid":
            return not_one_of(value["kind"], kinds)
        case "literal_error":
            return not_one_of(value, get_args(place.choices[0]))
        case "value_error":
            return str(details["ctx"]["error"])
    return f"expected {_expected(details)}, got {show(value)}{_hint(details['type'], value, kinds)}"


def _unknown_key(key: str, owner: Any) -> str:
    known = list(owner.model_fields)
    kinds = kinds_of(owner)
    unknown = f"unknown key for kind {kinds[0]}" if kinds else "unknown key"
    return unknown + (_suggest(key, known) or f"; known are {', '.join(known)}")


def not_one_of(value: Any, options: Sequence[Any]) -> str:
    """Return a message that lists the options, with the closest one as a suggestion."""
    names = [str(option) for option in options]
    given = repr(value) if isinstance(value, str) else show(value)
    return f"{given} is not one of {', '.join(names)}{_suggest(value, names)}"


def _suggest(word: Any, options: Sequence[str]) -> str:
    close = get_close_matches(str(word), options, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _expected(details: ErrorDetails) -> str:
    """Return what the schema expects; for errors not in `_EXPECTED`, from the message `Input should be ...`."""
    if details["type"] in _EXPECTED:
        return _EXPECTED[details["type"]]
    verb, _, limit = details["msg"].partition(" should ")[2].partition(" ")
    if verb == "have":
        return limit.partition(" after validation")[0]
    if verb == "be":
        return f"a value {limit}" if limit.startswith(("greater", "less")) else limit
    return f"to {verb} {limit}" if verb else details["msg"]


def _hint(error: str, value: Any, kinds: Sequence[str]) -> str:
    if error == "string_type" and isinstance(value, (int, float)):
        return "; put it in quotes"
    if error in ("int_type", "float_type") and isinstance(value, str) and _is_number(value):
        return "; remove the quotes"
    if error == "int_type" and isinstance(value, float) and abs(value) >= 2**63:
        return "; an int has at most 64 bits"
    if error == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if value in kinds:
        return f"; did you mean 'kind: {value}'?"
    return ""


def _is_number(text: str) -> bool:
    try:
        return type(parse(text, "", [])) in (int, float)
    except yaml.YAMLError:
        return False

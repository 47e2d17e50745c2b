"""Sections of the configuration, and parts: sections that are one of several kinds, open to other packages.

An extension point is a direct subclass of `Part`, such as the base class of backbones. Its choices are its subclasses
with a field `kind: Literal["name"]`, wherever they are defined. A field that has the extension point as its type
accepts any of them, and `kind` selects one. A YAML imports the modules of further choices: `imports: [my.module]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, field_validator
from pydantic_core import CoreSchema, core_schema

from maskrcnn.config.yaml_text import TracedMapping
from maskrcnn.errors import InputError
from maskrcnn.paths import expand

# A number of things that are computed or held in memory together, such as images of a batch or channels.
Size = Annotated[int, Field(ge=1, le=2**16)]


def is_section(choice: Any) -> bool:
    """Return whether a type is a section class."""
    return get_origin(choice) is None and isinstance(choice, type) and issubclass(choice, BaseModel)


def kinds_of(section: Any) -> tuple[str, ...]:
    """Return the values of `kind` of a section class; empty if it has none, such as an extension point."""
    field = section.model_fields.get("kind") if is_section(section) else None
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def choices_of(point: type[Part]) -> dict[str, type[Part]]:
    """Return the choices of an extension point by kind, in alphabetical order.

    A class replaces an older one of the same module and name: the module was loaded again.

    Raises:
        InputError: two different classes have the same kind.
    """
    choices: dict[str, type[Part]] = {}
    for subclass in _subclasses(point):
        for kind in kinds_of(subclass):
            names = [f"{choice.__module__}.{choice.__qualname__}" for choice in (choices.get(kind, subclass), subclass)]
            if names[0] != names[1]:
                raise InputError(f"{names[0]} and {names[1]} both have the kind '{kind}'")
            choices[kind] = subclass
    return dict(sorted(choices.items()))


def _subclasses(point: type[Part]) -> Iterator[type[Part]]:
    for subclass in point.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


class Section(BaseModel):
    """Base class of every section of a configuration.

    It is immutable. Unknown keys and numbers that are not finite are errors. In a path, `~` is the home directory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _expand_paths(cls, value: Any) -> Any:
        return _expanded(value)


def _expanded(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    return expand(value) if isinstance(value, Path) else value


def _no_choices(value: dict[str, Any]) -> Part:
    raise ValueError("no kind is known; `imports` lists the modules that define kinds")


class Part(Section):
    """Base class of the extension points (see the docstring of the module)."""

    kind: str

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if kinds_of(cls):
            return handler(source)
        choices = {kind: handler.generate_schema(choice) for kind, choice in choices_of(cls).items()}
        if not choices:
            return core_schema.no_info_after_validator_function(_no_choices, core_schema.dict_schema())
        return core_schema.tagged_union_schema(choices, discriminator="kind")


def alternatives(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows: members of unions and choices of extension points, without None."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [choice for member in get_args(annotation) for choice in alternatives(member)]
    if is_section(annotation) and issubclass(annotation, Part) and not kinds_of(annotation):
        return list(choices_of(annotation).values())
    return [] if annotation is NoneType else [annotation]


def import_parts(data: TracedMapping) -> list[str]:
    """Import the modules that the key `imports` of a configuration lists; return a line for each that fails."""
    modules = data.get("imports")
    problems = []
    for module in map(str, modules if isinstance(modules, list) else ()):
        origin = data.origins["imports"]
        if not all(part.isidentifier() for part in module.split(".")):
            problems.append(f"imports: '{module}' is not the name of a module, such as my_package.parts [{origin}]")
            continue
        try:
            import_module(module)
        except ImportError as error:
            problems.append(
                f"imports: cannot import '{module}' ({error}); install it, or add its folder to PYTHONPATH [{origin}]"
            )
    return problems


_BUILT: dict[type[Section], set[type[Part]]] = {}  # the parts that existed when a schema was built


def rebuild_if_parts_changed(schema: type[Section]) -> None:
    """Let `schema` accept the parts that were defined since this was called for it the last time."""
    parts = set(_subclasses(Part))
    if _BUILT.get(schema) != parts:
        _rebuild(schema, set())
        _BUILT[schema] = parts


def _rebuild(section: type[BaseModel], done: set[type[BaseModel]]) -> None:
    """Build the validators of a section and of all sections in it again, innermost first."""
    done.add(section)
    for field in section.model_fields.values():
        for inner in _sections_in(field.annotation):
            if inner not in done:
                _rebuild(inner, done)
    section.model_rebuild(force=True)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    for choice in alternatives(annotation):
        if is_section(choice):
            yield choice
        else:
            for argument in get_args(choice):
                yield from _sections_in(argument)

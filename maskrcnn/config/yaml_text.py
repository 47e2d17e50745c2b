"""Read and write YAML with the types of JSON, numbers such as `1e-3`, and errors for duplicate keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"  # prefix of the tags of the standard types
_MERGE = f"{_TAG}merge"  # the key `<<`
OVERRIDE = "--set"  # the origin of values from the command line


class TracedMapping(dict[str, Any]):
    """A YAML mapping with the origin of each key: `file:line`, or `OVERRIDE`."""

    def __init__(self, items: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        super().__init__(items)
        self.origins = origins


def traced(data: Mapping[str, Any], origin: str) -> TracedMapping:
    """Return nested mappings as traced mappings, all with the same origin."""
    items = {key: traced(value, origin) if isinstance(value, Mapping) else value for key, value in data.items()}
    return TracedMapping(items, dict.fromkeys(items, origin))


class _Loader(yaml.SafeLoader):
    """Loads the types of JSON, and reports duplicate keys and keys that are not text."""

    def __init__(self, text: str, source: str, problems: list[str]) -> None:
        super().__init__(text)
        self.source = source
        self.problems = problems

    def place(self, node: yaml.Node) -> str:
        return self.source if self.source == OVERRIDE else f"{self.source}:{node.start_mark.line + 1}"

    def read_mapping(self, node: yaml.MappingNode) -> TracedMapping:
        self.check_keys(node)
        self.flatten_mapping(node)  # puts the keys from `<<` first, so that keys of the node itself take precedence
        items, origins = {}, {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            value = self.construct_object(value_node, deep=True)
            if isinstance(key, str):
                items[key], origins[key] = value, self.place(key_node)
        return TracedMapping(items, origins)

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
    """Writes lists of plain values on one line, and repeated values without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def write_list(self, data: list[Any]) -> yaml.Node:
        plain = not any(isinstance(item, dict) for item in data)
        return self.represent_sequence(f"{_TAG}seq", data, flow_style=plain)


def _prepare_yaml() -> None:
    """Restrict PyYAML to the types of JSON. Only the two classes above are changed."""
    supported = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "merge")}
    _Loader.yaml_constructors = {
        key: read for key, read in yaml.SafeLoader.yaml_constructors.items() if key in supported or key is None
    }
    _Loader.yaml_implicit_resolvers = {
        letter: [(key, pattern) for key, pattern in table if key in supported]
        for letter, table in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _Loader.add_constructor(f"{_TAG}map", _Loader.read_mapping)
    _Dumper.add_representer(list, _Dumper.write_list)
    # YAML 1.1 reads 1e-3 and 1.5e3 as text, because the point or the sign is missing; YAML 1.2 reads numbers.
    number = re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
    for yaml_class in (_Loader, _Dumper):
        yaml_class.add_implicit_resolver(f"{_TAG}float", number, list("-+.0123456789"))


_prepare_yaml()


def parse(text: str, source: str, problems: list[str]) -> Any:
    """Return the value of a YAML text.

    Args:
        text: the YAML.
        source: name of the file, or `OVERRIDE`.
        problems: gets a line for each key that is duplicate or not text.

    Raises:
        yaml.YAMLError: the syntax is invalid.
    """
    loader = _Loader(text, source, problems)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump(data: Any) -> str:
    """Return data as YAML; `parse` restores it."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def syntax(error: yaml.YAMLError) -> str:
    """Return the position and the reason of a syntax error."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def show(value: Any) -> str:
    """Return the form of a value in messages: `text 'x'`, `a mapping`, `the list [1, 2]`, `3`."""
    if isinstance(value, str):
        return f"text {value!r}"
    if isinstance(value, dict):
        return "a mapping"
    text = json.dumps(value)
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return f"the list {short}" if isinstance(value, list) else short

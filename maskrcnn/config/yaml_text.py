"""Read and write YAML: the core schema of YAML 1.2, limits on size and depth, and errors for duplicate keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"  # prefix of the tags of the standard types
_MERGE = f"{_TAG}merge"  # the key `<<`
OVERRIDE = "--set"  # the origin of values from the command line

# Limits on a file, which keep the time and memory small that a hostile one takes.
MOST_BYTES = 2**20
MOST_VALUES = 100_000  # with the values that aliases repeat
DEEPEST = 50  # nested lists and mappings

# The core schema of YAML 1.2, section 10.3.2. PyYAML reads YAML 1.1, where 010 is 8, 1:30 is 90, and 1e-3 is text.
_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class TracedMapping(dict[str, Any]):
    """A YAML mapping with the origin of each key: `file:line`, or `OVERRIDE`."""

    def __init__(self, items: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        super().__init__(items)
        self.origins = origins


def traced(data: Mapping[str, Any], origin: str) -> TracedMapping:
    """Return nested mappings, also those in lists, as traced mappings, all with the same origin."""
    items = {key: _traced(value, origin) for key, value in data.items()}
    return TracedMapping(items, dict.fromkeys(items, origin))


def _traced(value: Any, origin: str) -> Any:
    if isinstance(value, list):
        return [_traced(item, origin) for item in value]
    return traced(value, origin) if isinstance(value, Mapping) else value


class _Loader(yaml.SafeLoader):
    """Loads the types of JSON within the limits, and reports duplicate keys and keys that are not text."""

    def __init__(self, text: str, source: str, problems: list[str]) -> None:
        super().__init__(text)
        self.source = source
        self.problems = problems
        self.depth = 0  # of the node that is being read
        self.extents: dict[yaml.Node, tuple[int, int]] = {}  # number of values and depth of each node that was read

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Read a node. Raises yaml.YAMLError as soon as the limits are exceeded, also by what aliases repeat."""
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"lists and mappings nest more than {DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None:
            return None
        if not is_alias:
            extents = [self.extents[child] for child in _children(node)]
            deepest = max((deep for _, deep in extents), default=0)
            self.extents[node] = (1 + sum(size for size, _ in extents), 1 + deepest)
        elif node not in self.extents:
            raise yaml.composer.ComposerError(None, None, "an alias is inside of the value that it repeats", mark)
        size, deep = self.extents[node]
        if size > MOST_VALUES or self.depth + deep > DEEPEST:
            problem = (
                f"with what aliases repeat, there are more than {MOST_VALUES} values, or more than {DEEPEST} levels"
            )
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return node

    def read_int(self, node: yaml.ScalarNode) -> int | float:
        """Return a number of the form of an int; as in JSON readers, a float where it has more than 64 bits."""
        text = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        number = int(text, base) if len(text) < 100 else float(text)
        return number if abs(number) < 2**63 else float(number)

    def read_float(self, node: yaml.ScalarNode) -> float:
        """Return a number. PyYAML's would read `!!float 1:30` as 90."""
        if ":" in self.construct_scalar(node):
            raise ValueError
        return float(self.construct_yaml_float(node))

    def read_text(self, node: yaml.ScalarNode) -> str:
        """Return a text. Raises yaml.YAMLError for characters that no path or file may have."""
        text: str = self.construct_scalar(node)
        if re.search("[\0\ud800-\udfff]", text):
            problem = "text must not have a null character or half of a surrogate pair"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return text

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node. Raises yaml.YAMLError also where a tag does not fit, such as `!!int x`."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, OverflowError):
            tag = node.tag.removeprefix(_TAG)
            raise yaml.constructor.ConstructorError(None, None, f"this is no {tag}", node.start_mark) from None

    def place(self, node: yaml.Node) -> str:
        return self.source if self.source == OVERRIDE else f"{self.source}:{node.start_mark.line + 1}"

    def read_mapping(self, node: yaml.MappingNode) -> TracedMapping:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError
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


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _prepare_yaml() -> None:
    """Restrict PyYAML to the types of JSON and the core schema. Only the two classes above are changed."""
    supported = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq")}
    _Loader.yaml_constructors = {
        key: read for key, read in yaml.SafeLoader.yaml_constructors.items() if key in supported or key is None
    }
    _Loader.yaml_implicit_resolvers = {}
    _Loader.add_implicit_resolver(_MERGE, re.compile("^<<$"), ["<"])
    for name, (pattern, first) in _CORE.items():
        # The dumper puts text in quotes that either version of YAML reads as something else.
        for yaml_class in (_Loader, _Dumper):
            yaml_class.add_implicit_resolver(f"{_TAG}{name}", re.compile(f"^(?:{pattern})$"), first)
    _Loader.add_constructor(f"{_TAG}int", _Loader.read_int)
    _Loader.add_constructor(f"{_TAG}float", _Loader.read_float)
    _Loader.add_constructor(f"{_TAG}str", _Loader.read_text)
    _Loader.add_constructor(f"{_TAG}map", _Loader.read_mapping)
    _Dumper.add_representer(list, _Dumper.write_list)


_prepare_yaml()


def parse(text: str, source: str, problems: list[str]) -> Any:
    """Return the value of a YAML text.

    Args:
        text: the YAML.
        source: name of the file, or `OVERRIDE`.
        problems: gets a line for each key that is duplicate or not text.

    Raises:
        yaml.YAMLError: the syntax is invalid, or a limit is exceeded.
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
    return " ".join(str(error).split())


def show(value: Any) -> str:
    """Return the form of a value in messages: `text 'x'`, `a mapping`, `the list [1, 2]`, `3`."""
    if isinstance(value, str):
        return f"text {value!r}"
    if isinstance(value, dict):
        return "a mapping"
    text = json.dumps(value)
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return f"the list {short}" if isinstance(value, list) else short

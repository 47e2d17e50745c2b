"""The plan of the house: who may import whom, how long a function may be, what is typed and documented."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
LONGEST_FUNCTION = 60  # lines, with signature and docstring

# A part is a subpackage or a module of `maskrcnn`, or the folder of the tools. It imports from parts above it in this
# list, and from itself. Two parts on one line do not know each other.
FLOORS = (
    {"errors"},
    {"structures", "config", "cli", "memory"},
    {"ops"},
    {"data", "training"},
    {"models", "evaluation", "visualization", "resume_rules"},
    {"run_directory", "roi_picture"},
    {"experiment"},
    {"inference"},
    {"training_run"},
    {"ablation"},
    {"tools"},
)


class Import(NamedTuple):
    importer: str  # dotted name of the module
    line: int
    imported: str  # dotted name, of a module or of a thing in one


def modules() -> dict[str, Path]:
    package = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (REPOSITORY / "maskrcnn").rglob("*.py")
    }
    return package | {f"tools.{path.stem}": path for path in (REPOSITORY / "tools").rglob("*.py")}


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}


def imports_of(module: str, tree: ast.Module) -> Iterator[Import]:
    """Every import of the project's own, also those inside functions."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in ("maskrcnn", "tools"):
                yield Import(module, node.lineno, name)


def part(name: str) -> str:
    """`maskrcnn.ops.boxes.box_area` is in part `ops`, `tools.train` in `tools`."""
    first, *rest = name.split(".")
    return first if first == "tools" else rest[0]


def height(name: str) -> int:
    return next(index for index, floor in enumerate(FLOORS) if part(name) in floor)


def misplaced(found: Import) -> bool:
    return part(found.imported) != part(found.importer) and height(found.imported) >= height(found.importer)


IMPORTS = [found for name, tree in TREES.items() for found in imports_of(name, tree)]


def module_of(name: str) -> str:
    """The module that `from a import b` loads: `a.b` if that is a module, else `a`."""
    return name if name in MODULES else name.rpartition(".")[0]


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}:{node.lineno}", node


def public_definitions(name: str, body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Functions and classes that others may use, and the public methods of these classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{name}.{node.name}:{node.lineno}", node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(f"{name}.{node.name}", node.body)


def test_every_module_has_a_place() -> None:
    parts = {part(name) for name in MODULES if name != "maskrcnn"}
    assert parts == set.union(*FLOORS), "a new part needs its place in FLOORS, a removed one leaves it"


def test_a_module_imports_from_below_alone() -> None:
    assert len(IMPORTS) > 50
    wrong = [f"{found.importer}:{found.line} imports {found.imported}" for found in IMPORTS if misplaced(found)]
    assert not wrong, "not from a floor below:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("maskrcnn.models.rpn", "maskrcnn.ops.boxes.box_area", False),
        ("maskrcnn.ops.boxes", "maskrcnn.models.rpn.RPN", True),
        ("maskrcnn.ops.boxes", "maskrcnn.ops.nms.batched_nms", False),
        ("maskrcnn.data.coco", "maskrcnn.training.loop.train", True),
        ("maskrcnn.run_directory", "maskrcnn.experiment.ExperimentConfig", True),
        ("maskrcnn.cli", "tools.train.main", True),
    ],
)
def test_the_rule_tells_right_from_wrong(importer: str, imported: str, wrong: bool) -> None:
    assert misplaced(Import(importer, 1, imported)) == wrong


def test_the_tools_stand_alone() -> None:
    assert not [found for found in IMPORTS if part(found.importer) == part(found.imported) == "tools"]


def test_no_circle_of_imports() -> None:
    graph = {name: {module_of(found.imported) for found in IMPORTS if found.importer == name} for name in MODULES}
    assert all(imported in MODULES for targets in graph.values() for imported in targets)
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_function_is_too_long() -> None:
    lengths = {place: (node.end_lineno or 0) - node.lineno + 1 for place, node in functions()}
    assert len(lengths) > 200
    too_long = [f"{place} has {length} lines" for place, length in lengths.items() if length > LONGEST_FUNCTION]
    assert not too_long, "\n".join(too_long)


def test_every_function_is_typed() -> None:
    untyped = []
    for place, node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [arg.arg for arg in arguments if arg and not arg.annotation and arg.arg not in ("self", "cls")]
        bare += ["return"] if node.returns is None else []
        untyped += [f"{place}: {', '.join(bare)}"] if bare else []
    assert not untyped, "\n".join(untyped)


def test_everything_public_is_documented() -> None:
    bare = [name for name, tree in TREES.items() if not ast.get_docstring(tree)]
    for name, tree in TREES.items():
        for place, node in public_definitions(name, tree.body):
            assert isinstance(node, ast.FunctionDef | ast.ClassDef)
            bare += [] if ast.get_docstring(node) else [place]
    assert not bare, "\n".join(bare)

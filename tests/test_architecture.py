"""Rules for the whole code base: import layers, function length, type hints and docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
LONGEST_FUNCTION = 60  # lines, including signature and docstring

# The layers, lowest first. A part is a subpackage or module of `maskrcnn`, or the folder `tools`. It may import from
# itself and from parts in lower layers, which come earlier in this list, but not from other parts of its own layer.
LAYERS = (
    {"errors", "paths"},
    {"structures", "config", "runtime"},
    {"ops"},
    {"data"},
    {"models", "evaluation"},
    {"visualization", "resume_rules"},
    {"engine"},
    {"interop"},
    {"run_directory"},
    {"experiment"},
    {"training_run", "inspection"},
    {"ablation"},
    {"cli"},
    {"__main__"},
    {"tools"},
)


class Import(NamedTuple):
    importer: str  # dotted name of the module
    line: int
    imported: str  # dotted name of a module or of an object in a module


def modules() -> dict[str, Path]:
    package = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (REPOSITORY / "maskrcnn").rglob("*.py")
    }
    return package | {f"tools.{path.stem}": path for path in (REPOSITORY / "tools").rglob("*.py")}


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}


def imports_of(module: str, tree: ast.Module) -> Iterator[Import]:
    """Yield every import of a module of this project, including imports inside functions."""
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
    """Return `ops` for `maskrcnn.ops.boxes.box_area`, and `tools` for `tools.train`."""
    package, *rest = name.split(".")
    return package if package == "tools" else rest[0]


def layer(name: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part(name) in parts)


def breaks_layers(statement: Import) -> bool:
    source, target = statement.importer, statement.imported
    return part(target) != part(source) and layer(target) >= layer(source)


# Without those of the package itself, which offers names of all layers.
IMPORTS = [statement for name, tree in TREES.items() if name != "maskrcnn" for statement in imports_of(name, tree)]


def module_of(name: str) -> str:
    """Return the module that `from a import b` loads: `a.b` if that is a module, otherwise `a`."""
    return name if name in MODULES else name.rpartition(".")[0]


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}:{node.lineno}", node


def public_definitions(name: str, body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Yield public functions and classes, and the public methods of these classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{name}.{node.name}:{node.lineno}", node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(f"{name}.{node.name}", node.body)


def test_every_module_has_a_layer() -> None:
    parts = {part(name) for name in MODULES if name != "maskrcnn"}
    assert parts == set.union(*LAYERS), "LAYERS must list exactly the existing parts"


def test_modules_import_only_from_lower_layers() -> None:
    assert len(IMPORTS) > 50
    wrong = [
        f"{statement.importer}:{statement.line} imports {statement.imported}"
        for statement in IMPORTS
        if breaks_layers(statement)
    ]
    assert not wrong, "not from a lower layer:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("maskrcnn.models.rpn", "maskrcnn.ops.boxes.box_area", False),
        ("maskrcnn.ops.boxes", "maskrcnn.models.rpn.RPN", True),
        ("maskrcnn.ops.boxes", "maskrcnn.ops.nms.batched_nms", False),
        ("maskrcnn.data.coco", "maskrcnn.engine.loop.train", True),
        ("maskrcnn.run_directory", "maskrcnn.experiment.ExperimentConfig", True),
        ("maskrcnn.cli.train", "tools.train.main", True),
    ],
)
def test_the_layer_rule(importer: str, imported: str, wrong: bool) -> None:
    assert breaks_layers(Import(importer, 1, imported)) == wrong


def test_tools_do_not_import_tools() -> None:
    assert not [statement for statement in IMPORTS if part(statement.importer) == part(statement.imported) == "tools"]


def test_no_import_cycles() -> None:
    graph = {
        name: {module_of(statement.imported) for statement in IMPORTS if statement.importer == name} for name in MODULES
    }
    assert all(imported in MODULES for targets in graph.values() for imported in targets)
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_no_module_needs_posix_to_be_imported() -> None:
    """Windows has none of these modules; a function that needs one imports it."""
    posix = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}
    imported = {
        (module, alias.name)
        for module, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {(module, node.module) for module, tree in TREES.items() for node in tree.body if type(node) is ast.ImportFrom}
    assert not {(module, name) for module, name in imported if name in posix}


def test_no_function_is_too_long() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert len(lengths) > 200
    too_long = [f"{name} has {length} lines" for name, length in lengths.items() if length > LONGEST_FUNCTION]
    assert not too_long, "\n".join(too_long)


def test_every_function_is_typed() -> None:
    untyped = []
    for name, node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        missing = [arg.arg for arg in arguments if arg and not arg.annotation and arg.arg not in ("self", "cls")]
        missing += ["return"] if node.returns is None else []
        untyped += [f"{name}: {', '.join(missing)}"] if missing else []
    assert not untyped, "\n".join(untyped)


def test_everything_public_is_documented() -> None:
    undocumented = [module for module, tree in TREES.items() if not ast.get_docstring(tree)]
    for module, tree in TREES.items():
        for name, node in public_definitions(module, tree.body):
            assert isinstance(node, ast.FunctionDef | ast.ClassDef)
            undocumented += [] if ast.get_docstring(node) else [name]
    assert not undocumented, "\n".join(undocumented)


def test_the_wheel_holds_every_package() -> None:
    listed = re.findall(r'^    "(maskrcnn[\w.]*)",$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    packages = {name.rpartition(".")[0] for name in MODULES if name.startswith("maskrcnn.")} | {"maskrcnn"}
    packages |= {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(listed) == packages | {"maskrcnn.recipes"}


def test_the_wheel_holds_every_data_file() -> None:
    section = (REPOSITORY / "pyproject.toml").read_text().partition("[tool.setuptools.package-data]\n")[2]
    patterns = re.findall(r'^"?(maskrcnn[\w.]*)"? = \[(.*)\]$', section.partition("\n[")[0], re.MULTILINE)
    packaged = {
        path
        for package, listed in patterns
        for pattern in re.findall(r'"([^"]+)"', listed)
        for path in REPOSITORY.joinpath(*package.split(".")).glob(pattern)
    }
    files = {path for path in (REPOSITORY / "maskrcnn").rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert (REPOSITORY / "maskrcnn" / "ablation" / "report.html.jinja") in files <= packaged

"""What docs/security.md promises: files of a stranger run no code, except where a configuration imports modules."""

from __future__ import annotations

import ast
import re
import struct
import sys
import zlib
from pathlib import Path

import pytest

from maskrcnn.config import read_config
from maskrcnn.data.images import read_image
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig

REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("maskrcnn", "tools") for path in (REPOSITORY / folder).rglob("*.py"))

DATA = "data: {train: {kind: shapes}, validation: {kind: shapes}}\n"


def calls(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Return the function and the keyword arguments of each call in a file, as source text."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [
        (ast.unparse(node.func), {str(word.arg): ast.unparse(word.value) for word in node.keywords}) for node in nodes
    ]


def test_the_page_names_tests_that_exist() -> None:
    page = (REPOSITORY / "docs" / "security.md").read_text(encoding="utf-8")
    files = set(re.findall(r"tests/[\w/]+\.py", page))
    tests = set(re.findall(r"`(test_\w+)`", page))
    assert len(files) > 5
    assert len(tests) > 5
    defined = set(re.findall(r"^def (test_\w+)", "\n".join((REPOSITORY / file).read_text() for file in files), re.M))
    assert tests <= defined


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_reader_can_run_code_from_a_file(path: Path) -> None:
    """Every `torch.load` and `np.load` refuses pickled objects, and nothing else executes text or bytes."""
    for function, keywords in calls(path):
        assert function not in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
        assert not function.startswith(("pickle.", "marshal.", "shelve."))
        assert function != "torch.load" or keywords["weights_only"] == "True"
        assert function != "np.load" or keywords["allow_pickle"] == "False"
        assert keywords.get("shell", "False") == "False"


def test_yaml_builds_no_python_objects(tmp_path: Path) -> None:
    path, proof = tmp_path / "evil.yaml", tmp_path / "proof"
    path.write_text(f"{DATA}imports: !!python/object/apply:pathlib.Path.touch [{proof}]\n")
    with pytest.raises(InputError, match=r"evil\.yaml: not valid YAML"):
        read_config(path, ExperimentConfig)
    assert not proof.exists()


def test_a_configuration_imports_the_modules_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This runs their code: `imports` is the one key to read before a configuration of a stranger is used."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger_parts", raising=False)
    (tmp_path / "stranger_parts.py").write_text("")
    (tmp_path / "config.yaml").write_text(f"imports: [stranger_parts]\n{DATA}")
    read_config(tmp_path / "config.yaml", ExperimentConfig)
    assert "stranger_parts" in sys.modules


def test_an_image_that_claims_too_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    ]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(InputError, match=r"bomb\.png: cannot be read as an image .*decompression bomb"):
        read_image(tmp_path / "bomb.png")

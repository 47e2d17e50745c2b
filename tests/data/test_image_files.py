"""Image files that a user names: folders, patterns, names of outputs, and reading ahead."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from maskrcnn.data.image_files import image_files, output_names, read_images
from maskrcnn.errors import InputError
from maskrcnn.structures import Example


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_of(folder: Path, *inputs: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in image_files([folder / name for name in inputs])]


def test_folders_files_and_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", "notes.txt", "deep/c.webp", "deep/deeper/d.tif", "set[1].png")
    assert names_of(tmp_path, ".") == ["a.png", "b.JPG", "set[1].png"]
    assert names_of(tmp_path, "deep", "a.png") == ["deep/c.webp", "a.png"]
    assert names_of(tmp_path, "**/*") == ["a.png", "b.JPG", "deep/c.webp", "deep/deeper/d.tif", "set[1].png"]
    assert names_of(tmp_path, "[ab].*") == ["a.png", "b.JPG"]
    assert names_of(tmp_path, "set[1].png") == ["set[1].png"]  # a file of this name comes first
    assert names_of(tmp_path, "notes.txt") == ["notes.txt"]  # the user named it


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    """macOS writes `._a.jpg` beside `a.jpg` on drives of other systems; it has no image."""
    touch(tmp_path, "a.jpg", "._a.jpg", ".hidden/b.jpg")
    assert names_of(tmp_path, ".") == names_of(tmp_path, "*") == names_of(tmp_path, "**/*.jpg") == ["a.jpg"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jpg", "absent.jpg: no such image or folder"),
        ("empty", "empty: no image in this folder"),
        ("empty/*.jpg", r"\*.jpg: no image matches this pattern"),
        (".*", "no image matches this pattern"),
        ("x\0*", "no such image or folder"),
        ("x" * 5000, "no such image or folder"),
    ],
)
def test_inputs_without_images(tmp_path: Path, name: str, message: str) -> None:
    touch(tmp_path, "empty/notes.txt", "._a.jpg")
    with pytest.raises(InputError, match=message):
        image_files([tmp_path / name])


def test_no_two_outputs_have_one_name() -> None:
    files = [Path(name) for name in ("x/1.jpg", "y/1.jpg", "1_2.jpg", "x/A.jpg", "y/a.png", "x/A_4_4.jpg", "A_4.jpg")]
    assert output_names(files) == ["1_1", "1_2_2", "1_2", "A_4_4_4", "a_5", "A_4_4", "A_4"]


def prepared(pixels: Tensor) -> Example:
    """Return the first row."""
    return Example(0, pixels[:, :1], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), ())


def test_few_images_are_read_ahead(tmp_path: Path) -> None:
    """However slowly they are taken, no more than two per worker and the one that is taken."""
    file = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(file)
    read: list[Tensor] = []
    before = threading.active_count()

    def counted(pixels: Tensor) -> Example:
        read.append(pixels)
        return prepared(pixels)

    images = iter(read_images([file] * 50, counted, workers=2))
    for taken in range(1, 20):
        next(images)
        assert len(read) <= taken + 4
    images.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_read_in_order(tmp_path: Path, workers: int) -> None:
    files = [tmp_path / f"{width}.png" for width in range(1, 6)]
    for width, file in enumerate(files, start=1):
        Image.new("RGB", (width, 2)).save(file)
    files[2].write_bytes(b"no image")
    images = list(read_images(files, prepared, workers=workers))
    assert [image.position for image in images] == [0, 1, 2, 3, 4]
    assert images[2].pixels is images[2].prepared is None
    assert "3.png: cannot be read as an image" in images[2].problem
    widths = [
        (image.pixels.shape[2], tuple(image.prepared.pixels.shape[1:]))
        for image in images
        if image.pixels is not None and image.prepared is not None
    ]
    assert widths == [(width, (1, width)) for width in (1, 2, 4, 5)]

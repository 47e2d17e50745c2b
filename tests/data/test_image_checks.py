"""Each fault of an image file is found before a training, from the header and the end of the file where they tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from maskrcnn.data import image_checks
from maskrcnn.data.image_checks import check_file, check_files, read_header
from maskrcnn.data.images import read_image

NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def turned(path: Path, orientation: int = 6) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(NOISE).save(path, exif=exif)


FAULTS: dict[str, Callable[[Path], object]] = {
    "missing_image": Path.unlink,
    "unreadable_image": lambda path: path.write_text("no image"),
    "truncated_image": cut,
    "size_mismatch": lambda path: Image.fromarray(NOISE[:, :50]).save(path),
    "exif_mismatch": turned,
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_files(tmp_path: Path, suffix: str, fault: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(NOISE).save(path)
    assert check_file(path, (40, 60), 7, "a.json") is None
    FAULTS[fault](path)
    finding = check_file(path, (40, 60), 7, "a.json")
    assert finding is not None
    assert (finding.image_id, finding.file) == (7, str(path))
    assert finding.fault == fault


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_sound_file_is_not_decoded(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_checks, "read_image", pytest.fail)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(NOISE).save(path)
    assert check_file(path, (40, 60), 7, "a.json") is None
    turned(path)
    assert check_file(path, (60, 40), 7, "a.json") is None


def test_a_jpeg_with_more_behind_its_end_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(NOISE).save(path)
    path.write_bytes(path.read_bytes() + b"a note of the camera")
    assert check_file(path, (40, 60), 7, "a.json") is None


def test_an_orientation_behind_the_pixels_of_a_png_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    turned(path)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    size = int.from_bytes(content[start : start + 4], "big") + 12
    chunk, end = content[start : start + size], content.rindex(b"IEND") - 4
    path.write_bytes(content[:start] + content[start + size : end] + chunk + content[end:])
    assert read_image(path).shape == (3, 60, 40)
    assert check_file(path, (60, 40), 7, "a.json") is None
    finding = check_file(path, (40, 60), 7, "a.json")
    assert finding is not None
    assert finding.fault in ("exif_mismatch", "size_mismatch")


def test_a_text_in_a_png_is_no_orientation(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "eXIf")
    Image.fromarray(NOISE).save(tmp_path / "a.png", pnginfo=text)
    assert read_header(tmp_path / "a.png") == ((40, 60), 1, "RGB", True)


def test_many_files(tmp_path: Path) -> None:
    for name in "abc":
        Image.fromarray(NOISE).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"")
    files = [str(tmp_path / f"{name}.png") for name in "abcd"]
    findings = check_files(files, np.tile([40, 60], (4, 1)), [1, 2, 3, 4], "a.json")
    assert [(finding.fault, finding.image_id) for finding in findings] == [
        ("unreadable_image", 2),
        ("missing_image", 4),
    ]

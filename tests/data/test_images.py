from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskrcnn.data.images import read_image
from maskrcnn.errors import InputError

RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "I;16"])
def test_every_kind_of_grey_png_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(RAMP)
    if mode == "I;16":
        grey = Image.fromarray(RAMP.astype(np.uint16) * 257)
    grey.convert(mode).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png")
    assert pixels.shape == (3, 4, 6)
    assert np.array_equal(pixels.numpy(), np.stack([RAMP] * 3))


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (6, 4), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").min() > 250


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer must rotate the image by 90 degrees clockwise
    Image.fromarray(RAMP).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png")[0].numpy(), np.rot90(RAMP, -1))


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name, reason in [("pipe.jpg", "it is a pipe"), ("loop.jpg", ".*symbolic links"), ("", "Is a directory")]:
        with pytest.raises(InputError, match=rf"cannot be read as an image \({reason}"):
            read_image(tmp_path / name)


def test_missing_and_broken_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jpg: no such image"):
        read_image(tmp_path / "nowhere.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"text\.jpg: cannot be read"):
        read_image(tmp_path / "text.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:1500])
    with pytest.raises(InputError, match=r"cut\.jpg: cannot be read"):
        read_image(tmp_path / "cut.jpg")
    with pytest.raises(InputError, match="cannot be read"):
        read_image(tmp_path)

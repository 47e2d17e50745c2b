"""The perceptual hash finds another encoding of an image, and tells photographs apart."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskrcnn.data.images import to_pixels
from maskrcnn.inspection.similarity import near_pairs, perceptual_hash


def photograph(seed: int) -> Image.Image:
    """Return a picture with detail at every scale, as photographs have it."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
        for side in (3, 8, 20, 60)
    ]
    return Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8))


def encoded(image: Image.Image, quality: int, factor: float = 1.0) -> Image.Image:
    file = io.BytesIO()
    size = round(image.width * factor), round(image.height * factor)
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def hashes(images: list[Image.Image]) -> np.ndarray:
    of_images = [perceptual_hash(to_pixels(image)) for image in images]
    assert all(of_image is not None for of_image in of_images)
    return np.array(of_images)


@pytest.mark.parametrize(("quality", "factor"), [(90, 1.0), (30, 1.0), (75, 0.5), (50, 0.3), (90, 2.0)])
def test_another_encoding_is_found(quality: int, factor: float) -> None:
    images = [photograph(seed) for seed in range(12)]
    pairs = near_pairs(hashes(images), hashes([encoded(image, quality, factor) for image in images]))
    assert pairs == [(index, index) for index in range(12)]


def test_an_image_without_structure_has_no_hash() -> None:
    assert perceptual_hash(torch.full((3, 40, 60), 7, dtype=torch.uint8)) is None
    noise = torch.randint(100, 103, (3, 400, 600), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert perceptual_hash(noise) is None


@pytest.mark.slow
def test_errors_on_the_real_subset(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No pair of photographs is taken for the same, and every encoding of a photograph is found."""
    files = sorted((shared_data / "coco_subset").glob("*2017/*.jpg"))
    images = [Image.open(file).convert("RGB") for file in files]
    own = hashes(images)
    assert near_pairs(own, own) == [(index, index) for index in range(len(files))]
    settings = ((75, 1.0), (30, 1.0), (75, 0.5), (50, 0.3))
    for quality, factor in settings:
        found = near_pairs(own, hashes([encoded(image, quality, factor) for image in images]))
        assert found == [(index, index) for index in range(len(files))]
    pairs = len(files) * (len(files) - 1) // 2
    with capsys.disabled():
        print(f"\n0 of {pairs} pairs of photographs are taken for the same; {4 * len(files)} encodings are found")

"""Predictions for many image files: what is written, in which order, with how much memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from painted import PaintedDetector, paint
from PIL import Image

from maskrcnn.engine.instances import Instances
from maskrcnn.engine.prediction import ImagesSkipped, PredictionOptions, predict_images
from maskrcnn.errors import InputError
from maskrcnn.runtime.outputs import LOCK, MARKER
from maskrcnn.structures import Example, MaskCrop


def scene(path: Path, *labels: int) -> Path:
    """Write an image with a square for each label, numbered from 100 (score 0.9) in steps of 200."""
    pixels = np.zeros((40, 20 * len(labels) + 10, 3), np.uint8)
    for index, label in enumerate(labels):
        paint(pixels, 100 + 200 * index, label, MaskCrop(20 * index + 2, 10, np.ones((9, 8), np.uint8)))
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def predicted(inputs: Sequence[Path], out: Path, **options: Any) -> list[dict[str, Any]]:
    path = predict_images(PaintedDetector(), inputs, out, PredictionOptions(**options))
    return json.loads(path.read_text())


def written(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} - {LOCK, MARKER}


class Counting(PaintedDetector):
    """Records the sizes of the batches."""

    sizes: list[int] = []  # noqa: RUF012

    def detect_prepared(self, examples: Sequence[Example]) -> list[Instances]:
        self.sizes.append(len(examples))
        return super().detect_prepared(examples)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_detected_in_batches_and_written_in_order(tmp_path: Path, workers: int) -> None:
    for number in range(5):
        scene(tmp_path / "in" / f"{number}.png", 1, *[2] * number)
    (tmp_path / "in" / "1_broken.png").write_bytes(b"")
    Counting.sizes.clear()
    with pytest.raises(ImagesSkipped, match="1 of 6 images were skipped"):
        predict_images(
            Counting(),
            [tmp_path / "in"],
            tmp_path / "out",
            PredictionOptions(min_score=0, batch_size=2, workers=workers),
        )
    assert Counting.sizes == [2, 2, 1]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    images = [(result["image_id"], Path(result["file_name"]).name) for result in results]
    assert images == sorted(images)
    assert [images.count(image) for image in dict.fromkeys(images)] == [1, 2, 3, 4, 5]
    assert {image_id for image_id, _ in images} == {1, 2, 4, 5, 6}
    assert written(tmp_path / "out") == {"results.json", *(f"{number}.png" for number in range(5))}


def test_results_are_written_while_images_are_read(tmp_path: Path) -> None:
    """The results of an image are not kept: they are in the temporary file when those of the next are made."""
    for number in range(30):
        scene(tmp_path / "in" / f"{number:02d}.png", *[1] * 60)

    class Watching(PaintedDetector):
        def detect_prepared(self, examples: Sequence[Example]) -> list[Instances]:
            sizes.append(sum(path.stat().st_size for path in (tmp_path / "out").glob("results.json.tmp")))
            return super().detect_prepared(examples)

    sizes: list[int] = []
    predict_images(Watching(), [tmp_path / "in"], tmp_path / "out", PredictionOptions(min_score=0, pictures=False))
    assert sizes == sorted(sizes)
    assert 0 < sizes[15] < sizes[-1] < (tmp_path / "out" / "results.json").stat().st_size
    assert written(tmp_path / "out") == {"results.json"}


def test_an_interrupted_prediction_leaves_no_results(tmp_path: Path) -> None:
    class Interrupted(PaintedDetector):
        def detect_prepared(self, examples: Sequence[Example]) -> list[Instances]:
            if (tmp_path / "out" / "a.png").exists():
                raise KeyboardInterrupt
            return super().detect_prepared(examples)

    files = [scene(tmp_path / "in" / f"{name}.png", 1) for name in "abc"]
    with pytest.raises(KeyboardInterrupt):
        predict_images(Interrupted(), files, tmp_path / "out", PredictionOptions())
    assert written(tmp_path / "out") == {"a.png"}


def test_chosen_classes_and_scores(tmp_path: Path) -> None:
    path = scene(tmp_path / "a.png", 1, 2, 3, 2)  # scores 0.9, 0.7, 0.5, 0.3
    assert [result["category_id"] for result in predicted([path], tmp_path / "out")] == [1, 2, 5]
    some = predicted([path], tmp_path / "out", classes=("cross", "ring"), min_score=0.25)
    assert [(result["category_id"], round(result["score"], 2)) for result in some] == [(2, 0.7), (5, 0.5), (2, 0.3)]
    with pytest.raises(InputError, match="'rings' is not one of disc, ring, cross; did you mean 'ring'"):
        predicted([path], tmp_path / "out", classes=("rings",))


def test_files_of_other_tools(tmp_path: Path) -> None:
    files = [scene(tmp_path / "in" / "a.png", 1, 3), scene(tmp_path / "in" / "b.png")]
    out = tmp_path / "out"
    predicted(files, out, formats=("labelme", "png", "yolo"), pictures=False)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {LOCK, MARKER} == {
        "results.json", "classes.txt", "labels/a.txt", "labels/b.txt", "labelme/a.json", "labelme/b.json",
        "masks/a/001_disc.png", "masks/a/002_cross.png",
    }  # fmt: skip
    assert (out / "classes.txt").read_text() == "disc\nring\ncross\n"
    assert [line.split()[0] for line in (out / "labels" / "a.txt").read_text().splitlines()] == ["0", "2"]
    assert (out / "labels" / "b.txt").read_text() == ""
    labelme = json.loads((out / "labelme" / "a.json").read_text())
    assert (out / "labelme" / labelme["imagePath"]).resolve() == files[0].resolve()
    assert np.array(Image.open(out / "masks" / "a" / "002_cross.png")).sum() == 72


def test_masks_of_a_model_without_masks_are_refused(tmp_path: Path) -> None:
    class Boxes(PaintedDetector):
        def detect_prepared(self, examples: Sequence[Example]) -> list[Instances]:
            return [replace(instances, pixel_masks=None) for instances in super().detect_prepared(examples)]

    options = PredictionOptions(formats=("png",))
    with pytest.raises(InputError, match="--format png: there are no masks"):
        predict_images(Boxes(), [scene(tmp_path / "a.png", 1)], tmp_path / "out", options)


def test_the_best_score_is_said_where_none_passes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = scene(tmp_path / "a.png", 1, 2)
    caplog.set_level("INFO", "maskrcnn")
    assert predicted([path], tmp_path / "out", min_score=0.95) == []
    assert "no detection has a score of at least 0.95; the best score is 0.90" in caplog.messages
    assert predicted([path], tmp_path / "out", min_score=0.95, classes=("cross",)) == []
    assert "no detection has a score of at least 0.95; there is none with a lower score" in caplog.messages
    caplog.clear()
    predicted([path], tmp_path / "out")
    assert caplog.messages == [f"1 images, 2 objects: pictures and results.json are in {tmp_path / 'out'}"]

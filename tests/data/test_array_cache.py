"""The cache of annotations: when it is used and when it is made anew; nothing that a user owns is written."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskrcnn.data import array_cache, coco, coco_arrays
from maskrcnn.data.array_cache import cache_folder
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import InputError

SQUARE = [4.0, 5.0, 8.0, 5.0, 8.0, 9.0, 4.0, 9.25]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes an annotation file with one square, and the cache is in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(array_cache, "SMALLEST", 1)
    array_cache._say_once.cache_clear()
    (tmp_path / "data").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "data" / "1.png")

    def write(**changes: Any) -> Path:
        entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 5, 4, 4], "segmentation": [SQUARE], **changes}
        content = {
            "images": [{"id": 1, "file_name": "1.png", "height": 20, "width": 30}],
            "annotations": [entry, {**entry, "id": 2, "segmentation": {"size": [20, 30], "counts": [5, 7, 588]}}],
            "categories": [{"id": 1, "name": "leaf"}],
        }
        path = tmp_path / "data" / "objects.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The annotation files that were read as JSON."""
    files: list[Path] = []
    read = coco.read_coco_json

    def record(path: Path) -> dict[str, Any]:
        files.append(path)
        return read(path)

    monkeypatch.setattr(coco, "read_coco_json", record)
    return files


def opened(path: Path, **options: Any) -> CocoDataset:
    return CocoDataset(path, path.parent, **options)


def content(dataset: CocoDataset) -> Any:
    objects = dataset.objects(0)
    masks = [(mask.x, mask.y, mask.pixels.tolist()) for mask in objects.masks]
    return dataset.classes, dataset.image_name(0), objects.boxes.tolist(), objects.labels.tolist(), masks


def cache_file() -> Path:
    (path,) = cache_folder().glob("*.npy")
    return path


def test_the_second_start_reads_no_json(write: Callable[..., Path], reads: list[Path]) -> None:
    path = write()
    first, second = opened(path), opened(path)
    assert len(reads) == 1
    assert content(first) == content(second)
    assert content(first)[2] == [[4, 5, 8, 9]] * 2
    assert content(opened(path, classes=("leaf",), rename={"leaf": "tree"}))[0].names == ("tree",)
    assert len(reads) == 1
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["1.png", "objects.json"]
    assert cache_file().name.startswith("objects-")


def test_the_cache_equals_the_file(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    opened(path)
    from_cache = content(opened(path))
    monkeypatch.setattr(array_cache, "SMALLEST", 2**24)
    assert content(opened(path)) == from_cache


def test_which_masks_are_empty_is_cached(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(segmentation=[[40, 5, 45, 5, 45, 9], [1, 2, 3, 4]])
    with caplog.at_level(logging.WARNING):
        first = opened(path)
        warnings = caplog.text
        caplog.clear()
        monkeypatch.delattr(coco_arrays, "without_pixels")
        second = opened(path)
    assert warnings == caplog.text
    assert "annotation 1 (image 1): its polygons cover no pixel of the image" in warnings
    assert "annotation 1 (image 1): has a polygon with fewer than three points" in warnings
    assert content(first)[2] == content(second)[2] == [[4, 5, 8, 9]]
    assert first.origin() == second.origin()


def test_a_small_file_is_not_cached(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "SMALLEST", 2**24)
    opened(write())
    assert not cache_folder().exists()


@pytest.mark.parametrize("same_time", [False, True])
def test_a_changed_file_is_read_again(write: Callable[..., Path], reads: list[Path], same_time: bool) -> None:
    path = write()
    before = path.stat()
    opened(path)
    write(bbox=[4, 5, 4, 3])  # of the same size
    if same_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content(opened(path))[2] == [[4, 5, 8, 8]] * 2
    opened(path)
    assert len(reads) == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-array_cache.ALIGNMENT] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 70)


def shorten_the_array(path: Path) -> None:
    np.save(path, np.load(path)[:300])


def with_objects(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


DAMAGES = [
    flip,
    cut,
    shorten_the_array,
    with_objects,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"not numpy"),
    lambda path: np.save(path, np.zeros((3, 3), np.uint8)),
    lambda path: np.save(path, np.full(99, 255, np.uint8)),
    lambda path: np.save(path, np.frombuffer((3).to_bytes(8, "little") + b"[1]", np.uint8)),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=[str(number) for number in range(len(DAMAGES))])
def test_a_damaged_cache_is_made_anew(
    write: Callable[..., Path], reads: list[Path], damage: Callable[[Path], None]
) -> None:
    path = write()
    expected = content(opened(path))
    damage(cache_file())
    assert content(opened(path)) == expected
    assert content(opened(path)) == expected
    assert len(reads) == 2


def test_a_cache_with_other_arrays_is_made_anew(
    write: Callable[..., Path], reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    opened(path)
    monkeypatch.setattr(array_cache, "FORMAT", 99)
    opened(path)
    assert len(reads) == 2


def test_without_a_place_for_the_cache_it_is_said_once(
    write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write()
    (tmp_path / "cache").write_text("a file of the user")
    with caplog.at_level(logging.WARNING):
        assert content(opened(path)) == content(opened(path))
    assert caplog.text.count("cannot keep annotations there") == 1
    assert (tmp_path / "cache").read_text() == "a file of the user"


def test_a_full_disk_is_survived(
    write: Callable[..., Path], reads: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path, write: Callable[..., object]) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(array_cache, "write_atomically", fail)
    opened(write())
    assert "No space left on device" in caplog.text
    assert len(reads) == 1


def test_a_file_with_malformed_masks_is_not_cached(write: Callable[..., Path]) -> None:
    path = write(segmentation=[[1, 2, 3, 4, 5, 6, 7]])
    for _ in range(2):
        with pytest.raises(InputError, match=r"annotation 1 \(image 1\): a polygon has an odd number"):
            opened(path)
    assert not list(cache_folder().glob("*.npy"))
    with pytest.raises(InputError, match="cannot read the annotation file"):
        opened(path.with_name("missing.json"))


def test_another_process_maps_the_file(write: Callable[..., Path]) -> None:
    path = write()
    dataset = opened(path)
    pickled = pickle.dumps(dataset)
    arrays = pickle.dumps(dataset._arrays)
    assert len(arrays) < 500 < len(pickled)
    assert content(pickle.loads(pickled)) == content(dataset)
    write(bbox=[1, 1, 2, 2])
    opened(path)
    with pytest.raises(OSError, match="the annotations changed while a process was started"):
        pickle.loads(pickled)


def _open_in_process(path: Path, queue: Any) -> None:
    queue.put(content(opened(path)))


def test_processes_that_start_together(write: Callable[..., Path]) -> None:
    path = write()
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    queue = context.Queue()
    processes = [context.Process(target=_open_in_process, args=(path, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(result == content(opened(path)) for result in results)
    assert [entry.suffix for entry in sorted(cache_folder().iterdir())] == [".lock", ".npy"]

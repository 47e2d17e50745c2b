"""Measure start-up and memory of a COCO dataset of the size of train2017, without its photographs.

    python tools/benchmarks/annotations.py FOLDER

writes an annotation file of 118,000 images and 860,000 objects with drawn polygons to FOLDER, which is new or was made
by this script, and empty files in place of images. It then measures the time from JSON, the time from the cache, and
how much memory four forked workers of a data loader take more after an epoch of reads of labels, boxes and masks. The
cache lies in FOLDER, too. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from maskrcnn.data.coco import CocoDataset
from maskrcnn.runtime.console import run_main

IMAGES, OBJECTS, CLASSES = 118_000, 860_000, 80
WORKERS = 4
MIB = 2**20


def make(folder: Path) -> None:
    """Write annotation file and images, unless they are there."""
    done = folder / "made_by_benchmark"
    if done.exists():
        return
    (folder / "images").mkdir(parents=True)
    for image in range(1, IMAGES + 1):
        (folder / "images" / f"{image:012}.jpg").touch()
    with (folder / "annotations.json").open("w") as file:
        for part in _json_parts():
            file.write(part)
    done.touch()


def _json_parts() -> Iterator[str]:
    """Yield the text of the annotation file: polygons of 22 points on average, as COCO has, with two decimals."""
    rng = np.random.default_rng(0)
    images = (
        json.dumps({"id": image, "file_name": f"{image:012}.jpg", "height": 480, "width": 640, "license": 3})
        for image in range(1, IMAGES + 1)
    )
    classes = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    yield f'{{"categories": {json.dumps(classes)}, "images": [{", ".join(images)}], "annotations": ['
    shapes = [_shape(rng) for _ in range(4096)]
    of_image = np.sort(rng.integers(1, IMAGES + 1, OBJECTS))
    numbers = rng.integers(1, CLASSES + 1, OBJECTS), rng.integers(len(shapes), size=OBJECTS)
    for index, (image, category, shape) in enumerate(zip(of_image, *numbers, strict=True), 1):
        comma = ", " if index > 1 else ""
        yield f'{comma}{{"id": {index}, "image_id": {image}, "category_id": {category}, "iscrowd": 0, {shapes[shape]}}}'
    yield "]}"


def _shape(rng: np.random.Generator) -> str:
    """Return the keys `segmentation`, `bbox` and `area` of a star-shaped polygon."""
    count = int(rng.integers(4, 41))
    angles = np.sort(rng.uniform(0, 2 * np.pi, count))
    radii = rng.uniform(0.5, 1, count) * np.exp(rng.uniform(np.log(4), np.log(120)))
    points = np.stack([320 + radii * np.cos(angles), 240 + radii * np.sin(angles)], axis=1).round(2)
    low, high = points.min(axis=0), points.max(axis=0)
    box = [*low.tolist(), *(high - low).round(2).tolist()]
    return json.dumps({"segmentation": [points.ravel().tolist()], "bbox": box, "area": box[2] * box[3]})[1:-1]


def _open(folder: Path) -> CocoDataset:
    return CocoDataset(folder / "annotations.json", folder / "images")


def start(folder: Path) -> None:
    """Print the seconds that the dataset takes to be built, and the peak memory of the process, in MiB."""
    import resource

    begin = time.perf_counter()
    _open(folder)
    seconds = time.perf_counter() - begin
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


class _Reads(Dataset):
    """Reads the annotations of an image and returns the number of its objects."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> int:
        objects = self.dataset.objects(index)
        assert len(objects.masks) == len(self.dataset.labels(index))
        return len(objects.masks)


def _memory(processes: Sequence[int]) -> dict[str, float]:
    """Return memory of processes in MiB: proportional share (PSS), and what each has for itself (USS)."""
    total = {"Pss": 0.0, "Private_Clean": 0.0, "Private_Dirty": 0.0}
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            key = line.partition(":")[0]
            if key in total:
                total[key] += int(line.split()[1]) / 1024
    return {"PSS": total["Pss"], "USS": total["Private_Clean"] + total["Private_Dirty"]}


def epoch(folder: Path) -> None:
    """Print the growth of the memory of all processes, and of the workers alone, over an epoch, in MiB."""
    reads = _Reads(_open(folder))
    loader = DataLoader(reads, batch_size=16, num_workers=WORKERS, prefetch_factor=2)
    before: dict[str, float] = {}
    objects = 0
    for number, batch in enumerate(loader, 1):
        objects += int(batch.sum())
        workers = [process.pid for process in multiprocessing.active_children() if process.pid]
        if number == 2 * WORKERS:
            before = _both(workers)
        if number == len(loader) - 2 * WORKERS:  # the workers still run
            after = _both(workers)
    print(json.dumps([objects, len(workers), {name: after[name] - before[name] for name in before}]))


def _both(workers: Sequence[int]) -> dict[str, float]:
    everything, alone = _memory([os.getpid(), *workers]), _memory(workers)
    return {"PSS of all": everything["PSS"], "USS of workers": alone["USS"], "PSS of workers": alone["PSS"]}


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--role", choices=["start", "epoch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        {"start": start, "epoch": epoch}[args.role](args.folder)
        return
    make(args.folder)
    environment = os.environ | {"XDG_CACHE_HOME": str(args.folder / "cache")}
    for path in (args.folder / "cache").rglob("*.npy"):
        path.unlink()

    def run(role: str, **changes: str) -> list[float]:
        command = [sys.executable, __file__, str(args.folder), "--role", role]
        return json.loads(subprocess.check_output(command, env=environment | changes, text=True))

    for name in ("from JSON, writing the cache", "from the cache", "from the cache again"):
        seconds, peak = run("start")
        print(f"start {name}: {seconds:.2f} s, peak memory {peak:.0f} MiB", flush=True)
    objects, workers, growth = run("epoch")
    print(f"an epoch of {objects} objects, {workers} workers, growth in MiB: {growth}")


if __name__ == "__main__":
    run_main(main)

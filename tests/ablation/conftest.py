"""Run directories of an ablation, written without training: detections are the ground truth, moved by some pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as cocoapi

from maskrcnn.ablation.plan import Plan, Run, load_plan
from maskrcnn.evaluation.results import write_results

EXPERIMENT = """
data:
  train: {kind: shapes, length: 10, height: 64, width: 64, classes: [disc, cross]}
  validation:
    {kind: shapes, length: 10, seed: 1, height: 64, width: 64, classes: [disc, cross], objects: [1, 3], sizes: [0.5, 1]}
training:
  schedule: {kind: cosine, iterations: 40, warmup_iterations: 0}
"""

ABLATION = """
title: Shapes & masks, a <b>small</b> ablation
experiment: experiment.yaml
baseline: pool
metric: mask/AP75
seeds: [0, 1, 2]
resamples: 200
variants:
  pool: {set: [model.roi.kind=roi_pool], paper: {mask/AP: 23.6, mask/AP75: 21.6}}
  align: {paper: {mask/AP: 30.9, mask/AP75: 32.1}}
  same: {set: [model.detection.detections_per_image=99]}
  coarse: {set: [model.rpn.batch_size_per_image=32]}
"""

SHIFTS = {"pool": 3, "align": 1, "same": 3, "coarse": 6, "masks": 1, "boxes": 3}  # pixels
MEMORY = {"pool": 300, "align": 200, "same": 100, "coarse": 400, "masks": 200, "boxes": 100}  # MiB
SAME_EXCEPT = 4  # `same` is better than `pool` on this image, and worse on the next


@pytest.fixture(scope="session")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Four variants, three seeds; the last seed of `align` is not finished, and one of `coarse` has not started."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "experiment.yaml").write_text(EXPERIMENT)
    (folder / "ablation.yaml").write_text(ABLATION)
    plan = load_plan(folder / "ablation.yaml", folder / "out")
    truth = plan.runs[0].config.data.build_validation().ground_truth()
    for run in plan.runs:
        if run.name != "coarse/seed_1":
            write_run(run, truth, iterations=30 if run.name == "align/seed_2" else 40)
    return plan


BOXES = """
title: With and without masks
experiment: experiment.yaml
baseline: boxes
metric: box/AP
variants:
  masks: {paper: {mask/AP: 30.0}}
  boxes: {set: [model.mask_head=null, evaluation.best_metric=box/AP], paper: {mask/AP: 31.0}}
"""


@pytest.fixture
def box_ablation(tmp_path: Path) -> Plan:
    """A variant with a mask head, and one without, which is the baseline."""
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT)
    (tmp_path / "ablation.yaml").write_text(BOXES)
    plan = load_plan(tmp_path / "ablation.yaml", tmp_path / "out")
    truth = plan.runs[0].config.data.build_validation().ground_truth()
    for run in plan.runs:
        write_run(run, truth, iterations=40)
    return plan


def write_run(run: Run, truth: dict[str, Any], *, iterations: int) -> None:
    """Write the files that the report reads, for a training that stopped after `iterations`."""
    run.directory.evaluation.mkdir(parents=True)
    run.directory.environment.write_text("command: train\nseed: 0\ndevice: old\n\ncommand: x\nseed: 0\ndevice: toy\n")
    write_results(run.directory.evaluation / "results.json", moved_truth(run, truth))
    records: list[dict[str, Any]] = []
    for iteration in range(10, iterations + 1, 10):
        loss = 2.0 / iteration + 0.01 * run.seed
        timing = {"images_per_second": 10.0 + iteration, "peak_memory": 2**20 * (MEMORY[run.variant] + run.seed)}
        records.append({"kind": "train", "iteration": iteration, "loss": loss, **timing})
        if iteration % 20 == 0:
            metrics = {"mask/AP75": iteration / 100 + 0.01 * run.seed, "mask/APl": None}
            timing = {"images_per_second": 100.0 + iteration}
            records.append({"kind": "evaluation", "iteration": iteration, "metrics": metrics, **timing})
    run.directory.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))


def moved_truth(run: Run, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects moved to the right as detections; seeds differ in the scores and in one missing object."""
    rng = np.random.default_rng(run.seed)
    results = []
    for number, entry in enumerate(truth["annotations"]):
        score = 0.6 + 0.4 * rng.random()
        if number == run.seed:
            continue
        shift = SHIFTS[run.variant]
        if run.variant == "same":
            shift += {SAME_EXCEPT: -1, SAME_EXCEPT + 1: 1}.get(entry["image_id"], 0)
        moved = np.roll(cocoapi.decode(entry["segmentation"]), shift, axis=1)
        code = cocoapi.encode(np.asfortranarray(moved))
        results.append(
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "score": score,
                "bbox": cocoapi.toBbox(code).tolist(),
            }
        )
        if run.config.model.mask_head is not None:
            results[-1]["segmentation"] = {"size": code["size"], "counts": code["counts"].decode("ascii")}
    return results

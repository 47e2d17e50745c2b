"""Reading the YAML file of an ablation, and the errors in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskrcnn.ablation.plan import load_plan
from maskrcnn.config import to_yaml
from maskrcnn.errors import InputError

EXPERIMENT = """
model:
  rpn: {batch_size_per_image: 8}
  roi: {kind: roi_align}
data:
  train: {kind: shapes, length: 4, height: 64, width: 64}
  validation: {kind: shapes, length: 4, height: 64, width: 64, seed: 1}
"""

ABLATION = """
title: The RoI layer
experiment: experiment.yaml
baseline: pool
seeds: [3, 5]
variants:
  pool: {set: ["model.roi={kind: roi_pool}"]}
  align: {set: [model.roi.sampling_ratio=1], paper: {mask/AP: 30.3}}
"""


def write(folder: Path, ablation: str = ABLATION) -> Path:
    (folder / "experiment.yaml").write_text(EXPERIMENT)
    (folder / "ablation.yaml").write_text(ablation)
    return folder / "ablation.yaml"


def test_every_variant_has_a_run_for_every_seed(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path), tmp_path / "out")
    assert [run.name for run in plan.runs] == ["pool/seed_3", "align/seed_3", "pool/seed_5", "align/seed_5"]
    assert [run.config.training.seed for run in plan.runs] == [3, 3, 5, 5]
    assert [run.config.model.roi.kind for run in plan.runs_of("pool")] == ["roi_pool", "roi_pool"]
    align = plan.runs_of("align")[0].config.model.roi
    assert align.kind == "roi_align"
    assert align.sampling_ratio == 1
    assert len({run.directory.root for run in plan.runs}) == 4
    assert plan.config.variants["align"].paper == {"mask/AP": 30.3}


def test_a_variant_may_name_another_experiment(tmp_path: Path) -> None:
    other_experiment = EXPERIMENT.replace("batch_size_per_image: 8", "batch_size_per_image: 16")
    (tmp_path / "other.yaml").write_text(other_experiment)
    ablation = ABLATION.replace("pool: {set: [", "pool: {experiment: other.yaml, set: [")
    pool, align = load_plan(write(tmp_path, ablation), tmp_path / "out").runs[:2]
    assert (pool.config.model.rpn.batch_size_per_image, align.config.model.rpn.batch_size_per_image) == (16, 8)


def test_ablations_with_a_run_in_common_share_it(tmp_path: Path) -> None:
    path = write(tmp_path)
    renamed = tmp_path / "renamed.yaml"
    renamed.write_text(ABLATION.replace("pool", "rounded").replace("roi_rounded", "roi_pool").replace("o=1", "o=3"))
    first, second = load_plan(path, tmp_path / "a"), load_plan(renamed, tmp_path / "b")
    shared = {run.directory.root for run in first.runs} & {run.directory.root for run in second.runs}
    assert shared == {run.directory.root for run in first.runs_of("pool")}


def folder_of(path: Path, *overrides: str) -> str:
    return load_plan(path, path.parent / "out", overrides).runs[0].directory.root.name


@pytest.mark.parametrize(
    "override",
    [
        "data.root=elsewhere",
        "training.workers=9",
        "training.log_every=7",
        "evaluation.pictures=1",
        "model.backbone={kind: resnet, depth: 50}",
        "model.rpn.nms_threshold=0.7",
    ],
)
def test_keys_that_cannot_change_the_result_and_defaults_leave_the_run_alone(tmp_path: Path, override: str) -> None:
    path = write(tmp_path)
    assert folder_of(path, override) == folder_of(path)


@pytest.mark.parametrize(
    "override",
    [
        "model.backbone={kind: resnet, weights: none}",
        "model.backbone={kind: resnet, depth: 101}",
        "training.patience=3",
        "training.optimizer={kind: sgd, lr: 0.5}",
        "data.train.seed=9",
        "data.train_transforms=[{kind: resize}]",
    ],
)
def test_keys_that_change_the_result_name_another_run(tmp_path: Path, override: str) -> None:
    path = write(tmp_path)
    assert folder_of(path, override) != folder_of(path)


def test_annotations_are_compared_by_content_wherever_they_lie(tmp_path: Path) -> None:
    for folder, text in (("here", "{}"), ("there", "{}"), ("changed", "[]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.json").write_text(text)
    path = write(tmp_path)
    coco = [f"data.{split}={{kind: coco, annotations: a.json, images: images}}" for split in ("train", "validation")]
    here, there, changed = (
        folder_of(path, *coco, f"data.root={tmp_path / folder}") for folder in ("here", "there", "changed")
    )
    assert here == there != changed


def test_a_default_that_changed_since_is_seen_in_the_stored_configuration(tmp_path: Path) -> None:
    path = write(tmp_path)
    run = load_plan(path, tmp_path / "out").runs[0]
    run.directory.root.mkdir(parents=True)
    stored = to_yaml(run.config)
    run.directory.config.write_text(stored)
    assert folder_of(path) == run.directory.root.name
    for changed in (stored.replace("nms_threshold: 0.7", "nms_threshold: 0.6"), f"old_key: 1\n{stored}"):
        assert changed != stored
        run.directory.config.write_text(changed)
        assert folder_of(path) == f"{run.directory.root.name}_2"


def test_overrides_apply_to_every_variant_below_its_own(tmp_path: Path) -> None:
    overrides = ["model.rpn.batch_size_per_image=32", "model.roi={kind: roi_align, sampling_ratio: 7}"]
    plan = load_plan(write(tmp_path), tmp_path / "out", overrides)
    assert {run.config.model.rpn.batch_size_per_image for run in plan.runs} == {32}
    assert plan.runs_of("align")[0].config.model.roi.sampling_ratio == 1
    assert plan.runs_of("pool")[0].config.model.roi.kind == "roi_pool"


def test_an_ablation_may_build_upon_another(tmp_path: Path) -> None:
    write(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text("base: ablation.yaml\nseeds: [9]\n")
    assert [run.name for run in load_plan(child, tmp_path / "out").runs] == ["pool/seed_9", "align/seed_9"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: pool", "baseline: poll", "baseline 'poll' is not one of the variants pool, align"),
        ("seeds: [3, 5]", "seeds: [3, 3]", r"seeds must be unique, got \[3, 3\]"),
        ("sampling_ratio=1", "sampling_rati=1", r"variants.align: .*\n.*sampling_rati"),
        ("model.roi.sampling_ratio=1", "'model.roi={kind: roi_pool}'", "variants.align is the same experiment as var"),
        ("experiment: experiment.yaml", "experiment: missing.yaml", "missing.yaml: cannot read the file"),
        ("pool: {set", "../pool: {set", "variants"),
        ("mask/AP: 30.3", "mask/PA: 30.3", "mask/PA"),
        ("sampling_ratio=1", "sampling_ratio=1, data.validation.seed=2", "align has another data.validation than"),
        (
            "sampling_ratio=1",
            "sampling_ratio=1, model.mask_head=null, evaluation.best_metric=box/AP",
            "metric is mask/AP, but variants.align has no mask head: use box/AP",
        ),
    ],
)
def test_errors_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ABLATION
    with pytest.raises(InputError, match=message):
        load_plan(write(tmp_path, ABLATION.replace(old, new)), tmp_path / "out")

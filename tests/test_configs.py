"""Every YAML file of the project is read, built at a small size, and trained for one step with each RoI layer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from maskrcnn.ablation.plan import load_plan
from maskrcnn.config import differences, json_schema, read_config, to_dict, to_yaml
from maskrcnn.data.loader import training_loader
from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.step import TrainingStep
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.models.box_head import VGGFullyConnected
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.models.norms import FrozenBatchNorm2d
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import Batch

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
PARTS = [path for path in FILES if path.is_relative_to(CONFIGS / "base")]
ABLATIONS = [path for path in FILES if path.is_relative_to(CONFIGS / "ablations")]
EXPERIMENTS = [path for path in FILES if path not in PARTS and path not in ABLATIONS]
REFERENCE = CONFIGS / "coco" / "mask_rcnn_r50_fpn_1x.yaml"  # the base for parts that no experiment uses

SMALL_RESIZE = "data.train_transforms.resize={short_side: [64], long_side: 64}"
SMALL_JITTER = "data.train_transforms.large_scale_jitter.side=64"
TINY = [
    "data.train={kind: shapes, length: 4, height: 64, width: 64}",
    "data.validation={kind: shapes, length: 4, height: 64, width: 64}",
    SMALL_RESIZE,
    "model.backbone.weights=none",
    "model.rpn.training={pre_nms_top_n: 20, post_nms_top_n: 20}",
    "model.rpn.inference={pre_nms_top_n: 20, post_nms_top_n: 20}",
    "model.rpn.batch_size_per_image=8",
    "model.sampling.batch_size_per_image=8",
    "model.detection.detections_per_image=4",
    "model.detection.score_threshold=0.0",
    "training.batch_size=2",
    "training.workers=0",
    "training.schedule={kind: multi_step, iterations: 1, steps: [], warmup_iterations: 0}",  # makes 1x and 3x equal
]


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.fixture(autouse=True)
def _narrow_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give `vgg_fc`, whose width is no key, 64 outputs instead of 4096."""
    monkeypatch.setitem(VGGFullyConnected.__init__.__kwdefaults__, "width", 64)


each_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=name)


@cache
def bases(path: Path) -> frozenset[Path]:
    """Return all direct and indirect base files."""
    names = yaml.safe_load(path.read_text()).get("base", [])
    direct = {(path.parent / base).resolve() for base in ([names] if isinstance(names, str) else names)}
    return frozenset(direct.union(*(bases(base) for base in direct)))


def tiny(path: Path, *overrides: str) -> ExperimentConfig:
    """Return the configuration at a small size; large-scale jitter is there in place of `resize`."""
    kinds = [transform.kind for transform in read_config(path, ExperimentConfig).data.train_transforms]
    sizes = [SMALL_JITTER if line == SMALL_RESIZE and "resize" not in kinds else line for line in TINY]
    return read_config(path, ExperimentConfig, [*sizes, *overrides])


def narrow(config: ExperimentConfig) -> ExperimentConfig:
    """Return the configuration with fewer channels and cells in the parts that take most of the time."""
    values = to_dict(config)
    model = values["model"]
    pool_size = 7 if model["box_head"]["kind"] == "vgg_fc" else 2
    limits = {
        "backbone": {"width": 32},
        "neck": {"channels": 64},
        "box_head": {"width": 64, "pool_size": pool_size},
        "mask_head": {"width": 64},
    }
    for part, limits_of_part in limits.items():
        section = model[part]
        for key in section.keys() & limits_of_part.keys():
            section[key] = min(section[key], limits_of_part[key])
    return ExperimentConfig.model_validate(values)


def first_batch(config: ExperimentConfig, model: MaskRCNN, num_images: int) -> Batch:
    dataset = config.data.train.build()
    loader = training_loader(
        dataset,
        config.data.build_train_transform(dataset),
        batch_size=num_images,
        seed=0,
        workers=0,
        size_divisor=model.size_divisor,
    )
    (batch,) = next(iter(loader))
    return batch


def trainable_parameters(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the first 1000 elements of each trainable parameter, by submodule."""
    parameters = {
        name: [p.detach().flatten()[:1000] for p in child.parameters() if p.requires_grad]
        for name, child in model.named_children()
    }
    return {name: tensors for name, tensors in parameters.items() if tensors}


def scale_down_frozen_norms(model: nn.Module) -> None:
    """Halve the output of frozen norms: with unit weights, each block of a deep network doubles the variance."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)


def check_step(config: ExperimentConfig) -> None:
    """Build the model, train it for one step, detect. Equal configurations are checked once."""
    _check_step(narrow(config).model_dump_json())


@cache
def _check_step(text: str) -> None:
    config = ExperimentConfig.model_validate_json(text)
    torch.manual_seed(0)
    model = config.model.build(len(config.data.train.build().classes))
    scale_down_frozen_norms(model)
    optimizer = config.training.optimizer.build(model, batch_size=2)
    batch = first_batch(config, model, 2)
    before = {name: [tensor.clone() for tensor in tensors] for name, tensors in trainable_parameters(model).items()}

    step = TrainingStep(
        TrainingState(model, optimizer),
        Processes(torch.device("cpu")),
        precision=config.training.precision,
        clip_norm=config.training.clip_norm,
    )
    result = step([batch], 1)

    assert len(result.losses) == 5
    assert min(result.losses.values()) >= 0
    assert result.gradient_norm > 0
    assert not [key for key, p in model.named_parameters() if p.requires_grad == (p.grad is None)]
    after = trainable_parameters(model)
    assert after.keys() >= {"backbone", "rpn", "box_head", "mask_head"}
    for name, tensors in after.items():
        assert not all(map(torch.equal, tensors, before[name])), f"{name} did not change"

    detections = model.eval().detect(batch.images)
    assert detections.valid.any()
    assert all(t.isfinite().all() for t in (detections.boxes, detections.scores[detections.valid], detections.masks))


def test_there_are_files() -> None:
    assert len(PARTS) > 8
    assert len(EXPERIMENTS) > 15
    assert len(ABLATIONS) >= 10


@each_experiment
def test_an_experiment_takes_a_step(path: Path) -> None:
    check_step(tiny(path))


@each_experiment
@pytest.mark.parametrize(
    "roi",
    ["model.roi={kind: roi_pool}", "model.roi={kind: roi_align, aggregate: average, sampling_ratio: 2, aligned: true}"],
    ids=["pool", "align"],
)
def test_the_roi_layer_is_one_key(path: Path, roi: str) -> None:
    config = tiny(path, roi)
    assert f"kind: {config.model.roi.kind}" in roi
    check_step(config)


@each_experiment
def test_an_experiment_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    config = read_config(path, ExperimentConfig)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(config))
    assert read_config(resolved, ExperimentConfig) == config


@pytest.mark.parametrize("path", PARTS, ids=name)
def test_a_part_is_used_or_can_be(path: Path, tmp_path: Path) -> None:
    if any(path in bases(experiment) for experiment in EXPERIMENTS):
        return
    composed = tmp_path / "composed.yaml"
    composed.write_text(json.dumps({"base": [str(REFERENCE), str(path)]}))
    assert to_dict(read_config(composed, ExperimentConfig)) != to_dict(read_config(REFERENCE, ExperimentConfig))
    check_step(tiny(composed))


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if path.stem.endswith("_roi_pool")], ids=name)
def test_a_pair_differs_in_the_roi_layer_alone(path: Path) -> None:
    pair = [path, path.with_name(path.name.replace("_roi_pool", "_roi_align"))]
    pool, align = (to_dict(read_config(config_path, ExperimentConfig)) for config_path in pair)
    lines = differences(pool, align)
    assert lines
    assert all(line.startswith("model.roi.") for line in lines)


@each_experiment
def test_an_experiment_opens_with_its_command(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"python tools/train.py configs/{name(path)}" in line for line in comments)


@pytest.mark.parametrize("path", ABLATIONS, ids=name)
def test_every_variant_of_an_ablation_takes_a_step(path: Path) -> None:
    plan = load_plan(path, Path("out"))
    assert len({run.directory.root for run in plan.runs}) == len(plan.config.variants) * len(plan.config.seeds)
    for variant in load_plan(path, Path("out"), TINY).runs[: len(plan.config.variants)]:
        check_step(variant.config)


@pytest.mark.parametrize("path", ABLATIONS, ids=name)
def test_an_ablation_opens_with_its_command(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"python tools/ablate.py configs/{name(path)}" in line for line in comments)


@pytest.mark.parametrize(
    "override",
    [
        "training.batch_size=0",
        "model.rpn.batch_size_per_image=-1",
        "model.rpn.positive_fraction=1.5",
        "model.rpn.training.pre_nms_top_n=0",
        "model.rpn.anchor_sizes=[[], [], [], [], []]",
        "model.rpn.anchor_ratios=[1.0, -1.0]",
        "model.sampling.foreground=50",
        "model.box_head.width=0",
        "model.mask_head.width=0",
        "model.mask_head.depth=-1",
        "model.mask_head={kind: mlp, depth: 0}",
        "model.mask_head={kind: mlp, mask_size: 0}",
        "model.mask_head.output=tanh",
        "model.mask_head.roi={kind: roi_pool, rounding: up}",
        "model.roi={kind: roi_warp, aggregate: maximum, sampling_ratio: 0}",
        "model.mask_head.pool_size=0",
        "model.detection.nms_threshold=2",
        "model.pixels.std=[0, 1, 1]",
        "model.backbone.groups=0",
        "model.backbone.freeze=6",
        "model.neck={norm: gn, channels: 100}",
    ],
)
def test_values_out_of_range_are_refused(override: str) -> None:
    with pytest.raises(InputError) as refusal:
        read_config(REFERENCE, ExperimentConfig, [override])
    assert override.partition("=")[0] in str(refusal.value)


def test_a_region_that_stage_5_halves_has_an_even_side() -> None:
    odd_sizes = ["model.box_head.pool_size=7", "model.mask_head.pool_size=7"]
    with pytest.raises(InputError, match="pool_size of both heads must be a multiple of 2"):
        read_config(CONFIGS / "coco" / "mask_rcnn_r50_c4_1x.yaml", ExperimentConfig, odd_sizes)


# The schema for editors.


def test_the_schema_is_up_to_date() -> None:
    stored = json.loads((CONFIGS / "schema.json").read_text())
    assert stored == json_schema(ExperimentConfig), "run `make schema`"


def test_every_file_fits_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for path in FILES:
        if path not in ABLATIONS:
            jsonschema.validate(yaml.safe_load(path.read_text()), json_schema(ExperimentConfig))

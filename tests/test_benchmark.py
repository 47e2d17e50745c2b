"""The benchmark runs both sides on the same work, and writes what it found. Nothing here looks at the clock."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from launcher import Launcher
from pycocotools import mask as cocoapi

from maskrcnn.config import read_config
from maskrcnn.data.loader import evaluation_loader
from maskrcnn.engine.evaluator import coco_results
from maskrcnn.engine.trainer import Trainer, TrainerOptions
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.interop.conversion import convert
from maskrcnn.interop.export import export
from maskrcnn.interop.layouts import TORCHVISION
from maskrcnn.ops.mask_tables import full_masks

TOOLS = Path(__file__).parents[1] / "tools"
CONFIGS = Path(__file__).parents[1] / "configs" / "convergence"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    return load(TOOLS / "benchmarks" / "worker.py")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load(TOOLS / "benchmark.py")


def both_sides(worker: ModuleType, task: str, precision: str = "fp32") -> list[dict[str, float]]:
    """What one repeat of each side worked on."""
    work = []
    for side in ("ours", "torchvision"):
        job = worker.Job(task, side, height=64, width=96, threads=1, precision=precision, device="cpu")
        work.append(worker.STEPS[task, side](job, torch.device("cpu"))())
    return work


def test_both_sides_encode_the_same_masks(worker: ModuleType) -> None:
    ours, theirs = both_sides(worker, "masks")
    assert ours == theirs
    assert ours["masks"] == 100
    assert ours["pixels"] > 1000


def test_both_sides_read_the_same_regions(worker: ModuleType) -> None:
    ours, theirs = both_sides(worker, "roi")
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours["sum"] > 0
    assert ours["gradient sum"] > 0


def test_both_sides_see_the_same_objects(worker: ModuleType) -> None:
    scene = worker.draw_scene(100, 150, seed=0)
    assert (scene.boxes[:, 2:] <= torch.tensor([150, 100])).all()
    theirs, ours = worker._torchvision_target(scene), worker._our_batch([scene], 1).targets
    assert torch.equal(ours.boxes[0], theirs["boxes"])
    assert torch.equal(ours.labels[0], theirs["labels"])
    assert torch.equal(full_masks(ours.masks, 100, 150)[0], theirs["masks"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_sides_train_and_detect_as_much(worker: ModuleType, precision: str) -> None:
    ours, theirs = both_sides(worker, "training", precision)
    assert ours.keys() == theirs.keys() == {"box regions", "mask regions"}
    assert ours["box regions"] == pytest.approx(theirs["box regions"], rel=0.1)  # anchors differ by a rounding
    assert ours["box regions"] > 100
    for side in both_sides(worker, "inference", precision):
        assert side["mask regions"] == side["detections"] == 100


def test_the_report(benchmark: ModuleType) -> None:
    ours = [benchmark.Repeat(seconds, {"masks": 100}) for seconds in (1.0, 2.0, 4.0)]
    theirs = [benchmark.Repeat(seconds, {"masks": 100}) for seconds in (3.0, 5.0, 8.0)]
    sides = [benchmark.Side("ours", ours, 3 * 2**20), benchmark.Side("torchvision", theirs, 4 * 2**20)]
    found = benchmark.Measurement("masks", sides, ["torch: 2.99"])
    text = benchmark.report([found], {"height": 80, "width": 133, "precision": "fp32"})
    assert "## masks: 2.50 (2.00 to 3.00) times as fast, 0.75 times the memory" in text
    assert "| ours | 2 | 1 | 4 | 3 | 100 |" in text
    assert "| torchvision | 5 | 3 | 8 | 4 | 100 |" in text
    assert "- torch: 2.99\n" in text
    assert "80 x 133" in text


def test_the_report_of_what_is_measured_alone(benchmark: ModuleType) -> None:
    repeats = [benchmark.Repeat(seconds, {"images": 5000}) for seconds in (1.0, 2.0, 4.0)]
    found = benchmark.Measurement("bootstrap", [benchmark.Side("ours", repeats, 3 * 2**20)], ["torch: 2.99"])
    text = benchmark.report([found], {"height": 80, "width": 133, "precision": "fp32"})
    assert "## bootstrap: 2 s\n" in text
    assert "| ours | 2 | 1 | 4 | 3 | 5000 |" in text
    assert "torchvision's side" not in text


def test_random_matches_are_those_of_a_good_model(worker: ModuleType) -> None:
    matches = worker.random_matches(images=50, categories=4, objects=400, detections=2000)
    assert matches.true_positives.shape == matches.ignored.shape == (2000, 4)
    assert not (matches.true_positives & matches.ignored).any()
    figures = matches.figures()
    assert 0.2 < figures["AP75"] < figures["AP"] < figures["AP50"] < 0.9
    for name in ("APs", "APm", "APl"):
        assert figures[name] == pytest.approx(figures["AP"], abs=0.1)


def test_the_tool_measures_and_writes(launcher: Launcher, tmp_path: Path) -> None:
    out = tmp_path / "new" / "masks.md"
    options = ["--repeats", "2", "--threads", "1", "--height", "64", "--width", "96", "--out", str(out)]
    done = launcher.run("tools/benchmark.py", "masks", *options)
    assert done.status == 0, done.err
    assert out.read_text() in done.out
    seconds = next(line for line in done.out.splitlines() if line.startswith("torchvision, s:"))
    assert len(seconds.split(":")[1].split(",")) == 2


@pytest.mark.parametrize("arguments", [["speed"], ["masks", "--repeats", "0"], ["masks", "--device", "nonsense"]])
def test_wrong_arguments_leave_with_two(launcher: Launcher, arguments: list[str]) -> None:
    done = launcher.run("tools/benchmark.py", *arguments)
    assert done.status == 2
    assert "Traceback" not in done.err


@pytest.mark.parametrize("taken", ["report.md", "report.png"])
def test_a_report_replaces_no_file(launcher: Launcher, tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    done = launcher.run("tools/benchmark.py", "masks", "--out", tmp_path / "report.md")
    assert done.status == 2
    assert f"{taken}: exists already" in done.err
    assert (tmp_path / taken).read_text() == "mine"


# ---- Learning speed


SMALL = [
    "model.backbone={weights: none, freeze: 0, norm: bn}",
    "model.sampling.batch_size_per_image=16",
    "data.train.height=64",
    "data.train.width=64",
    "data.validation={height: 64, width: 64, length: 2}",
]


@pytest.fixture(scope="module")
def convergence() -> ModuleType:
    return load(TOOLS / "benchmarks" / "convergence.py")


@pytest.fixture
def forked_trainings(launcher: Launcher, convergence: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings of the command need no import of torch."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ended = launcher.run(*command[1:])
        return subprocess.CompletedProcess(command, ended.status, ended.out, ended.err)

    monkeypatch.setattr(convergence, "subprocess", SimpleNamespace(run=run, DEVNULL=None, PIPE=None))


@pytest.fixture(scope="module")
def screening(convergence: ModuleType) -> ModuleType:
    return load(TOOLS / "benchmarks" / "screening.py")


@pytest.fixture(scope="module")
def convergence_worker(screening: ModuleType) -> ModuleType:
    return load(TOOLS / "benchmarks" / "convergence_worker.py")


def test_torchvisions_side_has_our_sizes_and_backbone(convergence_worker: ModuleType) -> None:
    config = read_config(CONFIGS / "shapes.yaml", ExperimentConfig, ["model.backbone.weights=none"])
    ours = config.model.build(4, pretrained=False)
    theirs = convergence_worker.torchvision_model(config, 4, ours)
    body = theirs.backbone.body.state_dict()
    for name, tensor in ours.backbone.state_dict().items():
        assert torch.equal(body[name], tensor), name
    parameters = ([*ours.backbone.parameters(), *ours.neck.parameters()], [*theirs.backbone.parameters()])
    learns = [sum(p.numel() for p in side if p.requires_grad) for side in parameters]
    assert learns[0] == learns[1] > 0
    heads = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    background = 4 * (256 + 1) + (64 + 1)  # torchvision predicts a box and a mask for background, too
    assert heads[1] - heads[0] == background


def test_both_sides_give_the_same_detections_from_the_same_weights(
    convergence_worker: ModuleType, tmp_path: Path
) -> None:
    """Ours under torchvision's conventions: the benchmark adds no difference of its own."""
    file = tmp_path / "both.yaml"
    resize = "{resize: {rounding: floor, antialias: false}}"
    bases = f"[{CONFIGS / '../base/conventions/torchvision.yaml'}, {CONFIGS / 'shapes.yaml'}]"
    file.write_text(f"base: {bases}\ndata: {{train_transforms: {resize}, validation_transforms: {resize}}}\n")
    changes = [*SMALL[2:], "model.backbone={weights: none, norm_eps: 1.0e-5}"]
    config = read_config(file, ExperimentConfig, changes)
    _, validation = config.data.build_both()
    torch.manual_seed(0)
    side = convergence_worker.torchvision_side(config, validation)
    torch.nn.init.normal_(side.model.roi_heads.box_predictor.cls_score.weight, std=0.3)  # scores that differ
    ours = config.model.build(len(validation.classes), pretrained=False)
    ours.load_state_dict(convert(side.model.state_dict(), source="torchvision").tensors)
    predictor = config.predictor(ours, validation.classes)
    (batch, *_) = evaluation_loader(validation, predictor.transform, batch_size=2, workers=0, size_divisor=32)
    both = (coco_results(predictor, batch), side.detect(batch))
    own, other = (sorted(results, key=itemgetter("image_id", "bbox")) for results in both)
    assert len(own) == len(other) > 10
    for one, two in zip(own, other, strict=True):
        assert one["category_id"] == two["category_id"]
        assert one["score"] == pytest.approx(two["score"], abs=1e-4)
        assert one["bbox"] == pytest.approx(two["bbox"], abs=1e-2)
        masks = [cocoapi.decode(result["segmentation"]) for result in (one, two)]
        assert (masks[0] != masks[1]).sum() <= 0.02 * max(1, masks[0].sum(), masks[1].sum()) + 1
    assert sum(cocoapi.area(result["segmentation"]) for result in own) > 1000


@pytest.mark.slow
def test_both_sides_have_the_same_ap_from_the_same_trained_weights(
    convergence_worker: ModuleType, shared_data: Path, tmp_path: Path
) -> None:
    """Ours are trained for a minute, under torchvision's conventions, and exported to torchvision's model."""
    file = tmp_path / "both.yaml"
    bases = [CONFIGS / "../base/conventions/torchvision.yaml", CONFIGS / "shapes.yaml"]
    resize = "{resize: {rounding: floor, antialias: false}}"
    file.write_text(
        f"base: [{', '.join(map(str, bases))}]\ndata: {{train_transforms: {resize}, validation_transforms: {resize}}}\n"
    )
    backbone = shared_data / "resnet18_imagenet" / "resnet18_imagenet_conv1_to_layer3.pth"
    changes = [f"model.backbone={{weights: {backbone}, norm_eps: 1.0e-5}}", "data.validation.length=40"]
    config = read_config(file, ExperimentConfig, changes)
    dataset, validation = config.data.build_both()
    torch.manual_seed(0)
    ours, theirs = convergence_worker.our_side(config, dataset), convergence_worker.torchvision_side(config, validation)
    options = TrainerOptions(workers=0, clip_norm=5.0)
    optimizer = torch.optim.SGD(ours.model.parameters(), lr=0.01, momentum=0.9)
    transform = config.data.build_train_transform(dataset)
    Trainer(ours.model, dataset, transform, optimizer=optimizer, iterations=110, batch_size=2, options=options).fit()
    exported = export(ours.model.state_dict(), validation.classes, TORCHVISION, source="ours")
    theirs.model.load_state_dict(exported, strict=True)
    one, two = (convergence_worker._measure(config, side, validation) for side in (ours, theirs))
    for name in ("box/AP", "mask/AP"):
        assert one[name] == pytest.approx(two[name], abs=0.0005)
        assert one[name] > 0.02  # 0.095 and 0.045


@pytest.mark.usefixtures("forked_trainings")
def test_both_sides_train_and_the_command_goes_on(convergence: ModuleType, tmp_path: Path) -> None:
    arguments = ([CONFIGS / "shapes.yaml"], SMALL, [0], [1, 2], tmp_path / "runs", 2)
    runs = convergence.run_all(*arguments)
    assert [(run.data, run.side, run.seed) for run in runs] == [("shapes", "ours", 0), ("shapes", "torchvision", 0)]
    assert all(run.losses.shape == (1, 5) and set(run.figures) == {1, 2} for run in runs)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    again = convergence.run_all(*arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == before
    two_seeds = [[*some, *(run._replace(seed=1) for run in some)] for some in (runs, again)]
    assert convergence.report(two_seeds[0]) == convergence.report(two_seeds[1])
    convergence.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(InputError, match=r"shapes_ours_seed0\.json: holds a training with other arguments"):
        convergence.run_all(*arguments[:3], [1], *arguments[4:])


def test_the_comparison_by_hand(convergence: ModuleType) -> None:
    points = {("ours", 0): 0.50, ("ours", 1): 0.54, ("torchvision", 0): 0.49, ("torchvision", 1): 0.51}
    runs = [
        convergence.Run("photos", side, seed, np.zeros((4, 5)), {4: {"box/AP": ap, "mask/AP": ap}}, ["torch: 2.99"])
        for (side, seed), ap in points.items()
    ]
    cell = convergence.difference(runs, "photos", 4, "mask/AP")
    assert (cell.ours, cell.torchvision) == pytest.approx((52.0, 50.0))
    assert cell.by_seed == pytest.approx([1.0, 3.0])
    # Two seeds: Student's t with one degree of freedom has 12.706 at 97.5 %, and the standard error is 1.
    assert str(cell) == "+2.0 [-10.7, +14.7]"
    text = convergence.report(runs)
    assert "| photos | 4 | 52.0 | 50.0 | +2.0 [-10.7, +14.7] | +1.0, +3.0 |" in text
    assert "Mean over all cells: +2.00 [-10.7, +14.7], 2 pairs of trainings. Worst cell: photos after 4 steps" in text


@pytest.mark.usefixtures("forked_trainings")
def test_a_model_that_torchvision_does_not_have_is_refused(convergence: ModuleType, tmp_path: Path) -> None:
    changes = [*SMALL, "model.box_head.depth=1"]
    job = convergence.Job(str(CONFIGS / "shapes.yaml"), changes, "torchvision", seed=0, marks=[1])
    with pytest.raises(InputError, match="status 2:\nerror: the convergence benchmark compares a box head of two"):
        convergence.train_missing({tmp_path / "refused.json": job}, tmp_path, 1)


def test_the_design_is_balanced(screening: ModuleType) -> None:
    levels = screening.design()
    assert levels.shape == (screening.TRAININGS, len(screening.FACTORS)) == (20, 19)
    assert np.array_equal(levels.T @ levels, 20 * np.eye(19))
    assert (levels.sum(axis=0) == 0).all()


def test_effects_by_hand(convergence: ModuleType, screening: ModuleType) -> None:
    """AP that depends on two choices alone: their effects are found, the others are 0."""
    names = list(screening.FACTORS)
    blocks = []
    for seed, spread in enumerate((0.0, 0.01)):
        aps = [0.3 + (0.02 + spread) * row[2] - 0.01 * row[7] for row in screening.design()]
        figures = [{40: {"box/AP": ap, "mask/AP": ap / 2}} for ap in aps]
        blocks.append([convergence.Run("photos", "ours", seed, np.zeros((1, 5)), f, ["torch: 2.99"]) for f in figures])
    values = screening.effects(blocks, 40, "box/AP")
    assert values == pytest.approx([5.0 if i == 2 else -2.0 if i == 7 else 0.0 for i in range(19)])
    text = screening.report(blocks)
    assert text.index(f"| {names[2]} |") < text.index(f"| {names[7]} |")
    low, high = screening.FACTORS[names[2]][:2]
    assert f"| {names[2]} | {low} | {high} | +5.0 | +2.5 |" in text


def test_margin_of_error_by_hand(screening: ModuleType) -> None:
    """Median 2: effects up to 7.5 count, whose median is 1.5: 2.25 times Student's t with 7/3 degrees of freedom."""
    effect = np.array([1.0, -1.0, 2.0, -10.0, 1.0, 2.0, 3.0])
    assert screening.margin_of_error(effect) == pytest.approx(2.25 * 3.764, rel=1e-3)


def test_levels_change_what_they_name(screening: ModuleType) -> None:
    config = read_config(CONFIGS / "shapes.yaml", ExperimentConfig, ["model.backbone.weights=none"])

    def weights(*high: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = config.model.build(4, pretrained=False)
        torch.manual_seed(1)
        screening.apply_levels(model, high)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    low = weights()
    rpn = ("conv", "objectness_logits", "anchor_deltas")
    levels = [f"neck.{part}.{level}.conv.weight" for part in ("lateral", "output") for level in range(4)]
    scales = {  # of the deviation of the weights
        "mask_logits": {"mask_head.logits.weight": 0.5**0.5 * 64**0.5 / 4},
        "mask_upsample": {"mask_head.upsample.weight": 2.0},
        "mask_layers": {f"mask_head.convs.{layer}.weight": 6**-0.5 for layer in range(4)},
        "box_layers": {f"box_head.trunk.{layer}.weight": 3**-0.5 for layer in (1, 3)},
        "box_predictors": {
            "box_head.cls_score.weight": 0.01 * (3 * 256) ** 0.5,
            "box_head.bbox_pred.weight": 0.001 * (3 * 256) ** 0.5,
        },
        "rpn_layers": {
            f"rpn.head.{layer}.weight": 100 * (3 * (64 * 9 if layer == "conv" else 64)) ** -0.5 for layer in rpn
        },
        "pyramid": dict.fromkeys(levels, 3**-0.5),
        "background_prior": {"box_head.cls_score.bias": None},
        "objectness_prior": {"rpn.head.objectness_logits.bias": None},
        "last_stage": {f"backbone.layer4.{block}.conv2.weight": 0.0 for block in (0, 1)},
    }
    assert scales.keys() == {name for name, factor in screening.FACTORS.items() if factor.start is not None}
    for name, expected in scales.items():
        high = weights(name)
        assert {key for key in low if not torch.equal(low[key], high[key])} == expected.keys(), name
        for key, scale in expected.items():
            if scale is not None:
                assert (high[key].std() / low[key].std()).item() == pytest.approx(scale, rel=0.15, abs=1e-6), key


@pytest.mark.usefixtures("forked_trainings")
def test_the_screening_trains_each_combination(
    convergence: ModuleType, screening: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, "train_missing", lambda wanted, runs, jobs: list(wanted.values()))
    (block,) = screening.run_all([CONFIGS / "shapes.yaml"], SMALL, [3], 10, tmp_path, 1)
    assert len({tuple(job.high) for job in block}) == 20
    assert all(job.marks == [5, 10] and job.seed == 3 for job in block)
    assert sum("model.loss_normalizer=batch" in job.overrides for job in block) == 10
    job = dataclasses.replace(block[0], marks=[1])
    (run,) = convergence.train_missing({tmp_path / "one.json": job}, tmp_path, 1)
    assert run.figures.keys() == {1}

"""Screening of initial weights and loss scales: what each does to the AP of a short training, all in a few trainings.

The choices, each with two levels, are varied together in the twenty trainings of a Plackett-Burman design, in which
every two choices are balanced: the effect of a choice is the mean AP of the ten trainings at its high level minus that
of the ten at its low level. Interactions are spread over all effects, so a large effect is a hint, to be confirmed by
trainings that differ in this choice alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from convergence import CONFIDENCE, FIGURES, Job, Run, header, train_missing
from scipy import stats

if TYPE_CHECKING:
    from torch import nn

    from maskrcnn.models.mask_rcnn import MaskRCNN

# First row of the design for 20 trainings (Plackett and Burman, 1946); the others are its rotations.
GENERATOR = (1, 1, -1, -1, 1, 1, 1, 1, -1, 1, -1, 1, -1, -1, -1, -1, 1, 1, -1)
TRAININGS = len(GENERATOR) + 1

TEXT = """Our model alone, trained {steps} steps in {trainings} combinations of the choices below (a Plackett-Burman
design). The low level is the default. Effect: mean AP of the {half} trainings at the high level minus that of the
{half} at the low level, in points, mean over {blocks}. Effects within the margin of error in the last row
({confidence:.0%}, Lenth's method: it takes most effects to be zero) are not distinguishable from noise."""


class Factor(NamedTuple):
    """A choice with two levels; the low one is the configuration's."""

    low: str
    high: str
    overrides: tuple[str, ...] = ()  # of the configuration, at the high level
    start: Callable[[MaskRCNN], None] | None = None  # draws weights anew for the high level


def _mask_logits(model: MaskRCNN) -> None:
    from torch import nn

    nn.init.kaiming_normal_(model.mask_head.logits.weight, mode="fan_out", nonlinearity="relu")


def _upsample(model: MaskRCNN) -> None:
    from torch import nn

    layer = model.mask_head.upsample
    nn.init.normal_(layer.weight, std=(2 / layer.in_channels) ** 0.5)


def _mask_layers(model: MaskRCNN) -> None:
    from torch import nn

    _as_torch(layer for layer in model.mask_head.convs.modules() if isinstance(layer, nn.Conv2d))


def _box_predictors(model: MaskRCNN) -> None:
    from torch import nn

    nn.init.normal_(model.box_head.cls_score.weight, std=0.01)
    nn.init.normal_(model.box_head.bbox_pred.weight, std=0.001)


def _box_layers(model: MaskRCNN) -> None:
    from torch import nn

    _as_torch(layer for layer in model.box_head.trunk.modules() if isinstance(layer, nn.Linear))


def _background_prior(model: MaskRCNN) -> None:
    model.box_head.cls_score.bias.zero_()


def _objectness_prior(model: MaskRCNN) -> None:
    model.rpn.head.objectness_logits.bias.fill_(-math.log(9))


def _rpn_layers(model: MaskRCNN) -> None:
    _as_torch((model.rpn.head.conv, model.rpn.head.objectness_logits, model.rpn.head.anchor_deltas))


def _pyramid(model: MaskRCNN) -> None:
    from torch import nn

    layers = [*model.neck.lateral.modules(), *model.neck.output.modules()]
    _as_torch(layer for layer in layers if isinstance(layer, nn.Conv2d))


def _as_torch(layers: Iterable[nn.Conv2d | nn.Linear]) -> None:
    from torch import nn

    for layer in layers:
        layer.reset_parameters()
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _last_stage(model: MaskRCNN) -> None:
    for block in model.stages()[-1]:
        last = block.conv3 if hasattr(block, "conv3") else block.conv2
        last.weight.zero_()


FACTORS: dict[str, Factor] = {
    "mask_logits": Factor("deviation 4/sqrt(inputs)", "He by outputs (torchvision)", start=_mask_logits),
    "mask_upsample": Factor("He by torch's outputs", "He by true inputs, twice as large", start=_upsample),
    "mask_layers": Factor("He", "variance 1/(3 inputs)", start=_mask_layers),
    "box_predictors": Factor("variance 1/(3 inputs)", "deviations 0.01 and 0.001 (Detectron2)", start=_box_predictors),
    "box_layers": Factor("variance 1/inputs", "variance 1/(3 inputs) (torchvision)", start=_box_layers),
    "background_prior": Factor("background at 0.9", "bias 0", start=_background_prior),
    "objectness_prior": Factor("bias 0", "object at 0.1", start=_objectness_prior),
    "rpn_layers": Factor("deviation 0.01", "variance 1/(3 inputs)", start=_rpn_layers),
    "pyramid": Factor("variance 1/inputs", "variance 1/(3 inputs)", start=_pyramid),
    "last_stage": Factor("He", "residuals of stage 5 start at 0", start=_last_stage),
    "box_loss": Factor("L1", "smooth L1, beta 1/9", ("model.box_head.smooth_l1_beta=0.1111",)),
    "rpn_box_loss": Factor("L1", "smooth L1, beta 1/9", ("model.rpn.smooth_l1_beta=0.1111",)),
    "normalizer": Factor("by image", "by batch", ("model.loss_normalizer=batch",)),
    "mask_target": Factor("coverage", "torchvision's samples", ("model.mask_head.target=torchvision",)),
    "positives": Factor("at most 25 % of the RoIs", "at most 50 %", ("model.sampling.positive_fraction=0.5",)),
    "warm_up": Factor("100 steps", "30 steps", ("training.schedule.warmup_iterations=30",)),
    "warm_up_factor": Factor("0.001", "0.1", ("training.schedule.warmup_factor=0.1",)),
    "bias_decay": Factor("biases decay", "they do not", ("training.optimizer.bias_weight_decay=0",)),
    "nothing": Factor("nothing changes", "nothing changes"),  # the last column of the design: shows the noise
}


def apply_levels(model: MaskRCNN, high: Sequence[str]) -> None:
    """Draw the weights of `model` anew for those of the choices `high` that are starts."""
    import torch

    with torch.no_grad():
        for name in high:
            start = FACTORS[name].start
            if start is not None:
                start(model)


def design() -> np.ndarray:
    """Return the levels, 1 or -1, of the factors in each training: (trainings, factors)."""
    rotations = [np.roll(GENERATOR, shift) for shift in range(len(GENERATOR))]
    return np.array([*rotations, [-1] * len(GENERATOR)])


def run_all(
    configs: Sequence[Path], overrides: Sequence[str], seeds: Sequence[int], steps: int, runs: Path, jobs: int
) -> list[list[Run]]:
    """Train what is missing, and return the trainings of each data set and seed."""
    decay = [f"training.schedule.iterations={steps}", f"training.schedule.steps=[{steps * 4 // 5}]"]
    wanted = {}
    for config in configs:
        for seed in seeds:
            for number, levels in enumerate(design()):
                high = [name for name, level in zip(FACTORS, levels, strict=True) if level > 0]
                changes = [change for name in high for change in FACTORS[name].overrides]
                job = Job(str(config), [*overrides, *decay, *changes], "ours", seed, [steps // 2, steps], high)
                wanted[runs / f"{config.stem}_seed{seed}_{number:02}.json"] = job
    trained = train_missing(wanted, runs, jobs)
    return [trained[first : first + TRAININGS] for first in range(0, len(trained), TRAININGS)]


def effects(blocks: Sequence[Sequence[Run]], mark: int, figure: str) -> np.ndarray:
    """Return the effect of each factor, mean over the blocks of trainings, in points: (factors,)."""
    points = np.array([[100 * run.figures[mark][figure] for run in block] for block in blocks])
    return points.mean(axis=0) @ design() / (TRAININGS / 2)


def margin_of_error(effect: np.ndarray) -> float:
    """Lenth's margin of error of the effects of a saturated design (Technometrics 31, 1989)."""
    sizes = np.abs(effect)
    initial = 1.5 * np.median(sizes)
    error = 1.5 * np.median(sizes[sizes <= 2.5 * initial])
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(effect) / 3) * error)


def report(blocks: Sequence[Sequence[Run]]) -> str:
    """The effects as Markdown, largest first."""
    first = blocks[0][0]
    marks = sorted(first.figures)
    names = ", ".join(f"{block[0].data} (seed {block[0].seed})" for block in blocks)
    columns = [(mark, figure) for figure in FIGURES for mark in marks]
    values = np.stack([effects(blocks, mark, figure) for mark, figure in columns])  # (columns, factors)
    order = np.argsort(-np.abs(values.mean(axis=0)))
    lines = header(
        "Screening of starts and scales",
        TEXT,
        first,
        steps=marks[-1],
        blocks=names,
        trainings=TRAININGS,
        half=TRAININGS // 2,
    )
    lines += ["", "| choice | low | high | " + " | ".join(f"{FIGURES[f]} at {m}" for m, f in columns) + " |"]
    lines += ["| --- | --- | --- |" + " ---: |" * len(columns)]
    for place in order:
        name = list(FACTORS)[place]
        cells = " | ".join(f"{value:+.1f}" for value in values[:, place])
        lines += [f"| {name} | {FACTORS[name].low} | {FACTORS[name].high} | {cells} |"]
    lines += ["| margin of error | | | " + " | ".join(f"{margin_of_error(column):.1f}" for column in values) + " |"]
    means = [np.mean([100 * run.figures[m][f] for block in blocks for run in block]) for m, f in columns]
    lines += ["", "Mean AP of all trainings: " + ", ".join(f"{value:.1f}" for value in means) + " (in the same order)."]
    return "\n".join([*lines, ""])

"""Screening of starts and scales: what each does to the AP of a short training, all in a few trainings.

Eleven choices, each with two levels, are varied together in the twelve trainings of a Plackett-Burman design, in which
every two choices are balanced: the effect of a choice is the mean AP of the six trainings at its high level minus that
of the six at its low level. Interactions are spread over all effects, so a large effect is a hint, to be confirmed by
trainings that differ in this choice alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from convergence import FIGURES, Job, Run, header, interval, train_missing

if TYPE_CHECKING:
    from maskrcnn.models.mask_rcnn import MaskRCNN

GENERATOR = (1, 1, -1, 1, 1, 1, -1, -1, -1, 1, -1)  # first row of the design; the others are its rotations

TEXT = """Our model alone, trained {steps} steps in twelve combinations of the eleven choices below (a Plackett-Burman
design). Effect: mean AP of the six trainings at the high level minus that of the six at the low level, in points, mean
over {blocks} and, where there are several, its {confidence:.0%} interval over them (Student's t)."""


class Factor(NamedTuple):
    """A choice with two levels."""

    low: str
    high: str
    overrides: tuple[str, ...] = ()  # of the configuration, at the high level; the low level is the configuration's
    start: Callable[[MaskRCNN, bool], None] | None = None  # draws weights anew, at either level


def _mask_logits(model: MaskRCNN, high: bool) -> None:
    from torch import nn

    logits = model.mask_head.logits
    if high:
        nn.init.kaiming_normal_(logits.weight, mode="fan_out", nonlinearity="relu")
    else:
        nn.init.normal_(logits.weight, std=logits.weight[0].numel() ** -0.5)


def _upsample(model: MaskRCNN, high: bool) -> None:
    from torch import nn

    layer = model.mask_head.upsample
    if high:
        nn.init.normal_(layer.weight, std=(2 / layer.in_channels) ** 0.5)
    else:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _box_predictors(model: MaskRCNN, high: bool) -> None:
    from torch import nn

    for layer, std in ((model.box_head.cls_score, 0.01), (model.box_head.bbox_pred, 0.001)):
        if high:
            layer.reset_parameters()
        else:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


def _box_layers(model: MaskRCNN, high: bool) -> None:
    from torch import nn

    for layer in model.box_head.trunk.modules():
        if isinstance(layer, nn.Linear):
            if high:
                layer.reset_parameters()
            else:
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)


def _background_prior(model: MaskRCNN, high: bool) -> None:
    classes = model.box_head.cls_score.out_features - 1
    if high:
        model.box_head.cls_score.bias[0] = math.log(0.9 / (0.1 / classes))


def _objectness_prior(model: MaskRCNN, high: bool) -> None:
    if high:
        model.rpn.objectness_logits.bias.fill_(-math.log(9))


def _last_stage(model: MaskRCNN, high: bool) -> None:
    if high:
        for block in model.stages()[-1]:
            last = block.conv3 if hasattr(block, "conv3") else block.conv2
            last.weight.zero_()


FACTORS: dict[str, Factor] = {
    "mask_logits": Factor("deviation 1/sqrt(inputs)", "He by outputs (torchvision)", start=_mask_logits),
    "mask_upsample": Factor("He by torch's outputs", "He by true inputs, twice as large", start=_upsample),
    "box_predictors": Factor("deviations 0.01 and 0.001", "torch.nn.Linear's (torchvision)", start=_box_predictors),
    "box_layers": Factor("variance 1/inputs", "torch.nn.Linear's, a third of it", start=_box_layers),
    "background_prior": Factor("bias 0", "background at 0.9", start=_background_prior),
    "objectness_prior": Factor("bias 0", "object at 0.1", start=_objectness_prior),
    "box_loss": Factor(
        "L1",
        "smooth L1, beta 1/9, of RPN and box head",
        ("model.box_head.smooth_l1_beta=0.1111", "model.rpn.smooth_l1_beta=0.1111"),
    ),
    "normalizer": Factor("by image", "by batch", ("model.loss_normalizer=batch",)),
    "mask_target": Factor("coverage", "torchvision's samples", ("model.mask_head.target=torchvision",)),
    "last_stage": Factor("He", "residuals of stage 5 start at 0", start=_last_stage),
    "warm_up": Factor("100 steps", "30 steps", ("training.schedule.warmup_iterations=30",)),
}


def apply_levels(model: MaskRCNN, high: Sequence[str]) -> None:
    """Draw the weights of `model` anew, each choice at its level; `high` names those at their high level."""
    import torch

    with torch.no_grad():
        for name, factor in FACTORS.items():
            if factor.start is not None:
                factor.start(model, name in high)


def design() -> np.ndarray:
    """Return the levels, 1 or -1, of the factors in each training: (12, 11)."""
    rotations = [np.roll(GENERATOR, shift) for shift in range(len(GENERATOR))]
    return np.array([*rotations, [-1] * len(GENERATOR)])


def run_all(
    configs: Sequence[Path], overrides: Sequence[str], seeds: Sequence[int], steps: int, runs: Path, jobs: int
) -> list[list[Run]]:
    """Train what is missing, and return the twelve trainings of each data set and seed."""
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
    return [trained[first : first + 12] for first in range(0, len(trained), 12)]


def effects(blocks: Sequence[Sequence[Run]], mark: int, figure: str) -> np.ndarray:
    """Return the effect of each factor in each block of twelve trainings, in points: (blocks, 11)."""
    points = np.array([[100 * run.figures[mark][figure] for run in block] for block in blocks])
    return points @ design() / 6


def report(blocks: Sequence[Sequence[Run]]) -> str:
    """The effects as Markdown, largest first."""
    first = blocks[0][0]
    marks = sorted(first.figures)
    names = ", ".join(f"{block[0].data} (seed {block[0].seed})" for block in blocks)
    columns = [(mark, figure) for figure in FIGURES for mark in marks]
    values = np.stack([effects(blocks, mark, figure) for mark, figure in columns])  # (columns, blocks, 11)
    order = np.argsort(-np.abs(values.mean(axis=(0, 1))))
    lines = header("Screening of starts and scales", TEXT, first, steps=marks[-1], blocks=names)
    lines += ["", "| choice | low | high | " + " | ".join(f"{FIGURES[f]} at {m}" for m, f in columns) + " |"]
    lines += ["| --- | --- | --- |" + " ---: |" * len(columns)]
    for place in order:
        name = list(FACTORS)[place]
        cells = [f"{column[:, place].mean():+.1f} {interval(column[:, place])}".strip() for column in values]
        lines += [f"| {name} | {FACTORS[name].low} | {FACTORS[name].high} | {' | '.join(cells)} |"]
    means = [np.mean([100 * run.figures[m][f] for block in blocks for run in block]) for m, f in columns]
    lines += ["", "Mean AP of all trainings: " + ", ".join(f"{value:.1f}" for value in means) + " (in the same order)."]
    return "\n".join([*lines, ""])

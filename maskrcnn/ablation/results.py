"""The results of an ablation: every variant's figures over its finished seeds, and what it did against the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from maskrcnn.ablation.comparison import Difference, compare, sentence
from maskrcnn.ablation.measurement import Cost, RunResult, measure
from maskrcnn.ablation.plan import AblationConfig, Plan
from maskrcnn.ablation.runner import is_finished
from maskrcnn.errors import InputError
from maskrcnn.evaluation.bootstrap import check_comparable
from maskrcnn.experiment import Metric


@dataclass(frozen=True)
class VariantResult:
    """One variant with at least one finished seed."""

    name: str
    runs: tuple[RunResult, ...]
    mean: Mapping[str, float]  # each figure, 0..1; nan where there is nothing to measure
    std: Mapping[str, float]  # with n - 1; nan where one seed is finished
    cost: Cost  # means over the seeds; the memory is the largest
    paper: Mapping[Metric, float]  # the paper's own figures for this row, in percent
    differences: Mapping[str, Difference]  # empty for the baseline, and without a seed that both have finished
    sentence: str | None  # what the deciding figure says about it


@dataclass(frozen=True)
class AblationResults:
    """An ablation, measured."""

    title: str
    baseline: str
    metric: str  # the figure that decides
    confidence: float
    resamples: int
    variants: tuple[VariantResult, ...]  # in the order of the plan
    unfinished: tuple[str, ...]  # names of runs

    @property
    def compared(self) -> list[VariantResult]:
        """The variants that were compared with the baseline."""
        return [variant for variant in self.variants if variant.differences]

    @property
    def metric_name(self) -> str:
        """The deciding figure, for people."""
        return self.metric.replace("/", " ")

    @property
    def sentences(self) -> list[str]:
        """What the ablation found, a sentence for each variant."""
        return [variant.sentence for variant in self.variants if variant.sentence]


def analyse(plan: Plan) -> AblationResults:
    """Measure the finished runs of an ablation, and compare each variant with the baseline.

    Detections are matched to the ground truth once; the matches stay beside the run's results.

    Raises:
        InputError: no run is finished, or the annotations changed between two runs.
    """
    finished = [run for run in plan.runs if is_finished(run)]
    if not finished:
        raise InputError(f"{plan.out}: no run of the ablation is finished; there is nothing to report")
    ground_truth = finished[0].config.data.build_validation().ground_truth()
    config = plan.config
    measured = [
        measure(run, ground_truth, metric=config.metric, resamples=config.resamples)
        for run in tqdm(finished, desc="measuring", leave=False, disable=None)
    ]
    for result in measured:
        for part, matches in result.matches.items():
            check_comparable(matches, measured[0].matches[part])
    runs = {name: [result for result in measured if result.run.variant == name] for name in config.variants}
    return AblationResults(
        title=config.title,
        baseline=config.baseline,
        metric=config.metric,
        confidence=config.confidence,
        resamples=config.resamples,
        variants=tuple(_variant(config, name, runs[name], runs[config.baseline]) for name in runs if runs[name]),
        unfinished=tuple(run.name for run in plan.runs if run not in finished),
    )


def _variant(
    config: AblationConfig, name: str, runs: Sequence[RunResult], baseline: Sequence[RunResult]
) -> VariantResult:
    differences = {} if name == config.baseline else compare(runs, baseline, confidence=config.confidence)
    values = {key: [run.figures[key] for run in runs] for key in runs[0].figures}
    said = None
    if differences:
        figure = config.metric.replace("/", " ")
        said = sentence(name, config.baseline, figure, differences[config.metric], config.confidence)
    return VariantResult(
        name=name,
        runs=tuple(runs),
        mean={key: float(np.mean(numbers)) for key, numbers in values.items()},
        std={key: _deviation(numbers) for key, numbers in values.items()},
        cost=_mean_cost([run.cost for run in runs]),
        paper=config.variants[name].paper,
        differences=differences,
        sentence=said,
    )


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _mean_cost(costs: Sequence[Cost]) -> Cost:
    return Cost(
        training=float(np.mean([cost.training for cost in costs])),
        inference=float(np.mean([cost.inference for cost in costs])),
        memory=float(np.max([cost.memory for cost in costs])),
    )

"""The results of an ablation: metrics of each variant over its finished seeds, and differences to the baseline."""

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
from maskrcnn.evaluation.matches import Matches


@dataclass(frozen=True)
class VariantResult:
    """One variant with at least one finished seed."""

    name: str
    runs: tuple[RunResult, ...]
    mean: Mapping[str, float]  # each of `RunResult.figures`; nan if the ground truth has no object for it
    std: Mapping[str, float]  # with n - 1 degrees of freedom; nan for a single seed
    cost: Cost  # means over the seeds; of the memory, the maximum
    paper: Mapping[str, float]  # the metrics that the paper reports for this row, in percent
    differences: Mapping[str, Difference]  # empty for the baseline, or without a finished seed in common with it
    sentence: str | None  # states the difference of the primary metric; None for the baseline


@dataclass(frozen=True)
class AblationResults:
    """The results of all variants with a finished run."""

    title: str
    baseline: str
    metric: str  # the primary metric
    confidence: float
    resamples: int
    variants: tuple[VariantResult, ...]  # in the order of the plan
    unfinished: tuple[str, ...]  # names of the runs

    @property
    def compared(self) -> list[VariantResult]:
        """The variants with differences to the baseline."""
        return [variant for variant in self.variants if variant.differences]

    @property
    def metric_name(self) -> str:
        """The display name of the primary metric."""
        return self.metric.replace("/", " ")

    @property
    def sentences(self) -> list[str]:
        """The conclusions of the ablation, one sentence per compared variant."""
        return [variant.sentence for variant in self.variants if variant.sentence]


def analyse(plan: Plan) -> AblationResults:
    """Measure the finished runs of an ablation, and compare each variant with the baseline.

    The matches of detections and ground truth are stored in the run directories and reused.

    Raises:
        InputError: no run is finished, or two runs were measured on different annotations.
    """
    finished = [run for run in plan.runs if is_finished(run)]
    if not finished:
        raise InputError(f"{plan.out}: no run of the ablation is finished; there is nothing to report")
    ground_truth = finished[0].config.data.build_validation().ground_truth()
    config = plan.config
    run_results = [
        measure(run, ground_truth, metric=config.metric, resamples=config.resamples)
        for run in tqdm(finished, desc="measuring", leave=False, disable=None)
    ]
    first: dict[str, Matches] = {}
    for result in run_results:
        for part, matches in result.matches.items():
            check_comparable(matches, first.setdefault(part, matches))
    by_variant = {name: [result for result in run_results if result.run.variant == name] for name in config.variants}
    return AblationResults(
        title=config.title,
        baseline=config.baseline,
        metric=config.metric,
        confidence=config.confidence,
        resamples=config.resamples,
        variants=tuple(
            _variant(config, name, runs, by_variant[config.baseline]) for name, runs in by_variant.items() if runs
        ),
        unfinished=tuple(run.name for run in plan.runs if run not in finished),
    )


def _variant(
    config: AblationConfig, name: str, runs: Sequence[RunResult], baseline: Sequence[RunResult]
) -> VariantResult:
    differences = {} if name == config.baseline else compare(runs, baseline, confidence=config.confidence)
    values = {key: [run.figures[key] for run in runs] for key in runs[0].figures}
    conclusion = None
    if differences:
        figure = config.metric.replace("/", " ")
        conclusion = sentence(name, config.baseline, figure, differences[config.metric], config.confidence)
    return VariantResult(
        name=name,
        runs=tuple(runs),
        mean={key: float(np.mean(numbers)) for key, numbers in values.items()},
        std={key: _standard_deviation(numbers) for key, numbers in values.items()},
        cost=_mean_cost([run.cost for run in runs]),
        paper=config.variants[name].paper,
        differences=differences,
        sentence=conclusion,
    )


def _standard_deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _mean_cost(costs: Sequence[Cost]) -> Cost:
    return Cost(
        training=float(np.mean([cost.training for cost in costs])),
        inference=float(np.mean([cost.inference for cost in costs])),
        memory=float(np.max([cost.memory for cost in costs])),
    )

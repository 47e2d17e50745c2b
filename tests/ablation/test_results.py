from __future__ import annotations

import math
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskrcnn.ablation import measurement
from maskrcnn.ablation.comparison import Difference, points, sentence, signed_points
from maskrcnn.ablation.curves import Curve, curve_of, mean_curve
from maskrcnn.ablation.measurement import load_matches, results_file
from maskrcnn.ablation.plan import Plan, Run
from maskrcnn.ablation.results import AblationResults, VariantResult, analyse
from maskrcnn.errors import InputError
from maskrcnn.evaluation.average_precision import evaluate
from maskrcnn.evaluation.bootstrap import Interval
from maskrcnn.evaluation.matches import Matches
from maskrcnn.evaluation.results import read_results


@pytest.fixture(scope="module")
def results(ablation: Plan) -> AblationResults:
    return analyse(ablation)


def variant(results: AblationResults, name: str) -> VariantResult:
    return next(variant for variant in results.variants if variant.name == name)


# Metrics.


def test_figures_are_those_of_an_evaluation(ablation: Plan, results: AblationResults) -> None:
    truth = ablation.runs[0].config.data.build_validation().ground_truth()
    for variant_result in results.variants:
        for result in variant_result.runs:
            expected = evaluate(truth, read_results(results_file(result.run))).summary()
            assert len(result.figures) == 12
            for name, value in result.figures.items():
                assert value == pytest.approx(expected[name], abs=1e-12, nan_ok=True)


def test_mean_and_deviation_are_over_the_finished_seeds(results: AblationResults) -> None:
    align = variant(results, "align")
    assert [result.run.seed for result in align.runs] == [0, 1]
    values = [result.figures["mask/AP"] for result in align.runs]
    assert values[0] != values[1]
    assert align.mean["mask/AP"] == pytest.approx(statistics.fmean(values))
    assert align.std["mask/AP"] == pytest.approx(statistics.stdev(values))
    assert math.isnan(align.mean["mask/APl"])  # no object of 96 x 96 pixels in scenes of 64 x 64


def test_unfinished_runs_are_named_and_left_out(results: AblationResults) -> None:
    assert set(results.unfinished) == {"align/seed_2", "coarse/seed_1"}
    assert [len(of_variant.runs) for of_variant in results.variants] == [3, 2, 3, 2]


def test_a_baseline_that_is_not_finished_leaves_figures_alone(ablation: Plan) -> None:
    results = analyse(replace(ablation, runs=tuple(run for run in ablation.runs if run.variant != "pool")))
    assert [of_variant.name for of_variant in results.variants] == ["align", "same", "coarse"]
    assert not results.compared
    assert not results.sentences


def test_nothing_finished_is_an_error(ablation: Plan) -> None:
    unfinished = tuple(run for run in ablation.runs if run.name == "align/seed_2")
    with pytest.raises(InputError, match="no run of the ablation is finished"):
        analyse(replace(ablation, runs=unfinished))


def test_runs_measured_on_different_annotations_are_not_compared(
    ablation: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matches of one run were stored before the annotation file changed."""
    original = measurement.load_matches

    def stale(run: Run, part: str, truth: dict[str, Any]) -> Matches:
        matches = original(run, part, truth)
        object_arrays = ("object_images", "object_categories", "object_areas")
        changes = {name: getattr(matches, name)[:-1] for name in object_arrays if run == ablation.runs[1]}
        return replace(matches, **changes)

    monkeypatch.setattr(measurement, "load_matches", stale)
    with pytest.raises(InputError, match="measured on different objects"):
        analyse(ablation)


# Cost and curves.


def test_cost_is_read_from_the_records(results: AblationResults) -> None:
    align = variant(results, "align")
    assert align.runs[0].cost.training == 35.0  # the median of 20, 30, 40, 50
    assert align.runs[0].cost.inference == 140.0  # the last evaluation
    assert align.runs[0].cost.memory == 200 * 2**20
    assert align.cost.memory == 201 * 2**20  # the maximum over the seeds


def test_figures_of_other_metrics_are_those_of_the_last_evaluation() -> None:
    metrics = {"mask/AP": 0.5, "ema/mask/AP": 0.6, "found/objects": 0.7, "ema/found/objects": 0.8, "found/all": None}
    figures = measurement._other_figures([{"metrics": {"found/objects": 0.1}}, {"metrics": metrics}])
    assert figures == pytest.approx({"found/objects": 0.7, "found/all": math.nan}, nan_ok=True)
    assert measurement._other_figures([]) == {}


def test_records_without_cost_give_nan(ablation: Plan) -> None:
    cost = measurement._cost([{"images_per_second": 4.0}], [{"metrics": {}}])
    assert cost.training == 4.0
    assert math.isnan(cost.inference)
    assert math.isnan(cost.memory)


def test_curves_are_read_from_the_records(results: AblationResults) -> None:
    run = variant(results, "pool").runs[1]
    assert run.loss.iterations == (10, 20, 30, 40)
    assert run.loss.values == pytest.approx((0.21, 0.11, 2 / 30 + 0.01, 0.06))
    assert run.metric == Curve((20, 40), (pytest.approx(0.21), pytest.approx(0.41)))


def test_a_curve_leaves_out_what_is_not_a_number() -> None:
    assert curve_of([(1, 0.5), (2, None), (3, 0.25)]) == Curve((1, 3), (0.5, 0.25))


def test_the_mean_of_curves_is_taken_where_all_have_points() -> None:
    assert mean_curve([Curve((1, 2, 4), (1.0, 2.0, 3.0)), Curve((2, 4, 6), (4.0, 7.0, 9.0))]) == Curve(
        (2, 4), (3.0, 5.0)
    )


def test_a_long_curve_is_thinned_by_means() -> None:
    thin = Curve(tuple(range(6)), (1.0, 3.0, 5.0, 7.0, 9.0, 11.0)).thinned(3)
    assert thin == Curve((0.5, 2.5, 4.5), (2.0, 6.0, 10.0))
    assert thin.thinned(3) == thin


# Matches.


def test_matches_are_made_once_and_anew_for_new_results(
    ablation: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = ablation.runs[0]
    truth = run.config.data.build_validation().ground_truth()
    expected = load_matches(run, "mask", truth).figures()
    results, stored = results_file(run), run.directory.evaluation / "matches_mask.npz"
    modified = stored.stat().st_mtime_ns
    assert load_matches(run, "mask", truth).figures() == pytest.approx(expected, nan_ok=True)
    assert stored.stat().st_mtime_ns == modified
    stored.write_bytes(b"of older results")
    os.utime(stored, ns=(0, results.stat().st_mtime_ns - 1))
    assert load_matches(run, "mask", truth).figures() == pytest.approx(expected, nan_ok=True)


# Differences.


def test_a_difference_is_the_mean_over_common_seeds(results: AblationResults) -> None:
    pool, align = variant(results, "pool"), variant(results, "align")
    difference = align.differences["mask/AP"]
    expected = {seed: align.runs[seed].figures["mask/AP"] - pool.runs[seed].figures["mask/AP"] for seed in (0, 1)}
    assert difference.by_seed == pytest.approx(expected)
    assert difference.interval.value == pytest.approx(statistics.fmean(expected.values()))
    assert difference.interval.low < difference.interval.value < difference.interval.high
    assert list(variant(results, "coarse").differences["box/AP"].by_seed) == [0, 2]


def test_the_interval_comes_from_paired_resamples(results: AblationResults) -> None:
    """If the same images are hard for both variants, the interval is narrower than one from unpaired resamples."""
    pool, same = variant(results, "pool"), variant(results, "same")
    resampled = [[run.resampled["mask/AP"] for run in of_variant.runs] for of_variant in (same, pool)]
    paired = np.subtract(*resampled).mean(axis=0)
    low, high = np.quantile(paired, [0.025, 0.975])
    interval = same.differences["mask/AP"].interval
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))
    unpaired = np.subtract(resampled[0], np.roll(resampled[1], 1, axis=1)).mean(axis=0)
    assert interval.high - interval.low < 0.7 * np.ptp(np.quantile(unpaired, [0.025, 0.975]))


def test_each_variant_gets_its_verdict(results: AblationResults) -> None:
    verdicts = {compared.name: compared.differences["mask/AP75"].interval.verdict for compared in results.compared}
    assert verdicts == {"align": "better", "same": "not told apart", "coarse": "worse"}
    better, same, worse = results.sentences
    interval = variant(results, "align").differences["mask/AP75"].interval
    assert better == (
        f"align is better than pool by {points(interval.value)} points of mask AP75 (95% interval "
        f"{points(interval.low)} to {points(interval.high)}; 2 of 2 seeds agree)."
    )
    assert same.startswith("same is not told apart from pool by this data: ")
    assert worse.startswith("coarse is worse than pool by ")


@pytest.mark.parametrize(
    ("interval", "seeds", "expected"),
    [
        (
            Interval(0.041, 0.029, 0.053), [0.04, 0.05, -0.01],
            "new is better than old by 4.1 points of mask AP (95% interval 2.9 to 5.3; 2 of 3 seeds agree).",
        ),
        (
            Interval(-0.041, -0.053, -0.029), [-0.04],
            "new is worse than old by 4.1 points of mask AP (95% interval 2.9 to 5.3; one seed).",
        ),
        (
            Interval(0.004, -0.008, 0.016), [0.01, -0.002],
            "new is not told apart from old by this data: +0.4 points of mask AP "
            "(95% interval \N{MINUS SIGN}0.8 to +1.6; 1 of 2 seeds above).",
        ),
        (
            Interval(math.nan, math.nan, math.nan), [math.nan],
            "new cannot be compared with old: the ground truth has nothing to measure mask AP on.",
        ),
    ],
)  # fmt: skip
def test_sentences(interval: Interval, seeds: list[float], expected: str) -> None:
    difference = Difference(interval, dict(enumerate(seeds)))
    assert sentence("new", "old", "mask AP", difference, 0.95) == expected


def test_numbers_have_the_minus_of_prose() -> None:
    assert points(-0.0123) == "\N{MINUS SIGN}1.2"
    assert signed_points(0.0) == "+0.0"

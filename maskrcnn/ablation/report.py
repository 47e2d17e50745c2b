"""Write the report of an ablation: `report.md`, `report.html`, `results.json` and TensorBoard events.

`results.json` holds the numbers. Metrics are named as in `evaluation/metrics.json`. COCO's lie in 0..1; differences are
in the same unit. A value is null if the ground truth has no object for it, or for the standard deviation of one seed.

    title, baseline     text
    metric              name of the primary metric
    confidence          confidence level of the intervals, 0 to 1
    resamples           number of bootstrap resamples
    unfinished          names of the runs that are left out
    made_by             command, hardware and versions, as text
    variants            object: by name
        mean, std       object: each metric over the finished seeds; std with n - 1 degrees of freedom
        paper           object: metrics that the paper reports, in percent
        cost            object: `training` and `inference` in images per second, `memory` in bytes
        sentence        states the difference of the primary metric; null for the baseline
        minus_baseline  object: for each COCO metric `value`, `low`, `high`, `verdict` and `by_seed`
        seeds           object: for each finished seed `figures` (metrics), `cost`, and the curves `loss` and `metric`:
                        lists of [iteration, value]; long curves are thinned, metrics.jsonl of the run has all values
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from maskrcnn.ablation.comparison import Difference
from maskrcnn.ablation.curves import Curve, mean_curve
from maskrcnn.ablation.html_report import html_page
from maskrcnn.ablation.measurement import RunResult
from maskrcnn.ablation.pictures import galleries
from maskrcnn.ablation.plan import Plan
from maskrcnn.ablation.results import AblationResults, VariantResult
from maskrcnn.ablation.tables import report_tables
from maskrcnn.engine.loggers import TENSORBOARD_FOLDER
from maskrcnn.runtime.files import json_text, write_text

OF_ONE_RUN = ("command:", "seed:")  # lines of `environment.txt` that the report replaces with its own command


def write_report(plan: Plan, results: AblationResults) -> None:
    """Write the report in all formats into `plan.out`, and replace an earlier one."""
    made_by = provenance(results)
    markdown = markdown_report(results, made_by)
    page = html_page(results, galleries(results), notes(results), made_by)
    write_text(plan.out / "report.md", markdown)
    write_text(plan.out / "report.html", page)
    write_text(plan.out / "results.json", json_text({**as_dict(results), "made_by": made_by}, indent=1) + "\n")
    write_events(plan.out / TENSORBOARD_FOLDER, results, markdown)


def markdown_report(results: AblationResults, made_by: str) -> str:
    """Return the report as Markdown: sentences, notes, tables and provenance."""
    blocks = [
        f"# {results.title}\n",
        "".join(f"- {sentence}\n" for sentence in results.sentences),
        *(f"{note}\n" for note in notes(results)),
        *(table.markdown() for table in report_tables(results)),
        f"## How it was made\n\n```\n{made_by}\n```\n",
    ]
    return "\n".join(block for block in blocks if block)


def notes(results: AblationResults) -> list[str]:
    """Return notes on the sentences: how the intervals are computed, and which runs are left out."""
    paragraphs = []
    if results.compared:
        paragraphs.append(
            f"Each interval comes from a paired bootstrap: {results.resamples:,} resamples of the images, the same for "
            "both variants, with the AP of each resample averaged over the seeds. It covers the sampling of the "
            "images, not the variation between seeds; the differences seed by seed show the latter."
        )
    seeds = {variant.name: [result.run.seed for result in variant.runs] for variant in results.variants}
    for variant in results.compared:
        common = list(variant.differences[results.metric].by_seed)
        if not common == seeds[variant.name] == seeds[results.baseline]:
            pair, listed = f"{variant.name} is compared with {results.baseline}", ", ".join(map(str, common))
            paragraphs.append(f"{pair} over the seeds that both have finished: {listed}.")
    if results.unfinished:
        paragraphs.append(f"Not finished, and left out: {', '.join(results.unfinished)}.")
    return paragraphs


def provenance(results: AblationResults) -> str:
    """Return this command, and the last block of the runs' `environment.txt`; equal blocks appear once."""
    names_by_environment: dict[str, list[str]] = {}
    for result in (result for variant in results.variants for result in variant.runs):
        if result.run.directory.environment.exists():
            blocks = result.run.directory.environment.read_text(encoding="utf-8").strip().split("\n\n")
            lines = [line for line in blocks[-1].splitlines() if not line.startswith(OF_ONE_RUN)]
            names_by_environment.setdefault("\n".join(lines), []).append(result.run.name)
    command = f"command: {shlex.join([Path(sys.executable).name, *sys.argv])}"
    if len(names_by_environment) == 1:
        return "\n".join([command, *names_by_environment])
    return "\n\n".join([command, *(f"{', '.join(names)}:\n{text}" for text, names in names_by_environment.items())])


def as_dict(results: AblationResults) -> dict[str, Any]:
    """Return the contents of `results.json` but for `made_by`, with nan instead of null."""
    return {
        "title": results.title,
        "baseline": results.baseline,
        "metric": results.metric,
        "confidence": results.confidence,
        "resamples": results.resamples,
        "unfinished": results.unfinished,
        "variants": {variant.name: _variant(variant) for variant in results.variants},
    }


def _variant(variant: VariantResult) -> dict[str, Any]:
    return {
        "mean": variant.mean,
        "std": variant.std,
        "paper": variant.paper,
        "cost": dataclasses.asdict(variant.cost),
        "sentence": variant.sentence,
        "minus_baseline": {key: _difference(difference) for key, difference in variant.differences.items()},
        "seeds": {str(result.run.seed): _run(result) for result in variant.runs},
    }


def _difference(difference: Difference) -> dict[str, Any]:
    interval = difference.interval
    numbers = {"value": interval.value, "low": interval.low, "high": interval.high, "verdict": interval.verdict}
    return {**numbers, "by_seed": {str(seed): value for seed, value in difference.by_seed.items()}}


def _run(result: RunResult) -> dict[str, Any]:
    thinned = {name: curve.thinned() for name, curve in _curves(result).items()}
    curves = {name: list(zip(curve.iterations, curve.values, strict=True)) for name, curve in thinned.items()}
    return {"figures": result.figures, "cost": dataclasses.asdict(result.cost), **curves}


def _curves(result: RunResult) -> dict[str, Curve]:
    return {"loss": result.loss, "metric": result.metric}


def write_events(folder: Path, results: AblationResults, markdown: str) -> None:
    """Write TensorBoard events: the report as text, and the mean curves and metrics of each variant.

    The metrics also appear on the HPARAMS page, which can sort the variants by them.
    """
    if folder.exists():
        shutil.rmtree(folder)
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("report", markdown)
    for variant in results.variants:
        with SummaryWriter(str(folder / variant.name)) as writer:
            _write_variant(writer, results, variant)


def _write_variant(writer: SummaryWriter, results: AblationResults, variant: VariantResult) -> None:
    figures = {key: value for key, value in variant.mean.items() if not math.isnan(value)}
    writer.add_hparams({"variant": variant.name}, figures, run_name=".")  # also writes the metrics as scalars
    curves = {"training loss": "loss", f"course of {results.metric_name}": "metric"}
    for title, name in curves.items():
        mean = mean_curve([_curves(result)[name] for result in variant.runs])
        for iteration, value in zip(mean.iterations, mean.values, strict=True):
            writer.add_scalar(title, value, int(iteration))

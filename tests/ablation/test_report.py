from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import Page
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskrcnn.ablation import pictures
from maskrcnn.ablation.charts import variant_style
from maskrcnn.ablation.pictures import galleries
from maskrcnn.ablation.plan import Plan
from maskrcnn.ablation.report import write_report
from maskrcnn.ablation.results import AblationResults, analyse
from maskrcnn.ablation.tables import NOTHING, Cell, Row, Table, other_table, report_tables
from maskrcnn.evaluation.matches import FIGURES
from maskrcnn.visualization.svg import COLOURS, WIDTH, ticks


@pytest.fixture(scope="module")
def results(ablation: Plan) -> AblationResults:
    return analyse(ablation)


@pytest.fixture(scope="module")
def out(ablation: Plan, results: AblationResults) -> Path:
    write_report(ablation, results)
    write_report(ablation, results)  # the second call replaces the first report
    return ablation.out


@pytest.fixture(scope="module")
def page(out: Path) -> Page:
    return Page((out / "report.html").read_text(encoding="utf-8"))


def test_a_table_for_metrics_that_are_not_cocos(results: AblationResults) -> None:
    assert other_table(results) is None
    changed = {"pool": ({"found/objects": 0.5}, {"found/objects": 0.0625}), "align": ({"found/objects": 12.0}, {})}
    variants = [
        replace(
            v, mean={**v.mean, **changed.get(v.name, ({}, {}))[0]}, std={**v.std, **changed.get(v.name, ({}, {}))[1]}
        )
        for v in results.variants
    ]
    table = other_table(replace(results, variants=tuple(variants)))
    assert table
    assert table.columns == ("variant", "found/objects")
    assert [row.cells[1].text for row in table.rows] == ["0.5 ± 0.0625", "12", NOTHING, NOTHING]


# report.html.


def test_the_page_loads_nothing(out: Path, page: Page) -> None:
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r'"data:[^"]*"', "", (out / "report.html").read_text()))
    sources = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert sources
    assert all(value and value.startswith("data:image/jpeg;base64,") for value in sources)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert (out / "report.html").stat().st_size < 3e6


def test_the_page_names_every_variant_and_escapes_the_title(page: Page, results: AblationResults) -> None:
    text = " ".join(page.texts)
    for name in ("pool (baseline)", "align", "same", "coarse", "align/seed_2", "device: toy", *results.sentences):
        assert name in text
    assert page.texts.count("Shapes & masks, a <b>small</b> ablation") == 2  # title and heading
    assert "small" not in page.texts


def test_the_best_is_bold_and_the_baseline_is_marked(page: Page, out: Path) -> None:
    source = (out / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr(.*?)</tr>", source)
    metric_rows = [row for row in rows if " ± " in row]
    assert [("baseline" in row, "<b>" in row) for row in metric_rows[:4]] == [
        (True, False), (False, True), (False, False), (False, False)
    ]  # fmt: skip


def test_the_charts_show_every_variant(page: Page) -> None:
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg" and "aria-label" in attributes]
    assert labels == ["differences to pool", "training loss", "mask AP75, percent"]
    strokes = [attributes.get("stroke") for tag, attributes in page.tags if attributes.get("class") == "line"]
    assert all(strokes.count(colour) == 3 for colour in COLOURS[:4])  # one in the legend, two curves
    intervals = [attributes for _, attributes in page.tags if attributes.get("class") == "interval"]
    assert len(intervals) == 3 * 6  # variants, metrics
    numbers = [float(number) for path in intervals for number in re.findall(r"[\d.]+", str(path["d"]))]
    assert min(numbers) >= 0
    assert max(numbers) < WIDTH


def test_pictures_show_the_images_that_differ_most(results: AblationResults) -> None:
    by_variant = {gallery.variant: gallery for gallery in galleries(results)}
    assert by_variant.keys() == {"align", "same", "coarse"}
    assert not by_variant["align"].losses
    assert len(by_variant["align"].gains) == len(by_variant["coarse"].losses) == 4
    assert [strip.caption.split(":")[0] for strip in by_variant["same"].gains] == ["image 4"]
    assert [strip.caption.split(":")[0] for strip in by_variant["same"].losses] == ["image 5"]
    gains = [float(strip.caption.split("+")[1].split()[0]) for strip in by_variant["align"].gains]
    assert gains == sorted(gains, reverse=True)


def test_a_strip_has_the_truth_and_every_variant(results: AblationResults) -> None:
    strip = galleries(results)[0].gains[0]
    assert strip.titles == ("ground truth", "pool, seed 0", "align, seed 0", "same, seed 0", "coarse, seed 0")
    images = [read_picture(uri) for uri in strip.pictures]
    assert {image.shape for image in images} == {(320, 320, 3)}
    distances = [np.abs(images[0].astype(int) - image).mean() for image in images[1:]]
    assert distances[1] < distances[0] < distances[3]  # align moves the objects by 1 pixel, pool by 3, coarse by 7


def test_the_number_of_pictures_is_bounded(results: AblationResults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST", 60)
    assert max(len(gallery.gains) for gallery in galleries(results)) == 2


def test_large_images_are_made_smaller_before_drawing(
    results: AblationResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "LEGIBLE_SIDE", 48)  # the images have 64 x 64 pixels
    strip = galleries(results)[0].gains[0]
    assert {read_picture(uri).shape for uri in strip.pictures} == {(48, 48, 3)}


def read_picture(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_ticks_are_round_and_inside() -> None:
    assert ticks(-0.013, 0.052) == [-0.01, 0.0, 0.01, 0.02, 0.03, 0.04, 0.05]
    assert ticks(0, 160000, 4) == [0, 50000, 100000, 150000]


def test_a_ninth_variant_is_dashed(results: AblationResults) -> None:
    many = replace(results, variants=tuple(replace(results.variants[0], name=str(index)) for index in range(9)))
    assert variant_style(many, "0") == 'stroke="#0072b2" stroke-dasharray="none"'
    assert variant_style(many, "8") == 'stroke="#0072b2" stroke-dasharray="6 3"'


def test_a_report_without_comparisons_is_written(ablation: Plan, tmp_path: Path) -> None:
    without_baseline = replace(
        ablation, out=tmp_path, runs=tuple(run for run in ablation.runs if run.variant == "align")
    )
    write_report(without_baseline, analyse(without_baseline))
    text = " ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).texts)
    assert "align" in text
    assert "Differences" not in text
    assert "minus those" not in text
    assert "Mask metrics" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_variant_without_masks_is_compared_by_its_boxes(box_ablation: Plan) -> None:
    results = analyse(box_ablation)
    (masks,) = results.compared
    assert set(masks.differences) == {f"box/{figure}" for figure in FIGURES}
    write_report(box_ablation, results)
    text = (box_ablation.out / "report.md").read_text(encoding="utf-8")
    assert f"| boxes (baseline) | 1 | {' | '.join([NOTHING] * 6)} |" in text  # mask metrics
    assert "## Box metrics minus those of boxes" in text
    assert "## Mask metrics minus those of boxes" not in text
    page = Page((box_ablation.out / "report.html").read_text(encoding="utf-8"))
    assert "box AP50" in page.texts
    assert "mask AP50" not in page.texts
    assert galleries(results)[0].gains[0].titles == ("ground truth", "masks, seed 0", "boxes, seed 0")


# report.md.


def test_the_markdown_has_sentences_and_tables(out: Path, results: AblationResults) -> None:
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Shapes & masks, a <b>small</b> ablation\n")
    assert all(f"- {sentence}\n" in text for sentence in results.sentences)
    assert "Not finished, and left out: coarse/seed_1, align/seed_2." in text
    assert "coarse is compared with pool over the seeds that both have finished: 0, 2." in text
    tables = dict(re.findall(r"## (.*)\n\n((?:\|.*\n)+)", text))
    assert list(tables) == [
        "Mask metrics", "Box metrics", "Mask metrics minus those of pool", "Box metrics minus those of pool",
        "mask AP75 minus that of pool, seed by seed", "Comparison with the paper", "Cost",
    ]  # fmt: skip
    for table in tables.values():
        assert len({line.count("|") for line in table.splitlines()}) == 1
    mean, deviation = (100 * metrics["mask/AP"] for metrics in (results.variants[1].mean, results.variants[1].std))
    assert f"| align | 2 | **{mean:.1f} ± {deviation:.1f}** |" in tables["Mask metrics"]
    assert "| pool (baseline) | 35 | 140 | 302 |" in tables["Cost"]


def test_the_paper_stands_beside(results: AblationResults) -> None:
    table = next(table for table in report_tables(results) if table.title == "Comparison with the paper")
    change = 100 * results.variants[1].differences["mask/AP75"].interval.value
    row = next(row for row in table.rows if [cell.text for cell in row.cells[:2]] == ["align", "mask AP75"])
    assert [cell.text for cell in row.cells[3:]] == ["32.1", f"{change:+.1f}", "+10.5"]


def test_a_table_in_markdown() -> None:
    rows = (Row((Cell("a"), Cell("1", strong=True))), Row((Cell("b"), Cell("0")), marked=True))
    assert Table("T", ("name", "AP"), rows, "A note.").markdown() == (
        "## T\n\n| name | AP |\n| --- | ---: |\n| a | **1** |\n| b | 0 |\n\nA note.\n"
    )


# results.json and TensorBoard.


def test_the_numbers_are_stored(out: Path, results: AblationResults) -> None:
    stored = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert stored["unfinished"] == ["coarse/seed_1", "align/seed_2"]
    assert list(stored["variants"]) == ["pool", "align", "same", "coarse"]
    align: dict[str, Any] = stored["variants"]["align"]
    assert align["mean"]["mask/AP"] == results.variants[1].mean["mask/AP"]
    assert align["mean"]["mask/APl"] is None
    assert align["paper"] == {"mask/AP": 30.9, "mask/AP75": 32.1}
    interval = results.variants[1].differences["mask/AP75"].interval
    assert align["minus_baseline"]["mask/AP75"] == {
        "value": interval.value, "low": interval.low, "high": interval.high, "verdict": "better",
        "by_seed": {str(seed): value for seed, value in results.variants[1].differences["mask/AP75"].by_seed.items()},
    }  # fmt: skip
    assert align["seeds"].keys() == {"0", "1"}
    assert align["seeds"]["0"]["metric"] == [[20, 0.2], [40, 0.4]]
    assert align["seeds"]["0"]["cost"]["memory"] == 200 * 2**20
    assert "device: toy" in stored["made_by"]
    assert "device: old" not in stored["made_by"]


def test_tensorboard_reads_the_events(out: Path, results: AblationResults) -> None:
    for variant in results.variants:
        events = EventAccumulator(str(out / "tensorboard" / variant.name)).Reload()
        [figure] = events.Scalars("mask/AP")
        assert figure.value == pytest.approx(variant.mean["mask/AP"], rel=1e-6)
        assert "mask/APl" not in events.Tags()["scalars"]
        assert [point.step for point in events.Scalars("training loss")] == [10, 20, 30, 40]
        assert [point.step for point in events.Scalars("course of mask AP75")] == [20, 40]
        assert events.PluginTagToContent("hparams")
    root = EventAccumulator(str(out / "tensorboard")).Reload()
    assert root.Tags()["tensors"] == ["report/text_summary"]
    assert len(list((out / "tensorboard").glob("events*"))) == 1  # the second report replaced the first

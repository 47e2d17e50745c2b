"""The report of an ablation as one self-contained HTML page, with styles, charts and pictures inline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maskrcnn.ablation.charts import forest_plot, loss_chart, metric_chart, variant_style
from maskrcnn.ablation.comparison import share
from maskrcnn.ablation.pictures import Gallery
from maskrcnn.ablation.results import AblationResults
from maskrcnn.ablation.tables import report_tables
from maskrcnn.visualization.pages import page_template

TEMPLATE = Path(__file__).with_name("report.html.jinja")  # text in it is escaped, except for the charts
FOREST = ("AP", "AP50", "AP75")  # for masks and boxes; the primary metric comes first


def html_page(results: AblationResults, pictures: Sequence[Gallery], notes: Sequence[str], provenance: str) -> str:
    """Return the whole page.

    Args:
        results: of the ablation.
        pictures: for each variant, the images on which it differs most from the baseline.
        notes: paragraphs below the sentences of the results.
        provenance: command, hardware and versions, as plain text.
    """
    curves = {"Training loss": loss_chart(results), results.metric_name: metric_chart(results)}
    return page_template(TEMPLATE).render(
        results=results,
        notes=notes,
        forest=forest_plot(results, _forest_figures(results)) if results.compared else "",
        confidence=share(results.confidence),
        tables=report_tables(results),
        curves={name: chart for name, chart in curves.items() if chart},
        variant_style=variant_style,
        galleries=pictures,
        provenance=provenance,
    )


def _forest_figures(results: AblationResults) -> list[str]:
    default = [f"{part}/{figure}" for part in ("mask", "box") for figure in FOREST]
    compared = {figure for variant in results.compared for figure in variant.differences}
    return [results.metric, *(figure for figure in default if figure in compared - {results.metric})]

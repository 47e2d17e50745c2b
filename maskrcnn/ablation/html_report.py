"""The report of an ablation as one self-contained HTML page, with styles, charts and pictures inline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from maskrcnn.ablation.charts import forest_plot, legend, loss_chart, metric_chart
from maskrcnn.ablation.comparison import share
from maskrcnn.ablation.pictures import Gallery, Strip
from maskrcnn.ablation.results import AblationResults, VariantResult
from maskrcnn.ablation.tables import Row, Table, report_tables

FOREST = ("AP", "AP50", "AP75")  # for masks and boxes; the primary metric comes first

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --soft: #667; --line: #ddd; --mark: #f1f4f8;
  --better: #00664b; --worse: #a83c00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --paper: #16181c; --soft: #99a; --line: #383c44; --mark: #22262d;
    --better: #4cc9a0; --worse: #ff9a5c; } }
body { margin: 2.5rem auto; padding: 0 1.25rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
ul.findings { padding: 0; list-style: none; }
ul.findings li { padding: .4rem .75rem; margin: .4rem 0; border-left: 4px solid var(--soft); background: var(--mark); }
ul.findings li.better { border-color: var(--better); }
ul.findings li.worse { border-color: var(--worse); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: .4rem; }
th { font-weight: 600; color: var(--soft); }
tr.baseline td { background: var(--mark); }
svg { display: block; width: 100%; max-width: 720px; height: auto; }
svg text { fill: var(--ink); font-size: 12px; }
svg .heading { font-weight: 600; }
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .grid { stroke: var(--line); }
svg .zero { stroke: var(--ink); }
svg .interval, svg .line { fill: none; stroke-width: 2; }
svg .interval { stroke-dasharray: none; }
svg .faint { fill: none; stroke-width: 1; opacity: .35; }
svg .value { fill: var(--paper); stroke-width: 2; stroke-dasharray: none; }
svg .seed { fill: var(--soft); }
.key { display: inline-flex; align-items: center; gap: .4rem; margin-right: 1.25rem; font-size: .875rem; }
.key svg { width: 24px; }
figure { margin: .75rem 0 1.5rem; }
.strip { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(150px, 1fr); gap: .5rem; overflow-x: auto; }
.strip img { width: 100%; display: block; border-radius: 3px; }
.strip span { font-size: .8rem; color: var(--soft); }
pre { padding: .75rem; overflow-x: auto; background: var(--mark); font-size: .8rem; }
"""


def html_page(results: AblationResults, pictures: Sequence[Gallery], notes: Sequence[str], provenance: str) -> str:
    """Return the whole page.

    Args:
        results: of the ablation.
        pictures: for each variant, the images on which it differs most from the baseline.
        notes: paragraphs below the sentences of the results.
        provenance: command, hardware and versions, as plain text.
    """
    title = escape(results.title)
    body = [
        f"<h1>{title}</h1>",
        *_findings(results),
        *(f'<p class="soft">{escape(note)}</p>' for note in notes),
        *_forest(results),
        *(line for table in report_tables(results) for line in _table(table)),
        *_curves(results),
        *(line for gallery in pictures for line in _gallery(gallery, results.baseline)),
        "<h2>How it was made</h2>",
        f"<pre>{escape(provenance)}</pre>",
    ]
    head = (
        f'<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>'
    )
    page = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{page}\n</body>\n</html>\n'


def _findings(results: AblationResults) -> Iterable[str]:
    if results.sentences:
        yield '<ul class="findings">'
        yield from (_sentence(variant, results.metric) for variant in results.compared)
        yield "</ul>"


def _sentence(variant: VariantResult, metric: str) -> str:
    verdict = variant.differences[metric].interval.verdict.replace(" ", "-")
    return f'<li class="{verdict}">{escape(variant.sentence or "")}</li>'


def _forest(results: AblationResults) -> Iterable[str]:
    if results.compared:
        default = [f"{part}/{figure}" for part in ("mask", "box") for figure in FOREST]
        figures = [results.metric, *(figure for figure in default if figure != results.metric)]
        yield f"<h2>Differences to {escape(results.baseline)}</h2>"
        caption = f"Squares: means over the seeds. Lines: {share(results.confidence)} intervals. Dots: single seeds."
        yield f'<p class="soft">{caption}</p>'
        yield f'<div class="scroll">{forest_plot(results, figures)}</div>'


def _curves(results: AblationResults) -> Iterable[str]:
    yield "<h2>Curves</h2>"
    yield '<p class="soft">Strong lines are means over the seeds, thin ones single seeds.</p>'
    yield f"<p>{legend(results)}</p>"
    for name, chart in (("Training loss", loss_chart(results)), (results.metric_name, metric_chart(results))):
        yield f"<h3>{escape(name)}</h3>\n{chart}" if chart else ""


def _table(table: Table) -> Iterable[str]:
    yield f"<h2>{escape(table.title)}</h2>"
    yield '<div class="scroll"><table>'
    yield f"<thead><tr>{''.join(f'<th>{escape(column)}</th>' for column in table.columns)}</tr></thead>"
    yield from ("<tbody>", *map(_row, table.rows), "</tbody></table></div>")
    if table.note:
        yield f'<p class="soft">{escape(table.note)}</p>'


def _row(row: Row) -> str:
    texts = [f"<b>{escape(cell.text)}</b>" if cell.strong else escape(cell.text) for cell in row.cells]
    kind = ' class="baseline"' if row.marked else ""
    return f"<tr{kind}>{''.join(f'<td>{text}</td>' for text in texts)}</tr>"


def _gallery(gallery: Gallery, baseline: str) -> Iterable[str]:
    yield f"<h2>{escape(gallery.variant)} and {escape(baseline)}, image by image</h2>"
    yield f'<p class="soft">{escape(gallery.note)}</p>'
    for name, strips in (("Largest losses", gallery.losses), ("Largest gains", gallery.gains)):
        if strips:
            yield f"<h3>{name}</h3>"
            yield from map(_strip, strips)


def _strip(strip: Strip) -> str:
    cells = [
        f'<div><img src="{picture}" alt="{escape(title)}" loading="lazy"><span>{escape(title)}</span></div>'
        for title, picture in zip(strip.titles, strip.pictures, strict=True)
    ]
    return f'<figure><figcaption>{escape(strip.caption)}</figcaption><div class="strip">{"".join(cells)}</div></figure>'

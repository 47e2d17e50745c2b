"""The examination as text for a terminal, and all findings as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator

from maskrcnn.data.findings import SEVERITIES
from maskrcnn.inspection.examination import Examination, Examined, Group

SHOWN = 3  # findings of a kind; the page shows more, and `findings.jsonl` has all


def as_text(examination: Examination) -> str:
    """Return statistics, findings, limits and traps as text."""
    return "\n\n".join("\n".join(lines) for lines in _sections(examination))


def _sections(examination: Examination) -> Iterator[list[str]]:
    for split in examination.splits:
        yield [f"{split.subject.name}:", *_indented(split.summary.split("\n"))]
        yield [f"{split.subject.name}: {_headline(split)}", *(line for group in split.groups for line in _group(group))]
        if split.limits:
            shares = [
                f"{limit.share:6.1%} {limit.name}" + (f": {limit.remedy}" if limit.remedy else "")
                for limit in split.limits
            ]
            yield [f"{split.subject.name}: share of the objects that the settings lose", *_indented(shares)]
    if examination.refusals:
        yield [
            "a training would not start",
            *_indented([f"- {refusal}".replace("\n", "\n    ") for refusal in examination.refusals]),
        ]
    if examination.traps:
        yield ["silent traps", *_indented([f"- {trap}" for trap in examination.traps])]


def _headline(split: Examined) -> str:
    if not split.findings:
        return "nothing is wrong"
    counts = [(split.number(severity), severity) for severity in SEVERITIES]
    return ", ".join(f"{count} {severity}{'s' * (count != 1)}" for count, severity in counts if count)


def _group(group: Group) -> Iterator[str]:
    yield f"  {group.severity}: {len(group.findings)} x {group.title} ({group.treatment} by training; {group.remedy})"
    for finding in group.findings[:SHOWN]:
        file = f"{finding.file}: " if finding.file else ""
        yield f"    {file}{finding.message}"
    if len(group.findings) > SHOWN:
        yield f"    and {len(group.findings) - SHOWN} more"


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def as_json_lines(examination: Examination) -> str:
    """Return all findings, one JSON object a line."""
    return "".join(
        json.dumps(
            {
                "split": split.subject.name,
                "severity": group.severity,
                "training": group.treatment,
                "fault": group.fault,
                "file": finding.file,
                "image_id": finding.image_id,
                "annotation_ids": finding.annotation_ids,
                "text": finding.text,
            }
        )
        + "\n"
        for split in examination.splits
        for group in split.groups
        for finding in group.findings
    )

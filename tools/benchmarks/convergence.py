"""Learning speed beside torchvision's Mask R-CNN: runs the trainings, and reports the AP after how many steps.

Each training is a process of its own with one thread (`convergence_worker.py`) and leaves one JSON file. Files that are
there already are not trained again, so the command goes on where it was stopped.
"""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from maskrcnn.errors import InputError

try:
    from matplotlib.figure import Figure
    from scipy import stats
except ImportError as error:
    raise InputError(f"{error}; the benchmark needs it: pip install '.[benchmark]'") from error

WORKER = Path(__file__).with_name("convergence_worker.py")
SIDES = ("ours", "torchvision")
TERMS = ("RPN objectness", "RPN boxes", "classes", "boxes", "masks")  # in the order of the recorded losses
FIGURES = {"box/AP": "box AP", "mask/AP": "mask AP"}
CONFIDENCE = 0.95
STRETCH = 20  # steps whose losses are recorded as one mean

TEXT = """Both sides train on the same batches in the same order (our loader: images resized and flipped), from the same
weights of the backbone, with the same optimizer and schedule, the same anchors, numbers of proposals, samples and
detections, and layers of the same sizes; pycocotools measures both. All else is each side's own: how its other layers
start, targets, losses, RoIAlign, masks into the image. AP in points (percent), mean over the seeds. Differences are
ours minus torchvision's, with the {confidence:.0%} interval of Student's t over the seeds."""


@dataclass(frozen=True)
class Job:
    """One training; the worker reads it as JSON."""

    config: str
    overrides: list[str]
    side: str
    seed: int
    marks: list[int]
    high: list[str] | None = None  # choices at their high level (screening.py); None trains the model as configured


class Run(NamedTuple):
    """What a training left."""

    data: str
    side: str
    seed: int
    losses: np.ndarray  # (stretches, 5): means of STRETCH steps each
    figures: dict[int, dict[str, float]]  # at each mark, 0..1
    environment: list[str]


def run_all(
    configs: Sequence[Path], overrides: Sequence[str], seeds: Sequence[int], marks: Sequence[int], runs: Path, jobs: int
) -> list[Run]:
    """Train what is missing, `jobs` at a time, and return all runs."""
    wanted = {
        runs / f"{config.stem}_{side}_seed{seed}.json": Job(str(config), list(overrides), side, seed, list(marks))
        for seed in seeds
        for config in configs
        for side in SIDES
    }
    return train_missing(wanted, runs, jobs)


def train_missing(wanted: Mapping[Path, Job], runs: Path, jobs: int) -> list[Run]:
    """Train the jobs whose file is missing in the folder `runs`, `jobs` at a time, and return all runs in order."""
    runs.mkdir(parents=True, exist_ok=True)
    missing = [(path, job) for path, job in wanted.items() if not _is_done(path, job)]
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(missing), desc="trainings", disable=None) as bar:
        for failed in pool.map(lambda item: _train(*item), missing):
            bar.update()
            if failed:
                pool.shutdown(cancel_futures=True)
                raise InputError(failed)
    return [_read(path, job) for path, job in wanted.items()]


def _is_done(path: Path, job: Job) -> bool:
    if not path.exists():
        return False
    if json.loads(path.read_text(encoding="utf-8"))["job"] != asdict(job):
        raise InputError(f"{path}: holds a training with other arguments; name another folder with --runs")
    return True


def _train(path: Path, job: Job) -> str | None:
    """Train and write `path`; return what went wrong."""
    command = [sys.executable, str(WORKER), json.dumps(asdict(job)), str(path)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return f"{path.stem}: the training ended with status {done.returncode}:\n{done.stderr.strip()}"
    return None


def _read(path: Path, job: Job) -> Run:
    record = json.loads(path.read_text(encoding="utf-8"))
    figures = {int(mark): {key: values[key] for key in FIGURES} for mark, values in record["figures"].items()}
    losses = np.array(record["losses"])
    return Run(Path(job.config).stem, job.side, job.seed, losses, figures, record["environment"])


# ---- The report


class Difference(NamedTuple):
    """Ours minus torchvision's, in points."""

    ours: float
    torchvision: float
    by_seed: np.ndarray  # paired differences

    def __str__(self) -> str:
        return f"{self.by_seed.mean():+.1f} {interval(self.by_seed)}"


def interval(values: np.ndarray) -> str:
    """The interval of the mean of independent values; nothing for a single one."""
    if len(values) < 2:
        return ""
    error = values.std(ddof=1) / len(values) ** 0.5
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=values.mean(), scale=max(error, 1e-12))
    return f"[{low:+.1f}, {high:+.1f}]"


def difference(runs: Sequence[Run], data: str, mark: int, figure: str) -> Difference:
    """Compare the sides on one data set after `mark` steps."""
    points: dict[str, dict[int, float]] = {side: {} for side in SIDES}
    for run in runs:
        if run.data == data:
            points[run.side][run.seed] = 100 * run.figures[mark][figure]
    ours, theirs = (points[side] for side in SIDES)
    return Difference(
        float(np.mean(list(ours.values()))),
        float(np.mean(list(theirs.values()))),
        np.array([ours[seed] - theirs[seed] for seed in ours]),
    )


def report(runs: Sequence[Run], picture: str | None = None) -> str:
    """The figures as Markdown, with all that it takes to repeat them; `picture` is the file name of the curves."""
    names, marks = list(dict.fromkeys(run.data for run in runs)), sorted(runs[0].figures)
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    lines = [*header("Learning speed beside torchvision's Mask R-CNN", TEXT, runs[0]), f"- seeds: {seeds}"]
    for figure, title in FIGURES.items():
        cells = {(data, mark): difference(runs, data, mark, figure) for data in names for mark in marks}
        lines += ["", f"## {title}", "", "| data | steps | ours | torchvision | difference | by seed |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
        lines += [
            f"| {data} | {mark} | {cell.ours:.1f} | {cell.torchvision:.1f} | {cell} | "
            f"{', '.join(f'{value:+.1f}' for value in cell.by_seed)} |"
            for (data, mark), cell in cells.items()
        ]
        # A training is one independent trial, whatever the number of times that it was measured.
        trials = np.array([[cells[data, mark].by_seed for mark in marks] for data in names]).mean(axis=1).ravel()
        worst = min(cells, key=lambda key: cells[key].by_seed.mean())
        lines += [
            "",
            f"Mean over all cells: {trials.mean():+.2f} {interval(trials)}, {len(trials)} pairs of trainings. Worst "
            f"cell: {worst[0]} after {worst[1]} steps, {cells[worst].by_seed.mean():+.1f}.",
        ]
    lines += ["", f"![Losses and AP]({picture})"] if picture else []
    return "\n".join([*lines, ""])


def header(title: str, text: str, run: Run, **values: Any) -> list[str]:
    """The first lines of a report: what was measured, by which command, and in which environment."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [f"# {title}, {today}", "", text.format(confidence=CONFIDENCE, **values), ""]
    lines += [f"- command: {shlex.join(['python', *sys.argv])}"]
    return lines + [f"- {line}" for line in run.environment]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the five loss terms and both AP: a row for each data set, a line for each seed, a colour for each side."""
    names = list(dict.fromkeys(run.data for run in runs))
    columns = [*TERMS, *FIGURES.values()]
    figure = Figure(figsize=(3 * len(columns), 2.6 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for run in runs:
        row, colour = axes[names.index(run.data)], {"ours": "#0072b2", "torchvision": "#d55e00"}[run.side]
        for term, panel in enumerate(row[: len(TERMS)]):
            middles = (np.arange(len(run.losses)) + 0.5) * STRETCH
            panel.plot(middles, run.losses[:, term], color=colour, linewidth=0.9)
        for key, panel in zip(FIGURES, row[len(TERMS) :], strict=True):
            panel.plot(
                list(run.figures),
                [100 * values[key] for values in run.figures.values()],
                color=colour,
                marker="o",
                markersize=3,
                linewidth=0.9,
                label=run.side,
            )
    for name, row in zip(names, axes, strict=True):
        row[0].set_ylabel(name)
        for title, panel in zip(columns, row, strict=True):
            panel.set_title(title, fontsize=10)
            panel.tick_params(labelsize=8)
        for panel in row[len(TERMS) :]:
            panel.set_xscale("log", base=2)
            panel.set_xticks(sorted(runs[0].figures), labels=[str(mark) for mark in sorted(runs[0].figures)])
    handles, labels = axes[0][-1].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=2)
    figure.supxlabel("training step", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)

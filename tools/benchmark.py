"""Measure speed, memory and learning speed beside torchvision's Mask R-CNN, in the same run.

    python tools/benchmark.py all --out benchmarks/2026-11-22-cpu.md
    python tools/benchmark.py training --repeats 3 --precision bf16
    python tools/benchmark.py bootstrap
    python tools/benchmark.py data datasets/coco --repeats 9
    python tools/benchmark.py convergence configs/convergence/shapes.yaml --set model.backbone.weights=imagenet

    python tools/benchmark.py screening configs/convergence/shapes.yaml --set model.backbone.weights=imagenet
    python tools/benchmark.py gpu

`gpu` measures ways to train on a GPU, with a training to its AP, within ten minutes (tools/benchmarks/gpu.py).
`convergence` trains both sides and compares their AP; `screening` compares starts and scales of our model. Both train
on the configurations in configs/convergence and explain themselves in their reports. All others compare speed and
memory: each side runs in a process of its own, and the two take turns (ours, torchvision, ours, torchvision, ...), so
that whatever else the machine does meets both. A pair of neighbours gives one ratio; the median pair counts, and the
range over all pairs tells how far to trust it. What each side does exactly stands in tools/benchmarks/worker.py. What
torchvision has nothing like is measured alone, repeat by repeat.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple

from tqdm import tqdm

from maskrcnn.runtime.console import run_main

WORKER = Path(__file__).parent / "benchmarks" / "worker.py"
sys.path.append(str(WORKER.parent))  # for the modules of the trainings
MIB = 2**20

TASKS = {
    "training": "One training step, batch 2: losses, backward, SGD. The images are ready, of their final size.",
    "inference": "One image: from its pixels to boxes and masks. Ours ends with COCO's run lengths, torchvision with "
    "full-size probabilities, which a user would still have to encode.",
    "roi": "RoIAlign, forward and backward: 1000 boxes, 7 x 7 bins, 2 x 2 points a bin, 256 channels at stride 4.",
    "masks": "100 masks of 28 x 28 to COCO's run lengths of the whole image; the same masks, to the pixel, on both "
    "sides. torchvision pastes, rounds and has pycocotools encode each mask.",
    "bootstrap": "AP, AP50, AP75, APs, APm and APl in 1,000 resamples of the images, from stored "
    "matches of one set of results, drawn at random in the size of COCO's validation set.",
}
PHOTO_TASKS = {
    "data": "One loader worker: photographs and annotations from files, flipped and in batches of 2. Ours are of the "
    "size for the network, uint8, with masks as summed-area tables. torchvision's worker (full-size masks, float32) "
    "leaves resizing to its model; `torchvision, resized` does it, too.",
    "decoders": "JPEG in memory to RGB pixels. Images with other pixels are counted against Pillow.",
}
SIDES = {"data": ["ours", "torchvision", "torchvision, resized"], "decoders": ["Pillow", "torchvision", "simplejpeg"]}
MARKS = [100, 200, 400, 800, 1600]
ALONE = {"bootstrap"}  # tasks that torchvision does not do
TERMS = (
    "torchvision's side is `maskrcnn_resnet50_fpn` out of the box: as it is built for its published weights (frozen "
    "batch norms, three trainable stages), 91 classes, SGD. Ours is `configs/coco/mask_rcnn_r50_fpn_1x.yaml` with as "
    "many proposals (2000 in training, 1000 in inference, of each image) and, in the process, what our tools do: "
    "`keep_freed_memory`. The weights are random and, but for the last layers, the same on both sides. A round before "
    "the first warms up. Memory is the peak of the whole process, on a GPU that of torch's allocations."
)


class Repeat(NamedTuple):
    """What a worker answers."""

    seconds: float
    work: dict[str, float]  # what was worked on, such as the number of regions


class Side(NamedTuple):
    """What one side took."""

    name: str
    repeats: list[Repeat]
    peak: int  # bytes


class Measurement(NamedTuple):
    """One task: our side, and the other if there is one. Their repeats were measured in turn."""

    task: str
    sides: list[Side]
    environment: list[str]


class Worker:
    """A process that does one side of one task, a repeat at a time.

    On Linux a process starts with the peak memory of the one that started it. This one imports no torch and is small.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        command = [sys.executable, str(WORKER), json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.environment: list[str] = self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self.process.kill()
        self.process.__exit__(kind, error, tb)  # closes the pipes and waits

    def repeat(self) -> Repeat:
        """Do the task once."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Repeat(*self._answer())

    def finish(self) -> int:
        """End the process; return its peak memory in bytes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:  # it has said why on stderr
            sys.exit(self.process.wait() or 1)
        return json.loads(line)


def measure(task: str, repeats: int, settings: dict[str, Any]) -> Measurement:
    """Run the sides of a task in turn."""
    names = SIDES.get(task, ["ours"] if task in ALONE else ["ours", "torchvision"])
    names = [name for name in names if name != "simplejpeg" or find_spec(name)]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker({"task": task, "side": name, **settings})) for name in names]
        rounds = [[worker.repeat() for worker in workers] for _ in tqdm(range(repeats + 1), desc=task, disable=None)]
        columns = zip(*rounds[1:], strict=True)  # the first round warms up
        sides = [
            Side(name, list(column), worker.finish())
            for name, column, worker in zip(names, columns, workers, strict=True)
        ]
        return Measurement(task, sides, workers[0].environment)


# ---- The report


def report(measurements: Sequence[Measurement], settings: dict[str, Any]) -> str:
    """The figures as Markdown, with all that it takes to repeat them."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [f"# Speed and memory, {today}", ""]
    if any(len(measurement.sides) > 1 and measurement.task in TASKS for measurement in measurements):
        lines += [TERMS, ""]
    lines += [f"- command: {shlex.join(['python', *sys.argv])}"]
    if not settings.get("photos"):
        lines += [f"- images: {settings['height']} x {settings['width']}, precision {settings['precision']}"]
    lines += [f"- {line}" for line in measurements[0].environment]
    for measurement in measurements:
        lines += ["", *_section(measurement)]
    return "\n".join([*lines, ""])


def _section(found: Measurement) -> list[str]:
    names = list(found.sides[0].repeats[0].work)
    return [
        f"## {found.task}: {_outcome(found.sides)}",
        "",
        (TASKS | PHOTO_TASKS)[found.task],
        "",
        *_table(
            ["", "median s", "fastest", "slowest", "peak MiB", *names],
            [
                [
                    side,
                    *(f"{pick([repeat.seconds for repeat in repeats]):.4g}" for pick in (median, min, max)),
                    f"{peak / MIB:.0f}",
                    *(f"{median(repeat.work[name] for repeat in repeats):g}" for name in names),
                ]
                for side, repeats, peak in found.sides
            ],
        ),
        "",
        *(
            f"{side}, s: {', '.join(f'{repeat.seconds:.4g}' for repeat in repeats)}  "
            for side, repeats, _ in found.sides
        ),
    ]


def _outcome(sides: Sequence[Side]) -> str:
    """The seconds of the first side, or the time of each other over its own: the median pair, and the range."""
    first, *others = sides
    if not others:
        return f"{median(repeat.seconds for repeat in first.repeats):.3g} s"
    outcomes = [_comparison(first, other) for other in others]
    return (
        outcomes[0]
        if len(outcomes) == 1
        else "; ".join(f"{outcome} than {other.name}" for outcome, other in zip(outcomes, others, strict=True))
    )


def _comparison(first: Side, other: Side) -> str:
    ratios = [their.seconds / our.seconds for our, their in zip(first.repeats, other.repeats, strict=True)]
    speed = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as fast"
    return f"{speed}, {first.peak / other.peak:.2f} times the memory"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(row)} |" for row in [head, rule, *rows]]


# ---- The command line


def _number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    parse.__name__ = "whole number"  # argparse's word for what is no int
    return parse


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda[:NUMBER]")
    return text


def _new_report(text: str) -> Path:
    """Parse the path of a report; neither it nor its picture may replace a file."""
    path = Path(text)
    taken = [str(file) for file in (path, path.with_suffix(".png")) if file.exists()]
    if taken:
        raise argparse.ArgumentTypeError(f"{', '.join(taken)}: exists already; choose another name")
    return path


def main() -> None:
    """Parse, measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, text in {**TASKS, "all": "All of these."}.items():
        _add_speed_arguments(tasks.add_parser(name, help=text, description=text))
    text = " ".join(PHOTO_TASKS.values())
    _add_data_arguments(tasks.add_parser("data", help="Loading of photographs, and decoders.", description=text))
    text = "What both reach on the same data after the same steps."
    _add_convergence_arguments(tasks.add_parser("convergence", help=text, description=text))
    text = "What each start and scale of our model does to the AP of a short training."
    _add_screening_arguments(tasks.add_parser("screening", help=text, description=text))
    text = "What a GPU does with a training: speed and memory beside torchvision, and a training to its AP."
    _add_gpu_arguments(tasks.add_parser("gpu", help=text, description=text))
    args = parser.parse_args()
    if args.task == "gpu":
        print(_gpu(args))
        return
    text = {"convergence": _convergence, "screening": _screening, "data": _data}.get(args.task, _speed)(args)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")


def _add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=_number(1), default=5, help="pairs to measure; default 5")
    parser.add_argument("--threads", type=_number(1), default=2, help="CPU threads of each side; default 2")
    parser.add_argument("--height", type=_number(64), default=800, help="of the images; default 800")
    parser.add_argument("--width", type=_number(64), default=1333, help="default 1333")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both sides; bf16 by autocast")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, ...; default cpu")
    parser.add_argument("--out", type=_new_report, metavar="FILE", help="write the report, Markdown, to this new file")


def _speed(args: argparse.Namespace) -> str:
    settings = {name: getattr(args, name) for name in ("threads", "height", "width", "precision", "device")}
    tasks = list(TASKS) if args.task == "all" else [args.task]
    return report([measure(task, args.repeats, settings) for task in tasks], settings)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, metavar="FOLDER", help="in COCO's layout: annotations/, train2017/")
    parser.add_argument("--split", default="train2017", help="default train2017")
    parser.add_argument("--images", type=_number(2), default=64, help="of each repeat; default 64")
    parser.add_argument("--repeats", type=_number(1), default=5, help="rounds to measure; default 5")
    parser.add_argument(
        "--threads", type=_number(1), default=1, help="CPU threads of each side; default 1, as a worker"
    )
    parser.add_argument("--out", type=_new_report, metavar="FILE", help="write the report, Markdown, to this new file")


def _data(args: argparse.Namespace) -> str:
    photos = (str(args.photos.absolute()), args.split, args.images)
    settings = {"threads": args.threads, "height": 0, "width": 0, "precision": "fp32", "device": "cpu"}
    settings["photos"] = photos
    return report([measure(task, args.repeats, settings) for task in PHOTO_TASKS], settings)


def _add_training_arguments(parser: argparse.ArgumentParser, *, seeds: list[int], runs: Path) -> None:
    parser.add_argument("configs", metavar="CONFIG", type=Path, nargs="+", help="e.g. configs/convergence/shapes.yaml")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="for all configs"
    )
    parser.add_argument("--seeds", type=_number(0), nargs="+", default=seeds, help=f"default {seeds}")
    parser.add_argument(
        "--jobs", type=_number(1), default=2, help="parallel trainings, each with one thread; default 2"
    )
    parser.add_argument(
        "--runs", type=Path, default=runs, help=f"stores the trainings, to continue later; default {runs}"
    )


def _add_convergence_arguments(parser: argparse.ArgumentParser) -> None:
    _add_training_arguments(parser, seeds=[0, 1, 2], runs=Path("runs/convergence"))
    parser.add_argument(
        "--marks", type=_number(1), nargs="+", default=MARKS, help="steps after which to measure the AP"
    )
    parser.add_argument("--out", type=_new_report, metavar="FILE", help="write the report and a picture to new files")


def _add_screening_arguments(parser: argparse.ArgumentParser) -> None:
    _add_training_arguments(parser, seeds=[0], runs=Path("runs/screening"))
    parser.add_argument("--steps", type=_number(5), default=400, help="length of each training; default 400")
    parser.add_argument("--out", type=_new_report, metavar="FILE", help="write the report, Markdown, to this new file")


def _add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=_number(1), nargs="+", default=[2, 8, 16], help="default 2 8 16")
    parser.add_argument("--height", type=_number(64), default=800, help="of the images; default 800")
    parser.add_argument("--width", type=_number(64), default=1333, help="default 1333")
    parser.add_argument("--steps", type=_number(1), default=20, help="timed steps of each row; default 20")
    parser.add_argument("--iterations", type=_number(0), default=2200, help="of the training; 0: none; default 2200")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; default 9")
    parser.add_argument(
        "--device", type=_device, default="cuda", help="cuda, cuda:1, ..., or cpu to try it; default cuda"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="of the trainings; default runs/gpu")
    parser.add_argument(
        "--out", type=_new_report, metavar="FILE", help="the report, a new file; default: in benchmarks"
    )


def _gpu(args: argparse.Namespace) -> str:
    import gpu

    plan = gpu.Plan(
        batches=args.batches,
        height=args.height,
        width=args.width,
        steps=args.steps,
        device=args.device,
        seconds=60 * args.minutes,
        iterations=args.iterations,
        runs=args.runs,
    )
    return gpu.run(plan, args.out or _dated_report("gpu"))


def _dated_report(name: str) -> Path:
    """Return the path of a new report in the folder `benchmarks`."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    paths = (Path("benchmarks") / f"{today}-{name}{suffix}.md" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(path for path in paths if not path.exists())


def _screening(args: argparse.Namespace) -> str:
    import screening

    blocks = screening.run_all(args.configs, args.overrides, args.seeds, args.steps, args.runs, args.jobs)
    return screening.report(blocks)


def _convergence(args: argparse.Namespace) -> str:
    import convergence

    runs = convergence.run_all(args.configs, args.overrides, args.seeds, sorted(args.marks), args.runs, args.jobs)
    if args.out is None:
        return convergence.report(runs)
    picture = args.out.with_suffix(".png")
    convergence.draw(runs, picture)
    return convergence.report(runs, picture.name)


if __name__ == "__main__":
    run_main(main)

"""Train the variants of an experiment, and report how each changes the AP, with confidence intervals.

    maskrcnn ablate configs/ablations/shapes_table2c.yaml

Finished runs are not trained again, so the same command continues after an interruption. Exit status: 0 success,
1 a run failed, 2 invalid input, 130 and 143 stopped by SIGINT and SIGTERM after every run has saved a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from maskrcnn.cli.arguments import add_set_argument, whole_number
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging

if TYPE_CHECKING:
    from maskrcnn.ablation.plan import Plan
    from maskrcnn.ablation.runner import RunsFailed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("ablation", metavar="ABLATION", type=expand, help="YAML file of the ablation")
    add_set_argument(
        parser, help="override a key in the experiments of all variants, such as data.root=DIR; may be repeated"
    )
    parser.add_argument("--out", type=expand, help="folder of the report; default: runs/ablations/NAME")
    parser.add_argument(
        "--jobs",
        type=whole_number(1, 1024),
        help="runs in parallel; default: one per GPU, or one per CPU core if there is no GPU",
    )
    parser.add_argument("--report-only", action="store_true", help="do not train; report on the finished runs")


def run(args: argparse.Namespace) -> None:
    """Check the plan, train and report."""
    from maskrcnn.ablation.plan import load_plan
    from maskrcnn.ablation.report import write_report
    from maskrcnn.ablation.results import analyse
    from maskrcnn.runtime.outputs import output_folder

    setup_logging()
    plan = load_plan(args.ablation, args.out or Path("runs/ablations") / args.ablation.stem, args.overrides)
    with output_folder(plan.out):
        failure = None if args.report_only else _train(plan, args.jobs)
        results = analyse(plan)
        write_report(plan, results)
    print("\n".join([*results.sentences, *(f"not finished: {name}" for name in results.unfinished)]))
    print(f"report.html, report.md and results.json are in {plan.out}")
    if failure is not None:
        print(failure, file=sys.stderr)
        sys.exit(1)


def _train(plan: Plan, jobs: int | None) -> RunsFailed | None:
    """Train what is missing, and return the exception that describes the runs that failed, if any."""
    from maskrcnn.ablation.runner import RunsFailed, check_runs, train_missing
    from maskrcnn.engine.loop import Interrupted

    check_runs(plan)
    try:
        train_missing(plan, jobs=jobs)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except RunsFailed as error:
        return error
    return None

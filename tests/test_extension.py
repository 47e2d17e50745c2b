"""Parts of another package: every command works with them, without a change to this package.

The commands run in a process of their own, so that other tests do not see these parts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Protocol

import pytest
import torch
from launcher import Ended, Launcher

from maskrcnn.engine.metrics import TIMING_KEYS, read_records

EXAMPLE = Path(__file__).parents[1] / "examples" / "extension"

RUN_COMMANDS = """
import contextlib, io, json, sys
from maskrcnn.cli import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["maskrcnn", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        print(json.dumps([stop.code, out.getvalue(), err.getvalue()]))
    except Exception as failure:  # Python's own status for it is 1
        print(json.dumps([1, out.getvalue(), str(failure)]))
"""


class Run(Protocol):
    def __call__(self, *commands: list[object], modules: Path = EXAMPLE) -> list[Ended]: ...


@pytest.fixture
def run(launcher: Launcher) -> Run:
    """Runs commands one after another in one process, which also finds the modules in a folder."""

    def run(*commands: list[object], modules: Path = EXAMPLE) -> list[Ended]:
        arguments = json.dumps([[str(argument) for argument in command] for command in commands])
        path = {"PYTHONPATH": f"{EXAMPLE}{os.pathsep}{modules}"}
        done = launcher.run("-c", RUN_COMMANDS, arguments, environment=path)
        assert done.status == 0, done.err
        return [Ended(*json.loads(line)) for line in done.out.splitlines() if line.startswith("[")]

    return run


def test_every_command_works_with_parts_of_another_package(run: Run, tmp_path: Path) -> None:
    config, whole, resumed = EXAMPLE / "experiment.yaml", tmp_path / "whole", tmp_path / "resumed"
    broken = tmp_path / "broken"
    outcomes = run(
        ["train", config, "--out", whole],
        ["train", config, "--out", resumed, "--set", "training.keep_checkpoints=5"],
        ["eval", config, "--weights", whole / "checkpoints" / "last.pt", "--out", tmp_path / "evaluation"],
        ["predict", "--weights", whole / "checkpoints" / "last.pt", whole / "predictions", "--out", tmp_path / "found"],
        ["train", config, "--out", broken, "--set", "training.optimizer.lr=1.0e+30"],
        ["ablate", EXAMPLE / "ablation.yaml", "--out", tmp_path / "ablation", "--jobs", 2],
        ["show-config", "--schema"],
        ["show-config", config],
    )
    assert [outcome.status for outcome in outcomes] == [0, 0, 0, 0, 1, 0, 0, 0], outcomes
    assert (whole / "numbers.csv").read_text().startswith("1,train/loss,")
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics == json.loads((whole / "evaluation" / "metrics.json").read_text())
    assert 0 <= metrics["found/objects"] <= 1
    assert re.search(r"^found/objects +0\.\d{3}$", outcomes[2].out + outcomes[2].err, re.MULTILINE)
    assert "evaluation/found/objects" in (whole / "numbers.csv").read_text()
    best = torch.load(whole / "checkpoints" / "best.pt", weights_only=True)["metrics"]
    recorded = [
        r["metrics"]["found/objects"] for r in read_records(whole / "metrics.jsonl") if r["kind"] == "evaluation"
    ]
    assert best["found/objects"] == max(recorded)
    assert (tmp_path / "found" / "results.json").is_file()
    assert "roi_align" in (tmp_path / "ablation" / "report.md").read_text()
    assert "| variant | found/objects |" in (tmp_path / "ablation" / "report.md").read_text()
    numbers = json.loads((tmp_path / "ablation" / "results.json").read_text())["variants"]["nearest"]
    assert numbers["mean"]["found/objects"] == metrics["found/objects"]
    assert "found/objects" not in numbers["minus_baseline"]
    assert "imports: [extension.parts]" in outcomes[-1].out

    (replay,) = (broken / "replay").iterdir()
    shutil.copy(resumed / "checkpoints" / "iteration_00000002.pt", resumed / "checkpoints" / "last.pt")
    again = run(["replay-batch", replay], ["train", config, "--out", resumed, "--resume"])
    assert again[0].status == 1
    assert "not finite" in again[0].out
    assert again[1].status == 0
    first, second = (
        [{key: value for key, value in record.items() if key not in TIMING_KEYS} for record in read_records(path)]
        for path in (whole / "metrics.jsonl", resumed / "metrics.jsonl")
    )
    assert first == second


MESSAGES = {
    "imports=[extension.party]": "imports: cannot import 'extension.party' (No module named 'extension.party')",
    "imports=[.parts]": "imports: '.parts' is not the name of a module, such as my_package.parts [--set]",
    "model.backbone.kind=plane": "model.backbone.kind: 'plane' is not one of plain, resnet, timm, vgg; did you mean",
    "evaluation.metrics=[{kind: fuond}]": "evaluation.metrics[0].kind: 'fuond' is not one of found, lvis; did you",
    "evaluation.metrics=[{kind: found, min_score: 2}]": "evaluation.metrics[0].min_score: expected a value less than",
    "evaluation.metrics=[{kind: found}, {kind: found}]": "evaluation.metrics: the kind 'found' is there already",
    "evaluation.best_metric=found/object": "mask/APl, found/objects; did you mean 'found/objects'? [--set]",
    "model.neck.kind=projektion": "model.neck.kind: 'projektion' is not one of fpn, none, projection; did you mean",
    "training.sampler.kind=every_secnd": "'every_secnd' is not one of class_balanced, every_second, repeat_factor",
    "training.loggers=[{kind: csw}]": "training.loggers[0].kind: 'csw' is not one of csv, tensorboard, wandb; did you",
}


def test_messages_list_the_foreign_kinds_and_refuse_two_parts_of_one_kind(run: Run, tmp_path: Path) -> None:
    (tmp_path / "twin.py").write_text(
        "from typing import Literal\n"
        "from maskrcnn.models.backbones.parts import BackboneConfig\n"
        "class PlainConfig(BackboneConfig):\n"
        "    kind: Literal['plain'] = 'plain'\n"
    )
    train = ["train", EXAMPLE / "experiment.yaml", "--out", tmp_path / "run", "--set"]
    changes = [*MESSAGES, "imports=[extension.parts, twin]"]
    *outcomes, last = run(*([*train, change] for change in changes), modules=tmp_path)
    for outcome, message in zip(outcomes, MESSAGES.values(), strict=True):
        assert outcome.status == 2
        assert message in outcome.err
        assert "1 problem\n" in outcome.err
    assert last.status == 2
    assert "extension.parts.PlainConfig and twin.PlainConfig both have the kind 'plain'" in last.err

"""A trial of hostile input: every command, with wrong files, values and arguments.

Each case is generated from its name, and runs a command in this process. Only the documented exit statuses come out,
with one message on stderr and no traceback, in bounded time, and the user's files stay as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskrcnn.cli import main
from maskrcnn.data.converters import FORMATS
from maskrcnn.experiment import load_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("logging_restored"),
    pytest.mark.filterwarnings("ignore"),
]

SECONDS = 60  # of one case; a case takes less than one on an idle core

EXPERIMENT = """\
model:
  backbone: {kind: resnet, depth: 18, width: 8, norm: bn, freeze: 0, weights: none}
  neck: {kind: fpn, channels: 8}
  rpn:
    anchor_sizes: [[8], [16], [32], [48], [64]]
    training: {pre_nms_top_n: 30, post_nms_top_n: 20}
    inference: {pre_nms_top_n: 30, post_nms_top_n: 10}
    batch_size_per_image: 16
  sampling: {batch_size_per_image: 16}
  box_head: {kind: fc, width: 16}
  mask_head: {kind: fcn, depth: 1, width: 8}
  detection: {score_threshold: 0.0, detections_per_image: 5}
data:
  root: ROOT
  train: {kind: coco, annotations: objects.json, images: images}
  validation: {kind: coco, annotations: objects.json, images: images}
  train_transforms: [{kind: horizontal_flip}, {kind: resize, short_side: [64], long_side: 64}]
  validation_transforms: [{kind: resize, short_side: [64], long_side: 64}]
training:
  batch_size: 2
  optimizer: {kind: sgd, lr: 0.001}
  schedule: {kind: cosine, iterations: 1, warmup_iterations: 0}
  workers: 0
  loggers: []
evaluation: {pictures: 0}
"""

ABLATION = """\
title: two
experiment: experiment.yaml
baseline: first
variants: {first: {}, second: {set: [training.seed=1]}}
"""

# Values that take the place of a good one.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**70, -(2**70), 10**30, 1e300, -1e-300, float("inf"), float("nan"),
    "", "x", "1", "\u20ac", "~", "../x", "a/b" * 300, [], [[]], [None], [1, "x"], {}, {"kind": "x"}, {"a": {"b": []}},
    [0] * 5000, "0" * 5000,
)  # fmt: skip

# The same in YAML, and what only YAML has.
YAML_VALUES = (
    *(json.dumps(value) for value in VALUES),
    ".inf", "-.INF", ".nan", "1:30", "010", "0o17", "0xffffffffffffffffffff", "1e999", "yes", "2020-01-01",
    "[", "{", "!!int x", "!!python/object:os.system x", "&a [*a]", "*a", '"\\uD800"', '"\\0"', "\x07", "[" * 10_000,
    "{a: " * 10_000, "- - -", "| x", "? ?", "%", "@", "`", "9" * 5000, "<<: x", "a: b: c",
)  # fmt: skip

DOUBLING = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))


@dataclass(frozen=True)
class User:
    """A user's folder: photographs, annotations, results, configurations and a checkpoint."""

    home: Path
    scratch: Path  # where a case writes its hostile file, and the command its output

    def hostile(self, name: str, content: bytes | str) -> Path:
        """Write a hostile file."""
        path = self.scratch / name
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        return path

    def config(self, **files: Path) -> list[str]:
        """Return arguments for a configuration in which other files take the place of those of the dataset."""
        sets = [f"--set=data.{split}.{key}={path}" for key, path in files.items() for split in ("train", "validation")]
        return [str(self.home / "experiment.yaml"), *sets]

    @property
    def out(self) -> str:
        return f"--out={self.scratch / 'out'}"

    def digests(self) -> dict[str, str]:
        """Return a digest of each of the user's files."""
        files = sorted(path for path in self.home.rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def coco() -> dict[str, Any]:
    """Return a small annotation file with all kinds of masks."""
    image = {"height": 40, "width": 48}
    entry = {"category_id": 3, "bbox": [4, 5, 20, 20], "iscrowd": 0, "area": 400.0}
    polygon = [4.0, 5.0, 24.0, 5.0, 24.0, 25.0, 4.0, 25.0]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", **image} for i in (1, 2)],
        "annotations": [
            {"id": 1, "image_id": 1, **entry, "segmentation": [polygon]},
            {"id": 2, "image_id": 2, **entry, "segmentation": {"size": [40, 48], "counts": [205, 400, 1315]}},
            {"id": 3, "image_id": 2, **entry, "iscrowd": 1, "segmentation": {"size": [40, 48], "counts": [0, 1920]}},
        ],
        "categories": [{"id": 3, "name": "leaf"}, {"id": 9, "name": "tree"}],
    }


RESULTS = [
    {"image_id": 1, "category_id": 3, "score": 0.9, "bbox": [4, 5, 20, 20]},
    {
        "image_id": 2,
        "category_id": 3,
        "score": 0.5,
        "bbox": [4, 5, 20, 20],
        "segmentation": {"size": [40, 48], "counts": [205, 400, 1315]},
    },
]


def run(*arguments: str) -> tuple[int, str]:
    """Return the exit status and stderr of a command that runs in this process."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    errors = io.StringIO()
    argv, sys.argv = sys.argv, ["maskrcnn", *arguments]
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(errors),
            pytest.raises(SystemExit) as exited,
        ):
            main()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        sys.argv = argv
    return int(exited.value.code or 0), errors.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "images").mkdir()
    for i in (1, 2):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(home / "images" / f"{i}.png")
        Image.fromarray(pixels).save(home / f"{i}.jpg")
    (home / "objects.json").write_text(json.dumps(coco()))
    (home / "results.json").write_text(json.dumps(RESULTS))
    (home / "experiment.yaml").write_text(EXPERIMENT.replace("ROOT", str(home)))
    (home / "ablation.yaml").write_text(ABLATION)
    status, errors = run("train", str(home / "experiment.yaml"), "--device=cpu", f"--out={home / 'run'}")
    assert status == 0, errors
    return home


@pytest.fixture
def user(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    monkeypatch.chdir(tmp_path)
    return User(home, tmp_path)


# The cases. Each function returns the arguments of a command, from random numbers and its number among its kind.


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return a file with a few bytes changed, removed or repeated, or cut off."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) or 1)
        size = rng.choice((1, 1, 2, 10, 100))
        action = rng.randrange(4)
        if action == 0:
            data[at : at + size] = bytes(rng.randrange(256) for _ in range(size))
        elif action == 1:
            del data[at : at + size]
        elif action == 2:
            data[at:at] = data[at : at + size] * rng.choice((1, 3))
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def changed(rng: random.Random, data: Any) -> Any:
    """Return JSON data with one value replaced by a hostile one, removed or repeated."""
    data = json.loads(json.dumps(data))
    parent = data
    while True:
        key = rng.choice(list(parent) if isinstance(parent, dict) else list(range(len(parent))))
        child = parent[key]
        if not (isinstance(child, dict | list) and child) or rng.random() < 0.2:
            break
        parent = child
    action = rng.random()
    if action < 0.15:
        del parent[key]
    elif action < 0.25 and isinstance(parent, list):
        parent.insert(0, child)
    else:
        parent[key] = rng.choice(VALUES)
    return data


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of a configuration, with its sections."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield f"{path}{key}"
        yield from leaves(inner, f"{path}{key}.")


KEYS = tuple(leaves(load_config("shapes/mask_rcnn_r18_fpn").model_dump(mode="json")))


def config_values(rng: random.Random, user: User, number: int) -> list[str]:
    return ["show-config", *user.config(), f"--set={KEYS[number % len(KEYS)]}={rng.choice(YAML_VALUES)}"]


def config_files(rng: random.Random, user: User, number: int) -> list[str]:
    text = (user.home / "experiment.yaml").read_bytes()
    special = (
        b"", b"\xef\xbb\xbf" + text, b"\xff\xfe" + text, b"\0" * 1000, b"#" * 2**21, DOUBLING.encode(), text + text,
        b"base: x\n" + text, b"base: case.yaml\n", b"base: [[case.yaml]]\n", b"<<: {a: *b}\n", b"- " * 10_000,
        b"[" * 10_000, b"imports: [no.such, '', ../x, 3]\n" + text, b"imports: {}\n" + text, b"a: " + b"9" * 10_000,
        text.decode().encode("utf-16"), b"base: /dev/zero\n", b"base: ~\n", b"--- a\n--- b\n",
    )  # fmt: skip
    content = special[number] if number < len(special) else damaged(rng, text)
    return ["show-config", str(user.hostile("case.yaml", content))]


def annotation_values(rng: random.Random, user: User, number: int) -> list[str]:
    path = user.hostile("objects.json", json.dumps(changed(rng, coco())))
    return ["inspect-dataset", *user.config(annotations=path), "--count=2", user.out]


def annotation_files(rng: random.Random, user: User, number: int) -> list[str]:
    text = (user.home / "objects.json").read_bytes()
    special = (b"", b"\xef\xbb\xbf" + text, b"[" * 10_000, b"{" * 10_000, b'{"images": ' + b"[" * 10_000, text + text)
    path = user.hostile("objects.json", special[number] if number < len(special) else damaged(rng, text))
    if number % 2:
        return ["eval", f"--annotations={path}", f"--predictions={user.home / 'results.json'}", user.out]
    return ["inspect-dataset", *user.config(annotations=path), "--count=2", user.out]


def results_values(rng: random.Random, user: User, number: int) -> list[str]:
    path = user.hostile("results.json", json.dumps(changed(rng, RESULTS)))
    backend = rng.choice(("faster", "pycocotools"))
    return ["eval", f"--annotations={user.home / 'objects.json'}", f"--predictions={path}", f"--backend={backend}"]


def evaluated_annotations(rng: random.Random, user: User, number: int) -> list[str]:
    path = user.hostile("objects.json", json.dumps(changed(rng, coco())))
    return ["eval", f"--annotations={path}", f"--predictions={user.home / 'results.json'}", user.out]


def images(rng: random.Random, user: User, number: int) -> list[str]:
    name = rng.choice(("images/1.png", "1.jpg"))
    suffix = rng.choice((".png", ".jpg", ".tif", ".webp", ".bmp"))
    path = user.hostile(f"case{suffix}", damaged(rng, (user.home / name).read_bytes()))
    if number % 2:
        return ["explain-roi", f"--image={path}", *_roi_arguments(user)]
    return ["predict", f"--weights={user.home / 'run/checkpoints/last.pt'}", "--device=cpu", str(path), user.out]


def _roi_arguments(user: User) -> list[str]:
    return [f"--config={user.home / 'experiment.yaml'}", "--box=1,1,20,20", f"--out={user.scratch / 'roi.png'}"]


def checkpoint_values(rng: random.Random, user: User, number: int) -> list[str]:
    content = torch.load(user.home / "run/checkpoints/last.pt", weights_only=True)
    section = content
    key = rng.choice(list(content))
    while isinstance(section[key], dict) and section[key] and rng.random() < 0.8:
        section = section[key]
        key = rng.choice(list(section))
    if rng.random() < 0.2:
        del section[key]
    else:
        section[key] = rng.choice((*VALUES, torch.zeros(3), torch.zeros(0), {3: 4}))
    path = user.scratch / "case.pt"
    torch.save(content, path)
    return _with_weights(user, path, number)


def checkpoint_files(rng: random.Random, user: User, number: int) -> list[str]:
    content = (user.home / "run/checkpoints/last.pt").read_bytes()
    content = content[: rng.randrange(len(content))] if number % 2 else damaged(rng, content)
    return _with_weights(user, user.hostile("case.pt", content), number)


def _with_weights(user: User, path: Path, number: int) -> list[str]:
    return [
        ["predict", f"--weights={path}", "--device=cpu", str(user.home / "1.jpg"), user.out],
        ["eval", *user.config(), f"--weights={path}", "--device=cpu", user.out],
        ["explain-roi", f"--image={user.home / '1.jpg'}", f"--weights={path}", *_roi_arguments(user)],
    ][number % 3]


SPECIAL = ("absent", "folder", "pipe", "loop", "device", "endless", "empty", "noise", "long", "tilde", "through")


def special_file(user: User, kind: str, suffix: str) -> Path:
    """Return a path that is no proper file."""
    path = user.scratch / f"case{suffix}"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "empty":
        path.touch()
    elif kind == "noise":
        path.write_bytes(random.Random(0).randbytes(5000))
    others = {
        "device": Path("/dev/null"),
        "endless": Path("/dev/zero"),
        "long": user.scratch / f"{'x' * 300}{suffix}",
        "tilde": Path(f"~nobody-of-this-name/case{suffix}"),
        "through": user.home / "1.jpg" / f"case{suffix}",
    }
    return others.get(kind, path)


def special_files(rng: random.Random, user: User, number: int) -> list[str]:
    commands: tuple[Callable[[Path], list[str]], ...] = (
        lambda path: ["show-config", str(path)],
        lambda path: ["train", str(path), user.out],
        lambda path: ["train", *user.config(), f"--init={path}", "--device=cpu", user.out],
        lambda path: ["train", *user.config(), f"--set=model.backbone.weights={path}", "--device=cpu", user.out],
        lambda path: ["train", *user.config(annotations=path), user.out],
        lambda path: ["train", *user.config(images=path), user.out],
        lambda path: ["eval", f"--annotations={path}", f"--predictions={user.home / 'results.json'}"],
        lambda path: ["eval", f"--annotations={user.home / 'objects.json'}", f"--predictions={path}"],
        lambda path: ["predict", f"--weights={path}", str(user.home / "1.jpg"), user.out],
        lambda path: ["predict", f"--weights={user.home / 'run/checkpoints/last.pt'}", str(path), user.out],
        lambda path: ["explain-roi", f"--image={path}", *_roi_arguments(user)],
        lambda path: ["replay-batch", str(path)],
        lambda path: ["ablate", str(path), user.out],
        lambda path: ["inspect-dataset", str(path), user.out],
    )
    command, kind = number % len(commands), number // len(commands)
    suffix = (".yaml",) * 2 + (
        ".pt",
        ".pt",
        ".json",
        "",
        ".json",
        ".json",
        ".pt",
        ".jpg",
        ".jpg",
        ".pt",
        ".yaml",
        ".yaml",
    )
    return commands[command](special_file(user, SPECIAL[kind], suffix[command]))


def conversions(rng: random.Random, user: User, number: int) -> list[str]:
    """Give special files to each reader of `convert-dataset`, and to `init-dataset`."""
    path = special_file(user, SPECIAL[number % len(SPECIAL)], ".json")
    images, reader = f"--images={user.home / 'images'}", number // len(SPECIAL)
    if reader == len(FORMATS):
        good = f"--validation={user.home / 'objects.json'}"
        return ["init-dataset", f"--train={path}", good, images, f"--out={user.scratch / 'out.yaml'}"]
    name, out = tuple(FORMATS)[reader], f"--out={user.scratch / 'out.json'}"
    return ["convert-dataset", str(path), f"--from={name}", images, out]


def command_lines(rng: random.Random, user: User, number: int) -> list[str]:
    values = (
        "",
        "x",
        "-1",
        "0",
        "2",
        "nan",
        "inf",
        "1e400",
        "9" * 5000,
        "1e30",
        "\u0663",
        "\udcff",
        "1,2",
        "1x1",
        "x" * 10**4,
    )
    weights = f"--weights={user.home / 'run/checkpoints/last.pt'}"
    commands = (
        lambda value: ["predict", weights, str(user.home / "1.jpg"), user.out, "--device=cpu", f"--score={value}"],
        lambda value: ["predict", weights, str(user.home / "1.jpg"), user.out, f"--device={value}"],
        lambda value: ["inspect-dataset", *user.config(), user.out, f"--count={value}"],
        lambda value: ["ablate", str(user.home / "absent.yaml"), user.out, f"--jobs={value}"],
        lambda value: ["explain-roi", "--map=8x8", f"--out={user.scratch / 'roi.png'}", f"--box=1,1,{value},6"],
        lambda value: ["explain-roi", f"--map={value}", f"--out={user.scratch / 'roi.png'}", "--box=1,1,6,6"],
        lambda value: [
            "explain-roi",
            "--map=8x8",
            "--box=1,1,6,6",
            f"--out={user.scratch / 'a.png'}",
            f"--stride={value}",
        ],
        lambda value: [
            "explain-roi",
            "--map=8x8",
            "--box=1,1,6,6",
            f"--out={user.scratch / 'a.png'}",
            f"--output={value}",
        ],
        lambda value: ["show-config", *user.config(), f"--set={value}"],
        lambda value: ["show-config", *user.config(), f"--set={value}=1"],
        lambda value: ["show-config", *user.config(), f"--set=training.{value}.x=1"],
        lambda value: [value],
    )
    return commands[number % len(commands)](values[number // len(commands)])


KINDS: dict[Callable[[random.Random, User, int], list[str]], int] = {
    config_values: 200,
    config_files: 60,
    annotation_values: 80,
    annotation_files: 40,
    results_values: 60,
    evaluated_annotations: 40,
    images: 40,
    checkpoint_values: 45,
    checkpoint_files: 24,
    special_files: 14 * len(SPECIAL),
    conversions: (len(FORMATS) + 1) * len(SPECIAL),
    command_lines: 12 * 15,
}
CASES = [pytest.param(make, number, id=f"{make.__name__}-{number}") for make in KINDS for number in range(KINDS[make])]


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 500


@pytest.mark.parametrize(("make", "number"), CASES)
def test_hostile_input(make: Callable[[random.Random, User, int], list[str]], number: int, user: User) -> None:
    arguments = make(random.Random(f"{make.__name__} {number}"), user, number)
    before = user.digests()
    status, errors = run(*arguments)
    assert status in (0, 1, 2), errors
    assert "Traceback" not in errors
    if status == 2:
        assert len(re.findall(r"^(?:maskrcnn[\w -]*: )?error: ", errors, re.MULTILINE)) == 1, errors
        assert len(errors) < 20_000
    assert user.digests() == before

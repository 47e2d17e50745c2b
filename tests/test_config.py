"""Composition, overrides, error messages and dumps, on small schemas."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field, ValidationError, model_validator

from maskrcnn.config import Part, Section, composition, differences, json_schema, read_config, to_dict, to_yaml
from maskrcnn.config.composition import merge, read_overrides
from maskrcnn.config.recipes import RECIPES, find_config
from maskrcnn.config.yaml_text import traced
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig


class Pool(Section):
    kind: Literal["roi_pool"] = "roi_pool"
    size: int = 7


class Align(Section):
    kind: Literal["roi_align"] = "roi_align"
    size: int = 7
    sampling_ratio: int = 0
    aligned: bool = True


RoI = Annotated[Pool | Align, Field(discriminator="kind")]


class Optimizer(Section):
    lr: float = 0.02
    steps: tuple[int, ...] = (60, 80)
    warmup: int = 10

    @model_validator(mode="after")
    def _warmup_ends_before_the_first_step(self) -> Optimizer:
        if self.steps and self.warmup > self.steps[0]:
            raise ValueError(f"warmup ({self.warmup}) must end before the first step ({self.steps[0]})")
        return self


class Experiment(Section):
    roi: RoI
    classes: int
    optimizer: Optimizer = Optimizer()
    name: str = "run"
    root: Path = Path("data")
    image_size: tuple[int, int] = (800, 1333)
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    limit: int | None = None
    max_norm: float = 1e30
    workers: int | Literal["auto"] = "auto"
    scale: float | tuple[float, float] = 1.0
    extra: RoI | None = None
    per_level: tuple[RoI, ...] = ()
    by_name: dict[str, RoI] = Field(default={})
    either: RoI | str = ""


MINIMAL = "roi: {kind: roi_align}\nclasses: 3\n"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes files into one folder and returns the path of the last."""

    def write_files(**files: str) -> Path:
        path = tmp_path
        for name, text in files.items():
            path = tmp_path / f"{name}.yaml"
            path.write_text(text, encoding="utf-8")
        return path

    return write_files


def load(path: Path, *overrides: str) -> Experiment:
    return read_config(path, Experiment, overrides)


def problems(path: Path, *overrides: str) -> list[str]:
    """Return the lines of the error message after the first, without the folder in paths."""
    first, *lines = refusal(path, *overrides).split("\n")
    assert first == f"{path.name}: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return [line.strip() for line in lines]


def refusal(path: Path, *overrides: str) -> str:
    """Return the error message without the folder in paths."""
    with pytest.raises(InputError) as caught:
        load(path, *overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


# Composition


def test_a_recipe_is_found_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(Path("shapes/mask_rcnn_r18_fpn")) == RECIPES / "shapes" / "mask_rcnn_r18_fpn.yaml"
    with pytest.raises(InputError, match=r"shapes/mask_rcn_r18: neither .*; did you mean 'shapes/mask_rcnn_r18_\w+'\?"):
        find_config(Path("shapes/mask_rcn_r18"))
    (tmp_path / "shapes").mkdir()
    own = Path("shapes/mask_rcnn_r18_fpn")
    own.touch()
    assert find_config(own) == own  # a file of the user's wins
    assert find_config(Path("absent.yaml")) == Path("absent.yaml")  # its reader says that it is absent


def test_parents_merge_in_order_and_the_file_comes_last(write: Write) -> None:
    path = write(
        one="roi: {kind: roi_align, size: 1}\nclasses: 1\nname: one",
        two="classes: 2\nname: two",
        top="base: [one.yaml, two.yaml]\nname: top",
    )
    config = load(path)
    assert (config.roi, config.classes, config.name) == (Align(size=1), 2, "top")


def test_base_is_relative_to_the_file_that_names_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "all.yaml").write_text("base: inner.yaml\nclasses: 5")
    (tmp_path / "parts" / "inner.yaml").write_text("roi: {kind: roi_pool}")
    assert load(write(top="base: parts/all.yaml")).classes == 5


def test_a_base_may_be_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("base: shapes/mask_rcnn_r18_fpn\ntraining: {batch_size: 4}\n")
    recipe = read_config("shapes/mask_rcnn_r18_fpn", ExperimentConfig, ["training.batch_size=4"])
    assert read_config(path, ExperimentConfig) == recipe
    path.write_text("base: shapes/mask_rcnn_r18_fpm\n")
    with pytest.raises(InputError, match="did you mean 'shapes/mask_rcnn_r18_fpn'"):
        read_config(path, ExperimentConfig)


def test_a_file_may_be_a_base_twice(write: Write) -> None:
    path = write(root=MINIMAL, left="base: root.yaml", right="base: root.yaml", top="base: [left.yaml, right.yaml]")
    assert load(path).classes == 3


def test_mappings_merge_deeply_and_lists_are_replaced(write: Write) -> None:
    path = write(
        part=MINIMAL + "optimizer: {lr: 0.1, steps: [100, 200]}",
        top="base: part.yaml\noptimizer: {steps: [300]}",
    )
    assert load(path).optimizer == Optimizer(lr=0.1, steps=(300,))


class Resize(Section):
    kind: Literal["resize"] = "resize"
    side: int = 800
    rounding: str = "nearest"


class Flip(Section):
    kind: Literal["flip"] = "flip"


class Augmented(Section):
    transforms: tuple[Annotated[Flip | Resize, Field(discriminator="kind")], ...] = ()
    name: str = "run"


FLIP_AND_RESIZE = "transforms: [{kind: flip}, {kind: resize, side: 640}]"


def test_a_mapping_above_a_list_of_parts_changes_the_part_of_its_kind(write: Write) -> None:
    base = write(base=FLIP_AND_RESIZE)
    child = write(child="base: base.yaml\ntransforms: {resize: {rounding: floor}}")
    assert read_config(child, Augmented).transforms == (Flip(), Resize(side=640, rounding="floor"))
    overridden = read_config(child, Augmented, ["transforms.resize.side=64", "transforms.resize.rounding=up"])
    assert overridden.transforms == (Flip(), Resize(side=64, rounding="up"))
    assert read_config(base, Augmented).transforms == (Flip(), Resize(side=640))


def test_a_list_replaces_a_list_of_parts(write: Write) -> None:
    assert read_config(write(one=FLIP_AND_RESIZE), Augmented, ["transforms=[{kind: flip}]"]).transforms == (Flip(),)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "transforms.crop.side=3",
            r"transforms\.crop: .*one part of this kind in a list \(of flip, resize\).*\[--set\]",
        ),
        ("transforms.resize=3", r"transforms\.resize: expected a mapping of keys"),
        (
            "transforms.resize.sied=3",
            r"transforms\[1\]\.sied: unknown key for kind resize; did you mean 'side'\? \[--set\]",
        ),
    ],
)
def test_wrong_changes_of_a_list_of_parts(write: Write, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_config(write(one=FLIP_AND_RESIZE), Augmented, [override])


def test_the_message_has_the_whole_path(write: Write) -> None:
    below, above = traced({"data": {"list": [traced({"kind": "flip"}, "a")]}}, "a"), ["data.list.crop.side=3"]
    with pytest.raises(InputError, match=r"^data\.list\.crop: .*\[--set\]$"):
        merge(below, read_overrides(above, []))


def test_an_empty_list_has_no_parts_to_change(write: Write) -> None:
    with pytest.raises(InputError, match="transforms: expected a list, got a mapping"):
        read_config(write(one="transforms: []"), Augmented, ["transforms.resize.side=3"])


def test_a_kind_that_is_twice_in_a_list_needs_the_whole_list(write: Write) -> None:
    twice = write(one="transforms: [{kind: resize}, {kind: resize}]")
    with pytest.raises(InputError, match="write the whole list"):
        read_config(twice, Augmented, ["transforms.resize.side=3"])


@pytest.mark.parametrize(
    ("child", "expected"),
    [
        ("{kind: roi_pool}", Pool()),  # drops size and sampling_ratio of the other kind
        ("{kind: roi_pool, size: 3}", Pool(size=3)),
        ("{kind: roi_align, size: 3}", Align(size=3, sampling_ratio=2)),
        ("{size: 3}", Align(size=3, sampling_ratio=2)),
    ],
)
def test_another_kind_replaces_the_section(write: Write, child: str, expected: Section) -> None:
    path = write(
        part="roi: {kind: roi_align, size: 14, sampling_ratio: 2}\nclasses: 3", top=f"base: part.yaml\nroi: {child}"
    )
    assert load(path).roi == expected


def test_a_part_may_give_keys_and_a_later_one_the_kind(write: Write) -> None:
    path = write(size="roi: {size: 14}\nclasses: 3", top="base: size.yaml\nroi: {kind: roi_pool}")
    assert load(path).roi == Pool(size=14)


def test_a_yaml_merge_key_is_no_duplicate(write: Write) -> None:
    path = write(top="roi: &roi {kind: roi_pool, size: 3}\nclasses: 3\nextra:\n  <<: *roi\n  size: 5")
    assert load(path).extra == Pool(size=5)


# Overrides


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["roi.size=3"], Align(size=3, sampling_ratio=2)),
        (["roi.kind=roi_pool"], Pool()),
        (["roi.kind=roi_pool", "roi.size=3"], Pool(size=3)),
        (["roi.size=3", "roi.kind=roi_pool"], Pool(size=3)),
        (["roi={kind: roi_pool, size: 3}", "roi.size=4"], Pool(size=4)),
        (["roi.kind=roi_pool", "roi.kind=roi_align"], Align(size=14, sampling_ratio=2)),
    ],
)
def test_overrides_merge_like_files(write: Write, overrides: list[str], expected: Section) -> None:
    path = write(top="roi: {kind: roi_align, size: 14, sampling_ratio: 2}\nclasses: 3")
    assert load(path, *overrides).roi == expected


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 0.001),
        ("optimizer.steps=[1000, 2000]", "optimizer.steps", [1000, 2000]),
        ("limit=null", "limit", None),
        ("name=a=b", "name", "a=b"),
        ("name='1e-3'", "name", "1e-3"),
        ("by_name.box.kind=roi_pool", "by_name.box", {"kind": "roi_pool", "size": 7}),
    ],
)
def test_override_values_are_yaml(write: Write, override: str, key: str, expected: Any) -> None:
    value: Any = to_dict(load(write(top=MINIMAL + "limit: 4"), override))
    for part in key.split("."):
        value = value[part]
    assert value == expected


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("name", "--set name: expected KEY=VALUE, such as model.roi.kind=roi_pool"),
        ("=3", "--set =3: expected KEY=VALUE, such as model.roi.kind=roi_pool"),
        ("roi..size=3", "--set roi..size=3: expected KEY=VALUE, such as model.roi.kind=roi_pool"),
        ("roi={a: 1, a: 2}", "--set: the key 'a' is given twice, first on line 1"),
        ("roi.sise=3", "roi.sise: unknown key for kind roi_align; did you mean 'size'? [--set]"),
        ("roi=roi_pool", "roi: expected a mapping, got text 'roi_pool'; did you mean 'kind: roi_pool'? [--set]"),
        ("optimizer.steps.0=3", "optimizer.steps: expected a list, got a mapping [--set]"),
    ],
)
def test_wrong_overrides(write: Write, override: str, line: str) -> None:
    assert problems(write(top=MINIMAL), override)[0] == line


def test_an_override_that_is_not_yaml(write: Write) -> None:
    (line,) = problems(write(top=MINIMAL), "name=[")
    assert line.startswith("--set name=[: the value is not valid YAML: line 1, column 2")


# Values


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-3", 0.001), ("1.5E3", 1500.0), (".5e+1", 5.0), ("-2.e2", -200.0), ("3", 3.0), ("007", 7.0), ("0x1f", 31.0)],
)
def test_numbers_that_yaml_reads_as_text_are_understood(write: Write, text: str, expected: float) -> None:
    value = load(write(top=f"{MINIMAL}max_norm: {text}")).max_norm
    assert value == expected
    assert isinstance(value, float)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("classes: 'yes'", "classes: expected an int, got text 'yes'"),
        ("classes: yes", "classes: expected an int, got text 'yes'"),
        ("classes: true", "classes: expected an int, got true"),
        ("classes: 1:30", "classes: expected an int, got text '1:30'"),
        ("classes: 1_000", "classes: expected an int, got text '1_000'"),
        (f"classes: {2**70}", "classes: expected an int, got 1.1805916207174113e+21; an int has at most 64 bits"),
        ("classes: 1.5", "classes: expected an int, got 1.5"),
        ("classes: 9e4", "classes: expected an int, got 90000.0; write 90000"),
        ("classes: '3'", "classes: expected an int, got text '3'; remove the quotes"),
        ("classes: null", "classes: expected an int, got null"),
        ("max_norm: true", "max_norm: expected a float, got true"),
        ("max_norm: .inf", "max_norm: expected a finite number, got Infinity"),
        ("max_norm: -.INF", "max_norm: expected a finite number, got -Infinity"),
        ("max_norm: .nan", "max_norm: expected a finite number, got NaN"),
        ("max_norm: 1e999", "max_norm: expected a finite number, got Infinity"),
        ("scale: [1, .inf]", "scale[1]: expected a finite number, got Infinity"),
        ("max_norm: abc", "max_norm: expected a float, got text 'abc'"),
        ("max_norm: '1e-3'", "max_norm: expected a float, got text '1e-3'; remove the quotes"),
        ("name: 12", "name: expected text, got 12; put it in quotes"),
        ("roi: {kind: roi_align, aligned: 1}", "roi.aligned: expected true or false, got 1"),
        ("image_size: [1, 2, 3]", "image_size: expected at most 2 items, got the list [1, 2, 3]"),
        ("image_size: [1]", "image_size[1]: missing"),
        ("image_size: [1, x]", "image_size[1]: expected an int, got text 'x'"),
        ("momentum: 1", "momentum: expected a value less than 1, got 1"),
        ("limit: x", "limit: expected an int, got text 'x'"),
        ("optimizer: 3", "optimizer: expected a mapping, got 3"),
        ("workers: atuo", "workers: expected an int or 'auto', got text 'atuo'"),
        ("scale: x", "scale: expected a float or a list, got text 'x'"),
        ("scale: [1, x]", "scale[1]: expected a float, got text 'x'"),
        ("extra: {kind: roi_pool, size: x}", "extra.size: expected an int, got text 'x'"),
        ("per_level: [{kind: roi_pool}, {}]", "per_level[1].kind: missing; one of roi_pool, roi_align"),
        ("by_name: {roi_pool: {kind: roi_pool, size: x}}", "by_name.roi_pool.size: expected an int, got text 'x'"),
        ("either: {kind: roi_pool, size: x}", "either.size: expected an int, got text 'x'"),
        ("either: 3", "either: expected a mapping or text, got 3"),
    ],
)
def test_values_of_the_wrong_type(write: Write, line: str, message: str) -> None:
    path = write(part=MINIMAL, top=f"base: part.yaml\n{line}")
    assert problems(path) == [f"{message} [top.yaml:2]"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "roi: {kind: roi_aling}",
            "roi.kind: 'roi_aling' is not one of roi_pool, roi_align; did you mean 'roi_align'?",
        ),
        ("roi: {kind: xyz}", "roi.kind: 'xyz' is not one of roi_pool, roi_align"),
        ("roi: {kind: 3}", "roi.kind: 3 is not one of roi_pool, roi_align"),
        ("roi: {size: 7}", "roi.kind: missing; one of roi_pool, roi_align"),
        (
            "roi: {kind: roi_pool, sampling_ratio: 2}",
            "roi.sampling_ratio: unknown key for kind roi_pool; known are kind, size",
        ),
        (
            "roi: {kind: roi_align, samplig_ratio: 2}",
            "roi.samplig_ratio: unknown key for kind roi_align; did you mean 'sampling_ratio'?",
        ),
    ],
)
def test_wrong_choices(write: Write, line: str, message: str) -> None:
    assert problems(write(top=f"classes: 3\n{line}")) == [f"{message} [top.yaml:2]"]


def test_an_extension_point_with_one_kind_or_none(write: Write) -> None:
    class ShapeConfig(Part):
        pass

    class Drawing(Section):
        shapes: tuple[ShapeConfig, ...] = ()

    def messages(line: str) -> list[str]:
        path = write(top=line)
        with pytest.raises(InputError) as caught:
            read_config(path, Drawing)
        return [message.removesuffix(f" [{path}:1]") for message in str(caught.value).split("\n  ")[1:]]

    nothing = "shapes[0]: no kind is known; `imports` lists the modules that define kinds"
    assert messages("shapes: [{kind: disc}]") == [nothing]
    assert json_schema(Drawing)["properties"]["shapes"]["items"] == {"type": "object", "additionalProperties": True}

    class DiscConfig(ShapeConfig):
        kind: Literal["disc"] = "disc"
        radius: int = 1

    assert messages("shapes: [{kind: disk}]") == ["shapes[0].kind: 'disk' is not one of disc; did you mean 'disc'?"]
    assert messages("shapes: [{kind: disc, radius: x}]") == ["shapes[0].radius: expected an int, got text 'x'"]
    assert read_config(write(top="shapes: [{kind: disc}]"), Drawing).shapes == (DiscConfig(),)


def test_a_literal_outside_a_union_has_suggestions(write: Write) -> None:
    class ModeConfig(Section):
        mode: Literal["train", "test"]

    with pytest.raises(InputError, match="mode: 'tain' is not one of train, test; did you mean 'train'"):
        read_config(write(top="mode: tain"), ModeConfig)


def test_a_validator_error_has_the_path_of_its_section(write: Write) -> None:
    (line,) = problems(write(top=f"{MINIMAL}optimizer: {{steps: [5]}}"))
    assert line == "optimizer: warmup (10) must end before the first step (5) [top.yaml:3]"


def test_a_validator_error_of_the_whole_has_no_path(write: Write) -> None:
    path = write(top="warmup: 99")
    with pytest.raises(InputError) as caught:
        read_config(path, Optimizer)
    assert str(caught.value) == f"{path}: 1 problem\n  warmup (99) must end before the first step (60)"


def test_every_problem_in_one_message_with_its_place(write: Write) -> None:
    path = write(
        part="roi:\n  kind: roi_align\n  siez: 3\noptimizer: {lr: abc}",
        top="base: part.yaml\nname: a\nname: b\nimage_siz: 3\ntrue: 3\nlimit: 1.5",
    )
    assert problems(path, "momentum=2", "nonsense") == [
        "top.yaml:3: the key 'name' is given twice, first on line 2",
        "top.yaml:5: the key 'true' is not text; put it in quotes",
        "--set nonsense: expected KEY=VALUE, such as model.roi.kind=roi_pool",
        "roi.siez: unknown key for kind roi_align; did you mean 'size'? [part.yaml:3]",
        "classes: missing",
        "optimizer.lr: expected a float, got text 'abc' [part.yaml:4]",
        "momentum: expected a value less than 1, got 2 [--set]",
        "limit: expected an int, got 1.5 [top.yaml:6]",
        "image_siz: unknown key; did you mean 'image_size'? [top.yaml:4]",
    ]


def test_a_duplicate_in_a_base_is_found(write: Write) -> None:
    path = write(part=MINIMAL + "optimizer:\n  lr: 1\n  warmup: 1\n  lr: 2", top="base: part.yaml")
    assert problems(path) == ["part.yaml:6: the key 'lr' is given twice, first on line 4"]


# Files


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"top": "base: no.yaml"},
            "no.yaml (a base of top.yaml): cannot read the file: No such file or directory",
        ),
        ({"top": "base: 3"}, "top.yaml: base: expected a path or a list of paths, got 3"),
        ({"top": "base: [3]"}, "top.yaml: base: expected a path or a list of paths, got the list [3]"),
        ({"top": "- 3"}, "top.yaml: expected a mapping (lines of `key: value`), got the list [3]"),
        (
            {"top": "a: b: c"},
            "top.yaml: not valid YAML: line 1, column 5: mapping values are not allowed here",
        ),
        (
            {"top": "a: &a {b: *a}"},
            "top.yaml: not valid YAML: line 1, column 11: an alias is inside of the value that it repeats",
        ),
        (
            {"top": "base: top.yaml"},
            "top.yaml: base files must not form a cycle: top.yaml -> top.yaml",
        ),
        (
            {"a": "base: b.yaml", "b": "base: top.yaml", "top": "base: a.yaml"},
            "top.yaml: base files must not form a cycle: top.yaml -> a.yaml -> b.yaml -> top.yaml",
        ),
    ],
)
def test_files_that_cannot_be_used(write: Write, files: dict[str, str], message: str) -> None:
    assert refusal(write(**files)) == message


def test_files_that_share_their_bases_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of forty files has two bases, which have the next two: 2^40 paths lead to the last ones."""
    for level in range(40):
        for side in "ab":
            bases = f"base: [{level + 1}a.yaml, {level + 1}b.yaml]\n" if level < 39 else "classes: 7\n"
            (tmp_path / f"{level}{side}.yaml").write_text(bases)
    reads = []
    read = composition.read_file
    monkeypatch.setattr(composition, "read_file", lambda path, **limits: (reads.append(path), read(path, **limits))[1])
    assert composition.compose(tmp_path / "0a.yaml", []) == {"classes": 7}
    assert len(reads) == 79


def test_a_file_that_is_absent_a_folder_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert refusal(tmp_path / "no.yaml") == "no.yaml: cannot read the file: No such file or directory"
    assert "Is a directory" in refusal(tmp_path)
    assert refusal(tmp_path / "binary.yaml") == "binary.yaml: the file is not UTF-8 text"


DOUBLING = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))
MERGING = "a0: &a0 {k: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(60))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(3000))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: " + "[" * 10_000, "lists and mappings nest more than 50 deep"),
        ("a: " + "{b: " * 10_000, "lists and mappings nest more than 50 deep"),
        ("- " * 10_000, "lists and mappings nest more than 50 deep"),
        (DOUBLING, "with what aliases repeat, there are more than 100000 values"),
        (MERGING, "with what aliases repeat, there are more than 100000 values"),
        (CHAIN, "or more than 50 levels"),
        ("#" * 2**20 + "#", "cannot read the file: it has 1048577 bytes, more than 1048576"),
        ("a: \x00", "not valid YAML: unacceptable character #x0000"),
        ('a: "\\uD800"', "line 1, column 4: text must not have a null character or half of a surrogate pair"),
        ('base: "a\\0.yaml"', "line 1, column 7: text must not have a null character or half of a surrogate pair"),
        ("a: !!int x", "not valid YAML: line 1, column 4: this is no int"),
        (f"a: 0x{'f' * 1000}", "not valid YAML: line 1, column 4: this is no int"),
        ("a: !!map x", "not valid YAML: line 1, column 4: this is no map"),
        ("a: !!float 1:30", "not valid YAML: line 1, column 4: this is no float"),
        ("a: !!python/object:os.system x", "could not determine a constructor for the tag"),
    ],
)
def test_the_work_on_a_hostile_file_is_bounded(write: Write, content: str, message: str) -> None:
    assert message in refusal(write(top=content))


def test_a_long_override_is_bounded(write: Write) -> None:
    (line,) = problems(write(top=MINIMAL), f"{'a.' * 10_000}a=1")
    assert len(line) < 400
    (line,) = problems(write(top=MINIMAL), f"classes={'[' * 10_000}")
    assert "lists and mappings nest more than 50 deep" in line


def test_only_regular_files_are_opened(write: Write, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name, reason in [
        ("pipe", "it is a pipe, a socket or a device"),
        ("loop", "symbolic links"),
        ("x" * 300, "long"),
    ]:
        message = f"cannot read the file: .*{reason}"
        with pytest.raises(InputError, match=message):
            load(tmp_path / f"{name}.yaml")
        with pytest.raises(InputError, match=message):
            load(write(top=f"base: {name}.yaml"))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load(tmp_path / "top.yaml").classes == 3


def test_a_tilde_is_the_home_directory(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Files(Section):
        folder: Path
        more: tuple[Path, ...] = ()

    monkeypatch.setenv("HOME", str(tmp_path))
    write(part="folder: ~/data\nmore: [~/a, b~]")
    top = write(top="base: ~/part.yaml")
    files = Files(folder=tmp_path / "data", more=(tmp_path / "a", Path("b~")))
    assert read_config(top, Files) == read_config("~/top.yaml", Files) == files


def test_an_empty_file_is_an_empty_mapping(write: Write) -> None:
    assert read_config(write(top=""), Optimizer) == Optimizer()


# The configuration itself and its dumps


def test_a_section_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Pool().size = 3  # type: ignore[misc]


FULL = """\
roi: {kind: roi_align, sampling_ratio: 2}
classes: 80
name: '1e-3'
root: some/where
optimizer: {lr: 1e-5, steps: []}
per_level: [{kind: roi_pool}, {kind: roi_align}]
by_name: {'on': {kind: roi_pool}, '1e3': {kind: roi_align}, 2020-01-01: {kind: roi_pool}}
scale: [0.5, 2]
"""


def test_a_dump_reads_back_as_an_equal_object(write: Write) -> None:
    config = load(write(top=FULL))
    assert load(write(resolved=to_yaml(config))) == config


def test_a_dump_keeps_the_order_of_fields_and_short_lists_on_a_line(write: Write) -> None:
    text = to_yaml(load(write(top=FULL)))
    assert list(yaml.safe_load(text)) == list(Experiment.model_fields)
    assert "  steps: []\n" in text
    assert "image_size: [800, 1333]\n" in text
    assert "per_level:\n- kind: roi_pool\n" in text


def test_differences_name_keys_and_both_values() -> None:
    old = {"roi": {"kind": "roi_align", "aligned": True}, "lr": 0.1, "same": [1], "limit": None}
    new = {"roi": {"kind": "roi_pool"}, "lr": 0.2, "same": [1], "limit": None, "steps": [1, 2]}
    assert differences(old, new) == [
        "roi.kind: roi_align -> roi_pool",
        "roi.aligned: true -> (absent)",
        "lr: 0.1 -> 0.2",
        "steps: (absent) -> [1, 2]",
    ]
    assert differences(old, old) == []


def test_the_schema_fits_parts_as_well_as_experiments() -> None:
    schema = json_schema(Experiment)
    assert "required" not in schema
    assert all("required" not in section for section in schema["$defs"].values())
    assert schema["additionalProperties"] is False
    assert schema["properties"]["base"]["anyOf"][1] == {"type": "array", "items": {"type": "string"}}
    # `oneOf` would refuse `roi: {size: 7}`, which fits both choices.
    assert schema["properties"]["roi"]["anyOf"] == [{"$ref": "#/$defs/Pool"}, {"$ref": "#/$defs/Align"}]
    assert "base" not in schema["$defs"]["Pool"]["properties"]


def test_reading_a_configuration_needs_no_torch() -> None:
    code = "import sys, maskrcnn.config, maskrcnn.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

import dataclasses
import pickle
import random
import re
import signal
import tarfile
import zipfile
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from maskrcnn.engine.checkpoint import (
    CheckpointFolder,
    TrainingState,
    capture,
    load_checkpoint,
    load_weights,
    random_states,
    restore,
    save_checkpoint,
    set_random_states,
)
from maskrcnn.engine.ema import ExponentialAverage
from maskrcnn.engine.optimizer import AdamWConfig, SGDConfig
from maskrcnn.errors import InputError
from maskrcnn.structures import ClassRows, ClassTable

CLASSES = ClassTable(names=("cat", "dog", "owl"), category_ids=(1, 7, 90))
CONFIG = {"training": {"batch_size": 2, "clip_norm": None, "steps": [1, 2]}}


class Heads(nn.Module):
    """Head parameters with class-specific rows, and a class-agnostic layer."""

    def __init__(self, classes: int, width: int = 2) -> None:
        super().__init__()
        self.shared = nn.Linear(3, width)
        self.scores = nn.Linear(width, classes + 1)
        self.deltas = nn.Linear(width, classes * 4)
        self.masks = nn.Conv2d(width, classes, 1)

    def class_rows(self) -> Mapping[str, ClassRows]:
        layouts = {
            "scores": ClassRows(per_class=1, background=True),
            "deltas": ClassRows(per_class=4, background=False),
            "masks": ClassRows(per_class=1, background=False),
        }
        return {f"{layer}.{kind}": layout for layer, layout in layouts.items() for kind in ("weight", "bias")}


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.fixture
def optimizer(model):
    optimizer = AdamWConfig().build(model, batch_size=16)
    model(torch.randn(4, 2)).square().mean().backward()
    optimizer.step()
    return optimizer


def checkpoint_of(model, optimizer, iteration=7, metrics=None):
    metrics = metrics or {}
    return capture(
        TrainingState(model, optimizer), iteration=iteration, classes=CLASSES, config=CONFIG, metrics=metrics
    )


# ---- Files


def test_a_saved_checkpoint_loads_unchanged(tmp_path, model, optimizer):
    path = tmp_path / "new" / "last.pt"
    saved = checkpoint_of(model, optimizer, metrics={"segm/AP": 0.25})
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)
    assert (loaded.iteration, loaded.classes, loaded.config) == (7, CLASSES, CONFIG)
    assert (loaded.metrics, loaded.versions) == ({"segm/AP": 0.25}, saved.versions)
    assert loaded.model.keys() == saved.model.keys()
    for name, tensor in saved.model.items():
        assert torch.equal(loaded.model[name], tensor)
    assert [entry.name for entry in path.parent.iterdir()] == ["last.pt"]


def test_restore_loads_weights_optimizer_and_random_states(tmp_path, model, optimizer):
    save_checkpoint(tmp_path / "last.pt", checkpoint_of(model, optimizer))
    samples = torch.rand(3), np.random.rand(), random.random()
    other = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    fresh = AdamWConfig().build(other, batch_size=16)
    restore(load_checkpoint(tmp_path / "last.pt"), TrainingState(other, fresh), source="last.pt")
    assert torch.equal(torch.rand(3), samples[0])
    assert (np.random.rand(), random.random()) == samples[1:]
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert torch.equal(fresh.state[other[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
    assert fresh.state[other[0].weight]["step"] == 1


def test_random_states_include_the_cached_normal_of_numpy():
    np.random.seed(3)
    np.random.standard_normal()  # NumPy draws two values and caches one
    states = random_states()
    samples = np.random.standard_normal(3)
    set_random_states(states)
    assert np.array_equal(np.random.standard_normal(3), samples)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, model, optimizer):
    other = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    fresh = TrainingState(other, SGDConfig().build(other, batch_size=16))
    with pytest.raises(InputError, match=r"last\.pt: .*(\n.*)*0\.weight: \[3, 2\] in the file, \[4, 2\] in the model"):
        restore(checkpoint_of(model, optimizer), fresh, source="last.pt")


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, model, optimizer, monkeypatch, failing):
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint_of(model, optimizer, iteration=1))

    def fail(*arguments):
        if failing == "torch.save":
            arguments[1].write(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, checkpoint_of(model, optimizer, iteration=2))
    monkeypatch.undo()
    assert load_checkpoint(path).iteration == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
from maskrcnn.structures import ClassTable
from maskrcnn.engine.checkpoint import CheckpointFolder, TrainingState
from maskrcnn.engine.optimizer import SGDConfig

model = nn.Linear(1, 1)
folder = CheckpointFolder(
    Path(sys.argv[1]),
    state=TrainingState(model, SGDConfig().build(model, batch_size=16)),
    classes=ClassTable((), ()),
    config={},
    metric="segm/AP",
)
folder.save(1)

def die_half_way(content, file):
    file.write(b"the first half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = die_half_way
folder.save(2)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_checkpoint(launcher, tmp_path, model, optimizer):
    assert launcher.run("-c", KILLED_WHILE_SAVING, tmp_path).status == -signal.SIGKILL
    assert (tmp_path / "last.pt.tmp").exists()
    assert load_checkpoint(tmp_path / "last.pt").iteration == 1
    save_checkpoint(
        tmp_path / "last.pt", checkpoint_of(model, optimizer, iteration=3)
    )  # the temporary file does not prevent a save
    assert load_checkpoint(tmp_path / "last.pt").iteration == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.pt: cannot read it: No such file"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(InputError, match="cannot read it: Is a directory"):
        load_checkpoint(tmp_path)


def test_a_damaged_file_is_named(tmp_path, model, optimizer):
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint_of(model, optimizer))
    content = path.read_bytes()
    for damaged in (b"", b"hello", content[: len(content) // 2], content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"last\.pt: "):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", {"weight": 3}, "model.weight: Input should be an instance of Tensor"),
        ("iteration", "soon", "iteration: Input should be a valid integer"),
        ("classes", {"names": None, "category_ids": (1,)}, "classes.names: Input should be a valid tuple"),
        ("classes", {"names": ("a", "b"), "category_ids": (1,)}, "classes has not as many names as ids"),
        ("config", None, "it lacks config"),
    ],
)
def test_a_field_that_is_no_such_field_is_named(tmp_path, model, optimizer, field, value, message):
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint_of(model, optimizer))
    torch.save(torch.load(path, weights_only=True) | {field: value}, path)
    with pytest.raises(InputError, match=rf"last\.pt: the checkpoint is damaged: {re.escape(message)}"):
        load_checkpoint(path)


def equal(first, second):
    """Return whether two checkpoints, or parts of them, are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def test_a_flipped_byte_is_found_or_changes_nothing(tmp_path, model, optimizer):
    """Some bytes of the file, such as padding, have no meaning."""
    path = tmp_path / "last.pt"
    saved = checkpoint_of(model, optimizer)
    save_checkpoint(path, saved)
    content = path.read_bytes()
    weight = model[0].weight.detach().numpy().tobytes()
    position = content.index(weight)
    found = 0
    for place in {position, position + len(weight) - 1, *range(0, len(content), 101)}:
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            assert equal(dataclasses.asdict(load_checkpoint(path)), dataclasses.asdict(saved))
        except InputError as error:
            found += str(error).startswith(f"{path}: ")
    assert found > len(range(0, len(content), 101)) / 2
    path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    with pytest.raises(InputError, match=r"last\.pt: .*it is damaged: .*/data/\d+ has a wrong checksum"):
        load_checkpoint(path)


def code(path):
    torch.save({"format": print}, path)


def plain_pickle(path):
    path.write_bytes(pickle.dumps({"model": np.zeros(3)}))


def whole_model(path):
    torch.save(nn.Linear(2, 2), path)


def old_format(path):
    torch.save({"model": print}, path, _use_new_zipfile_serialization=False)


def script(path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def archive(path):
    with tarfile.open(path, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name))


def other_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello.txt", "hello")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [code, plain_pickle, whole_model, old_format, script, archive, other_zip])
def test_a_file_that_could_run_code_is_refused_without_advice_to_run_it(tmp_path, make, recwarn):
    path = tmp_path / "evil.pt"
    make(path)
    recwarn.clear()
    with pytest.raises(InputError, match=r"evil\.pt: this is not a file of tensors that can be read safely") as refusal:
        load_checkpoint(path)
    message = str(refusal.value)
    assert "\n" not in message
    assert not any(word in message.lower() for word in ("weights_only", "weights only", "trust", "option", "allowlist"))
    assert not recwarn.list


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2]])
def test_a_file_without_names_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "list.pt")
    with pytest.raises(InputError, match=r"list\.pt: it holds a \w+, not tensors by name"):
        load_checkpoint(tmp_path / "list.pt")


def test_a_foreign_state_dict_is_refused(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "resnet.pt")
    with pytest.raises(InputError, match=r"resnet\.pt: this is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "resnet.pt")


def test_missing_fields_of_a_checkpoint_are_named(tmp_path, model, optimizer):
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint_of(model, optimizer))
    content = torch.load(path, weights_only=True)
    del content["optimizer"], content["classes"]
    torch.save(content, path)
    with pytest.raises(InputError, match=r"last\.pt: .*lacks optimizer, classes"):
        load_checkpoint(path)


def folder_of(path, model, optimizer, **options):
    state = TrainingState(model, optimizer)
    return CheckpointFolder(path, state=state, classes=CLASSES, config=CONFIG, metric="segm/AP", **options)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_newest_checkpoints_are_kept(tmp_path, model, optimizer, links, monkeypatch):
    if not links:

        def refuse(*arguments):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("os.link", refuse)
    folder = folder_of(tmp_path, model, optimizer, keep=2)
    for iteration in (5, 10, 15):
        folder.save(iteration)
    folder.save(15)  # as on a signal right after a regular save
    names = ["iteration_00000010.pt", "iteration_00000015.pt", "last.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [load_checkpoint(tmp_path / name).iteration for name in names] == [10, 15, 15]


def test_averaged_weights_come_back_and_their_absence_is_refused(tmp_path, model, optimizer):
    average = ExponentialAverage(model, decay=0.5)
    with torch.no_grad():
        model[0].weight.zero_()
    average.update(100)
    saved = capture(
        TrainingState(model, optimizer, average=average), iteration=1, classes=CLASSES, config=CONFIG, metrics={}
    )
    save_checkpoint(tmp_path / "last.pt", saved)
    other = ExponentialAverage(model, decay=0.5)
    restore(load_checkpoint(tmp_path / "last.pt"), TrainingState(model, optimizer, average=other), source="last.pt")
    for name, tensor in average.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert not torch.equal(other.state_dict()["0.weight"], model[0].weight)
    with pytest.raises(InputError, match=r"last\.pt: it holds no averaged weights"):
        restore(checkpoint_of(model, optimizer), TrainingState(model, optimizer, average=other), source="last.pt")


def test_best_checkpoint_is_kept_after_a_resume(tmp_path, model, optimizer):
    def folder():
        return folder_of(tmp_path, model, optimizer)

    first = folder()
    assert first.keep_best(10, {"segm/AP": 0.2})
    assert first.keep_best(20, {"segm/AP": 0.4})
    assert not first.keep_best(30, {"segm/AP": float("nan")})
    resumed = folder()
    assert resumed.best_iteration == 20
    assert not resumed.keep_best(40, {"segm/AP": 0.3})
    best = load_checkpoint(tmp_path / "best.pt")
    assert (best.iteration, best.metrics) == (20, {"segm/AP": 0.4})
    resumed.save(40)
    assert load_checkpoint(tmp_path / "last.pt").iteration == 40


# ---- Weights only


def test_matching_weights_are_loaded_and_the_others_reported():
    model = nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 4, bias=False), "new": nn.Linear(1, 1)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {
        "body.weight": torch.ones(3, 2),
        "body.bias": torch.ones(3),
        "head.weight": torch.ones(5, 3),
        "old.weight": torch.ones(1),
    }
    report = load_weights(model, weights, source="init.pt")
    assert report.loaded == ("body.weight", "body.bias")
    assert report.misfits == (("head.weight", (5, 3), (4, 3)),)
    assert report.missing == ("new.weight", "new.bias")
    assert report.unused == ("old.weight",)
    assert torch.equal(model["body"].weight, torch.ones(3, 2))
    assert torch.equal(model["head"].weight, before["head.weight"])
    assert report.describe().splitlines() == [
        "2 tensors loaded from init.pt",
        "  does not fit  head.weight: [5, 3] in the file, [4, 3] in the model",
        "  missing       new.weight: not in the file",
        "  missing       new.bias: not in the file",
        "  unused        old.weight: not in the model",
    ]
    with pytest.raises(InputError, match=r"init\.pt: these weights do not match this model(\n.*)*head\.weight"):
        report.require_complete()


def test_the_report_is_complete_if_all_weights_match(model):
    report = load_weights(model, model.state_dict(), source="last.pt")
    report.require_complete()
    assert report.describe() == "7 tensors loaded from last.pt"


def numbered(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return weights for `model` in which each row holds its own index."""
    rows = {name: torch.arange(len(tensor), dtype=torch.float32) for name, tensor in model.state_dict().items()}
    return {
        name: rows[name].view(-1, *[1] * (tensor.ndim - 1)).expand_as(tensor)
        for name, tensor in model.state_dict().items()
    }


def test_rows_by_hand():
    scores = ClassRows(per_class=1, background=True)
    assert (scores.count(3), scores.of([3, 1])) == (4, [0, 3, 1])
    deltas = ClassRows(per_class=4, background=False)
    assert (deltas.count(2), deltas.of([2])) == (8, [4, 5, 6, 7])
    cells = ClassRows(per_class=2, background=True)
    assert (cells.count(2), cells.of([2, 1]), cells.of([])) == (6, [0, 1, 4, 5, 2, 3], [0, 1])
    assert ClassRows(per_class=2, background=False).of([]) == []


def test_class_rows_follow_their_names():
    target = ClassTable(names=("owl", "fox", "cat"), category_ids=(1, 2, 3))
    model = Heads(classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1.0)
    weights = numbered(Heads(classes=3))
    report = load_weights(model, weights, source="init.pt", source_classes=CLASSES, classes=target)
    # The labels of cat, dog, owl in the file are 1, 2, 3. The rows of fox, which is not in the file, keep -1.
    assert model.scores.bias.tolist() == [0, 3, -1, 1]
    assert model.scores.weight[:, 1].tolist() == [0, 3, -1, 1]
    assert model.deltas.bias.tolist() == [8, 9, 10, 11, -1, -1, -1, -1, 0, 1, 2, 3]
    assert model.deltas.weight[:, 0].tolist() == [8, 9, 10, 11, -1, -1, -1, -1, 0, 1, 2, 3]
    assert model.masks.bias.tolist() == [2, -1, 0]
    assert model.masks.weight[:, 1, 0, 0].tolist() == [2, -1, 0]
    assert model.shared.bias.tolist() == [0, 1]
    assert (report.known_classes, report.new_classes) == (("owl", "cat"), ("fox",))
    assert "\n    fox  new" in report.describe()
    assert weights["scores.bias"].tolist() == [0, 1, 2, 3]  # the tensors of the caller are unchanged
    with pytest.raises(InputError, match="fox"):
        report.require_complete()


@pytest.mark.parametrize("names", [("dog",), ("cat", "dog", "owl", "fox", "elk")])
def test_class_rows_follow_their_names_into_another_number_of_classes(names):
    model = Heads(classes=len(names))
    target = ClassTable(names=names, category_ids=tuple(range(len(names))))
    report = load_weights(model, numbered(Heads(classes=3)), source="x", source_classes=CLASSES, classes=target)
    assert report.misfits == ()
    dog = names.index("dog")
    assert model.scores.bias[[0, dog + 1]].tolist() == [0, 2]
    assert model.deltas.bias[4 * dog : 4 * dog + 4].tolist() == [4, 5, 6, 7]
    assert model.masks.bias[dog].item() == 1


def test_no_common_class_keeps_background_alone():
    model = Heads(classes=1)
    before = model.masks.weight.clone()
    target = ClassTable(names=("fox",), category_ids=(1,))
    report = load_weights(model, numbered(Heads(classes=3)), source="x", source_classes=CLASSES, classes=target)
    assert report.known_classes == ()
    assert model.scores.bias[0].item() == 0
    assert torch.equal(model.masks.weight, before)


def test_class_rows_of_another_width_do_not_fit():
    model = Heads(classes=3, width=5)
    report = load_weights(model, numbered(Heads(classes=3)), source="x", source_classes=CLASSES, classes=CLASSES)
    assert ("scores.weight", (4, 2), (4, 5)) in report.misfits
    assert model.scores.bias.tolist() == [0, 1, 2, 3]


def test_rows_that_contradict_the_class_table_are_refused():
    with pytest.raises(InputError, match=r"init\.pt: scores\.weight has 3 rows, but 3 classes need 4"):
        load_weights(
            Heads(classes=3), numbered(Heads(classes=2)), source="init.pt", source_classes=CLASSES, classes=CLASSES
        )

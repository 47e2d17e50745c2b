"""Rules for configuration changes of a resumed run: every key has a rule with the expected effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskrcnn.config import Section, read_config, to_dict
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.resume_rules import RULES, UNKNOWN, changes, identity, rule_of

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = ("coco/mask_rcnn_r50_fpn_1x.yaml", "coco/mask_rcnn_vgg16_1x.yaml", "shapes/mask_rcnn_r18_fpn.yaml")


def keys_of(section: dict[str, Any], prefix: str = "") -> set[str]:
    """Return the names of all keys and sections."""
    names = {f"{prefix}{key}" for key in section}
    nested = [keys_of(value, f"{prefix}{key}.") for key, value in section.items() if isinstance(value, dict)]
    return names.union(*nested)


def keys() -> set[str]:
    return set().union(*(keys_of(to_dict(read_config(CONFIGS / name, ExperimentConfig))) for name in SHIPPED))


def test_every_key_has_a_rule_and_every_rule_a_key() -> None:
    sections = {"data", "training"}
    assert [key for key in sorted(keys() - sections) if rule_of(key) is UNKNOWN] == []
    assert RULES.keys() - keys() == set()


@pytest.mark.parametrize(
    ("key", "effect"),
    [
        ("model.backbone.depth", "refused"),
        ("model.rpn.nms_threshold", "refused"),
        ("model.mask_head.kind", "refused"),
        ("model.backbone.weights", "harmless"),
        ("model.detection.score_threshold", "warned"),
        ("data.train.seed", "refused"),
        ("data.train.root", "harmless"),
        ("data.root", "harmless"),
        ("data.validation.annotations", "warned"),
        ("training.batch_size", "refused"),
        ("training.seed", "refused"),
        ("training.sampler.kind", "refused"),
        ("training.optimizer.kind", "refused"),
        ("training.optimizer.weight_decay", "refused"),
        ("training.optimizer.lr", "warned"),
        ("training.schedule.iterations", "warned"),
        ("training.schedule.kind", "warned"),
        ("training.workers", "harmless"),
        ("training.log_every", "harmless"),
        ("evaluation.pictures", "harmless"),
        ("evaluation.metrics", "warned"),
        ("evaluation.best_metric", "warned"),
        ("evaluations", "refused"),
        ("nobody.knows", "refused"),
    ],
)
def test_the_rule_of_a_key_is_its_own_or_that_of_the_longest_section(key: str, effect: str) -> None:
    assert rule_of(key).effect == effect


def test_a_changed_kind_lists_all_keys_of_the_section() -> None:
    old = {"training": {"schedule": {"kind": "cosine", "final_factor": 0.0}, "optimizer": {"kind": "sgd"}}}
    new = {"training": {"schedule": {"kind": "multi_step", "gamma": 0.1}, "optimizer": {"kind": "adamw"}}}
    by_effect = changes(old, new)
    assert [line.split(" (the ")[0] for line in by_effect.warned] == [
        "training.schedule.kind: cosine -> multi_step",
        "training.schedule.final_factor: 0.0 -> (absent)",
        "training.schedule.gamma: (absent) -> 0.1",
    ]
    assert [line.split(" (")[0] for line in by_effect.refused] == ["training.optimizer.kind: sgd -> adamw"]
    assert by_effect.harmless == []
    assert changes(new, new).describe() == ""


class _Resize(Section):
    kind: str = "resize"
    side: int = 800


class _Model(Section):
    width: int = 64


class _Old(Section):
    model: _Model = _Model()
    steps: tuple[_Resize, ...] = (_Resize(),)


class _NewModel(_Model):
    scale: float = 1.0


class _New(_Old):
    model: _NewModel = _NewModel()
    sizes: tuple[int, ...] = (1, 2)


def test_a_new_key_with_its_default_does_not_change_the_identity() -> None:
    assert identity(_Old()) == identity(_New())
    old, new = _Old(model=_Model(width=8)), _New(model=_NewModel(width=8))
    assert identity(old) == identity(new)
    assert identity(new)["model.width"] == 8
    assert identity(_New(sizes=(3,)))["sizes"] == [3]
    assert identity(_Old(steps=(_Resize(), _Resize(side=9))))["steps[1].side"] == 9


def test_the_identity_holds_every_changed_key_that_affects_the_result() -> None:
    path = CONFIGS / "shapes/mask_rcnn_r18_fpn.yaml"
    overrides = [
        "training.workers=9",
        "training.seed=9",
        "model.roi={kind: roi_warp}",
        "evaluation.backend=pycocotools",
    ]
    plain, changed = (identity(read_config(path, ExperimentConfig, lines)) for lines in ([], overrides))
    assert changed == {**plain, "training.seed": 9, "model.roi": "roi_warp"}

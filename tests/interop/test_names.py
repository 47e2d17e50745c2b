"""Templates of names."""

from __future__ import annotations

import pytest

from maskrcnn.interop.names import Rule, fill, match, to_ours, to_theirs

RULES = (
    Rule("layer{i}.{j}.conv{k}.weight", "res{i+1}.{j}.conv{k}.weight"),
    Rule("neck.{i}.{p}", "fpn{i+2}.{p}"),
    Rule("neck.{i}.norm.{norm}", "fpn{i+2}.norm.{norm}"),
    Rule("neck.{i}.{p}", "old_fpn{i+1}.{p}"),
    Rule("rest.{any}", "body.{any}"),
)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("layer1.0.conv3.weight", "res2.0.conv3.weight"),
        ("layer10.22.conv1.weight", "res11.22.conv1.weight"),
        ("neck.0.bias", "fpn2.bias"),
        ("neck.3.norm.running_var", "fpn5.norm.running_var"),
        ("rest.a.b", "body.a.b"),
    ],
)
def test_both_directions(ours: str, theirs: str) -> None:
    assert to_ours(theirs, RULES) == ours
    assert to_theirs(ours, RULES) == theirs


@pytest.mark.parametrize(
    "name", ["fpn1.bias", "fpn2.gamma", "xfpn2.bias", "fpn2.bias.x", "fpn2xbias", "body.", "fpn-2.bias"]
)
def test_other_names_are_unknown(name: str) -> None:
    assert to_ours(name, RULES) is None


def test_old_names_are_read_and_new_names_are_written() -> None:
    assert to_ours("old_fpn1.weight", RULES) == "neck.0.weight"
    assert to_theirs("neck.0.weight", RULES) == "fpn2.weight"


def test_a_template_fills_what_it_matched() -> None:
    values = match("res{i+1}.{p}", "res4.bias")
    assert values == {"i": "3", "p": "bias"}
    assert fill("res{i+1}.{p}", values) == "res4.bias"

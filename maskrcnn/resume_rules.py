"""Rules for configuration changes when a run is resumed, and the keys that determine the result of a run.

- refused: the checkpoint does not match the new configuration, or the order of the images would change within an epoch.
- warned: training can continue, but no single configuration describes the whole run any more.
- harmless: the change does not affect training or metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pydantic_core import to_jsonable_python

from maskrcnn.config import Section, differences

Effect = Literal["refused", "warned", "harmless"]


class Rule(NamedTuple):
    """The effect of a change, and the reason."""

    effect: Effect
    reason: str
    new_run: bool = False  # a harmless change when a run resumes, but a new run may have another result


_MEASURED = Rule("warned", "metrics before and after are not comparable, but best.pt is chosen among both")
_ROUNDING = Rule("warned", "rounding differs from the next training step on")
_NEXT_STEP = Rule("warned", "takes effect from the next training step on")
_START = Rule("harmless", "a resumed run loads its weights from the checkpoint", new_run=True)
_WHEN = Rule("harmless", "does not affect the training steps")
_STOP = Rule("harmless", "does not affect the training steps that are done", new_run=True)
_PLACE = Rule("harmless", "location of the files, not their content")

# A rule applies to a key and all keys below it. The rule of the longest matching key applies.
RULES: Mapping[str, Rule] = {
    "imports": Rule("harmless", "names modules, whose kinds the other keys select"),
    "model": Rule("refused", "the stored weights belong to another model, or have another meaning in it"),
    "model.backbone.weights": _START,
    "model.box_head.initialization": _START,
    "model.mask_head.initialization": _START,
    "model.backbone.checkpoint_activations": Rule("harmless", "same results with less memory"),
    "model.loss_weights": _NEXT_STEP,
    "model.kernels": _ROUNDING,
    "model.rpn.inference": _MEASURED,
    "model.rpn.sparse_loss": _ROUNDING,
    "model.detection": _MEASURED,
    "model.mask_head.paste": _MEASURED,
    "data.root": _PLACE,
    "data.train": Rule(
        "refused", "the order of the images changes: some would be used twice in an epoch, others never"
    ),
    "data.train.root": _PLACE,
    "data.validation": _MEASURED,
    "data.validation.root": _PLACE,
    "data.train_transforms": Rule("warned", "images are transformed differently from the next training step on"),
    "data.validation_transforms": _MEASURED,
    "data.num_classes": Rule("harmless", "only compared with the annotations"),
    "training.batch_size": Rule(
        "refused", "the finished iterations would correspond to other images and another epoch"
    ),
    "training.grad_accum_steps": Rule(
        "warned", "rounding and the batches of batch norms differ from the next training step on"
    ),
    "training.optimizer": Rule("refused", "the stored momenta belong to other parameter groups or another optimizer"),
    "training.optimizer.lr": _NEXT_STEP,
    "training.optimizer.base_batch": _NEXT_STEP,
    "training.optimizer.momentum": _NEXT_STEP,
    "training.optimizer.betas": _NEXT_STEP,
    "training.schedule": Rule(
        "warned", "the learning rate follows the new schedule from the next step on; a cosine schedule jumps there"
    ),
    "training.seed": Rule(
        "refused", "the order of the images changes: some would be used twice in an epoch, others never"
    ),
    "training.sampler": Rule("refused", "the order of the images changes within an epoch"),
    "training.buckets": Rule("refused", "other images share a batch, so their order changes within an epoch"),
    "training.workers": Rule("harmless", "batches do not depend on the number of workers"),
    "training.precision": _ROUNDING,
    "training.compile": _ROUNDING,
    "training.cuda_graph": _ROUNDING,
    "training.gradient_exchange": _ROUNDING,
    "training.cudnn_benchmark": _ROUNDING,
    "training.tf32": _ROUNDING,
    "training.deterministic": _ROUNDING,
    "training.clip_norm": _NEXT_STEP,
    "training.skip_non_finite": _NEXT_STEP,
    "training.ema_decay": Rule("refused", "the stored average was computed with the old decay, or there is none"),
    "training.profile": _WHEN,
    "training.evaluate_every": _STOP,
    "training.patience": _STOP,
    "training.checkpoint_every": _WHEN,
    "training.keep_checkpoints": _WHEN,
    "training.log_every": _WHEN,
    "training.loggers": _WHEN,
    "evaluation": Rule("harmless", "evaluation does not affect the training steps"),
    "evaluation.metrics": _MEASURED,
    "evaluation.best_metric": Rule("warned", "the current best.pt was selected by the old metric"),
}
UNKNOWN = Rule("refused", "no rule allows a change")


def rule_of(key: str) -> Rule:
    """Return the rule for a key such as `training.schedule.steps`."""
    names = key.split(".")
    prefixes = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((RULES[prefix] for prefix in prefixes if prefix in RULES), UNKNOWN)


class Changes(NamedTuple):
    """The changed keys by effect, each as `key: old -> new (reason)`."""

    refused: list[str]
    warned: list[str]
    harmless: list[str]

    def describe(self) -> str:
        """Return the changes as text, grouped by effect; empty if there are none."""
        groups = {
            "may not change in a run": self.refused,
            "changes training or metrics": self.warned,
            "changes neither training nor metrics": self.harmless,
        }
        return "\n".join("\n    ".join([f"  {title}:", *lines]) for title, lines in groups.items() if lines)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """Return the changes between two configurations in plain types with all defaults (`maskrcnn.config.to_dict`)."""
    by_effect = Changes([], [], [])
    for line in differences(old, new):
        rule = rule_of(line.partition(": ")[0])
        getattr(by_effect, rule.effect).append(f"{line} ({rule.reason})")
    return by_effect


def affects_result(key: str) -> bool:
    """Return whether a new run with another value of the key may end with other weights or metrics."""
    rule = rule_of(key)
    return rule.effect != "harmless" or rule.new_run


def identity(config: Section) -> dict[str, Any]:
    """Return the keys that determine the result of a run and differ from their defaults, with values in plain types.

    Two configurations of one experiment have the same identity, and a new key with a default value does not change it.
    """
    return dict(_identity("", config, None))


def _identity(key: str, value: Any, default: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Section):
        alike = type(value) is type(default)
        if not alike and affects_result(key):
            yield key, getattr(value, "kind", "")
        for name, field in type(value).model_fields.items():
            inner = getattr(default, name) if alike else field.get_default(call_default_factory=True)
            yield from _identity(f"{key}.{name}".removeprefix("."), getattr(value, name), inner)
    elif value != default and affects_result(key):
        items = value if isinstance(value, tuple) and any(isinstance(item, Section) for item in value) else ()
        yield key, len(items) if items else to_jsonable_python(value)
        for index, item in enumerate(items):
            yield from _identity(f"{key}[{index}]", item, None)

"""Which keys of the configuration may change when a run goes on, and why.

A run is one line of steps. A change is refused where the steps before and after would not belong together: where
stored tensors would mean something else, or images would be seen twice or never. Where the steps go on, but no single
configuration describes the run any more, the change is warned of. The rest does not touch what is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from maskrcnn.config import differences

Effect = Literal["refused", "warned", "harmless"]


class Rule(NamedTuple):
    """What becomes of a change, and why."""

    effect: Effect
    reason: str


_MEASURED = Rule("warned", "figures before and after do not compare, and best.pt is chosen among both")
_ROUNDING = Rule("warned", "sums are rounded otherwise from the next step on")
_NEXT_STEP = Rule("warned", "from the next step on")
_START = Rule("harmless", "a run that goes on takes its weights from the checkpoint")
_WHEN = Rule("harmless", "when something is done beside the steps")
_PLACE = Rule("harmless", "where the files lie, not what they hold")

# A rule is for a key and for all keys below it; of two rules, the longer key's holds.
RULES: Mapping[str, Rule] = {
    "model": Rule("refused", "the stored weights belong to another model, or mean something else in it"),
    "model.backbone.weights": _START,
    "model.box_head.initialization": _START,
    "model.mask_head.initialization": _START,
    "model.backbone.checkpoint_activations": Rule("harmless", "the same numbers in less memory"),
    "model.rpn.inference": _MEASURED,
    "model.detection": _MEASURED,
    "model.mask_head.paste": _MEASURED,
    "data.root": _PLACE,
    "data.train": Rule("refused", "the dataset gives the order of the images: some would be seen twice, others never"),
    "data.train.root": _PLACE,
    "data.validation": _MEASURED,
    "data.validation.root": _PLACE,
    "data.train_transforms": Rule("warned", "images are changed in other ways from the next step on"),
    "data.validation_transforms": _MEASURED,
    "data.num_classes": Rule("harmless", "it is compared with the annotations, no more"),
    "training.batch_size": Rule("refused", "the iterations done would stand for other images, and another epoch"),
    "training.grad_accum_steps": Rule(
        "warned", "rounded otherwise from the next step on, and batch norms see other batches"
    ),
    "training.optimizer": Rule("refused", "the stored momenta belong to other groups of parameters, or another method"),
    "training.optimizer.lr": _NEXT_STEP,
    "training.optimizer.base_batch": _NEXT_STEP,
    "training.optimizer.momentum": _NEXT_STEP,
    "training.optimizer.betas": _NEXT_STEP,
    "training.schedule": Rule(
        "warned", "the learning rate follows the new schedule from the next step on; that of a cosine jumps there"
    ),
    "training.seed": Rule("refused", "the seed gives the order of the images: some would be seen twice, others never"),
    "training.workers": Rule("harmless", "batches do not depend on who loads them"),
    "training.precision": _ROUNDING,
    "training.compile": _ROUNDING,
    "training.deterministic": _ROUNDING,
    "training.clip_norm": _NEXT_STEP,
    "training.skip_non_finite": _NEXT_STEP,
    "training.ema_decay": Rule("refused", "the checkpoint's average was made with the old one, or there is none in it"),
    "training.profile": _WHEN,
    "training.evaluate_every": _WHEN,
    "training.patience": _WHEN,
    "training.checkpoint_every": _WHEN,
    "training.keep_checkpoints": _WHEN,
    "training.log_every": _WHEN,
    "evaluation": Rule("harmless", "measured and drawn beside the steps"),
    "evaluation.best_metric": Rule("warned", "the best.pt so far was chosen by the old one"),
}
UNKNOWN = Rule("refused", "no rule says that it may change")


def rule_of(key: str) -> Rule:
    """Return the rule for a key, `training.schedule.steps` for one."""
    parts = key.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((RULES[prefix] for prefix in prefixes if prefix in RULES), UNKNOWN)


class Changes(NamedTuple):
    """The keys that changed, by what becomes of it: `key: old -> new (reason)` each."""

    refused: list[str]
    warned: list[str]
    harmless: list[str]

    def describe(self) -> str:
        """Return the changes for people to read, in groups; empty if there is none."""
        groups = {
            "may not change in a run": self.refused,
            "changes what is learnt or measured": self.warned,
            "changes nothing of that": self.harmless,
        }
        return "\n".join("\n    ".join([f"  {title}:", *lines]) for title, lines in groups.items() if lines)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """Compare two configurations in plain types, both with all defaults (`maskrcnn.config.to_dict`)."""
    found = Changes([], [], [])
    for line in differences(old, new):
        rule = rule_of(line.partition(": ")[0])
        getattr(found, rule.effect).append(f"{line} ({rule.reason})")
    return found

"""The plan of an ablation: an experiment, its variants and seeds, read from YAML and checked before training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, model_validator

from maskrcnn.config import Section, Size, read_config
from maskrcnn.errors import InputError
from maskrcnn.evaluation.metric import CocoMetric
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.resume_rules import identity
from maskrcnn.run_directory import RunDirectory

TRAINED = "trained"  # the folder that holds the runs of all ablations, beside the report folders

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # used in file names


class VariantConfig(Section):
    """One variant: overrides in `set`, as with `--set` on the command line, or another experiment file, or both."""

    experiment: Path | None = None
    set: tuple[str, ...] = Field((), description="overrides KEY=VALUE, as with --set")
    paper: dict[CocoMetric, float] = Field(
        {}, description="the metrics that the paper reports for this row, in percent"
    )


class AblationConfig(Section):
    """An ablation. Paths are relative to the YAML file that is given to `load_plan`."""

    title: str
    experiment: Path = Field(description="YAML file of the experiment that the variants modify")
    variants: dict[Name, VariantConfig] = Field(min_length=2)
    baseline: str = Field(description="the variant that the others are compared with")
    metric: CocoMetric = Field("mask/AP", description="primary metric, which decides the comparison")
    seeds: tuple[NonNegativeInt, ...] = Field((0,), min_length=1)
    resamples: Size = Field(1000, description="number of bootstrap resamples of the images")
    confidence: float = Field(0.95, gt=0, lt=1, description="confidence level of the intervals")

    @model_validator(mode="after")
    def _names_agree(self) -> AblationConfig:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline '{self.baseline}' is not one of the variants {', '.join(self.variants)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be unique, got {list(self.seeds)}")
        return self


@dataclass(frozen=True)
class Run:
    """One training of an ablation."""

    variant: str
    seed: int
    config: ExperimentConfig
    directory: RunDirectory

    @property
    def name(self) -> str:
        """The name of the run in messages."""
        return f"{self.variant}/seed_{self.seed}"

    @property
    def parts(self) -> tuple[str, ...]:
        """What is measured: `mask` if the model has a mask head, and `box`."""
        return ("box",) if self.config.model.mask_head is None else ("mask", "box")


@dataclass(frozen=True)
class Plan:
    """An ablation with the resolved configuration of every run."""

    config: AblationConfig
    out: Path
    runs: tuple[Run, ...]  # ordered by seed, then variant, so that an interrupted ablation has runs of every variant

    def runs_of(self, variant: str) -> list[Run]:
        """Return the runs of one variant, one per seed."""
        return [run for run in self.runs if run.variant == variant]


def load_plan(path: Path, out: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read an ablation and resolve every run.

    Args:
        path: the YAML file of the ablation; it may have a `base`, like an experiment.
        out: the folder of the report. The runs are in `trained` beside it, each in a folder named by the digest of
            what determines its result, so that ablations share equal runs.
        overrides: `KEY=VALUE` strings for the experiments of all variants; the overrides of a variant take precedence.

    Raises:
        InputError: the ablation or the experiment of a variant is invalid, two variants are the same experiment,
            variants have different validation images, or one has no mask head and the metric is of masks.
    """
    config = read_config(path, AblationConfig)
    runs = []
    for seed in config.seeds:
        for name, variant in config.variants.items():
            resolved = _resolve(path, config, name, variant, [*overrides, f"training.seed={seed}"])
            runs.append(Run(name, seed, resolved, _directory(out.parent / TRAINED, resolved)))
    plan = Plan(config, out, tuple(runs))
    _require_distinct(path, plan)
    _require_same_images(path, plan)
    _require_metric(path, plan)
    return plan


def _resolve(
    path: Path, config: AblationConfig, name: str, variant: VariantConfig, overrides: Sequence[str]
) -> ExperimentConfig:
    experiment = path.parent / (variant.experiment or config.experiment)
    try:
        return read_config(experiment, ExperimentConfig, [*overrides, *variant.set])
    except InputError as error:
        raise InputError(f"{path}: variants.{name}: {error}") from error


def _directory(trained: Path, config: ExperimentConfig) -> RunDirectory:
    """Return the directory of a run: the first of DIGEST, DIGEST_2, ... in `trained` that is free or holds this run.

    The digest leaves out keys that have their defaults. If a default has changed since, the stored configuration, which
    has every key, differs from this one, and the run gets the next directory.
    """
    digest = _digest(config)
    names = (digest if number == 1 else f"{digest}_{number}" for number in count(1))
    return next(run for run in (RunDirectory(trained / name) for name in names) if _is_free_or_of(run, config))


def _digest(config: ExperimentConfig) -> str:
    """Return a digest of the data and of the keys that determine the result, which equal experiments share."""
    data = [split.with_root(config.data.root).digest() for split in (config.data.train, config.data.validation)]
    return hashlib.sha256(json.dumps([identity(config), data], sort_keys=True).encode()).hexdigest()[:16]


def _is_free_or_of(run: RunDirectory, config: ExperimentConfig) -> bool:
    if not run.config.exists():
        return True
    try:
        return identity(read_config(run.config, ExperimentConfig)) == identity(config)
    except InputError:  # it has keys that no longer exist
        return False


def _require_distinct(path: Path, plan: Plan) -> None:
    """Raise an `InputError` if two variants are the same experiment: training both would be wasted time."""
    variant_of: dict[Path, str] = {}
    for run in plan.runs[: len(plan.config.variants)]:
        folder = run.directory.root
        if folder in variant_of:
            raise InputError(f"{path}: variants.{run.variant} is the same experiment as variants.{variant_of[folder]}")
        variant_of[folder] = run.variant


def _require_same_images(path: Path, plan: Plan) -> None:
    """Raise an `InputError` if variants have different validation images: the paired bootstrap needs the same."""
    first = plan.runs[0].config.data
    for run in plan.runs:
        if (run.config.data.root, run.config.data.validation) != (first.root, first.validation):
            raise InputError(
                f"{path}: variants.{run.variant} has another data.validation than variants.{plan.runs[0].variant}: "
                "variants are compared on the same images"
            )


def _require_metric(path: Path, plan: Plan) -> None:
    """Raise an `InputError` if a variant does not have the primary metric."""
    for run in plan.runs:
        if plan.config.metric.split("/")[0] not in run.parts:
            raise InputError(
                f"{path}: metric is {plan.config.metric}, but variants.{run.variant} has no mask head: use box/AP"
            )

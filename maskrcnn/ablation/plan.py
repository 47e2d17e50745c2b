"""What an ablation is: an experiment, its variants and seeds, read from YAML and checked before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from maskrcnn.config import Section, load_config, to_dict
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig, Metric
from maskrcnn.run_directory import RunDirectory

TRAINED = "trained"  # the folder of all runs, beside the folders of the ablations

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # it becomes a part of file names


class VariantConfig(Section):
    """What one variant changes: `set` as with `--set` on the command line, or a whole other experiment, or both."""

    experiment: Path | None = None
    set: tuple[str, ...] = Field((), description="KEY=VALUE each, as with --set")
    paper: dict[Metric, float] = Field({}, description="the paper's own figures for this row, in percent")


class AblationConfig(Section):
    """An ablation. Paths are relative to the file that is run."""

    title: str
    experiment: Path = Field(description="what all variants start from: a YAML file")
    variants: dict[Name, VariantConfig] = Field(min_length=2)
    baseline: str = Field(description="the variant that the others are compared with")
    metric: Metric = Field("mask/AP", description="which figure decides")
    seeds: tuple[NonNegativeInt, ...] = Field((0,), min_length=1)
    resamples: PositiveInt = Field(1000, description="of the bootstrap over images")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")

    @model_validator(mode="after")
    def _names_agree(self) -> AblationConfig:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline '{self.baseline}' is none of the variants {', '.join(self.variants)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"each seed may stand only once, got {list(self.seeds)}")
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
        """How the run is called in messages."""
        return f"{self.variant}/seed_{self.seed}"


@dataclass(frozen=True)
class Plan:
    """An ablation with every run's configuration resolved."""

    config: AblationConfig
    out: Path
    runs: tuple[Run, ...]  # seed by seed, the variants of each in order: an interrupted ablation compares all

    def runs_of(self, variant: str) -> list[Run]:
        """The runs of one variant, a seed each."""
        return [run for run in self.runs if run.variant == variant]


def load_plan(path: Path, out: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read an ablation and resolve every run.

    Args:
        path: the ablation's YAML; like an experiment it may have a `base`.
        out: the folder of the report. The runs lie beside it, in `trained`, each in a folder named after its
            configuration, so that ablations with a run in common train it once.
        overrides: `KEY=VALUE` each, for the experiment of every variant, below what the variant itself sets.

    Raises:
        InputError: the ablation or a variant's experiment is wrong, or two variants are the same experiment, or are
            not measured on the same images.
    """
    config = load_config(path, AblationConfig)
    runs = []
    for seed in config.seeds:
        for name, variant in config.variants.items():
            resolved = _resolve(path, config, name, variant, [*overrides, f"training.seed={seed}"])
            runs.append(Run(name, seed, resolved, RunDirectory(out.parent / TRAINED / _digest(resolved))))
    plan = Plan(config, out, tuple(runs))
    _require_distinct(path, plan)
    _require_same_images(path, plan)
    return plan


def _resolve(
    path: Path, config: AblationConfig, name: str, variant: VariantConfig, overrides: Sequence[str]
) -> ExperimentConfig:
    experiment = path.parent / (variant.experiment or config.experiment)
    try:
        return load_config(experiment, ExperimentConfig, [*overrides, *variant.set])
    except InputError as error:
        raise InputError(f"{path}: variants.{name}: {error}") from error


def _digest(config: ExperimentConfig) -> str:
    """A name for a configuration: equal ones have the same."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def _require_distinct(path: Path, plan: Plan) -> None:
    """A variant that changes nothing would cost hours to find equal."""
    seen: dict[Path, str] = {}
    for run in plan.runs[: len(plan.config.variants)]:
        folder = run.directory.root
        if folder in seen:
            raise InputError(f"{path}: variants.{run.variant} is the same experiment as variants.{seen[folder]}")
        seen[folder] = run.variant


def _require_same_images(path: Path, plan: Plan) -> None:
    """A paired comparison needs the same images on both sides."""
    first = plan.runs[0].config.data
    for run in plan.runs:
        if (run.config.data.root, run.config.data.validation) != (first.root, first.validation):
            raise InputError(
                f"{path}: variants.{run.variant} has another data.validation than variants.{plan.runs[0].variant}: "
                "variants are compared on the same images"
            )

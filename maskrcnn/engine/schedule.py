"""Learning rate schedules: pure functions from an iteration to a factor, so that resuming needs no state.

The factor for iteration `i` multiplies the base learning rate in the training step after `i` finished steps.
"""

from __future__ import annotations

import bisect
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from maskrcnn.config import Part
from maskrcnn.errors import InputError

logger = logging.getLogger(__name__)

Schedule = Callable[[int], float]
Share = Annotated[float, Field(ge=0, le=1)]


def _int_if_whole(length: float) -> float:
    """Return whole numbers as int, so that a stored configuration has 60000, not 60000.0."""
    return int(length) if length == int(length) else length


Length = Annotated[
    float,
    Field(gt=0, le=1e15),
    AfterValidator(_int_if_whole),
    PlainSerializer(_int_if_whole, return_type=Any),
]

DEFAULT_ITERATIONS = 90_000  # the reference 1x schedule


class ScheduleConfig(Part):
    """Base class of the configs of schedules, an extension point: the length and a linear warm-up.

    The defaults are Detectron2's.

    The length is in `iterations` or in `epochs`, and `steps` are in the same unit. The warm-up is always in iterations.
    `resolve` converts epochs to iterations for the size of a dataset.
    """

    epochs: Length | None = Field(None, description="length of training in epochs, instead of `iterations`")
    iterations: PositiveInt | None = Field(
        None,
        description="length of training in optimizer steps; default 90000 if `epochs` is null",
        validate_default=True,
    )
    warmup_iterations: NonNegativeInt = Field(
        1000, description="length of the warm-up; a tenth of the schedule if it is longer than the schedule"
    )
    warmup_factor: Share = 0.001

    @field_validator("iterations")
    @classmethod
    def _one_unit(cls, iterations: int | None, info: ValidationInfo) -> int | None:
        epochs = info.data.get("epochs")
        if epochs is None:
            return DEFAULT_ITERATIONS if iterations is None else iterations
        if iterations is not None:
            raise ValueError(f"iterations is {iterations}, and epochs is {epochs}: set one of the two to null")
        return None

    @abstractmethod
    def build(self) -> Schedule:
        """Return the learning rate factor as a function of the iteration. The schedule must be in iterations."""

    @property
    def num_iterations(self) -> int:
        """The length of training in iterations. Call `resolve` first if the schedule is in epochs."""
        assert self.iterations is not None, "resolve() the schedule first"
        return self.iterations

    def effective_warmup(self) -> int:
        """Return the length of the warm-up: `warmup_iterations`, or a tenth of the schedule if it is longer than that.

        A shortened warm-up is logged.
        """
        if self.warmup_iterations <= self.num_iterations:
            return self.warmup_iterations
        shorter = self.num_iterations // 10
        logger.info(
            "warm-up of %d iterations instead of %d: training ends after %d",
            shorter,
            self.warmup_iterations,
            self.num_iterations,
        )
        return shorter

    def resolve(self, iterations_per_epoch: int) -> Self:
        """Return the schedule with its length and steps in iterations.

        Args:
            iterations_per_epoch: number of training steps per epoch.

        Raises:
            InputError: the schedule is invalid after rounding to iterations.
        """
        if self.epochs is None:
            return self
        changes = self._in_iterations(iterations_per_epoch)
        try:
            return type(self).model_validate({**self.model_dump(), "epochs": None, **changes})
        except ValidationError as error:
            problems = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
            raise InputError(
                f"training.schedule: epochs is {self.epochs}, and an epoch has {iterations_per_epoch} iterations: "
                f"{problems}"
            ) from error

    def _in_iterations(self, iterations_per_epoch: int) -> dict[str, Any]:
        """Return the settings whose unit changes, converted to iterations, by key."""
        assert self.epochs is not None
        return {"iterations": max(1, round(self.epochs * iterations_per_epoch))}


class MultiStepConfig(ScheduleConfig):
    """The learning rate is multiplied by `gamma` at each of `steps`. The defaults are the 1x schedule of Detectron2."""

    kind: Literal["multi_step"] = "multi_step"
    steps: tuple[Length, ...] = Field((60_000, 80_000), description="in iterations, or in epochs if `epochs` is set")
    gamma: PositiveFloat = 0.1

    @model_validator(mode="after")
    def _steps_are_in_order(self) -> Self:
        unit, end = ("iterations", self.iterations) if self.epochs is None else ("epochs", self.epochs)
        assert end is not None
        if unit == "iterations" and any(step != int(step) for step in self.steps):
            raise ValueError(f"steps must be whole iterations, but are {list(self.steps)}")
        if any(later <= earlier for earlier, later in pairwise(self.steps)):
            raise ValueError(f"steps must ascend, but are {list(self.steps)}")
        if self.steps and self.steps[-1] >= end:
            raise ValueError(f"steps must lie below {unit}, which is {end}, but the last is {self.steps[-1]}")
        return self

    def _in_iterations(self, iterations_per_epoch: int) -> dict[str, Any]:
        steps = tuple(round(step * iterations_per_epoch) for step in self.steps)
        return {**super()._in_iterations(iterations_per_epoch), "steps": steps}

    def build(self) -> Schedule:
        """Return the learning rate factor as a function of the iteration. The schedule must be in iterations."""
        assert self.epochs is None, "resolve() the schedule first"
        return partial(
            multi_step_factor,
            steps=self.steps,
            gamma=self.gamma,
            warmup_iterations=self.effective_warmup(),
            warmup_factor=self.warmup_factor,
        )


class CosineConfig(ScheduleConfig):
    """Cosine decay of the learning rate factor, from 1 at the first iteration to `final_factor` after the last."""

    kind: Literal["cosine"] = "cosine"
    final_factor: Share = 0.0

    def build(self) -> Schedule:
        """Return the learning rate factor as a function of the iteration. The schedule must be in iterations."""
        return partial(
            cosine_factor,
            iterations=self.num_iterations,
            final_factor=self.final_factor,
            warmup_iterations=self.effective_warmup(),
            warmup_factor=self.warmup_factor,
        )


def warmup(iteration: int, *, iterations: int, factor: float) -> float:
    """Return the warm-up factor: linear from `factor` at iteration 0 to 1 at `iterations`, then 1."""
    if iteration >= iterations:
        return 1.0
    return factor + (1.0 - factor) * iteration / iterations


def multi_step_factor(
    iteration: int, *, steps: Sequence[float], gamma: float, warmup_iterations: int, warmup_factor: float
) -> float:
    """Return `gamma` to the power of the number of steps passed, times the warm-up factor."""
    warmup_value = warmup(iteration, iterations=warmup_iterations, factor=warmup_factor)
    return warmup_value * gamma ** bisect.bisect_right(steps, iteration)


def cosine_factor(
    iteration: int, *, iterations: int, final_factor: float, warmup_iterations: int, warmup_factor: float
) -> float:
    """Return the cosine decay from 1 to `final_factor` over `iterations`, times the warm-up factor."""
    warmup_value = warmup(iteration, iterations=warmup_iterations, factor=warmup_factor)
    decay = 0.5 * (1.0 + math.cos(math.pi * min(iteration / iterations, 1.0)))
    return warmup_value * (final_factor + (1.0 - final_factor) * decay)

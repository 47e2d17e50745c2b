"""Learning-rate schedules: pure functions from an iteration to a factor, so that resuming needs no state.

The factor for iteration `i` (counted from 0) multiplies the base learning rate in the step that follows `i` finished
ones.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from maskrcnn.config import Section

Schedule = Callable[[int], float]
Share = Annotated[float, Field(ge=0, le=1)]


class _WarmUpConfig(Section):
    """What all schedules share: a length, and a linear rise at the start (Detectron2's defaults)."""

    iterations: PositiveInt = 90_000
    warmup_iterations: NonNegativeInt = 1000
    warmup_factor: Share = 0.001

    @model_validator(mode="after")
    def _warmup_ends(self) -> _WarmUpConfig:
        if self.warmup_iterations > self.iterations:
            raise ValueError(
                f"warmup_iterations is {self.warmup_iterations}, but training ends after {self.iterations} iterations"
            )
        return self


class MultiStepConfig(_WarmUpConfig):
    """The rate falls by `gamma` at each of `steps`; by default the reference 1x schedule."""

    kind: Literal["multi_step"] = "multi_step"
    steps: tuple[PositiveInt, ...] = (60_000, 80_000)
    gamma: PositiveFloat = 0.1

    @model_validator(mode="after")
    def _steps_are_in_order(self) -> MultiStepConfig:
        if any(later <= earlier for earlier, later in pairwise(self.steps)):
            raise ValueError(f"steps must ascend, but are {list(self.steps)}")
        if self.steps and self.steps[-1] >= self.iterations:
            raise ValueError(
                f"steps must lie below iterations, which is {self.iterations}, but the last is {self.steps[-1]}"
            )
        return self

    def build(self) -> Schedule:
        """Return the schedule as a function of the iteration."""
        return partial(
            multi_step_factor,
            steps=self.steps,
            gamma=self.gamma,
            warmup_iterations=self.warmup_iterations,
            warmup_factor=self.warmup_factor,
        )


class CosineConfig(_WarmUpConfig):
    """The rate falls along half a cosine, from 1 at the first iteration to `final_factor` after the last."""

    kind: Literal["cosine"] = "cosine"
    final_factor: Share = 0.0

    def build(self) -> Schedule:
        """Return the schedule as a function of the iteration."""
        return partial(
            cosine_factor,
            iterations=self.iterations,
            final_factor=self.final_factor,
            warmup_iterations=self.warmup_iterations,
            warmup_factor=self.warmup_factor,
        )


ScheduleConfig = Annotated[MultiStepConfig | CosineConfig, Field(discriminator="kind")]


def warmup(iteration: int, *, iterations: int, factor: float) -> float:
    """Return the linear rise from `factor` at iteration 0 to 1 at `iterations`, and 1 from there on."""
    if iteration >= iterations:
        return 1.0
    return factor + (1.0 - factor) * iteration / iterations


def multi_step_factor(
    iteration: int, *, steps: Sequence[int], gamma: float, warmup_iterations: int, warmup_factor: float
) -> float:
    """Return `gamma` to the power of the steps passed, times the warm-up."""
    rise = warmup(iteration, iterations=warmup_iterations, factor=warmup_factor)
    return rise * gamma ** bisect.bisect_right(steps, iteration)


def cosine_factor(
    iteration: int, *, iterations: int, final_factor: float, warmup_iterations: int, warmup_factor: float
) -> float:
    """Return half a cosine from 1 to `final_factor` over `iterations`, times the warm-up."""
    rise = warmup(iteration, iterations=warmup_iterations, factor=warmup_factor)
    fall = 0.5 * (1.0 + math.cos(math.pi * min(iteration / iterations, 1.0)))
    return rise * (final_factor + (1.0 - final_factor) * fall)

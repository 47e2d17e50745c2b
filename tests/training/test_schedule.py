import math

import pytest
from pydantic import TypeAdapter, ValidationError

from maskrcnn.training.schedule import CosineConfig, MultiStepConfig, ScheduleConfig, warmup


@pytest.mark.parametrize(
    ("iteration", "factor"),
    [
        (0, 0.001),
        (1, 0.001 + 0.999 / 1000),
        (500, 0.5005),
        (999, 0.001 + 0.999 * 0.999),
        (1000, 1.0),
        (59_999, 1.0),
        (60_000, 0.1),
        (79_999, 0.1),
        (80_000, 0.01),
        (89_999, 0.01),
    ],
)
def test_reference_schedule_by_hand(iteration, factor):
    assert MultiStepConfig().build()(iteration) == pytest.approx(factor, rel=1e-12)


def test_warmup_of_no_length_is_over_at_once():
    assert warmup(0, iterations=0, factor=0.001) == 1.0


def test_step_within_the_warmup_multiplies_it():
    schedule = MultiStepConfig(iterations=20, steps=(5,), gamma=0.5, warmup_iterations=10, warmup_factor=0.0).build()
    assert [schedule(i) for i in (4, 5, 10)] == pytest.approx([0.4, 0.25, 0.5])


@pytest.mark.parametrize(("iteration", "factor"), [(0, 0.0), (5, 0.5 * (0.2 + 0.8 * (1 + math.cos(math.pi / 8)) / 2)),
                                                   (20, 0.6), (40, 0.2), (50, 0.2)])  # fmt: skip
def test_cosine_by_hand(iteration, factor):
    config = CosineConfig(iterations=40, warmup_iterations=10, warmup_factor=0.0, final_factor=0.2)
    assert config.build()(iteration) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": (8, 8)}, "steps must ascend"),
        ({"steps": (8, 5)}, "steps must ascend"),
        ({"steps": (5, 10)}, "steps must lie below iterations"),
        ({"steps": (), "warmup_iterations": 11}, "warmup_iterations is 11"),
        ({"steps": (0,)}, "greater than 0"),
        ({"steps": (), "iterations": 0}, "greater than 0"),
    ],
)
def test_schedules_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        MultiStepConfig(**{"iterations": 10, "warmup_iterations": 0, **values})


def test_kind_chooses_the_schedule():
    adapter = TypeAdapter(ScheduleConfig)
    assert isinstance(adapter.validate_python({"kind": "cosine", "iterations": 2000}), CosineConfig)
    assert isinstance(adapter.validate_python({"kind": "multi_step"}), MultiStepConfig)

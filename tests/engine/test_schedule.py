import math

import pytest
from pydantic import ValidationError

from maskrcnn.config import Section, read_config, to_yaml
from maskrcnn.engine.schedule import CosineConfig, MultiStepConfig, ScheduleConfig, warmup
from maskrcnn.errors import InputError


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


def test_warmup_of_length_zero_has_factor_one():
    assert warmup(0, iterations=0, factor=0.001) == 1.0


@pytest.mark.parametrize(("iterations", "length"), [(1, 0), (9, 0), (400, 40), (999, 99), (1000, 1000)])
def test_warmup_longer_than_the_schedule_takes_a_tenth_of_it(iterations, length, caplog):
    caplog.set_level("INFO")
    assert CosineConfig(epochs=1).resolve(iterations).effective_warmup() == length
    schedule = MultiStepConfig(iterations=iterations, steps=()).build()
    assert schedule(length) == 1.0
    assert length == 0 or schedule(0) == pytest.approx(0.001)
    message = f"warm-up of {length} iterations instead of 1000: training ends after {iterations}"
    assert (message in caplog.text) == (length < 1000)


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
        ({"steps": (0,)}, "greater than 0"),
        ({"steps": (), "iterations": 0}, "greater than 0"),
        ({"steps": (5.5,)}, "steps must be whole iterations"),
        ({"steps": (5,), "epochs": 6}, "iterations is 10, and epochs is 6: set one of the two to null"),
        ({"steps": (5,), "epochs": 5, "iterations": None}, "steps must lie below epochs, which is 5"),
        ({"steps": (4, 2.5), "epochs": 5, "iterations": None}, "steps must ascend"),
        ({"steps": (), "epochs": math.inf, "iterations": None}, "finite"),
    ],
)
def test_invalid_schedules_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        MultiStepConfig(**{"iterations": 10, "warmup_iterations": 0, **values})


def test_kind_chooses_the_schedule(choose):
    assert isinstance(choose(ScheduleConfig, {"kind": "cosine", "iterations": 2000}), CosineConfig)
    assert isinstance(choose(ScheduleConfig, {"kind": "multi_step"}), MultiStepConfig)


# Epochs.


def test_epochs_become_iterations():
    config = MultiStepConfig(epochs=12, steps=(8, 10.5), warmup_iterations=7)
    assert config.iterations is None
    resolved = config.resolve(1000)
    assert resolved == MultiStepConfig(iterations=12_000, steps=(8000, 10_500), warmup_iterations=7)
    assert resolved.num_iterations == 12_000
    assert resolved.build()(10_500) == pytest.approx(0.01)
    assert CosineConfig(epochs=0.004, warmup_iterations=0).resolve(100).iterations == 1  # at least one


def test_a_schedule_in_iterations_stays_as_it_is():
    assert MultiStepConfig().resolve(5) == MultiStepConfig()
    assert MultiStepConfig().iterations == MultiStepConfig().num_iterations == 90_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": (1.01, 1.02)}, r"an epoch has 10 iterations: steps must ascend, but are \[10, 10\]"),
        ({"steps": (4.99,)}, "steps must lie below iterations, which is 50"),
        ({"steps": (0.01,)}, "greater than 0"),
    ],
)
def test_epochs_that_are_too_short_are_refused(values, message):
    config = MultiStepConfig(**{"epochs": 5, "steps": (), "warmup_iterations": 0, **values})
    with pytest.raises(InputError, match=rf"training\.schedule: .*{message}"):
        config.resolve(10)


def test_yaml_states_either_unit_and_keeps_whole_numbers(tmp_path):
    class Experiment(Section):
        schedule: ScheduleConfig

    path = tmp_path / "schedule.yaml"
    for text in ("{kind: multi_step, epochs: 12, steps: [8, 10.5]}", "{kind: multi_step, iterations: 9, steps: [5.0]}"):
        path.write_text(f"schedule: {text.replace('}', ', warmup_iterations: 0}')}")
        config = read_config(path, Experiment)
        stored = to_yaml(config)
        assert "steps: [8, 10.5]" in stored or "steps: [5]" in stored
        path.write_text(stored)
        assert read_config(path, Experiment) == config

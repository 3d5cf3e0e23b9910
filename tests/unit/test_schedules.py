"""Values of the learning-rate schedules."""

import pytest

from trainway.config.schema import ScheduleConfig
from trainway.schedules import lr_factor


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_starts_above_zero(name):
    config = ScheduleConfig(name=name, warmup_steps=4)
    assert [lr_factor(config, step, 100) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_values_between():
    cosine = ScheduleConfig(name="cosine", warmup_steps=10, min_lr_ratio=0.1)
    linear = ScheduleConfig(name="linear", warmup_steps=10, min_lr_ratio=0.1)
    assert lr_factor(cosine, 60, 110) == pytest.approx(0.55)
    assert lr_factor(cosine, 35, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 2**-0.5))
    assert lr_factor(linear, 35, 110) == pytest.approx(0.775)
    assert lr_factor(cosine, 110, 110) == lr_factor(linear, 110, 110) == pytest.approx(0.1)
    assert lr_factor(ScheduleConfig(name="constant", warmup_steps=10), 110, 110) == 1.0


def test_edges():
    assert lr_factor(ScheduleConfig(warmup_steps=0), 1, 1) == pytest.approx(0.1)
    assert 0.9 < lr_factor(ScheduleConfig(warmup_steps=0), 1, 100) < 1.0
    assert lr_factor(ScheduleConfig(warmup_steps=100), 10, 10) == 0.1
    assert lr_factor(ScheduleConfig(warmup_steps=10), 10, 10) == 1.0


def test_wsd_is_stable_then_decays_over_the_last_steps():
    linear = ScheduleConfig(
        name="wsd", warmup_steps=10, decay_ratio=0.2, decay_shape="linear", min_lr_ratio=0.1
    )
    assert [lr_factor(linear, step, 100) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert {lr_factor(linear, step, 100) for step in range(11, 81)} == {1.0}
    factors = [lr_factor(linear, step, 100) for step in (81, 85, 90, 100)]
    assert factors == pytest.approx([0.955, 0.775, 0.55, 0.1], abs=1e-12)


def test_wsd_decays_as_one_minus_the_root_of_progress():
    sqrt = ScheduleConfig(name="wsd", warmup_steps=10, decay_ratio=0.2, decay_shape="sqrt", min_lr_ratio=0.0)
    assert lr_factor(sqrt, 80, 100) == 1.0
    factors = [lr_factor(sqrt, step, 100) for step in (81, 85, 90, 100)]
    assert factors == pytest.approx([1 - 0.05**0.5, 0.5, 1 - 0.5**0.5, 0.0], abs=1e-12)
    lifted = sqrt.model_copy(update={"min_lr_ratio": 0.2})
    assert lr_factor(lifted, 85, 100) == pytest.approx(0.6)
    assert lr_factor(lifted, 100, 100) == pytest.approx(0.2)


def test_wsd_without_a_stable_part_and_with_a_decay_of_one_step():
    whole = ScheduleConfig(
        name="wsd", warmup_steps=0, decay_ratio=1.0, decay_shape="linear", min_lr_ratio=0.0
    )
    assert [lr_factor(whole, step, 4) for step in (1, 2, 3, 4)] == [0.75, 0.5, 0.25, 0.0]
    short = whole.model_copy(update={"decay_ratio": 1e-6})
    assert [lr_factor(short, step, 4) for step in (1, 2, 3, 4)] == [1.0, 1.0, 1.0, 0.0]


def test_warm_up_as_a_share_of_the_run() -> None:
    config = ScheduleConfig(name="linear", warmup_ratio=0.1, min_lr_ratio=0.0)
    assert [lr_factor(config, step, 40) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert lr_factor(config, 40, 40) == 0.0
    assert lr_factor(ScheduleConfig(warmup_ratio=0.03), 1, 10) == pytest.approx(
        1.0, abs=0.03
    )  # no step warms up

"""Values of the learning-rate schedules."""

import pytest

from trainway.config.schema import ScheduleConfig
from trainway.schedules import lr_factor


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
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

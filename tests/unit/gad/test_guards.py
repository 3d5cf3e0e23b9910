"""Warnings of adversarial distillation: each where it belongs, none of a healthy run, the same after a resume."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
import pytest

from trainway.gad.alarms import ALARMS, LEARNING_STEPS
from trainway.gad.guards import GadGuard
from trainway.gad.recent import TREND, WINDOW
from trainway.logs import logger


@pytest.fixture(autouse=True)
def _the_log_is_heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logger, "propagate", True)  # a run in this process may have turned it off
    caplog.set_level(logging.WARNING, logger.name)


Figures = dict[str, float]
Curve = Callable[[int], Figures]
"""Figures by step of the stage, from 1."""


def noisy(value: float, spread: float, seed: object) -> float:
    return value + random.Random(str(seed)).gauss(0, spread)


@cache
def healthy(step: int) -> Figures:
    """The adversarial stage of a run that goes well: 512 pairs a step, the discriminator's lead shrinks, and answers
    grow to the teacher's length while the longer ones score higher."""
    fading = math.exp(-step / 300)
    return {
        "gad/discriminator_accuracy": noisy(0.53 + 0.2 * fading, 0.02, ("accuracy", step)),
        "gad/discriminator_loss": noisy(0.68 - 0.2 * fading, 0.02, ("loss", step)),
        "gad/margin": noisy(0.1 + fading, 0.05, ("margin", step)),
        "gad/teacher_score": noisy(3.0, 0.1, ("teacher", step)),
        "gad/student_score": noisy(2.9 - fading, 0.1, ("student", step)),
        "gad/reward_std": noisy(0.5, 0.05, ("std", step)),
        "gad/collapsed_groups": abs(noisy(0.02, 0.02, ("collapsed", step))),
        "gad/score_length_correlation": noisy(0.05 + 0.4 * fading, 0.1, ("correlation", step)),
        "gad/response_length": noisy(400 - 200 * fading, 10, ("length", step)),
        "gad/teacher_length": noisy(390, 15, ("teacher length", step)),
        "gad/truncated": abs(noisy(0.05 + 0.3 * fading, 0.02, ("truncated", step))),
        "gad/empty": 0.0,
        # an estimate with outliers, as exp(q) - q - 1 has
        "gad/kl": 50.0 if step % 97 == 0 else abs(noisy(0.3 * (1 - fading), 0.02, ("kl", step))),
        "gad/entropy": noisy(0.9 - 0.3 * (1 - fading), 0.02, ("entropy", step)),
    }


def but(**changes: float | Callable[[int], float]) -> Curve:
    """A healthy run, but for some figures: constants, or functions of the step."""
    return lambda step: (
        healthy(step)
        | {f"gad/{name}": value(step) if callable(value) else value for name, value in changes.items()}
    )


def found(
    curve: Curve, steps: Iterable[int], stage: str = "adversarial", guard: GadGuard | None = None
) -> list[tuple[int, str]]:
    """(step, name) of every warning."""
    guard = guard or GadGuard()
    return [(step, name) for step in steps for name in guard.look(step, stage, curve(step))]


@pytest.mark.parametrize("stage", ["warmup", "adversarial"])
def test_none_of_a_healthy_run(stage: str) -> None:
    assert found(healthy, range(1, 2000), stage) == []


TOY_STEPS = (16, 48, 80, 144, 272, 528, 1040, 1484)
TOY_FIGURES = {
    "gad/discriminator_accuracy": (0.700, 0.644, 0.562, 0.524, 0.502, 0.512, 0.510, 0.522),
    "gad/discriminator_loss": (0.603, 0.630, 0.686, 0.693, 0.699, 0.698, 0.695, 0.693),
    "gad/margin": (0.319, 0.383, 0.109, 0.018, 0.004, 0.006, 0.009, 0.012),
    "gad/collapsed_groups": (0.033, 0.0, 0.0, 0.0, 0.0, 0.0, 0.001, 0.0),
    "gad/kl": (0.011, 0.077, 0.194, 0.321, 0.347, 0.405, 0.353, 0.397),
    "gad/entropy": (2.067, 2.080, 2.027, 1.913, 1.847, 1.853, 1.850, 1.861),
}
"""Of the toy teacher's run (ten symbols, each an answer), as measured: the student finds the teacher."""
FROZEN_FIGURES = {
    "gad/discriminator_accuracy": (0.700, 0.644, 0.562, 0.423, 0.239, 0.193, 0.214, 0.191),
    "gad/discriminator_loss": (0.603, 0.630, 0.686, 0.714, 0.759, 0.768, 0.768, 0.770),
    "gad/margin": (0.319, 0.383, 0.109, -0.022, -0.116, -0.136, -0.135, -0.141),
    "gad/collapsed_groups": (0.033, 0.0, 0.0, 0.004, 0.436, 0.870, 0.955, 0.980),
    "gad/kl": (0.011, 0.077, 0.194, 0.539, 1.713, 1.997, 2.204, 2.030),
    "gad/entropy": (2.067, 2.080, 2.027, 1.680, 0.519, 0.136, 0.044, 0.025),
}
"""Of the same run, the discriminator frozen at step 100: the student says one symbol in the end."""


def toy(measured: dict[str, tuple[float, ...]]) -> Curve:
    lengths = {"gad/response_length": 1.0, "gad/teacher_length": 1.0, "gad/score_length_correlation": 0.0}
    never = {"gad/truncated": 0.0, "gad/empty": 0.0}

    def curve(step: int) -> Figures:
        figures = {name: float(np.interp(step, TOY_STEPS, values)) for name, values in measured.items()}
        figures["gad/discriminator_accuracy"] += noisy(0.0, 0.03, ("toy", step))
        return lengths | never | figures

    return curve


def test_none_of_the_toy_teachers_run() -> None:
    assert found(toy(TOY_FIGURES), range(1, 1501)) == []


def test_the_toy_teachers_frozen_discriminator() -> None:
    seen = dict(map(reversed, found(toy(FROZEN_FIGURES), range(1, 1501))))
    # the run itself warned at 204, 275, 313 and 438; between points an interpolation is no exponential
    assert seen == {
        "divergence": pytest.approx(204, abs=15),
        "outrun": pytest.approx(275, abs=15),
        "collapsed groups": pytest.approx(313, abs=20),
        "entropy": pytest.approx(438, abs=80),
    }


SATURATED = but(discriminator_accuracy=0.998, discriminator_loss=0.004)


def test_a_saturated_discriminator() -> None:
    assert found(SATURATED, range(1, 500)) == [(2 * WINDOW - 1, "saturated")]
    assert found(SATURATED, range(1, 500), "warmup") == [(2 * WINDOW - 1, "saturated")]
    # trap 5 stays under it: a discriminator of 98 % still has something to learn, and to say
    assert found(but(discriminator_accuracy=0.98, discriminator_loss=0.06), range(1, 500)) == []
    assert found(but(discriminator_accuracy=0.995, discriminator_loss=0.3), range(1, 500)) == []
    assert found(but(discriminator_accuracy=0.97, discriminator_loss=0.03), range(1, 500)) == []


def test_what_a_saturated_discriminator_may_see(caplog: pytest.LogCaptureFixture) -> None:
    found(SATURATED, range(1, 100))
    (said,) = caplog.messages
    assert said.startswith("warning: step 63: the discriminator tells 99.8% of the student's answers")
    assert "likely by their form" in said
    caplog.clear()
    found(lambda step: SATURATED(step) | {"gad/truncated": 0.7}, range(1, 100))
    (said,) = caplog.messages
    assert "likely by the missing end: 70% of the answers are cut off" in said


def test_a_discriminator_that_learns_nothing() -> None:
    blind = but(discriminator_accuracy=lambda step: noisy(0.5, 0.01, step), discriminator_loss=0.693)
    fires = WINDOW + LEARNING_STEPS - 1
    assert found(blind, range(1, 600), "warmup") == [(fires, "learns nothing")]
    # one that has learnt, and was then brought to guess, is the aim
    won = but(discriminator_accuracy=lambda step: 0.8 if step <= 100 else 0.5)
    assert found(won, range(1, 600)) == []
    # but not while the answers are twice as long as the teacher's
    long = but(discriminator_accuracy=lambda step: 0.8 if step <= 100 else 0.5, response_length=800.0)
    assert [name for _, name in found(long, range(1, 600))] == ["learns nothing"]


def hacked(step: int) -> Figures:
    """A frozen discriminator: its lead falls without end, and answers grow to 1300 tokens in 300 steps."""
    grown = min(1.0, step / 300)
    return healthy(step) | {
        "gad/response_length": noisy(400 + 900 * grown, 10, ("hacked", step)),
        "gad/margin": noisy(1 - 6 * grown, 0.05, ("hacked margin", step)),
        "gad/score_length_correlation": noisy(0.5, 0.1, ("hacked correlation", step)),
        "gad/discriminator_accuracy": max(0.0, 0.7 - grown),
        "gad/kl": 0.2,
    }


def test_length_hacking(caplog: pytest.LogCaptureFixture) -> None:
    (step, name), (later, other) = found(hacked, range(1, 300))
    assert (name, other) == ("length hacking", "outrun")
    assert TREND <= step < 100 < later  # of 300 after which all is lost
    assert "1.41 times the teacher's) and score higher for it (correlation 0.49)" in caplog.messages[0]
    # in the warm-up nothing is rewarded
    assert "length hacking" not in [name for _, name in found(hacked, range(1, 300), "warmup")]


@pytest.mark.parametrize(
    "curve",
    [
        # longer than the teacher's, but no longer growing
        lambda step: hacked(step) | {"gad/response_length": 520.0},
        # growing to the teacher's length
        lambda step: hacked(step) | {"gad/response_length": 100 + min(step, 290)},
        # growing, and scored lower for it
        lambda step: hacked(step) | {"gad/score_length_correlation": -0.3},
        # growing, but the discriminator keeps its lead
        lambda step: hacked(step) | {"gad/margin": noisy(1 + step / 300, 0.01, step)},
    ],
)
def test_what_is_no_length_hacking(curve: Curve) -> None:
    assert "length hacking" not in [name for _, name in found(curve, range(1, 300))]


@pytest.mark.parametrize(
    ("name", "curve", "words"),
    [
        ("collapsed groups", but(collapsed_groups=0.6), "in 60% of the groups"),
        ("truncated", but(truncated=0.97, response_length=1500.0), "has not learnt to end"),
        (
            "truncated",
            but(truncated=0.97, response_length=400.0, teacher_length=396.0),
            "raise data.max_response_tokens",
        ),
        ("empty", but(empty=0.2), "20% of the answers are empty"),
        ("outrun", but(discriminator_accuracy=0.3), "prefers the student's answers"),
        ("divergence", but(kl=lambda step: 0.02 * step), "nats per token): likely its language breaks"),
        ("entropy", but(entropy=lambda step: 0.9 * math.exp(-step / 80)), "no longer vary"),
    ],
)
def test_each_other_alarm(name: str, curve: Curve, words: str, caplog: pytest.LogCaptureFixture) -> None:
    seen = found(curve, range(1, 300))
    assert [what for _, what in seen] == [name]
    assert seen[0][0] >= WINDOW
    assert words in caplog.messages[0]


def test_collapsed_groups_matter_to_a_policy_alone() -> None:
    assert found(but(collapsed_groups=1.0), range(1, 300), "warmup") == []


def test_every_alarm_is_tested_here() -> None:
    tested = {"saturated", "learns nothing", "length hacking", "collapsed groups", "truncated", "empty"}
    assert {alarm.name for alarm in ALARMS} == tested | {"divergence", "entropy", "outrun"}


def recurring(step: int) -> Figures:
    """Empty answers between steps 100 and 200, and again from 400; about the limit from 600."""
    on = 100 <= step < 200 or 400 <= step < 500
    empty = 0.3 if on else 0.0
    return healthy(step) | {"gad/empty": (0.095 + 0.01 * (step // 40 % 2)) if step >= 600 else empty}


def test_said_again_only_after_it_was_gone() -> None:
    steps = [step for step, name in found(recurring, range(1, 800)) if name == "empty"]
    assert len(steps) == 3  # wavering about the limit for 200 steps is said once
    assert 100 < steps[0] < 132
    assert 400 < steps[1] < 432
    assert steps[2] > 600


@pytest.mark.parametrize("cut", [1, 20, WINDOW, 63, 64, 90, 131, 410])
def test_a_resumed_run_warns_as_an_uninterrupted_one(cut: int) -> None:
    def curve(step: int) -> Figures:
        saturated = {"gad/discriminator_accuracy": 1.0, "gad/discriminator_loss": 0.0} if step > 30 else {}
        return hacked(step) | recurring(step) | saturated | {"gad/entropy": 0.9 * math.exp(-step / 80)}

    stage = "adversarial"
    whole = found(curve, range(1, 550))
    assert {name for _, name in whole} >= {"saturated", "entropy", "empty"}
    first, second = GadGuard(), GadGuard()
    before = found(curve, range(1, cut), stage, first)
    second.load(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    assert before + found(curve, range(cut, 550), stage, second) == whole


def test_a_stage_is_judged_by_its_own_steps() -> None:
    guard = GadGuard()
    sure = but(entropy=0.05)  # little from the start: nothing was lost
    assert found(healthy, range(1, 101), "adversarial", guard) == []
    assert found(sure, range(101, 201), "another", guard) == []
    # in one stage the same is a loss
    assert [name for _, name in found(lambda s: healthy(s) if s < 101 else sure(s), range(1, 201))] == [
        "entropy"
    ]


def test_what_held_in_one_stage_begins_anew_in_the_next() -> None:
    guard = GadGuard()
    assert found(SATURATED, range(1, 2 * WINDOW - 1), "warmup", guard) == []
    assert found(SATURATED, range(1, 500), "adversarial", guard) == [(2 * WINDOW - 1, "saturated")]


def test_a_discriminator_that_learnt_in_the_warm_up_has_learnt() -> None:
    guard, guessing = GadGuard(), but(discriminator_accuracy=0.5)
    assert found(healthy, range(1, 100), "warmup", guard) == []
    assert found(guessing, range(1, 500), "adversarial", guard) == []
    assert [name for _, name in found(guessing, range(1, 500))] == ["learns nothing"]


def test_a_step_without_figures_or_numbers_counts_for_nothing() -> None:
    guard = GadGuard()
    assert found(lambda step: {}, range(1, 100), "seqkd", guard) == []
    bad = but(kl=math.nan, entropy=math.inf, discriminator_loss=math.nan)
    assert found(bad, range(1, 300), "adversarial", guard) == []
    # and hides nothing
    now_and_then = but(empty=lambda step: math.nan if step % 10 == 0 else 0.2)
    assert found(now_and_then, range(1, 100)) == [(WINDOW + 3, "empty")]


def test_only_one_rank_speaks(caplog: pytest.LogCaptureFixture) -> None:
    quiet = GadGuard(speaks=False)
    assert found(SATURATED, range(1, 100), guard=quiet) == [(63, "saturated")]
    assert caplog.messages == []
    found(SATURATED, range(1, 100))
    assert len(caplog.messages) == 1

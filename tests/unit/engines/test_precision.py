"""Which arithmetic is used, and fp16's loss scale."""

from __future__ import annotations

import torch

from trainway.engines.precision import LossScale, choose_precision


def test_auto_on_a_cpu_is_fp32() -> None:
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"


def test_scale_halves_on_overflow_and_doubles_after_a_stretch() -> None:
    scale = LossScale.start("fp16")
    assert scale.value == 65536
    assert scale.update(overflowed=True)
    assert scale.value == 32768
    for _ in range(scale.growth_every):
        assert not scale.update(overflowed=False)
    assert scale.value == 65536


def test_overflow_at_the_smallest_scale_is_a_real_one() -> None:
    scale = LossScale.start("fp16")
    while scale.value > scale.smallest:
        assert scale.update(overflowed=True)
    assert not scale.update(overflowed=True)


def test_other_formats_are_never_scaled() -> None:
    scale = LossScale.start("fp32")
    assert not scale.update(overflowed=True)
    assert scale.value == 1.0


def test_state_is_taken_back() -> None:
    scale = LossScale.start("fp16")
    scale.update(overflowed=True)
    other = LossScale.start("fp16")
    other.load(scale.state())
    assert other == scale

"""The arithmetic of a step: which number format the hardware does well, autocast, and fp16's loss scale."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]


def choose_precision(wanted: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """Resolve `auto`: bf16 on GPUs that have it, fp16 on older ones, fp32 on CPUs (bf16 is slower there)."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which forward passes run: weights stay fp32, matrix products run in `precision`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


@dataclass
class LossScale:
    """fp16's dynamic loss scale: halved when a gradient overflows, doubled after a stretch without one.

    Source: Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.2. For the other formats
    the scale is 1 and never moves.
    """

    enabled: bool
    value: float = field(default=1.0)
    good_steps: int = 0
    growth_every: int = 1000
    smallest: float = 1.0

    @classmethod
    def start(cls, precision: Precision) -> LossScale:
        return cls(enabled=precision == "fp16", value=2.0**16 if precision == "fp16" else 1.0)

    def update(self, overflowed: bool) -> bool:
        """Move the scale after a step; True when the overflow is explained by the scale and the step is retried
        with the next batch at a lower one."""
        if not self.enabled:
            return False
        if overflowed:
            self.good_steps = 0
            if self.value <= self.smallest:
                return False
            self.value /= 2
            return True
        self.good_steps += 1
        if self.good_steps == self.growth_every:
            self.value, self.good_steps = self.value * 2, 0
        return False

    def state(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        if state:
            self.value, self.good_steps = float(state["value"]), int(state["good_steps"])

"""Which steps are not taken: NaN or infinite losses and gradients, and sudden spikes of the gradient norm."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from trainway.config.schema import TrainConfig
from trainway.errors import UserError
from trainway.logs import warn


class StepGuard:
    """Judges every step by its loss and global gradient norm, so that all ranks decide the same.

    A left-out step costs its batch, never the weights. `max_skipped_steps` in a row end the run: the last
    checkpoint stays what it was.
    """

    WINDOW = 64
    """Steps over which the usual gradient norm is taken."""

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._norms: deque[float] = deque(maxlen=self.WINDOW)
        self.skipped = 0
        self.skipped_in_a_row = 0

    def accept(self, step: int, loss: float, norm: float) -> bool:
        """True when the step may change the weights.

        Raises:
            UserError: the policy is to stop, or too many steps in a row were left out.
        """
        reason = self._objection(loss, norm)
        if reason is None:
            self.skipped_in_a_row = 0
            self._norms.append(norm)
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        warn(f"step {step} left out: {reason} ({self.skipped} so far)")
        nonfinite = not (math.isfinite(loss) and math.isfinite(norm))
        if nonfinite and self._train.on_nonfinite == "stop":
            raise _diverged(step, reason, "train.on_nonfinite is stop")
        if self.skipped_in_a_row >= self._train.max_skipped_steps:
            raise _diverged(step, reason, f"{self.skipped_in_a_row} steps in a row were left out")
        return False

    def state(self) -> dict[str, Any]:
        return {
            "norms": list(self._norms),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._norms = deque(state["norms"], maxlen=self.WINDOW)
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def _objection(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        factor = self._train.spike_factor
        if factor and len(self._norms) == self.WINDOW and norm > factor * median(self._norms):
            return (
                f"the gradient norm {norm:.3g} is over {factor:g} times the usual {median(self._norms):.3g}"
            )
        return None


def _diverged(step: int, reason: str, why: str) -> UserError:
    return UserError(
        f"training stopped at step {step}: {reason}",
        why,
        "lower optim.lr or lengthen schedule.warmup_steps, and start again from an earlier checkpoint (--resume STEP)",
    )

"""`python -m tests.fake_pod [ORDERS.json]`: the supervisor with stages of `tests.fake_trainway` and a clock that a test puts forward."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trainway.pod import supervisor
from trainway.pod.journal import Clock
from trainway.pod.start import read_orders


class LateClock(Clock):
    """Real time, and as many seconds as the file `later` says."""

    def now(self) -> float:
        try:
            later = float((Path(os.environ["FAKE_DIR"]) / "later").read_text() or 0)
        except FileNotFoundError:
            later = 0.0
        return super().now() + later


if __name__ == "__main__":
    supervisor.Clock = LateClock  # type: ignore[misc]
    orders = read_orders(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    sys.exit(supervisor.supervise(orders, trainway=(sys.executable, "-m", "tests.fake_trainway")))

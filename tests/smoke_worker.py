"""A rank of the smoke test whose data or settings are another rank's: `RANK 1`'s, as a machine with a fault would have."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import trainway.smoke.run as run
from trainway.cli.app import main
from trainway.smoke.learning import Material, make_material
from trainway.smoke.report import SmokeSettings


def other_material(settings: SmokeSettings) -> Material:
    return make_material(replace(settings, seed=settings.seed + 1))


if __name__ == "__main__":
    words = ["smoke", "--timeout", "60"]
    if os.environ["RANK"] == "1":
        match sys.argv[1]:
            case "data":
                run.make_material = other_material
            case "settings":
                words += ["--seed", "7"]
    sys.exit(main(words))

"""Starting the smoke test: under torchrun as training is, or in this process where a launcher has started it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from trainway.config.schema import EngineConfig
from trainway.launch.devices import gpu_environment, visible_gpus
from trainway.launch.local import PARENT, run_processes, spans_nodes, under_launcher
from trainway.launch.network import communication_environment
from trainway.launch.nodes import plan_meeting
from trainway.logs import start_logging
from trainway.smoke.report import SmokeSettings

CPU_RANKS = 2
"""Ranks where there is no GPU: one alone would have nobody to talk to."""


def start_smoke(
    settings: SmokeSettings,
    *,
    nproc: int | Literal["auto"] = "auto",
    torchrun_args: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Test this cluster and print what was found; returns 0 when it is fit to train on, else 4.

    Raises:
        ConfigError: the settings do not fit the number of ranks.
        EnvironmentFault: a rank has no GPU of its own.
    """
    if under_launcher():
        if spans_nodes() and PARENT not in os.environ:  # our own launching command has seen to it
            os.environ.update(communication_environment())
        from trainway.smoke.run import run_smoke

        return run_smoke(settings, as_json=as_json)
    count = nproc if nproc != "auto" else len(visible_gpus()) or CPU_RANKS
    engine = EngineConfig(name="ddp", nproc=count, timeout_s=max(1, round(settings.timeout_s)))
    chosen = gpu_environment(engine)
    meeting = plan_meeting(torchrun_args, count, engine)
    settings.check(count * meeting.nodes)
    start_logging("info", is_main=True)
    words = ["smoke", *settings.arguments(), *(["--json"] if as_json else [])]
    return run_processes(count, words, torchrun_args, meeting, chosen)

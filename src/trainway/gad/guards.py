"""What looks wrong in adversarial distillation: said once, with the likely cause and its cure, while it can be cured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainway.gad.alarms import ALARMS, Alarm
from trainway.gad.recent import Recent
from trainway.logs import warn


class GadGuard:
    """Watches a run's figures (`measures.step_measures`) step by step for what `alarms.ALARMS` lists.

    Every rank may watch, since the figures are the same; only one that `speaks` warns. What was said is said again only
    when it has gone and come back. A run that resumes from `state` warns as one that was never interrupted.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self._speaks = speaks
        self._recent = Recent()
        self._held: dict[str, int] = {}
        self._raised: set[str] = set()

    def look(self, step: int, stage: str, figures: Mapping[str, Any]) -> list[str]:
        """Take in the figures of a step, and warn; the names of the alarms that were raised now.

        In a new stage figures are collected anew.
        """
        recent = self._recent
        if stage != recent.stage:
            self._recent = recent = recent.next_stage(stage)
            self._held.clear()
        recent.take(figures)
        return [alarm.name for alarm in ALARMS if self._judge(alarm, step)]

    def state(self) -> dict[str, Any]:
        return {
            "recent": self._recent.state(),
            "held": {name: count for name, count in self._held.items() if count},
            "raised": sorted(self._raised),
        }

    def load(self, state: dict[str, Any]) -> None:
        self._recent = Recent.from_state(state["recent"])
        self._held = dict(state["held"])
        self._raised = set(state["raised"])

    def _judge(self, alarm: Alarm, step: int) -> bool:
        """True when the alarm is raised now."""
        recent = self._recent
        if not all(recent.known(name) for name in alarm.needs):
            return False
        if alarm.name in self._raised:
            if alarm.gone(recent):
                self._raised.discard(alarm.name)
                self._held[alarm.name] = 0
            return False
        held = self._held.get(alarm.name, 0) + 1 if alarm.holds(recent) else 0
        self._held[alarm.name] = held
        if held < alarm.patience:
            return False
        self._raised.add(alarm.name)
        if self._speaks:
            warn(f"step {step}: {alarm.says(recent)}")
        return True

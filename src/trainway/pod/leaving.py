"""What a job leaves its machine with: the action that was ordered, asked for until it is agreed to, and the exit code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainway.errors import ExitCode
from trainway.jobs.orders import Orders, PodState
from trainway.pod import ending
from trainway.pod.guard import HOUR_S, NEVER_AGAIN
from trainway.pod.journal import Journal
from trainway.pod.signals import Signals

ASK_AGAIN_S = 600.0
"""A machine that has agreed to end and is still there is asked again."""


def last_resort(orders: Orders, environ: Mapping[str, str]) -> Callable[[], ending.Answer] | None:
    """How a machine that costs is ended without the supervisor; None where nothing is to be ended. A stop, which loses
    nothing: nobody knows what is saved elsewhere."""
    if orders.machine == "keep":
        return None
    if orders.ender == "runpod":
        return lambda: ending.ask_runpod("stop", environ)
    if orders.ender == "command" and orders.end_command:
        return lambda: ending.run_end_command(orders.end_command, environ)
    return None


@dataclass(frozen=True)
class Leaving:
    """The end of one supervisor's work on its machine."""

    orders: Orders
    rank: int
    journal: Journal
    signals: Signals
    environ: Mapping[str, str]

    @property
    def state(self) -> PodState:
        return self.journal.state

    def leave(self, *, asked: bool, beat: Callable[[], None]) -> int:
        """End the machine as it was ordered, and return the exit code of this process.

        asked: whether the user has asked for a stop; beat: called now and then while nothing is left to do but to wait.
        """
        code = exit_code(self.state)
        if self.state.stage != "ended":
            self.journal.change(stage="end")
        if self.state.outcome == "stopped" and not asked:
            # whoever has sent the signal ends the machine, or starts this again
            self.journal.change(stage="ended")
            return code
        action = self._action(asked)
        machine = self.orders.ender
        if machine == "runpod" and action != "keep" and self.rank == 0:
            self._end_pod(action)
            return code
        if machine == "command" and action != "keep" and self.rank == 0 and self.orders.end_command:
            self._ask(lambda: ending.run_end_command(self.orders.end_command, self.environ))
            return code
        self.journal.change(stage="ended")
        if machine == "runpod":  # it would be started again
            self.journal.say("this container waits until its machine is ended")
            while not self.signals.sleep(HOUR_S):
                beat()
        return code

    def _action(self, asked: bool) -> ending.Action:
        if asked and self.state.outcome == "stopped":
            return "stop"  # to go on from there, whatever is to become of the machine at the end
        if self.state.incomplete and self.orders.machine == "terminate":
            self.journal.say(
                "the machine is stopped and not terminated: its disk holds what is not elsewhere"
            )
            return "stop"
        return self.orders.machine

    def _end_pod(self, action: ending.Action) -> None:
        """Ask RunPod, and ask again when it has agreed and this process still lives."""
        reason = self.state.reason
        while self._ask(lambda: ending.ask_runpod(action, self.environ), reason):
            if self.signals.sleep(ASK_AGAIN_S):
                return
            what = "the machine has agreed to end, is still there, and goes on costing"
            self.journal.say(what)
            self.journal.change(reason=_both(reason, what), machine_ended=False, stage="end")

    def _ask(self, attempt: Callable[[], ending.Answer], reason: str | None = None) -> bool:
        first = self.state.reason if reason is None else reason

        def say(text: str) -> None:
            self.journal.say(text)
            self.journal.change(reason=_both(first, text))

        if not ending.keep_asking(attempt, say, self.signals.sleep, self.orders.guard_every_s):
            return False
        self.journal.change(reason=first, machine_ended=True, stage="ended")
        return True


def exit_code(state: PodState) -> int:
    """Of the supervisor's process, by how the job has ended."""
    if state.outcome == "stopped":
        return ExitCode.STOPPED
    if state.outcome == "done" and not state.incomplete:
        return ExitCode.DONE
    if state.exit_code in NEVER_AGAIN:
        return state.exit_code
    return ExitCode.ENVIRONMENT


def _both(reason: str, more: str) -> str:
    return "; ".join(part for part in (reason, more) if part)

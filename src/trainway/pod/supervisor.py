"""A job on its machine from the first second to the last: checks, data, training, release, and the end of what costs."""

from __future__ import annotations

import os
import shlex
import traceback
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from trainway.checkpoint.lock import directory_lock
from trainway.errors import ExitCode, UserError
from trainway.jobs.orders import JobDir, Orders, Outcome, PodState, Stage
from trainway.pod import stages
from trainway.pod.deadman import STILL_S, Deadman
from trainway.pod.following import Following
from trainway.pod.guard import (
    GO_ON,
    NEVER_AGAIN,
    Facts,
    Kind,
    Verdict,
    bounds_of,
    dollars_spent,
    judge,
    limit_s,
)
from trainway.pod.journal import Clock, Journal
from trainway.pod.leaving import Leaving, last_resort
from trainway.pod.processes import JOB_MARK, Child, end_all
from trainway.pod.progress import Progress, Seen, look
from trainway.pod.signals import Signals
from trainway.pod.stages import Step
from trainway.pod.start import is_asked, load_state, make_place, node_rank, take_secrets

OUTCOMES: dict[Kind, Outcome] = {
    "done": "done",
    "failed": "failed",
    "stop": "stopped",
    "stall": "stalled",
    "deadline": "deadline",
    "budget": "budget",
}
STALL_LOOKS = 6
"""A training that stands still gets so many looks of the guard to end by itself: it hardly will."""
LAST_TRIES = 3
"""Of each command after the training."""


def supervise(
    orders: Orders,
    environ: MutableMapping[str, str] = os.environ,
    *,
    trainway: tuple[str, ...] = stages.TRAINWAY,
) -> int:
    """Do what the orders say, once; the exit code is 0, 75 (stopped and saved), or 2 to 4, which no restart heals.

    A container that is started again by its scheduler calls it again, and goes on where it was. On RunPod it does not
    return before a signal comes: a container there restarts when its first process ends.

    Args:
        trainway: the command line that the verbs are appended to.

    Raises:
        ConfigError, EnvironmentFault: the place cannot be used, or another supervisor is at work there.
    """
    # a `~` is this machine's home
    orders = orders.model_copy(update={"root": str(Path(orders.root).expanduser().absolute())})
    rank = node_rank(orders, environ)
    job_dir = make_place(orders, rank, environ)
    with directory_lock(job_dir.path, job_dir.lock, what="job", setting="name"):
        return Supervisor(orders, job_dir, rank, environ, trainway).run()


class Supervisor:
    """One start of the supervisor of one node."""

    def __init__(
        self,
        orders: Orders,
        job_dir: JobDir,
        rank: int,
        environ: MutableMapping[str, str],
        trainway: tuple[str, ...],
    ) -> None:
        self.orders, self.environ, self.trainway = orders, environ, trainway
        self.clock, self.signals = Clock(), Signals()
        self.place = stages.place_of(orders, job_dir, rank)
        self.job = JobDir.of(orders.root, orders.job)
        state, self._answered = load_state(job_dir, self.job.stop_request, orders, self.clock.now())
        self.bounds = bounds_of(orders, state.began)
        self.journal = Journal(job_dir, state, self.clock)
        self._deadman = self._watched()
        self._last_moment = float("inf")
        """When what comes after the training is over, done or not."""

    @property
    def state(self) -> PodState:
        return self.journal.state

    def run(self) -> int:
        """All stages that are still to be done, and the end."""
        with self.signals.listening():
            try:
                complete = self._work()
            except Exception as error:  # whatever is wrong here, the machine is not to go on costing for it
                self.journal.say(f"internal error: {''.join(traceback.format_exception(error))}")
                self._note_fault(f"internal error: {type(error).__name__}: {error}")
                complete = True
            code = self._leave() if complete else int(ExitCode.STOPPED)
        if self._deadman is not None:
            self._deadman.end()
        self.journal.close()
        return code

    def _leave(self) -> int:
        asked = is_asked(self.job.stop_request, self._answered)
        leaving = Leaving(self.orders, self.place.rank, self.journal, self.signals, self.environ)
        return leaving.leave(asked=asked, beat=self._beat)

    def _watched(self) -> Deadman | None:
        """What ends a machine that costs when this process hangs; None where nothing is to be ended, or without a limit."""
        act, limit = last_resort(self.orders, self.environ), limit_s(self.bounds)
        if act is None or self.place.rank > 0 or limit == float("inf"):
            return None
        save_s = self.bounds.save_s
        end_at = self.bounds.began + limit + 2 * save_s + STILL_S
        deadman = Deadman(end_at, self.clock.now, act, still_s=save_s + STILL_S)
        self.signals.on_wait = deadman.beat
        deadman.start()
        return deadman

    # ---- the stages

    def _work(self) -> bool:
        """False when a signal has come after the training: what is missing then is for the next start."""
        if self.state.outcome is not None and self.state.stage in ("end", "ended"):
            self.journal.say(f"{self.orders.job} is over already ({self.state.outcome}): nothing is started")
            return True
        self._clear()
        if self.state.outcome is None:
            verdict = self._until_trained()
            self._beat(look(self.place.run))
            self._conclude(verdict)
        return self._after()

    def _clear(self) -> None:
        """End what a supervisor that was killed has left behind."""
        own = str(self.place.job_dir.path)
        if not end_all(lambda environ: environ.get(JOB_MARK) == own, self.bounds.save_s):
            self.journal.say("processes of an earlier start cannot be killed")

    def _until_trained(self) -> Verdict:
        self.journal.change(total_steps=stages.total_steps(self.orders))
        self._beat(look(self.place.run))
        rank, nodes = self.place.rank, self.orders.nodes
        self.journal.say(
            f"{self.orders.job}: node {rank} of {nodes} in {self.place.root}, run {self.place.run.path}"
        )
        try:
            names = take_secrets(self.place.job_dir, self.environ)
            stages.write_orders(self.orders, self.place)
        except UserError as error:
            return Verdict("failed", "; ".join(part for part in (error.what, error.why) if part))
        if names:
            self.journal.say(f"secrets: {', '.join(names)}")
        verdict = self._wait_for_upload()
        for step in stages.preparation(self.orders, self.place, self.trainway):
            if verdict.kind == "done":
                verdict = self._run(step)
        return self._train() if verdict.kind == "done" else verdict

    def _wait_for_upload(self) -> Verdict:
        if not self.orders.awaits_upload or self.job.uploaded.exists():
            return Verdict("done")
        self._enter("upload")
        self.journal.say("waiting for the files that were promised")
        minutes = self.orders.limits.upload_minutes
        end = self.clock.now() + minutes * 60
        while not self.job.uploaded.exists():
            if (verdict := self._judge(Facts())) != GO_ON:
                return verdict
            if self.clock.now() >= end:
                return Verdict("failed", f"the promised files have not come within {minutes:g} minutes")
            self._beat()
            self.signals.wait(self.orders.guard_every_s)
        return Verdict("done")

    def _train(self) -> Verdict:
        """Train, and start again what crashes, as long as it gets on."""
        step = stages.training(self.orders, self.place, self.trainway)
        while self.state.crashes <= self.bounds.restarts:
            self.journal.change(attempts=self.state.attempts + 1)
            verdict = self._run(step)
            if verdict.kind != "again":
                return verdict
            self.journal.change(crashes=self.state.crashes + 1)
            self.journal.say(f"train: {verdict.reason}; it goes on from step {self.state.saved_step}")
            self.signals.sleep(self.orders.guard_every_s)
        return Verdict("failed", f"{self.state.crashes} crashes without a newly saved step")

    def _after(self) -> bool:
        """The release of a training that is done, and the last copy of whatever there is."""
        self._last_moment = max(
            self.bounds.began + limit_s(self.bounds), self.clock.now() + self.bounds.save_s
        )
        steps: list[Step] = []
        if self.place.rank == 0 and self.state.outcome == "done":
            steps += stages.release(self.orders, self.place, self.trainway)
        steps += stages.last_copy(self.orders, self.place)
        for step in steps:
            verdict = self._last(step)
            if verdict.kind == "stop":
                return False
            if verdict.kind != "done":
                self._note_fault(f"{step.stage} failed: {verdict.reason}")
                if step.stage == "release":  # what it would have made is not there
                    steps = [other for other in steps if other.stage != "release"]
        return True

    def _last(self, step: Step) -> Verdict:
        for attempt in range(LAST_TRIES):
            if attempt and self.signals.sleep(self.orders.guard_every_s):
                return Verdict("stop")
            verdict = self._run(step)
            if verdict.kind != "again":
                break
        return verdict

    # ---- one command

    def _run(self, step: Step) -> Verdict:
        """Run a command to its end under the guard: `done`, `again`, or why all is over."""
        if step.stage != self.state.stage:
            self._enter(step.stage)
        if (verdict := self._judge(Facts(), step.stage)) != GO_ON:
            return verdict
        self.journal.say(f"{step.stage}: {shlex.join(step.command)}")
        try:
            child = self._start(step.command)
        except OSError as error:  # such as a machine without a process or memory left, for now
            reason = f"{step.stage} cannot be started: {error.strerror or error}"
            return Verdict("again" if step.stage in ("train", "release", "sync") else "failed", reason)
        progress = Progress(self.place.run) if step.stage == "train" else None
        following = self._following() if progress is not None else None
        try:
            asked, code = self._watch(child, step.stage, progress, following)
        finally:
            if following is not None:
                following.end()
            if not child.kill():  # what the command has left behind
                self.journal.say(f"{step.stage}: a process cannot be killed, and is left behind")
        if progress is not None:
            self._beat(look(self.place.run))
        if code:
            self.journal.change(exit_code=code)
        return self._verdict(step, asked, code)

    def _watch(
        self, child: Child, stage: Stage, progress: Progress | None, following: Following | None
    ) -> tuple[Verdict | None, int | None]:
        """Wait for the end, or bring it about: (the guard's reason, exit code)."""
        asked: Verdict | None = None
        kill_at = float("inf")
        while (code := child.exit_code()) is None:
            now = self.clock.now()
            self._beat(progress.look(now) if progress else None)
            if following is not None:
                following.look()
            if asked is None:
                verdict = self._judge(Facts(progressed=progress.progressed if progress else None), stage)
                if verdict != GO_ON:
                    asked, kill_at = verdict, now + self._grace(verdict)
                    self.journal.say(f"{stage} is asked to end: {verdict.reason}")
                    child.ask_to_end()
            elif now >= kill_at:
                self.journal.say(f"{stage} has not ended in time, and is killed")
                child.kill()
                return asked, child.exit_code()
            self.signals.wait(min(self.orders.guard_every_s, max(0.0, kill_at - now)))
        return asked, code

    def _verdict(self, step: Step, asked: Verdict | None, code: int | None) -> Verdict:
        if code == ExitCode.DONE:
            return Verdict("done")
        if asked is not None:
            return asked
        if step.stage == "train":
            return judge(self.clock.now(), Facts(exit_code=code, crashes=self.state.crashes), self.bounds)
        if step.stage in ("release", "sync"):
            return Verdict("again", f"exit code {code}")
        if step.stage == "doctor" and code not in NEVER_AGAIN:
            self.journal.say(f"doctor: exit code {code} says nothing about this machine: going on")
            return Verdict("done")
        return Verdict("stop" if code == ExitCode.STOPPED else "failed", f"{step.stage}: exit code {code}")

    def _judge(self, facts: Facts, stage: Stage = "upload") -> Verdict:
        now = self.clock.now()
        if stage in ("release", "sync"):
            # neither a limit that has ended the training nor the request for it ends this too
            if self.signals.asked:
                return Verdict("stop", "stopped by a signal")
            return Verdict("deadline", "its time is over") if now >= self._last_moment else GO_ON
        asked = self.signals.asked or is_asked(self.job.stop_request, self._answered)
        return judge(now, Facts(facts.exit_code, asked, facts.progressed, facts.crashes), self.bounds)

    def _grace(self, verdict: Verdict) -> float:
        if verdict.kind == "stall":
            return min(self.bounds.save_s, STALL_LOOKS * self.orders.guard_every_s)
        return self.bounds.save_s

    def _start(self, command: tuple[str, ...]) -> Child:
        job_dir = self.place.job_dir
        environ = stages.stage_environment(self.orders, self.place, self.environ)
        return Child(command, job_dir=job_dir.path, log=job_dir.log, folder=self.place.root, environ=environ)

    def _following(self) -> Following | None:
        sync = self.orders.sync
        if sync is None or self.place.rank > 0:
            return None
        return Following(lambda: self._start(stages.syncing(self.place.run, sync)), self.journal.say)

    # ---- what is noted

    def _enter(self, stage: Stage) -> None:
        self.journal.change(stage=stage)

    def _beat(self, seen: Seen | None = None) -> None:
        changes: dict[str, Any] = {"dollars": round(dollars_spent(self.clock.now(), self.bounds), 4)}
        if seen is not None:
            changes["step"] = max(seen.step, seen.saved)
            if seen.saved > self.state.saved_step:
                changes |= {"saved_step": seen.saved, "crashes": 0}
        self.journal.beat(**changes)

    def _conclude(self, verdict: Verdict) -> None:
        outcome = OUTCOMES[verdict.kind]
        saved = f"step {self.state.saved_step} is saved" if self.state.saved_step else "no step is saved"
        reason = "; ".join(part for part in (verdict.reason, saved) if part)
        code = self.state.exit_code if outcome == "failed" else None
        if verdict.kind == "stop":
            # the signal that has ended the training is answered with this: the next one ends what comes after
            self.signals.asked = False
        self.journal.change(outcome=outcome, reason=reason, exit_code=code)
        self.journal.say(f"the training is over: {outcome}: {reason}")

    def _note_fault(self, what: str) -> None:
        """Something is wrong that leaves the outcome of a training that is over as it is."""
        reason = "; ".join(part for part in (self.state.reason, what) if part)
        self.journal.change(
            outcome=self.state.outcome or "failed",
            reason=reason,
            incomplete=True,
            exit_code=self.state.exit_code or ExitCode.INTERNAL,
        )
        self.journal.say(what)

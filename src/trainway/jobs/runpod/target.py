"""RunPod as a place to run jobs at: each verb as a story over the API, the candidates and the inside of the pod."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainway.errors import EnvironmentFault, UserError
from trainway.jobs.orders import PodState
from trainway.jobs.origin import origin
from trainway.jobs.record import Record
from trainway.jobs.runpod import place
from trainway.jobs.target import Cost, Job, JobStatus, MachineState, Say, Stray

if TYPE_CHECKING:
    from trainway.jobs.runpod.api import Api
    from trainway.jobs.runpod.machines import Machine
    from trainway.jobs.runpod.models import Pod
    from trainway.jobs.runpod.reach import Shells
    from trainway.jobs.shell.connection import Connection

SAVE_MINUTES = 20.0
"""How long a stop waits for the training to save."""
_STATES: dict[str, MachineState] = {
    "PROVISIONING": "starting",
    "STARTING": "starting",
    "RUNNING": "running",
    "EXITED": "stopped",
    "ERROR": "failed",
    "TERMINATED": "gone",
}


def _open() -> Api:
    from trainway.jobs.runpod.api import Api

    return Api()


class RunPodTarget:
    """Pods, and clusters for several nodes. `api` and `shells` are other ones in tests."""

    def __init__(self, api: Callable[[], Api] = _open, shells: Shells | None = None) -> None:
        self._open = api
        self._given = shells

    def request(self, job: Job, record: Record) -> Any:
        """The first request in full, and what else of it the other candidates change. No key and no network is needed.

        The id of a volume that is not there yet is NEW.
        """
        from trainway.jobs.runpod.request import NEW_VOLUME, body_of, check, volume_body

        check(job)
        settings = job.spec.runpod
        centers = settings.data_centers
        volume = volume_body(
            job, record, centers[0] if centers else "(where the first candidate is in stock)"
        )
        volume_id = job.spec.volume.id if volume is None else NEW_VOLUME
        bodies = [
            body_of(
                job, record, choice, volume_id=volume_id, data_centers=centers,
                dollars_per_hour=job.orders.dollars_per_hour,
            ).body()
            for choice in job.spec.gpus
        ]  # fmt: skip
        what = "compute" if job.spec.nodes > 1 else "gpu"
        found = {
            "method": "POST",
            "path": "/clusters" if job.spec.nodes > 1 else "/pods",
            "body": bodies[0],
            "other_candidates": [{what: body[what]} for body in bodies[1:]],
        }
        return (
            found
            if volume is None
            else {"volume": {"path": "/network-volumes", "body": volume.body()}, **found}
        )

    def up(self, job: Job, record: Record, say: Say) -> Record:
        from trainway.jobs.runpod.keys import key_file, public_key, register
        from trainway.jobs.runpod.placing import find_or_place
        from trainway.jobs.runpod.reach import deliver, wait_for_ssh
        from trainway.jobs.runpod.request import check

        check(job)  # before a key is asked for, let alone money spent
        origin()
        shells = self._shells()
        with self._open() as api:
            key = key_file()
            register(api, public_key(key), say)
            record = place.noted(record, ssh_key=str(key))
            record, machine = find_or_place(api, job, record, say)
            record = record.with_(phase="up", root=job.orders.root, ended=None)
            say(
                f"{machine.kind} {machine.id} runs in {machine.data_center or 'a data centre'}; waiting for its SSH"
            )
            record, connection = wait_for_ssh(api, shells, record, _first(machine), say)
            deliver(connection, job, say)
        return record

    def status(self, record: Record) -> JobStatus:
        from trainway.jobs.runpod.reach import inside

        with self._open() as api:
            machine = self._machine(api, record)
            if machine is None:
                return JobStatus("gone", "RunPod has no machine of this job")
            detail = f"{machine.kind} {machine.id}: {machine.status}"
            if machine.data_center:
                detail += f" in {machine.data_center}"
            detail += f", ${machine.dollars_per_hour:.2f} an hour"
            state: PodState | None = None
            if machine.status == "RUNNING":
                record, state, silence = inside(api, self._shells(), record, _first(machine))
                detail += f"; its inside does not answer: {silence}" if silence else ""
            nodes = tuple(_node(number, pod) for number, pod in enumerate(machine.pods))
            return JobStatus(
                _STATES[machine.status], detail, state, nodes if machine.kind == "cluster" else ()
            )

    def logs(self, record: Record, *, follow: bool, tail: int | None) -> Iterator[str]:
        """From the API and not by SSH: it has what was said before SSH was there and after the container had ended."""
        from trainway.jobs.runpod.logs import cluster_log, pod_lines

        with self._open() as api:
            machine = self._needed(api, record)
            if machine.kind == "cluster":
                yield from cluster_log(api, machine.pods, follow=follow, tail=tail)
            else:
                yield from pod_lines(api, _first(machine), follow=follow, tail=tail)

    def ssh(self, record: Record, command: Sequence[str]) -> int:
        return self._connection(record).interactive(command)

    def tunnel(self, record: Record, ports: Mapping[int, int], say: Say) -> int:
        connection = self._connection(record)
        for here, there in ports.items():
            say(f"http://127.0.0.1:{here} is port {there} of the pod, until Ctrl-C")
        return connection.forward(ports)

    def stop(self, record: Record, say: Say) -> Record:
        from trainway.jobs.runpod.keys import check_account
        from trainway.jobs.runpod.machines import end_machine

        with self._open() as api:
            machine = self._machine(api, record)
            if machine is None:
                check_account(api, record)
                say("RunPod has no machine of this job: nothing to stop")
                record = place.forgotten(record, api.clock.now())
                return record.with_(phase="stopped" if record.place.get("volume") else "ended")
            if machine.status == "RUNNING":
                record = self._save(api, record, machine, say)
            if record.place.get("volume") or machine.kind == "cluster":
                # a stopped pod may come back without a GPU, and its disk costs; the volume holds all that counts
                end_machine(api, machine.kind, machine.id)
                say(
                    f"{machine.kind} {machine.id} is ended; volume {record.place.get('volume')} holds the work"
                )
                return place.forgotten(record, api.clock.now()).with_(phase="stopped")
            self._stop_pod(api, machine.id)
            say(
                f"pod {machine.id} is stopped; its disk goes on costing, and what lies on /tmp and /root is gone"
            )
            return place.closed(record, api.clock.now()).with_(phase="stopped")

    def down(self, record: Record, say: Say) -> Record:
        from trainway.jobs.runpod.keys import check_account
        from trainway.jobs.runpod.machines import end_machine, is_gone, machines_of

        with self._open() as api:
            kind = place.kind_of(record)
            known = place.machine_id(record)
            if known is not None:  # first of all: a list that cannot be read must not keep it alive
                if is_gone(api, kind, known):
                    check_account(api, record)
                end_machine(api, kind, known)
                say(f"{kind} {known} has ended, RunPod says so")
            # those that a lost answer has left behind too
            others = [machine.id for machine in machines_of(api, record, kind) if machine.id != known]
            for machine_id in others:
                end_machine(api, kind, machine_id)
                say(f"{kind} {machine_id} has ended, RunPod says so")
            if not others and known is None:
                check_account(api, record)
                say("RunPod has no machine of this job")
            if volume := record.place.get("volume"):
                say(
                    f"volume {volume} stays, and costs until it is deleted at console.runpod.io; "
                    f"`volume: {{id: {volume}}}` in a job file goes on with it"
                )
            now = api.clock.now()
            return place.forgotten(record, now).with_(phase="ended", ended=record.ended or now)

    def cost(self, record: Record) -> Cost:
        from trainway.jobs.runpod.bills import cost_of

        with self._open() as api:
            return cost_of(api, record)

    def strays(self, records: Sequence[Record]) -> list[Stray]:
        from trainway.jobs.runpod.reach import inside
        from trainway.jobs.runpod.reaping import strays_of

        with self._open() as api:

            def ask(record: Record, machine: Machine) -> tuple[PodState | None, str]:
                return inside(api, self._shells(), record, _first(machine))[1:]

            return strays_of(api, records, ask)

    def end_stray(self, stray: Stray) -> None:
        from trainway.jobs.runpod.reaping import end_stray

        with self._open() as api:
            end_stray(api, stray)

    def _shells(self) -> Shells:
        from trainway.jobs.runpod.reach import OpenSsh

        return self._given or OpenSsh()

    def _machine(self, api: Api, record: Record) -> Machine | None:
        from trainway.jobs.runpod.machines import find_machine, machines_of

        kind, known = place.kind_of(record), place.machine_id(record)
        if known is not None:
            return find_machine(api, kind, known)
        return next(iter(machines_of(api, record, kind)), None)

    def _needed(self, api: Api, record: Record) -> Machine:
        machine = self._machine(api, record)
        if machine is None or not machine.pods:
            volume = record.place.get("volume")
            raise EnvironmentFault(
                f"job {record.name} has no machine at RunPod",
                f"it has ended; what it wrote is on volume {volume}" if volume else "it has ended",
                "`trainway up` starts it again, `trainway cost` says what it has cost",
            )
        return machine

    def _connection(self, record: Record) -> Connection:
        from trainway.jobs.runpod.reach import reach

        with self._open() as api:
            machine = self._needed(api, record)
            return reach(api, self._shells(), record, _first(machine), lambda _: None)[1]

    def _save(self, api: Api, record: Record, machine: Machine, say: Say) -> Record:
        """Ask the training to save, and wait for it; say so when it cannot be asked."""
        from trainway.jobs.runpod.reach import ask_to_stop, job_dir, reach, wait_until_saved

        shells = self._shells()
        try:
            record, connection = reach(api, shells, record, _first(machine), say)
            ask_to_stop(connection, record)
            say("asked the training to save and end")
            last = wait_until_saved(
                lambda: shells.state(connection, job_dir(record)),
                now=api.clock.now, sleep=api.clock.sleep, minutes=SAVE_MINUTES,
            )  # fmt: skip
        except UserError as error:
            say(
                f"the training could not be asked to save ({error.what}): steps since its last checkpoint are lost"
            )
            return record
        if last is not None and last.stage in ("end", "ended"):
            say(f"it has ended at step {last.step}: {last.reason or last.outcome}")
        else:
            say(
                f"it has not ended within {SAVE_MINUTES:.0f} minutes: steps since its last checkpoint are lost"
            )
        return record

    def _stop_pod(self, api: Api, pod_id: str) -> None:
        """Stop a pod, and come back only when it has stopped; one that is gone or has exited is so already."""
        from trainway.jobs.runpod.api import Refused
        from trainway.jobs.runpod.machines import END_ATTEMPTS

        for attempt in range(1, END_ATTEMPTS + 1):
            pod = api.find_pod(pod_id)
            if pod is None or pod.status in ("EXITED", "TERMINATED"):
                return
            try:
                api.act(pod_id, "stop")
            except Refused as refused:
                if refused.status not in (404, 409):  # 409: it is on its way already
                    raise
            api.clock.sleep(api.clock.backoff(attempt))
        raise EnvironmentFault(
            f"pod {pod_id} is not known to have stopped, and may go on costing money",
            "RunPod still shows it running",
            "start the same command again, or end it: `trainway down`",
        )


def _first(machine: Machine) -> Pod:
    if not machine.pods:
        raise EnvironmentFault(f"{machine.kind} {machine.id} has no pods yet", "", "wait a minute")
    return machine.pods[0]


def _node(number: int, pod: Pod) -> str:
    rank = pod.cluster.rank if pod.cluster is not None and pod.cluster.rank is not None else number
    used = [f"{gpu.util}%" for gpu in pod.runtime.gpus if gpu.util is not None] if pod.runtime else []
    return f"node {rank}: pod {pod.id}, {pod.status}" + (f", GPUs at {' '.join(used)}" if used else "")

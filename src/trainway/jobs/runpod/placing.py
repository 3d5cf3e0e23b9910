"""A machine for a job: the candidates in their order, none dearer than allowed, and never two machines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trainway.errors import ConfigError, EnvironmentFault
from trainway.jobs.record import Record, find_record
from trainway.jobs.runpod import place
from trainway.jobs.runpod.api import ATTEMPTS, Api, Lost, Refused
from trainway.jobs.runpod.gpus import gpu_type_id
from trainway.jobs.runpod.machines import (
    Machine,
    end_machine,
    end_others,
    find_machine,
    new_cluster,
    of_pod,
    only_machine,
    wait_until_running,
)
from trainway.jobs.runpod.models import CreateCluster, CreatePod, GpuType
from trainway.jobs.runpod.place import Kind
from trainway.jobs.runpod.request import body_of
from trainway.jobs.runpod.volumes import JobVolume
from trainway.jobs.spec import GpuChoice
from trainway.jobs.target import Job, Say
from trainway.jobs.waiting import Deadline

COST_SLACK = 1.05
"""What a pod costs is a little more than its GPUs: its disk."""
_CAPACITY = re.compile(
    r"capacity|no longer any|not? (enough|available)|unavailable|no (instance|machine|host)|out of stock|sold out"
    r"|insufficient (resource|stock|supply)",
    re.IGNORECASE,
)
_STOCK = {"HIGH": 0, "MEDIUM": 1, "LOW": 2, "NONE": 3}


@dataclass(frozen=True)
class Try:
    """One machine that would do, in one data centre or in any of several."""

    choice: GpuChoice
    price: float
    """Dollars of one GPU for an hour, by today's catalogue."""
    data_centers: tuple[str, ...]

    def __str__(self) -> str:
        where = f" in {', '.join(self.data_centers)}" if self.data_centers else ""
        return f"{self.choice.count} x {self.choice.name}{where}"


def find_or_place(api: Api, job: Job, record: Record, say: Say) -> tuple[Record, Machine]:
    """The job's running machine, the one that there is or a new one; all of it in the record before it is asked for.

    Raises:
        ConfigError: RunPod refuses the request itself.
        EnvironmentFault: no candidate is to be had, no money, or nobody knows what was made.
    """
    kind: Kind = "cluster" if job.spec.nodes > 1 else "pod"
    record = place.noted(record, kind=kind)
    machine = only_machine(api, record, kind, say)
    if machine is not None:
        record, awake = _go_on(api, job, record, machine, say)
        if awake is not None:
            return record, awake
    refusals: list[tuple[str, Refused | None]] = []
    volume = JobVolume(api, job, record, say)
    for option in _tries(api, job, record, volume, refusals, say):
        try:
            record, placed = _try(api, job, record, option, volume, say)
        except Refused:
            now = find_record(record.name) or record
            if place.machine_id(now) is None:  # for good, and nothing was made: nothing may cost
                volume.drop_unused(now)
            raise
        if isinstance(placed, Machine):
            return record, placed
        say(f"{option}: {placed if isinstance(placed, str) else _refused(placed)}")
        refusals.append((f"{option}: {placed}", None) if isinstance(placed, str) else (str(option), placed))
    volume.drop_unused(record)
    raise _none_left(refusals)


def _go_on(api: Api, job: Job, record: Record, machine: Machine, say: Say) -> tuple[Record, Machine | None]:
    """The machine that is there, awake; None when it is no good any more, and ended.

    Raises EnvironmentFault for one that does not come in time: it was there before, and is left.
    """
    say(f"found {machine.kind} {machine.id} of this job: {machine.status}")
    cost = machine.dollars_per_hour or record.dollars_per_hour
    if machine.id != place.machine_id(record):
        record = place.opened(record, machine.kind, machine.id, machine.created, cost)
    if machine.status == "EXITED" and machine.kind == "pod":
        try:
            pod = api.act(machine.id, "start")
        except Refused as refused:
            if not record.place.get("volume"):
                raise EnvironmentFault(
                    f"pod {machine.id} does not start again",
                    refused.why,
                    "its disk is kept: try later, or give it up with `trainway down`",
                ) from None
            pod = None
        if pod is not None:
            machine = of_pod(pod)
            now = api.clock.now()
            record = place.opened(place.closed(record, now), "pod", pod.id, now, cost)
    # just woken, it may still show EXITED
    deadline = _deadline(api, job, say)
    found = wait_until_running(api, machine, say, deadline, lambda _: "", final=("ERROR", "TERMINATED"))
    if isinstance(found, Machine):
        return record, found
    if deadline.is_over():
        raise deadline.fault(
            f"{machine.kind} {machine.id}",
            found,
            f"it is left as it is, and may cost money: start the same command again, or end it: "
            f"`trainway down {record.name}`",
        )
    has_worked = record.phase != "asked" and not record.place.get("volume")
    if has_worked and find_machine(api, machine.kind, machine.id) is not None:
        raise EnvironmentFault(
            found,
            "its own disk is all that it has, and may hold work that is nowhere else",
            "try again, or give it up: `trainway down`",
        )
    say(f"{found}: ended")
    end_machine(api, machine.kind, machine.id)
    return place.forgotten(record, api.clock.now()), None


def _tries(
    api: Api,
    job: Job,
    record: Record,
    volume: JobVolume,
    refusals: list[tuple[str, Refused | None]],
    say: Say,
) -> Iterator[Try]:
    """What is worth asking for: on offer, in stock, not too dear, where the volume is or can be."""
    catalogues: dict[int, dict[str, GpuType]] = {}
    cloud = job.spec.runpod.cloud
    for choice in job.spec.gpus:
        if choice.count not in catalogues:
            product = "CLUSTER" if job.spec.nodes > 1 else "POD"
            types = api.gpu_types(count=choice.count, cloud=cloud, product=product)
            catalogues[choice.count] = {found.id: found for found in types}
        found = catalogues[choice.count].get(gpu_type_id(choice.name))
        why = _unfit(job, record, choice, found)
        if why or found is None:
            say(f"{choice.count} x {choice.name}: {why}")
            refusals.append((f"{choice.count} x {choice.name}: {why}", None))
            continue
        price = found.price.secure if cloud == "SECURE" else found.price.community
        stock = sorted(found.data_centers, key=lambda center: _STOCK[center.availability])
        centers = tuple(center.id for center in stock if center.availability != "NONE")
        allowed = job.spec.runpod.data_centers
        if allowed:
            centers = tuple(center for center in centers if center in allowed)
        groups = volume.centers(centers, allowed)
        if not groups:
            why = f"none in stock where {'the volume is' if volume.is_wanted else 'it may be'}"
            say(f"{choice.count} x {choice.name}: {why}")
            refusals.append((f"{choice.count} x {choice.name}: {why}", None))
        yield from (Try(choice, price, group) for group in groups)


def _unfit(job: Job, record: Record, choice: GpuChoice, found: GpuType | None) -> str:
    """Why a candidate is not asked for; empty when it is."""
    cloud = job.spec.runpod.cloud
    if found is None:
        return "RunPod's catalogue does not list it"
    if not (found.secure if cloud == "SECURE" else found.community):
        return f"it is not to be had in the {cloud} cloud"
    most = found.max_count.secure if cloud == "SECURE" else found.max_count.community
    if choice.count > most:
        return f"a machine has at most {most} of them"
    price = found.price.secure if cloud == "SECURE" else found.price.community
    if price > (highest := highest_price(job, record, choice)):
        return f"${price:.2f} an hour each, and the highest allowed is ${highest:.2f}"
    if found.availability == "NONE":
        return "none in stock"
    return ""


def highest_price(job: Job, record: Record, choice: GpuChoice) -> float:
    """The most that one GPU may cost in dollars per hour: what the job says, or what its limit in dollars leaves."""
    if choice.max_price is not None:
        return choice.max_price
    dollars, hours = job.orders.limits.dollars, record.planned_hours
    if dollars is None or not hours:
        return float("inf")
    return dollars / (hours * choice.count * job.spec.nodes)


def _try(
    api: Api, job: Job, record: Record, option: Try, volume: JobVolume, say: Say, *, is_second: bool = False
) -> tuple[Record, Machine | Refused | str]:
    """Ask for one machine and wait until it runs; why not, when it is not to be had. Then there is none.

    A machine ends itself by the price that it was told: one that costs more than that is given back, and asked for
    once more with its real price.
    """
    choice = option.choice
    num_gpus = choice.count * job.spec.nodes
    cost = option.price * num_gpus
    record, volume_id, centers = volume.at(record, option.data_centers)
    body = body_of(job, record, choice, volume_id=volume_id, data_centers=centers, dollars_per_hour=cost)
    # before anything is asked for: whatever happens now, the job is known to have asked
    record = record.with_(phase="asked", gpu=choice.name, num_gpus=num_gpus, dollars_per_hour=cost)
    say(f"asking for {option} at ${cost:.2f} an hour")
    try:
        machine = _create(api, record, body, say)
    except Refused as refused:
        if refused.status in (400, 403):
            return record, refused
        raise
    record = place.opened(record, machine.kind, machine.id, machine.created, cost)
    most = highest_price(job, record, choice) * num_gpus * COST_SLACK
    real = cost

    def too_dear(now: Machine) -> str:
        nonlocal real
        real = now.dollars_per_hour
        if real > most:
            return f"it costs ${real:.2f} an hour, and the most allowed is ${most:.2f}"
        if real > cost * COST_SLACK:
            return f"it costs ${real:.2f} an hour, and the catalogue said ${cost:.2f}"
        return ""

    found = wait_until_running(api, machine, say, _deadline(api, job, say), too_dear)
    if isinstance(found, Machine):
        record = place.priced(record, found.dollars_per_hour)
        end_others(api, record, found, say)
        return volume.used(record), found
    end_machine(api, machine.kind, machine.id)
    record = place.forgotten(record, api.clock.now())
    if cost * COST_SLACK < real <= most and not is_second:
        say(f"{option}: {found}; asked for again at that price")
        dearer = replace(option, price=real / num_gpus)
        return _try(api, job, record, dearer, volume, say, is_second=True)
    return record, found


def _deadline(api: Api, job: Job, say: Say) -> Deadline:
    return Deadline(job.orders.limits.start_minutes, say, now=api.clock.now)


def _create(api: Api, record: Record, body: CreatePod | CreateCluster, say: Say) -> Machine:
    """Make the machine once. After a lost answer the name says whether it was made, and only then it is asked again."""
    kind: Kind = "cluster" if isinstance(body, CreateCluster) else "pod"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if isinstance(body, CreateCluster):
                # nothing else is asked before it is noted: a refusal of that would read as one of the cluster
                return new_cluster(api.create_cluster(body))
            return of_pod(api.create_pod(body))
        except Lost as lost:
            say(f"no answer ({lost.why}); looking whether there is a {kind} now")
            fault = lost
        api.clock.sleep(api.clock.backoff(attempt))
        found = only_machine(api, record, kind, say)
        if found is not None:
            return found
    raise fault


def _refused(refused: Refused) -> str:
    if refused.status == 403:
        return f"not open to this account ({refused.words})"
    return f"none to be had ({refused.words})" if is_capacity(refused) else f"refused ({refused.words})"


def is_capacity(refused: Refused) -> bool:
    """Whether a 400 says that there is no machine rather than that a rule is broken: by its words alone, as RunPod has
    no code for it."""
    return refused.status == 400 and bool(_CAPACITY.search(refused.words))


def _none_left(refusals: Sequence[tuple[str, Refused | None]]) -> EnvironmentFault | ConfigError:
    answers = [refused for _, refused in refusals if refused is not None]
    rules = [refused for refused in answers if refused.status == 400 and not is_capacity(refused)]
    # a broken rule is the same on every candidate
    if rules and len(rules) == len(refusals):
        return ConfigError(
            "RunPod refuses what this job asks for",
            rules[-1].words,
            "correct the job file; nothing is left running",
        )
    why = "; ".join(f"{what}: {refused.words}" if refused else what for what, refused in refusals)
    return EnvironmentFault(
        "no candidate of this job is to be had at RunPod",
        why,
        "try again later, or add candidates under `gpus:`",
    )

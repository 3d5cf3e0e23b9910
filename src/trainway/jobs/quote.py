"""What a job will take before anything is rented: hours and dollars by the plan, and whether that may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainway.errors import ConfigError, EnvironmentFault, UserError
from trainway.jobs.rules import PAID
from trainway.jobs.spec import GpuChoice, JobSpec
from trainway.jobs.target import Job
from trainway.planning.gpus import find_gpu
from trainway.planning.plan import Plan, make_plan
from trainway.planning.prices import load_prices

MARGIN = 1.5
"""The default deadline in forecasts; a forecast is not that wrong, a machine that hangs is."""
EXTRA_HOURS = 1.0
"""For the boot, the upload and the release, which no forecast counts."""


@dataclass(frozen=True)
class Offer:
    """One candidate, as the plan sees it."""

    gpu: GpuChoice
    plan: Plan | None
    """None where the model's shape is not known here."""
    price: float
    """Dollars of one GPU for an hour; 0 where nothing is paid by the hour."""
    hours: float | None
    dollars_per_hour: float
    """Of all nodes."""
    refused: str = ""
    """Why it will not do."""

    @property
    def dollars(self) -> float | None:
        return None if self.hours is None else self.hours * self.dollars_per_hour


@dataclass(frozen=True)
class Quote:
    """All candidates in the job's order, and what could not be found out."""

    offers: tuple[Offer, ...]
    unknown: str = ""

    @property
    def usable(self) -> tuple[Offer, ...]:
        return tuple(offer for offer in self.offers if not offer.refused)


def quote(job: Job) -> Quote:
    """Plan the run on every candidate. Raises ConfigError for a GPU that nobody knows."""
    offers: list[Offer] = []
    unknown = ""
    for choice in job.spec.gpus:
        plan: Plan | None = None
        try:
            gpu = find_gpu(choice.name)
            plan = make_plan(job.config, gpu=gpu, num_gpus=choice.count, num_nodes=job.spec.nodes)
        except EnvironmentFault as error:  # the model's own files are not here
            unknown = error.what
        offers.append(_offer(job.spec, choice, plan))
    return Quote(tuple(offers), unknown)


def settle(job: Job, found: Quote) -> Job:
    """The job with the candidates that will do, and its limits and price in the orders.

    Raises:
        EnvironmentFault: the run fits on no candidate.
        ConfigError: the plan is over a limit, or nothing says when a paid job is to end.
    """
    if found.offers and not found.usable:
        raise _nothing_fits(found)
    offers = _within_limits(job.spec, found.usable)
    hours = job.spec.limits.hours or _default_hours(job.spec, offers)
    first = offers[0].dollars_per_hour if offers else 0.0
    limits = job.spec.limits.model_copy(update={"hours": hours})
    return replace(
        job,
        spec=job.spec.model_copy(update={"gpus": tuple(offer.gpu for offer in offers)}),
        orders=job.orders.model_copy(update={"limits": limits, "dollars_per_hour": first}),
    )


def describe(job: Job, found: Quote) -> str:
    """What the user is asked to agree to, in lines."""
    lines = [f"{job.spec.name}: {job.config.recipe} on {job.spec.target}, {_machines(job.spec)}"]
    for offer in found.offers:
        name = f"  {offer.gpu.count * job.spec.nodes} x {offer.gpu.name}"
        if offer.refused:
            lines.append(f"{name}: will not do: {offer.refused}")
            continue
        time = "time not known" if offer.hours is None else f"{offer.hours:.3g} hours"
        rate = f"${offer.dollars_per_hour:.2f} an hour" if offer.dollars_per_hour else "no price by the hour"
        total = f", ${offer.dollars:,.2f} in all" if offer.dollars else ""
        lines.append(f"{name}: {time}, {rate}{total}")
    if found.unknown:
        lines.append(f"  not planned: {found.unknown}")
    hours, dollars = job.orders.limits.hours, job.orders.limits.dollars
    ends = [f"{hours:.3g} hours"] if hours else []
    ends += [f"${dollars:,.2f}"] if dollars else []
    if ends:
        lines.append(f"  ended in any case after {' or '.join(ends)}")
    return "\n".join(lines)


def _offer(spec: JobSpec, choice: GpuChoice, plan: Plan | None) -> Offer:
    listed = plan.price if plan is not None else load_prices().of(find_gpu(choice.name))
    price = choice.price or (listed.usd_per_hour if spec.target == "runpod" and listed else 0.0)
    refused = ""
    if choice.max_price is not None and price > choice.max_price:
        refused = f"its list price is ${price:.2f} an hour, the highest allowed is ${choice.max_price:.2f}"
    if plan is not None and not plan.fits:
        peak, device = plan.headroom.peak_bytes / 2**30, plan.headroom.device_bytes / 2**30
        refused = f"the run needs {peak:.1f} GiB of its {device:.1f}"
    return Offer(
        gpu=choice,
        plan=plan,
        price=price,
        hours=None if plan is None else plan.hours,
        dollars_per_hour=price * choice.count * spec.nodes,
        refused=refused,
    )


def _within_limits(spec: JobSpec, offers: Sequence[Offer]) -> Sequence[Offer]:
    """Those whose forecast is within the limits. Raises ConfigError when there are none left."""
    over: list[str] = []

    def is_within(offer: Offer) -> bool:
        if spec.limits.hours and offer.hours and offer.hours > spec.limits.hours:
            over.append(f"{offer.gpu.name}: {offer.hours:.3g} hours of {spec.limits.hours:.3g}")
            return False
        if spec.limits.dollars and offer.dollars and offer.dollars > spec.limits.dollars:
            over.append(f"{offer.gpu.name}: ${offer.dollars:,.2f} of ${spec.limits.dollars:,.2f}")
            return False
        return True

    kept = [offer for offer in offers if is_within(offer)]
    if over and not kept:
        raise ConfigError(
            "the plan is over the job's limits",
            "; ".join(over),
            "shorten the run (train.total_steps), take a cheaper GPU, or raise `limits:`",
        )
    return kept


def _default_hours(spec: JobSpec, offers: Sequence[Offer]) -> float | None:
    known = [offer.hours for offer in offers if offer.hours is not None]
    if known:
        return max(known) * MARGIN + EXTRA_HOURS
    if spec.target in PAID:
        raise ConfigError(
            "nothing says when this job is to end",
            "the length of the run is not known here, so no deadline follows from it",
            "set `limits: {hours: N}`",
        )
    return None


def _nothing_fits(found: Quote) -> UserError:
    advice = next((o.plan.advice for o in found.offers if o.plan is not None and o.plan.advice), ())
    cure = "; ".join(str(item) for item in advice[:3])
    return EnvironmentFault(
        "the run fits on none of the GPUs of this job",
        "; ".join(f"{offer.gpu.count} x {offer.gpu.name}: {offer.refused}" for offer in found.offers),
        cure or "`trainway plan CONFIG` lists the GPUs that it fits on, cheapest first",
    )


def _machines(spec: JobSpec) -> str:
    return f"{spec.nodes} nodes" if spec.nodes > 1 else "one machine"

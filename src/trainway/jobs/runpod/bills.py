"""What a job has cost: by the clock and the price of each of its machines, and by RunPod's own bill."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from trainway.jobs.record import Record
from trainway.jobs.runpod import place
from trainway.jobs.runpod.api import Lost, Refused
from trainway.jobs.target import Cost

if TYPE_CHECKING:
    from trainway.jobs.runpod.api import Api
    from trainway.jobs.runpod.models import Bill

LATE_HOURS = 1.0
"""The bill comes in whole hours, and is that late."""
CENT = Decimal("0.01")
APART = 0.10
"""Share by which the bill and the clock may differ before it is said."""


def cost_of(api: Api, record: Record) -> Cost:
    """Hours and dollars of all machines that the job has had. Its volume costs apart."""
    now = api.clock.now()
    hours = estimated = 0.0
    notes: list[str] = []
    bills = _bills(api, record, notes)
    billed = sum((one.total_amount for bill in bills.values() for one in bill.records), Decimal(0))
    totals = sum((bill.metadata.totals.total_amount for bill in bills.values()), Decimal(0))
    if abs(totals - billed) > CENT:
        notes.append(f"the bill's hours sum up to ${billed:.2f}, and it says ${totals:.2f}")
    has_bill = any(bill.records for bill in bills.values())
    for span in place.spans(record):
        began, end, price = float(span["began"]), span["end"], float(span["dollars_per_hour"])
        if end is None and _is_gone(api, span):
            # it has ended itself: the bill alone says when
            records = bills[span["id"]].records if span["id"] in bills else []
            end = min(max((one.end_time.timestamp() for one in records), default=now), now)
            notes.append(
                f"{span['kind']} {span['id']} has ended itself, by the bill at the latest at {_time(end)}"
            )
        span_hours = max(0.0, (now if end is None else float(end)) - began) / 3600
        hours += span_hours
        estimated += span_hours * price
    if not place.spans(record):
        notes.append("no machine has been rented")
    elif bills and not has_bill:
        notes.append(f"nothing is billed yet; the bill is up to {LATE_HOURS:.0f} hour late")
    elif has_bill and (apart := abs(float(billed) - estimated)) > APART * max(float(billed), estimated):
        notes.append(
            f"the bill and the clock are ${apart:.2f} apart: the bill counts whole hours, is up to "
            f"{LATE_HOURS:.0f} hour late, and knows when a machine really ran"
        )
    if volume := record.place.get("volume"):
        notes.append(f"volume {volume} costs apart, until it is deleted")
    return Cost(hours, estimated, float(billed) if has_bill else None, "; ".join(notes))


def _bills(api: Api, record: Record, notes: list[str]) -> dict[str, Bill]:
    """The bill of each machine, by its id, from its first start on: one that was stopped and started has one bill.

    Without the right to see it, or an answer, the clock alone says what was spent, and `notes` why.
    """
    began: dict[str, tuple[str, float]] = {}
    for span in place.spans(record):
        kind, first = began.get(str(span["id"]), (str(span["kind"]), float(span["began"])))
        began[str(span["id"])] = (kind, min(first, float(span["began"])))
    found: dict[str, Bill] = {}
    for machine_id, (kind, first) in began.items():
        ask = api.cluster_bill if kind == "cluster" else api.pod_bill
        try:
            found[machine_id] = ask(machine_id, datetime.fromtimestamp(first, UTC))
        except (Refused, Lost) as fault:
            notes.append(f"the bill of {kind} {machine_id} cannot be seen ({fault.why}): by the clock alone")
            return {}  # a part of it would read as the whole
    return found


def _is_gone(api: Api, span: dict[str, object]) -> bool:
    machine_id = str(span["id"])
    if span["kind"] == "cluster":
        return api.find_cluster(machine_id) is None
    pod = api.find_pod(machine_id)
    return pod is None or pod.status == "TERMINATED"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")

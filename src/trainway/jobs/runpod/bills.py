"""What a job has cost: by the clock and the price of each of its machines, and by RunPod's own bill."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from trainway.jobs.record import Record
from trainway.jobs.runpod import place
from trainway.jobs.target import Cost

if TYPE_CHECKING:
    from trainway.jobs.runpod.api import Api

LATE_HOURS = 1.0
"""The bill comes in whole hours, and is that late."""
APART = 0.10
"""Share by which the bill and the clock may differ before it is said."""


def cost_of(api: Api, record: Record) -> Cost:
    """Hours and dollars of all machines that the job has had. Its volume costs apart."""
    now = api.clock.now()
    hours = estimated = billed = 0.0
    has_bill = False
    notes: list[str] = []
    for span in place.spans(record):
        began, end, price = float(span["began"]), span["end"], float(span["dollars_per_hour"])
        since = datetime.fromtimestamp(began, UTC)
        ask = api.cluster_bill if span["kind"] == "cluster" else api.pod_bill
        bill = ask(str(span["id"]), since)
        amount = bill.metadata.totals.total_amount
        if bill.records:
            has_bill = True
            billed += amount
        if end is None and _is_gone(api, span):
            # it has ended itself: the bill alone says when
            end = max((record.end_time.timestamp() for record in bill.records), default=now)
            end = min(end, now)
            notes.append(
                f"{span['kind']} {span['id']} has ended itself, by the bill at the latest at {_time(end)}"
            )
        span_hours = max(0.0, (now if end is None else float(end)) - began) / 3600
        hours += span_hours
        estimated += span_hours * price
    if not place.spans(record):
        notes.append("no machine has been rented")
    elif not has_bill:
        notes.append(f"nothing is billed yet; the bill is up to {LATE_HOURS:.0f} hour late")
    elif abs(billed - estimated) > APART * max(billed, estimated):
        notes.append(
            f"the bill and the clock are ${abs(billed - estimated):.2f} apart: the bill counts whole hours, is up to "
            f"{LATE_HOURS:.0f} hour late, and knows when a machine really ran"
        )
    if volume := record.place.get("volume"):
        notes.append(f"volume {volume} costs apart, until it is deleted")
    return Cost(hours, estimated, billed if has_bill else None, "; ".join(notes))


def _is_gone(api: Api, span: dict[str, object]) -> bool:
    machine_id = str(span["id"])
    if span["kind"] == "cluster":
        return api.find_cluster(machine_id) is None
    pod = api.find_pod(machine_id)
    return pod is None or pod.status == "TERMINATED"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")

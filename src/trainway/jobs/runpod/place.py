"""What a record holds of a job at RunPod: its machines and what they cost by the hour, its volume, how it is reached."""

from __future__ import annotations

from typing import Any, Literal, cast

from trainway.jobs.record import Record

Kind = Literal["pod", "cluster"]

# kind, id: of the machine that there is; spans: of all that there were; volume, data_center, volume_used: of its volume;
# ssh_key, host_keys: how it is reached, the keys by the start of the container that has shown them


def noted(record: Record, **changes: Any) -> Record:
    """The record with more known of its place, saved; None forgets."""
    place = {key: value for key, value in {**record.place, **changes}.items() if value is not None}
    return record.with_(place=place)


def kind_of(record: Record) -> Kind:
    return cast(Kind, record.place.get("kind", "pod"))


def machine_id(record: Record) -> str | None:
    found = record.place.get("id")
    return None if found is None else str(found)


def opened(record: Record, kind: Kind, new_id: str, began: float, dollars_per_hour: float) -> Record:
    """A machine is ours: from `began` on it costs."""
    spans = [span for span in _spans(record) if span["id"] != new_id or span["end"] is not None]
    span = {"kind": kind, "id": new_id, "began": began, "end": None, "dollars_per_hour": dollars_per_hour}
    return noted(record, kind=kind, id=new_id, spans=[*spans, span])


def priced(record: Record, dollars_per_hour: float) -> Record:
    """What the machine really costs, disk and all, as the provider shows it."""
    last = {"dollars_per_hour": dollars_per_hour}
    spans = [{**span, **last} if span["end"] is None else span for span in _spans(record)]
    return noted(record.with_(dollars_per_hour=dollars_per_hour), spans=spans)


def closed(record: Record, now: float) -> Record:
    """The machine costs no more."""
    spans = [{**span, "end": now} if span["end"] is None else span for span in _spans(record)]
    return noted(record, spans=spans)


def forgotten(record: Record, now: float) -> Record:
    """The machine is gone."""
    return noted(closed(record, now), id=None, host_keys=None)


def spans(record: Record) -> list[dict[str, Any]]:
    """Each machine's kind, id, time in seconds since 1970 from `began` to `end` (None: still), and price."""
    return _spans(record)


def _spans(record: Record) -> list[dict[str, Any]]:
    return list(record.place.get("spans", []))

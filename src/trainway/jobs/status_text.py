"""A job's state as a row of a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trainway.jobs.target import JobStatus
from trainway.jobs.verbs import Seen

HEAD = ("job", "target", "machine", "stage", "step", "spent", "")


def status_json(seen: Seen) -> dict[str, Any]:
    """A job under stable keys."""
    found = seen.status
    return {
        "job": seen.record.name,
        "target": seen.record.target,
        "phase": seen.record.phase,
        "machine": found.machine if found else None,
        "detail": found.detail if found else seen.problem,
        "nodes": list(found.nodes) if found else [],
        "pod": found.pod.model_dump() if found and found.pod else None,
        "record": asdict(seen.record),
    }


def status_rows(found: Sequence[Seen]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """(rows, head) of a table, a node's own line below its job's."""
    rows: list[tuple[str, ...]] = []
    for seen in found:
        rows.append(_row(seen))
        rows += [("", "", "", "", "", "", node) for node in (seen.status.nodes if seen.status else ())]
    return rows, HEAD


def _row(seen: Seen) -> tuple[str, ...]:
    record, now = seen.record, seen.status
    if now is None:
        return (record.name, record.target, "unknown", "", "", "", seen.problem)
    pod = now.pod
    if pod is None:
        return (record.name, record.target, now.machine, "", "", "", now.detail)
    step = f"{pod.step}/{pod.total_steps}" if pod.total_steps else str(pod.step)
    return (
        record.name,
        record.target,
        now.machine,
        _stage(now),
        step,
        f"${pod.dollars:,.2f}",
        pod.reason or now.detail,
    )


def _stage(now: JobStatus) -> str:
    assert now.pod is not None
    return now.pod.stage if now.pod.outcome is None else f"{now.pod.stage}: {now.pod.outcome}"

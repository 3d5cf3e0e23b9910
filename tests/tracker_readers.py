"""What the trackers hold, read back by their own readers: {step: {name: value}} each."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from trainway.tracking.jsonl import read_jsonl
from trainway.tracking.tail import numbers

Points = dict[int, dict[str, float]]

BLOCK = 32768
"""Of a .wandb file: the log format of LevelDB after a header of seven bytes."""


def recorded(run: Path) -> Points:
    """The numbers of metrics.jsonl."""
    found: Points = {}
    for record in read_jsonl(run / "metrics.jsonl"):
        row = found.setdefault(record["step"], {})
        figures = numbers(record)
        assert not set(row) & set(figures), "metrics.jsonl holds a number twice"
        row.update(figures)
    return found


def wandb_points(run: Path) -> Points:
    """The rows of a run's only offline directory; a step that stands there twice is an error."""
    found: Points = {}
    for record in wandb_records(run):
        if not record.HasField("history"):
            continue
        items = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
        }
        step = items.pop("_step")
        row = {name: float(value) for name, value in items.items() if not name.startswith("_")}
        assert step not in found, f"step {step} stands there twice"
        found[step] = row
    return found


def wandb_records(run: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    for data in _leveldb(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        yield record


def mlflow_points(uri: str, run_id: str) -> Points:
    """Every point of every metric; two of one name and step are an error, whatever their values."""
    from mlflow import MlflowClient

    client, found = MlflowClient(tracking_uri=uri), {}
    for name in client.get_run(run_id).data.metrics:
        for point in client.get_metric_history(run_id, name):
            row = found.setdefault(point.step, {})
            assert name not in row, f"{name} stands there twice at step {point.step}"
            row[name] = point.value
    return found


def trackio_points(database: Path, name: str) -> Points:
    """The rows of a run in a project's database."""
    found: Points = {}
    with closing(sqlite3.connect(database)) as opened:
        for step, metrics in opened.execute("SELECT step, metrics FROM metrics WHERE run_name = ?", (name,)):
            assert step not in found, f"step {step} stands there twice"
            found[step] = json.loads(metrics)
    return found


def tensorboard_points(run: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    found: Points = {}
    for name in reader.Tags()["scalars"]:
        for event in reader.Scalars(name):
            row = found.setdefault(event.step, {})
            assert name not in row, f"{name} stands there twice at step {event.step}"
            row[name] = event.value
    return found


def _leveldb(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    place, whole = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK  # the rest of a block that has no room for a header
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # full, or the last part
            yield whole
            whole = b""

"""What is known of a run before its first step, kept in its directory: where its settings are from, its data, its plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trainway.files import atomic_write
from trainway.logs import warn
from trainway.planning.advice import NAMES
from trainway.planning.facts import Model
from trainway.planning.gpus import find_gpu, gpu_of_device
from trainway.planning.headroom import CPU_BYTES, RESTING, parts
from trainway.planning.measured import load_measurements
from trainway.planning.plan import Basis, Plan, plan_on
from trainway.planning.prices import load_prices
from trainway.planning.rows import Rows
from trainway.recipes.model import run_shape
from trainway.training.session import Session
from trainway.training.speed import device_name


def record_start(session: Session, origins: Mapping[str, str]) -> None:
    """Write start.json; rank 0 calls it. What it cannot find out is null there, and never ends a run.

    `origins`: of each setting, as `LoadedConfig.origins`; empty where a script made the configuration.
    """
    try:
        device = device_name(session.world.device)
        found = {
            "origins": dict(origins),
            "device": device,
            "world_size": session.world.world_size,
            "total_steps": session.geometry.total_steps,
            "geometry": asdict(session.geometry),
            "data": _data(session),
            "plan": _plan(session, device),
        }
        atomic_write(session.run.start, json.dumps(found, indent=2, ensure_ascii=False, default=str) + "\n")
    except Exception as error:  # a report without its plan is worth less than the run
        warn(f"what is planned for this run is not kept: {type(error).__name__}: {error}")


def _data(session: Session) -> dict[str, Any]:
    prepared, seq_len = session.prepared, session.config.train.seq_len
    manifest = prepared.manifest
    keys = ("documents", "tokens", "trained", "text_bytes")
    splits = {
        name: {key: split[key] for key in keys if key in split} for name, split in manifest.splits.items()
    }
    shares = prepared.to_json()["mix"]
    return {
        "splits": splits,
        "rows_per_epoch": prepared.rows_per_epoch(seq_len),
        "vocab_size": manifest.vocab_size,
        "quarantined": manifest.quarantined,
        "duplicates": manifest.duplicates,
        "conversations": manifest.conversations,
        "absent": list(prepared.absent),
        "mix": shares,
        "streams": [{key: stream[key] for key in ("name", *keys) if key in stream} for stream in manifest.streams],
        "warnings": list(prepared.warnings),
    }  # fmt: skip


def _plan(session: Session, device: str) -> dict[str, Any] | None:
    """The plan for these very devices; None for a model or a device that planning does not know."""
    config, world = session.config, session.world
    shape, gpu = run_shape(session), gpu_of_device(device)
    if shape is None or gpu is None:
        return None
    if gpu.is_cpu:
        gpu = find_gpu(device)  # with this machine's memory
    nodes = world.world_size // world.local_world_size
    rows = Rows(session.prepared.rows_per_epoch(config.train.seq_len), "the prepared data")
    basis = Basis(config, Model(shape, config.lora), tuple(load_measurements()), load_prices(), rows)
    return _described(plan_on(basis, gpu, world.local_world_size, nodes, advise=False))


def _described(found: Plan) -> dict[str, Any]:
    headroom, price = found.headroom, found.price
    estimate = round(found.memory.total * headroom.correction)
    return {
        "gpu": found.gpu.name,
        "num_gpus": found.world_size,
        "precision": found.precision,
        "memory": [{"name": name, "bytes": value} for name, value in _held(found)],
        "peak_bytes": headroom.peak_bytes,
        "device_bytes": headroom.device_bytes,
        # what the allocator counts of it, or on a CPU the process
        "counted_bytes": estimate + found.memory.host + CPU_BYTES if found.gpu.is_cpu else estimate,
        "step_s": found.step_s,
        "hours": found.hours,
        "basis": None if found.efficiency is None else f"{found.efficiency.kind}, {found.efficiency.source}",
        "usd_per_hour": found.dollars_per_hour,
        "price": None if price is None else str(price),
        "dollars": found.dollars,
    }


def _held(found: Plan) -> list[tuple[str, int]]:
    """What fills a device at its fullest moment, the most first; on a CPU that of all processes together."""
    headroom, ranks = found.headroom, found.num_gpus if found.gpu.is_cpu else 1
    held = parts(found.memory)
    if headroom.is_answering:  # passes through the models are over
        held = {name: value for name, value in held.items() if name in RESTING}
    rows = [(NAMES.get(name, name), value * ranks) for name, value in held.items()]
    rows += [("vLLM, while it answers", headroom.server_bytes)] * headroom.is_answering
    rows.sort(key=lambda row: -row[1])
    rest = headroom.peak_bytes - sum(value for _, value in rows)
    name = "Python and its libraries" if found.gpu.is_cpu else "context and fragments"
    return [*rows, (name, rest)] if rest > 0 else rows

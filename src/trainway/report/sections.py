"""What the sections of a run's report say; a section without anything to say is None."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainway.report.facts import RunFacts
from trainway.report.wording import count, day, dollars, duration, loss, share, size

GIB = 2**30


@dataclass(frozen=True)
class Table:
    """Cells as text. `numbers`: columns that are set to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class Card:
    """A figure that one looks for first."""

    label: str
    value: str
    notes: Sequence[str] = ()


def about(run: RunFacts) -> list[str]:
    """What was trained, on what, when, and for how long, in a few words each."""
    config = run.config
    parameters = run.number("result", "parameters")
    name = config.get("model.path") or config.get("model.architecture") or ""
    words = [
        str(config.get("recipe", "")),
        f"{name}{f', {count(parameters)} parameters' if parameters else ''}",
    ]
    if config.get("lora.enabled") is True:
        words.append(f"LoRA of rank {config.get('lora.r')}")
    device, cpu = run.start.get("device") or run.result.get("device") or "", run.provenance.get("cpu")
    if device == "cpu":
        device = f"CPU ({cpu.get('model')})" if isinstance(cpu, Mapping) else "CPU"
    ranks = int(run.number("start", "world_size") or run.number("result", "world_size") or 1)
    words.append(f"{ranks} × {device}" if ranks > 1 and device else str(device))
    if started := run.provenance.get("started"):
        words.append(day(started))
    return [word for word in words if word]


def notices(run: RunFacts) -> list[dict[str, str]]:
    """What a reader must know before all figures."""
    found = []
    if run.state in ("failed", "stopped") and run.status.get("error"):
        kind = "bad" if run.state == "failed" else "warn"
        found.append({"kind": kind, "text": str(run.status["error"])})
    if run.state == "killed":
        found.append(
            {
                "kind": "bad",
                "text": "The run's process ended without a word; the same command goes on from its newest checkpoint.",
            }
        )
    for metric, times in run.series.not_finite.items():
        steps = "one step" if times == 1 else f"{times:,} steps"
        found.append({"kind": "warn", "text": f"{metric} was not a finite number at {steps}."})
    if skipped := run.number("result", "skipped_steps"):
        said = "One step was" if skipped == 1 else f"{skipped:,.0f} steps were"
        found.append({"kind": "warn", "text": f"{said} left out: the warnings say why."})
    return [*found, *({"kind": "bad", "text": f"Not readable: {what}"} for what in run.damaged)]  # fmt: skip


def cards(run: RunFacts) -> list[Card]:
    """The run's figures: as its report gives them, or as far as it has come."""
    found = [_loss_card(run), _tokens_card(run), _time_card(run)]
    found += [_speed_card(run), _mfu_card(run), _cost_card(run), _memory_card(run)]
    return [card for card in found if card is not None]


def _loss_card(run: RunFacts) -> Card | None:
    final = run.number("result", "val_loss")
    final = run.last("val/loss") if final is None else final
    if final is None:
        train = run.last("train/loss")
        return None if train is None else Card("Training loss", loss(train))
    notes = []
    best, at = best_loss(run)
    if best is not None and at is not None:
        notes.append("also the best" if best == final else f"best {loss(best)} at step {at:,}")
    if math.isfinite(final) and final < 20:
        notes.append(f"perplexity {math.exp(final):,.2f}")
    return Card("Validation loss", loss(final), notes)


def best_loss(run: RunFacts) -> tuple[float | None, int | None]:
    """The lowest validation loss and its step; of the saved steps where the run says so."""
    best, at = run.number("result", "best_val_loss"), run.number("result", "best_step")
    if best is not None and at is not None:
        return best, int(at)
    columns = run.series.columns().get("val/loss")
    pairs = (
        []
        if columns is None
        else [pair for pair in zip(columns.low, columns.steps, strict=True) if pair[0] == pair[0]]
    )
    return min(pairs) if pairs else (None, None)


def tokens(run: RunFacts) -> float | None:
    """Tokens that the loss was taken of, so far."""
    found = run.number("result", "tokens")
    return run.last("train/tokens") if found is None else found


def _tokens_card(run: RunFacts) -> Card | None:
    found, total = tokens(run), run.number("start", "total_steps")
    steps = f"{run.step:,} steps" if not total or total == run.step else f"{run.step:,} of {total:,.0f} steps"
    return Card("Steps", f"{run.step:,}") if found is None else Card("Tokens", count(found), [steps])


def seconds(run: RunFacts) -> float | None:
    """Of training, so far; while a run is not done, the sum of its steps."""
    found = run.number("result", "seconds")
    columns = run.series.columns().get("perf/step_s")
    if found is not None or columns is None:
        return found
    known = [value for value in columns.mean if value == value]
    return sum(known) / len(known) * run.step if known else None


def _time_card(run: RunFacts) -> Card | None:
    found, planned = seconds(run), run.number("start", "plan", "hours")
    if found is None:
        return None
    return Card("Time", duration(found), [f"forecast {duration(planned * 3600)}"] if planned else [])


def _speed_card(run: RunFacts) -> Card | None:
    found = run.number("result", "tokens_per_s")
    usual = mean(run, "perf/tokens_per_s")
    if found is None and usual is None:
        return None
    if found is None:
        return Card("Tokens per second", count(usual or 0.0))
    return Card("Tokens per second", count(found), [f"{count(usual)} while it trains"] if usual else [])


def _mfu_card(run: RunFacts) -> Card | None:
    found = mean(run, "perf/mfu")
    return None if found is None else Card("MFU", share(found), ["mean of all steps"])


def cost(run: RunFacts) -> float | None:
    """Dollars, by the plan's price and the time that training took."""
    rate, taken = run.number("start", "plan", "usd_per_hour"), seconds(run)
    return None if rate is None or taken is None else rate * taken / 3600


def _cost_card(run: RunFacts) -> Card | None:
    found, planned = cost(run), run.number("start", "plan", "dollars")
    if found is None:
        return None
    notes = [f"forecast {dollars(planned)}"] if planned is not None else []
    return Card(
        "Cost",
        dollars(found),
        [*notes, f"at {dollars(run.number('start', 'plan', 'usd_per_hour') or 0)} an hour"],
    )


def peak_gib(run: RunFacts) -> float | None:
    """Of the rank that speaks for the run."""
    found = run.number("result", "peak_memory_gib")
    return run.last("perf/memory_gib") if found is None else found


def _memory_card(run: RunFacts) -> Card | None:
    found, planned = peak_gib(run), run.number("start", "plan", "counted_bytes")
    if not found:
        return None
    return Card("Peak memory", f"{found:.2f} GiB", [f"planned {planned / GIB:.2f} GiB"] if planned else [])


def mean(run: RunFacts, metric: str) -> float | None:
    """Of all buckets of a metric; None where it has no finite value."""
    columns = run.series.columns().get(metric)
    known = [value for value in columns.mean if value == value] if columns else []
    return sum(known) / len(known) if known else None


def marks(run: RunFacts) -> dict[str, list[tuple[str, float]]]:
    """Lines across the charts of a run: the plan's memory, and the device's where the run comes near it."""
    planned, device = (
        run.number("start", "plan", "counted_bytes"),
        run.number("start", "plan", "device_bytes"),
    )
    found = [] if not planned else [(f"planned {planned / GIB:.2f}", planned / GIB)]
    if device and (peak_gib(run) or 0.0) > 0.4 * device / GIB:
        found.append((f"device {device / GIB:.0f}", device / GIB))
    return {"perf/memory_gib": found} if found else {}


def memory(run: RunFacts) -> dict[str, Any] | None:
    """The plan's bytes on one device, as parts of its bar (which is 1000 wide)."""
    plan = run.start.get("plan")
    device = run.number("start", "plan", "device_bytes")
    rows = plan.get("memory") if isinstance(plan, Mapping) else None
    if not isinstance(rows, list) or not device:
        return None
    held = [(str(row.get("name")), float(row.get("bytes", 0))) for row in rows if isinstance(row, Mapping)]
    peak = sum(value for _, value in held)
    parts, x, scale = [], 0.0, 1000 / (peak if peak < 0.4 * device else max(device, peak))
    for name, value in held:
        parts.append({"name": name, "size": size(value), "x": f"{x:.2f}", "width": f"{value * scale:.2f}"})
        x += value * scale
    where = "this machine" if run.start.get("device") == "cpu" else f"each {run.start.get('device')}"
    sentence = f"{size(peak)} of the {size(device)} of {where} at the fullest moment of a step."
    return {"parts": parts, "sentence": sentence}


def warned(run: RunFacts) -> Table | None:
    """Warnings and errors of the log; what was said again is counted."""
    rows: dict[tuple[str, str], list[str]] = {}
    for line in run.warned:
        rows.setdefault((line.level, line.message), []).append(line.time)
    cells = [
        [
            times[-1],
            message if level == "warning" else f"{level}: {message}",
            f"{len(times)} ×" if len(times) > 1 else "",
        ]
        for (level, message), times in rows.items()
    ]
    return Table(("when (UTC)", "what", ""), cells, (2,)) if cells else None


def asked(run: RunFacts) -> list[dict[str, Any]]:
    """What the model wrote over the steps, by prompt, the newest first."""
    reference_name = "teacher" if run.config.get("recipe") == "gad" else "reference"
    found = []
    for item in run.asked:
        answers = [
            {
                "label": "best weights" if answer.best else f"step {answer.step:,}",
                "note": "" if answer.score is None else f"score {answer.score:.3f}",
                "text": answer.text if answer.text.strip() else "(nothing)",
            }
            for answer in item.spread()
        ]
        title = " ".join(item.prompt.split())[:90] or "(an empty prompt)"
        found.append(
            {"title": title, "prompt": item.prompt, "reference": item.reference, "reference_name": reference_name, "answers": answers}
        )  # fmt: skip
    return found


def data(run: RunFacts) -> dict[str, Any] | None:
    """What preparation made of the files."""
    found = run.start.get("data")
    if not isinstance(found, Mapping) or not isinstance(found.get("splits"), Mapping):
        return None
    uses = {"train": "training", "val": "validation"}
    rows = [[uses.get(name, name), *_amounts(split)] for name, split in found["splits"].items()]
    tables = [Table(("split", *_AMOUNTS), rows, (1, 2, 3, 4))]
    if mix := found.get("mix"):
        shares = {entry["name"]: share(entry["share"]) for entry in mix}
        streams = {stream.get("name"): stream for stream in found.get("streams") or ()}
        rows = [[name, shares[name], *_amounts(streams.get(name, {}))] for name in shares]
        tables.append(Table(("source", "share of the rows", *_AMOUNTS), rows, (1, 2, 3, 4, 5)))
    return {"tables": [_filled(table) for table in tables], "remarks": list(_remarks(found))}


_AMOUNTS = ("documents", "tokens", "trained tokens", "bytes per token")


def _amounts(split: Mapping[str, Any]) -> list[str]:
    held = split.get("tokens") or 0
    cells = [
        f"{split[key]:,}" if isinstance(split.get(key), int) else ""
        for key in ("documents", "tokens", "trained")
    ]
    return [*cells, f"{split['text_bytes'] / held:.2f}" if held and split.get("text_bytes") else ""]


def _filled(table: Table) -> Table:
    """Without the columns that no row fills."""
    kept = [i for i in range(len(table.head)) if any(row[i] for row in table.rows)]
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table([table.head[i] for i in kept], rows, [kept.index(i) for i in table.numbers if i in kept])


def _remarks(found: Mapping[str, Any]) -> Iterable[str]:
    if rows := found.get("rows_per_epoch"):
        yield f"{rows:,} rows make an epoch; the tokenizer has {found.get('vocab_size', 0):,} tokens."
    told = {"quarantined": "malformed records were set aside", "duplicates": "duplicates were left out"}
    told |= {
        "too_long": "conversations were too long and left out",
        "truncated": "conversations were shortened",
    }
    counts = {**found, **(found.get("conversations") or {})}
    for key, words in told.items():
        if isinstance(counts.get(key), int) and counts[key]:
            yield f"{counts[key]:,} {words}."
    if absent := found.get("absent"):
        yield f"Optional sources that were absent: {', '.join(map(str, absent))}."
    yield from map(str, found.get("warnings") or ())


def checkpoints(run: RunFacts) -> Table | None:
    """The checkpoints that are kept."""
    rows = []
    for info in run.checkpoints:
        found = [mark for mark, on in (("best", info.is_best), ("latest", info.is_latest)) if on]
        rows.append([f"step {info.step:,}", " ".join(found), size(info.size_bytes)])
    return _filled(Table(("checkpoint", "marks", "size"), rows, (2,))) if rows else None


def settings(run: RunFacts) -> list[dict[str, Any]]:
    """The resolved configuration: what was set for this run, then what a preset set, then the defaults."""
    origins = run.start.get("origins") or {}
    if not origins:
        rows = [[key, as_text(value)] for key, value in run.config.items()]
        return (
            [{"title": "Settings", "open": False, "table": Table(("setting", "value"), rows)}] if rows else []
        )
    groups: dict[str, list[list[str]]] = {"Set for this run": [], "From presets": [], "Defaults": []}
    for key, value in run.config.items():
        origin = str(origins.get(key, ""))
        name = (
            "Defaults"
            if origin == "default"
            else "From presets"
            if origin.startswith("preset")
            else "Set for this run"
        )
        groups[name].append([key, as_text(value), origin])
    heads = dict.fromkeys(groups, ("setting", "value", "origin")) | {"Defaults": ("setting", "value")}
    return [
        {"title": name, "open": name == "Set for this run", "table": Table(heads[name], [row[: len(heads[name])] for row in rows])}
        for name, rows in groups.items()
        if rows
    ]  # fmt: skip


def as_text(value: Any) -> str:
    """A setting's value as a configuration file has it; a long list on lines of its own."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def environment(run: RunFacts) -> Table | None:
    """Versions, machine, commit and command line."""
    found = run.provenance
    rows = []
    if isinstance(argv := found.get("argv"), list) and argv:
        rows.append(["command", " ".join(map(str, argv))])
    for name, state in (found.get("git") or {}).items():
        if isinstance(state, Mapping):
            rows.append(
                [
                    f"commit of {name}",
                    f"{state.get('commit')}{', with changes' if state.get('dirty') else ''}",
                ]
            )
    rows += [[name, str(version)] for name, version in (found.get("versions") or {}).items() if version]
    if isinstance(cpu := found.get("cpu"), Mapping):
        rows.append(["CPU", f"{cpu.get('model')}, {cpu.get('cores')} cores"])
    named = {
        "platform": "platform",
        "hostname": "host",
        "config_hash": "hash of the configuration",
        "data_hash": "hash of the data",
    }
    rows += [[label, str(found[key])] for key, label in named.items() if found.get(key)]
    if rows and (engine := run.result.get("engine")):
        rows.append(["engine", str(engine)])
    return Table((), rows) if rows else None

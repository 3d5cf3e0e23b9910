"""A plan as text: what a person reads before renting (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainway.planning.advice import NAMES
from trainway.planning.gad import describe_stages
from trainway.planning.headroom import GIB, RESTING, parts
from trainway.planning.plan import Fit, Plan

BAR = 32
MOST_FITS = 8
MOST_ADVICE = 6


def describe(plan: Plan, name: str, *, bars: bool = False) -> str:
    """The plan in lines of text. `name`: of the configuration; `bars`: draw the memory."""
    blocks = [_head(plan, name), _memory(plan, bars), _figures(plan)]
    if plan.advice or plan.headroom.too_small:
        blocks.append(_advice(plan))
    if plan.fitting:
        blocks.append(_fits(plan.fitting))
    elif not plan.fits:
        blocks.append(["no GPU of the catalogue fits it, in up to 32 nodes"])
    remarks = [f"missing: {what}" for what in plan.missing] + [f"note: {note}" for note in plan.notes]
    blocks.append(remarks)
    return "\n\n".join("\n".join(block) for block in blocks if block)


def size(count: float) -> str:
    """`1.96B`, `134.5M`."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def duration(seconds: float) -> str:
    """`8.80 s`, `12 ms`."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.2g} ms"


def dollars(amount: float) -> str:
    """`$0.31`, `$31,270`."""
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:.2f}"


def hours(count: float) -> str:
    """`1.2 min`, `979.6 h`."""
    return f"{count:,.0f} h" if count >= 1000 else f"{count:.1f} h" if count >= 1 else f"{60 * count:.1f} min"


def _head(plan: Plan, name: str) -> list[str]:
    counts = plan.parameters
    model = plan.config.model.path or f"a new {plan.family}"
    what = f"{model}, {size(counts.total)} parameters"
    if counts.active != counts.total:
        what += f", {size(counts.active)} active"
    if counts.trainable != counts.total:
        what += f", {size(counts.trainable)} trained"
    nodes = f" in each of {plan.num_nodes} nodes" if plan.num_nodes > 1 else ""
    where = f"{plan.num_gpus} x {plan.gpu.name}{nodes}"
    engine = plan.config.engine.name
    return [
        f"{name}: {plan.config.recipe} of {what}",
        f"on {where}, {plan.precision}, engine {engine if engine != 'auto' else _auto(plan)}",
    ]


def _auto(plan: Plan) -> str:
    return "single" if plan.world_size == 1 else "ddp"


def _memory(plan: Plan, bars: bool) -> list[str]:
    found = plan.headroom
    held = parts(plan.memory)
    if found.is_answering:  # the fullest moment: passes through the models are over
        held = {name: value for name, value in held.items() if name in RESTING}
    rows = [(NAMES.get(name, name), value) for name, value in held.items()]
    rows += [("vLLM, while it answers", found.server_bytes)] * found.is_answering
    rows = sorted(rows, key=lambda row: -row[1])
    if not plan.gpu.is_cpu:
        rows.append(("context, fragments", found.peak_bytes - sum(value for _, value in rows)))
    width = max(len(name) for name, _ in rows)
    shown = [
        f"  {name.ljust(width)}  {value / GIB:7.2f} GiB{_bar(value, found.device_bytes) if bars else ''}"
        for name, value in rows
        if value >= GIB // 100
    ]
    where = "this machine" if plan.gpu.is_cpu else "each GPU"
    peak, device, free = (value / GIB for value in (found.peak_bytes, found.device_bytes, found.free_bytes))
    if found.fits:
        return [f"fits: {peak:.1f} of {device:.1f} GiB on {where}, {free:.1f} free", *shown]
    short = f", {-free:.1f} too many" if free < 0 else ""
    return [f"does not fit: {peak:.1f} of {device:.1f} GiB on {where}{short}", *shown, *_states(plan)]


def _states(plan: Plan) -> list[str]:
    """What training all parameters takes, over all ranks: where this is the problem, no batch size cures it."""
    if plan.config.lora.enabled or plan.config.optim.name != "adamw":
        return []
    total = plan.parameters.trainable * 16 / 1e12
    is_pair = plan.config.recipe == "gad" and plan.config.gad.stage != "seqkd"
    also = ", and the discriminator as much" if is_pair else ""
    count = size(plan.parameters.trainable)
    what = "16 bytes each of fp32 weight, gradient and two moments"
    return [f"  all {count} parameters trained are {total:.2f} TB over all ranks: {what}{also}"]


def _bar(value: int, device: int) -> str:
    filled = min(BAR, max(1, round(BAR * value / device)))
    return f"  {'█' * filled}{'·' * (BAR - filled)}"


def _figures(plan: Plan) -> list[str]:
    rows = [("batch", _batch(plan)), ("steps", _steps(plan)), *_time(plan)]
    if plan.dollars is not None:
        rows.append(("cost", f"{dollars(plan.dollars)} at {plan.price}"))
    elif plan.price is not None:
        rows.append(("cost", f"{dollars(plan.dollars_per_hour or 0.0)} an hour at {plan.price}"))
    disk = plan.disk
    model = f", the model's files {disk.model / GIB:.1f}" if disk.model else ""
    each = f"{_plural(disk.copies, 'checkpoint')} of {disk.each_checkpoint / GIB:.2f}"
    rows.append(("disk", f"{plan.disk_bytes / GIB:.1f} GiB: {each}{model}"))
    if plan.memory.host:
        need = plan.memory.host * plan.num_gpus / GIB
        rows.append(("host memory", f"{need:.0f} GiB of the CPU's on each node, for what is offloaded"))
    width = max(len(name) for name, _ in rows)
    return [f"{name.ljust(width)}  {text}".rstrip() for name, text in rows]


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _batch(plan: Plan) -> str:
    geometry = plan.geometry
    if plan.config.recipe == "gad":
        rollout = plan.config.rollout
        return f"{geometry.global_batch_size:,} prompts a step, {rollout.num_per_prompt} answers to each"
    rows = f"{_plural(geometry.micro_batch_size, 'row')} x {geometry.grad_accum_steps} x {_plural(geometry.world_size, 'rank')}"
    return (
        f"{geometry.global_batch_size:,} rows of {geometry.seq_len:,} ({rows}), "
        f"{geometry.tokens_per_step:,} tokens a step"
    )


def _steps(plan: Plan) -> str:
    geometry = plan.geometry
    if geometry.total_steps is None:
        return "not known"
    text = describe_stages(plan.stages) if plan.stages else f"{geometry.total_steps:,}"
    if geometry.steps_per_epoch is not None:
        text += f"; {geometry.steps_per_epoch:,} an epoch"
    if plan.rows is not None:
        text += f" of {plan.rows.count:,} rows ({plan.rows.source})"
    return text


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.step_s is None or plan.efficiency is None:
        yield "time", "not known"
        return
    total = f", {hours(plan.hours)} with evaluations and saves" if plan.hours is not None else ""
    yield "time", f"{duration(plan.step_s)} a step{total}"
    for name, time in plan.step_times.items():
        inside = ", ".join(f"{part} {duration(seconds)}" for part, seconds in time.parts.items())
        yield "", f"{name}: {duration(time.seconds)} ({inside}), {time.flops / 1e15:,.3g} PFLOP"
    work = plan.efficiency
    yield "", f"{work.mfu:.0%} of the peak, {work.kind}: {work.source}"


def _advice(plan: Plan) -> list[str]:
    lines = ["what would make room, each by itself"]
    if plan.headroom.too_small:
        lines.append(f"  {plan.headroom.too_small}")
    found = plan.headroom
    short = -found.free_bytes
    alone = found.is_answering or found.answering_bytes <= found.device_bytes
    for item in plan.advice[:MOST_ADVICE]:
        enough = "; that is enough" if alone and item.saves_bytes >= short > 0 else ""
        lines.append(f"  {item}{enough}")
    return lines if len(lines) > 1 else [*lines, "  nothing: more GPUs, or larger ones"]


def _fits(fits: Sequence[Fit]) -> list[str]:
    head = ("where it fits, cheapest first", "GiB", "step", "hours", "dollars", "needs")
    rows = [head]
    for fit in fits[:MOST_FITS]:
        nodes = f" x {fit.num_nodes} nodes" if fit.num_nodes > 1 else ""
        rows.append(
            (
                f"  {fit.num_gpus} x {fit.gpu}{nodes}",
                f"{fit.peak_bytes / GIB:.1f} of {fit.device_bytes / GIB:.1f}",
                "" if fit.step_s is None else duration(fit.step_s),
                "" if fit.hours is None else hours(fit.hours),
                _cost(fit),
                fit.change,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    left = len(fits) - MOST_FITS
    return lines + ([f"  and {left} more: --json"] if left > 0 else [])


def _cost(fit: Fit) -> str:
    if fit.dollars is not None:
        return dollars(fit.dollars)
    if fit.usd_per_hour is None or fit.step_s is None:
        return "no price"
    return f"{dollars(1000 * fit.step_s / 3600 * fit.usd_per_hour)} for 1,000 steps"

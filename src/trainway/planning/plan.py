"""The plan of a run on given GPUs: does it fit, how long does it take, what does it cost, and on what basis (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainway.config.schema import RunConfig
from trainway.errors import ConfigError
from trainway.planning.advice import Advice
from trainway.planning.arithmetic import MemoryEstimate, ParameterCount
from trainway.planning.disk import Disk, plan_disk
from trainway.planning.facts import Model
from trainway.planning.gad import Stage, gad_stages
from trainway.planning.geometry import Geometry, plan_memory, resolve_geometry
from trainway.planning.gpus import GPUS, Gpu, find_gpu
from trainway.planning.headroom import Headroom, changes_that_help, judge, parts, shares_gpu
from trainway.planning.measured import Measurement, load_measurements, nearest
from trainway.planning.model_shape import find_shape
from trainway.planning.prices import Price, PriceList, load_prices
from trainway.planning.rows import Rows, known_rows
from trainway.planning.run_time import run_seconds, seconds_beside, step_times
from trainway.planning.timing import FILL_UNKNOWN, Efficiency, Job, StepTime, efficiency, work_of

SCHEMA = 1
"""Of `Plan.to_json`: it rises when a key changes its meaning or goes; new keys may come."""


@dataclass(frozen=True)
class Basis:
    """What plans of one configuration share."""

    config: RunConfig
    model: Model
    measurements: tuple[Measurement, ...]
    prices: PriceList
    rows: Rows | None

    @property
    def fill(self) -> float:
        """Share of a row's, or of a prompt's and an answer's, longest length that holds tokens."""
        if self.config.recipe == "gad" or (
            self.config.recipe == "sft" and self.config.data.packing == "none"
        ):
            return (self.rows.fill if self.rows else None) or FILL_UNKNOWN
        return 1.0


@dataclass(frozen=True)
class Fit:
    """GPUs on which the run fits, and what it would take there."""

    gpu: str
    num_gpus: int
    num_nodes: int
    change: str
    """The setting that it needs; empty: none."""
    peak_bytes: int
    device_bytes: int
    step_s: float | None
    hours: float | None
    dollars: float | None
    usd_per_hour: float | None
    """Of all GPUs together."""


@dataclass(frozen=True)
class Plan:
    """What a run takes on given GPUs. Bytes are of one rank unless said otherwise; a figure that is not known is None."""

    config: RunConfig
    gpu: Gpu
    num_gpus: int
    """Of each node."""
    num_nodes: int
    family: str
    parameters: ParameterCount
    geometry: Geometry
    stages: tuple[Stage, ...] | None
    rows: Rows | None
    precision: str
    headroom: Headroom
    flops_per_token: float
    efficiency: Efficiency | None
    step_times: dict[str, StepTime]
    """By stage of gad; else one, under the recipe's name."""
    step_s: float | None
    """Mean over the run's stages, or of the last where their lengths are not known."""
    hours: float | None
    """With evaluations and saves."""
    price: Price | None
    disk: Disk
    measured: Measurement | None
    advice: tuple[Advice, ...]
    missing: tuple[str, ...]
    """What is not known, and which option tells it."""
    notes: tuple[str, ...]
    fitting: tuple[Fit, ...] = ()

    @property
    def memory(self) -> MemoryEstimate:
        return self.headroom.memory

    @property
    def world_size(self) -> int:
        return self.num_gpus * self.num_nodes

    @property
    def fits(self) -> bool:
        return self.headroom.fits

    @property
    def dollars(self) -> float | None:
        if self.hours is None or self.price is None:
            return None
        return self.hours * self.world_size * self.price.usd_per_hour

    @property
    def dollars_per_hour(self) -> float | None:
        return None if self.price is None else self.world_size * self.price.usd_per_hour

    @property
    def checkpoint_bytes(self) -> int:
        """Disk for all checkpoints that are kept at once."""
        return self.disk.checkpoints

    @property
    def disk_bytes(self) -> int:
        """Disk for checkpoints and the model's files."""
        return self.disk.total

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, under stable keys; see docs/plan.md."""
        found = self.headroom
        return {
            "schema": SCHEMA,
            "fits": self.fits,
            "recipe": self.config.recipe,
            "engine": self.config.engine.name,
            "precision": self.precision,
            "model": {"path": self.config.model.path, "family": self.family, **asdict(self.parameters)},
            "gpu": {**asdict(self.gpu), "aliases": list(self.gpu.aliases), "num_gpus": self.num_gpus, "num_nodes": self.num_nodes},
            "geometry": asdict(self.geometry),
            "stages": None if self.stages is None else [asdict(stage) for stage in self.stages],
            "rows": None if self.rows is None else asdict(self.rows),
            "memory": {
                "parts_bytes": parts(self.memory),
                "host_bytes": self.memory.host,
                "estimate_bytes": self.memory.total,
                "correction": found.correction,
                "correction_source": str(self.measured) if found.correction != 1.0 else None,
                "allowance_bytes": found.allowance_bytes,
                "training_bytes": found.training_bytes,
                "answering_bytes": found.answering_bytes,
                "rollout_server_bytes": found.server_bytes,
                "peak_bytes": found.peak_bytes,
                "device_bytes": found.device_bytes,
                "free_bytes": found.free_bytes,
                "too_small": found.too_small or None,
            },
            "time": {
                "flops_per_token": self.flops_per_token,
                "efficiency": None if self.efficiency is None else asdict(self.efficiency),
                "steps": {name: asdict(time) for name, time in self.step_times.items()},
                "step_s": self.step_s,
                "hours": self.hours,
            },
            "cost": {"price": None if self.price is None else asdict(self.price), "dollars": self.dollars},
            "disk": {**asdict(self.disk), "checkpoint_bytes": self.checkpoint_bytes, "disk_bytes": self.disk_bytes},
            "advice": [asdict(item) for item in self.advice],
            "fitting": [asdict(item) for item in self.fitting],
            "missing": list(self.missing),
            "notes": list(self.notes),
        }  # fmt: skip


def plan(
    config: RunConfig,
    gpu: str | None = None,
    num_gpus: int | None = None,
    num_nodes: int = 1,
    *,
    rows: int | None = None,
    price: float | None = None,
    prices: PriceList | None = None,
) -> Plan:
    """Plan a run by a GPU's name; without one, on the cheapest GPUs that it fits on. With `Plan.fitting`.

    Args:
        num_gpus: GPUs of each node; empty means engine.nproc where it is a number, else 1, and without `gpu` as many
            as it takes.
        rows: rows of the training split in one epoch; empty means those of a prepared store or of the files, if cheap.
        price: dollars of one GPU for an hour; empty means the list price.

    Raises:
        ConfigError: no such GPU, a batch that does not divide, a model whose shape is not known.
        DataError, EnvironmentFault: as `find_shape`.
    """
    from trainway.planning.fitting import find_fits

    known = Rows(rows, "given") if rows is not None else known_rows(config)
    basis = Basis(
        config,
        Model(find_shape(config), config.lora),
        tuple(load_measurements()),
        prices or load_prices(),
        known,
    )
    fits = find_fits(basis)
    if gpu is not None:
        found = plan_on(basis, find_gpu(gpu), num_gpus or _ranks(config), num_nodes)
    else:
        found = _cheapest(basis, fits, num_gpus, num_nodes)
    if price is not None:
        found = replace(found, price=Price(price, "", "given", "by --price"))
    return replace(found, fitting=tuple(fits))


def make_plan(
    config: RunConfig, *, gpu: Gpu, num_gpus: int, num_nodes: int, rows_per_epoch: int | None = None
) -> Plan:
    """Plan a run on one kind of GPU, `num_gpus` in each of `num_nodes`; without `fitting`. Raises as `plan` does."""
    known = Rows(rows_per_epoch, "given") if rows_per_epoch is not None else known_rows(config)
    basis = Basis(
        config, Model(find_shape(config), config.lora), tuple(load_measurements()), load_prices(), known
    )
    return plan_on(basis, gpu, num_gpus, num_nodes)


def plan_on(
    basis: Basis,
    gpu: Gpu,
    num_gpus: int,
    num_nodes: int,
    memory: MemoryEstimate | None = None,
    *,
    advise: bool = True,
) -> Plan:
    """The plan of a configuration on `num_gpus` GPUs in each of `num_nodes` nodes.

    memory: of a rank, if known. advise: find out what would make a run fit that does not, which takes a while.
    """
    config, model, world = basis.config, basis.model, num_gpus * num_nodes
    check_ranks(config, gpu, num_gpus, num_nodes)
    rows = basis.rows.count if basis.rows else None
    geometry = resolve_geometry(config, world, rows)
    stages = gad_stages(config, rows) if config.recipe == "gad" else None
    precision = planned_precision(config, gpu)
    half = precision != "fp32"
    measured = nearest(basis.measurements, gpu, work_of(config, model, world, precision))
    memory = memory or plan_memory(config, model.shape, geometry, half_precision=half, on_cpu=gpu.is_cpu)
    headroom = judge(
        config, model, memory, gpu, num_gpus=num_gpus, world_size=world, half=half, measured=measured
    )  # fmt: skip
    work = efficiency(config, model, gpu, basis.measurements, world, precision)
    disk = plan_disk(config, model, geometry)
    job = Job(config, model, geometry, gpu, num_nodes, precision, basis.fill)
    times = step_times(job, work)
    step_s, seconds = run_seconds(stages, geometry, times)
    if seconds is not None and work is not None:
        seconds += seconds_beside(job, work, disk)
    advice = (
        [] if headroom.fits or not advise else changes_that_help(config, model, geometry, headroom, gpu, half)
    )
    return Plan(
        config=config,
        gpu=gpu,
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        family=model.shape.family,
        parameters=model.counts,
        geometry=geometry,
        stages=stages,
        rows=basis.rows,
        precision=precision,
        headroom=headroom,
        flops_per_token=model.training_flops(geometry.seq_len),
        efficiency=work,
        step_times=times,
        step_s=step_s,
        hours=None if seconds is None else seconds / 3600,
        price=basis.prices.of(gpu),
        disk=disk,
        measured=measured,
        advice=tuple(advice),
        missing=_missing(config, geometry, gpu, work, basis),
        notes=_notes(basis, gpu, num_nodes, headroom, times),
    )


def planned_precision(config: RunConfig, gpu: Gpu) -> str:
    """train.precision as it is on `gpu`: `auto` is bf16 on every GPU of the catalogue, fp32 on a CPU."""
    if config.train.precision != "auto":
        return config.train.precision
    return "fp32" if gpu.is_cpu else "bf16"


def _ranks(config: RunConfig) -> int:
    return config.engine.nproc if isinstance(config.engine.nproc, int) else 1


def _cheapest(basis: Basis, fits: Sequence[Fit], num_gpus: int | None, num_nodes: int) -> Plan:
    """The plan on the cheapest GPUs that the run fits on as it is; on the largest with a price where none will do."""
    if num_gpus is None:
        fit = next((fit for fit in fits if not fit.change), None)
        if fit is not None:
            return plan_on(basis, find_gpu(fit.gpu), fit.num_gpus, fit.num_nodes)
    count = num_gpus or max(_ranks(basis.config), basis.config.rollout.tensor_parallel)
    plans = [plan_on(basis, gpu, count, num_nodes, advise=False) for gpu in GPUS if basis.prices.of(gpu)]
    fitting = [found for found in plans if found.fits and found.step_s is not None]
    if fitting:
        return min(fitting, key=lambda found: (found.step_s or 0.0) * (found.dollars_per_hour or 0.0))
    largest = max(plans, key=lambda found: found.headroom.device_bytes)
    return plan_on(basis, largest.gpu, count, num_nodes)


def check_ranks(config: RunConfig, gpu: Gpu, num_gpus: int, num_nodes: int) -> None:
    """Raises ConfigError for numbers of GPUs that the run itself would refuse."""
    if num_gpus < 1 or num_nodes < 1:
        raise ConfigError(
            f"{num_gpus} GPUs in each of {num_nodes} nodes",
            "a run has at least one GPU",
            "use --num-gpus 1 --num-nodes 1 or more",
        )
    if config.engine.name == "single" and num_gpus * num_nodes > 1:
        raise ConfigError(
            f"engine.name=single uses one GPU of {num_gpus * num_nodes}",
            "the others would be paid for and idle",
            "use engine.name=ddp or fsdp, or --num-gpus 1",
        )
    spread = config.rollout.tensor_parallel
    if shares_gpu(config) and not gpu.is_cpu and num_gpus % spread:
        raise ConfigError(
            f"rollout.tensor_parallel is {spread}, with {num_gpus} GPUs in a node",
            "each copy of the student is spread over that many GPUs of one node",
            f"use --num-gpus {spread}, or a divisor of {num_gpus}",
        )


def _missing(
    config: RunConfig, geometry: Geometry, gpu: Gpu, work: Efficiency | None, basis: Basis
) -> tuple[str, ...]:
    found = []
    if geometry.total_steps is None:
        found.append("the rows of an epoch, so steps, hours and dollars: --rows N")
    elif geometry.steps_per_epoch is None:
        found.append("the rows of an epoch, so epochs: --rows N")
    if work is None:
        found.append("how fast this CPU is: `trainway bench` measures it")
    elif gpu.is_cpu and config.recipe == "gad" and not work.covers_all:
        found.append("how fast a step of gad is on this CPU: `trainway bench` measures it")
    if basis.prices.of(gpu) is None and not gpu.is_cpu:
        found.append(f"the price of {gpu.name}: --price USD")
    return tuple(found)


def _notes(
    basis: Basis, gpu: Gpu, num_nodes: int, headroom: Headroom, times: dict[str, StepTime]
) -> tuple[str, ...]:
    config, found = basis.config, []
    if basis.fill != 1.0:
        what = "prompts and answers" if config.recipe == "gad" else "rows"
        known = basis.rows is not None and basis.rows.fill is not None
        where = basis.rows.source if basis.rows and known else "assumed: their lengths are not known"
        found.append(f"{what} hold {basis.fill:.0%} of their longest length on average ({where})")
    host = headroom.memory.host / 2**30
    if gpu.host_gib and host > gpu.host_gib:
        found.append(
            f"{host:.0f} GiB of the CPU's memory for each GPU are more than the {gpu.host_gib:g} of a usual machine"
        )
    if any(time.parts.get("communication", 0) > time.parts.get("arithmetic", 0) for time in times.values()):
        found.append(
            "traffic takes longer than arithmetic: a larger train.micro_batch_size with less accumulation moves less"
        )
    if num_nodes > 1:
        found.append("between nodes 50 GB/s a GPU are assumed with NVLink inside them, 3 GB/s without")
    if headroom.correction != 1.0:
        found.append(f"the memory is {headroom.correction:.2f} times the estimate, as measured")
    if basis.prices.note:
        found.append(basis.prices.note)
    return tuple(found)

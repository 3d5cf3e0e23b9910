"""What a run needs of a machine, as far as its plan can say: disk, memory, ranks, what it takes from the Hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from trainway.config.mixes import train_sources
from trainway.config.rules import is_local
from trainway.config.schema import RunConfig
from trainway.data.hub_sources import HUB_DIR, HubSource, hub_source
from trainway.doctor.disk import Need
from trainway.doctor.findings import Finding, Subject, fault, ok
from trainway.doctor.gpu import GpuFacts, visible_numbers
from trainway.errors import UserError
from trainway.launch.devices import VISIBLE, process_count
from trainway.launch.nodes import plan_meeting
from trainway.planning.advice import oom_advice
from trainway.planning.arithmetic import count_parameters
from trainway.planning.geometry import plan_memory, planned_shape, resolve_geometry
from trainway.recipes.volume import CHECKPOINT_BYTES, STORE_SHARE, text_size
from trainway.run_dir import RunDir
from trainway.storage.address import is_remote
from trainway.storage.retry import Backoff

STORED_BYTES = 2
"""Per weight of a published model: bf16."""


def hub_home(environ: Mapping[str, str]) -> Path:
    """Where the Hub's libraries keep their files."""
    named = environ.get("HF_HOME") or os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(named).expanduser()


def run_place(config: RunConfig) -> Path:
    """The run directory, or where it will be made."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    return Path(config.runs_dir) / config.name if config.name else Path(config.runs_dir)


def ranks_here(config: RunConfig, facts: GpuFacts, environ: Mapping[str, str]) -> int:
    """Processes that a run starts on this machine."""
    visible = ",".join(map(str, visible_numbers(facts, environ)))
    return process_count(config.engine, {**environ, VISIBLE: visible})


def used_gpus(config: RunConfig | None, facts: GpuFacts, environ: Mapping[str, str]) -> list[int]:
    """The numbers of the GPUs that a run takes; all that can be seen without one."""
    visible = visible_numbers(facts, environ)
    if config is None:
        return visible
    chosen = [number for number in config.engine.gpus if number in visible] or visible
    return chosen[: process_count(config.engine, {**environ, VISIBLE: ",".join(map(str, visible))})]


def from_the_hub(config: RunConfig | None) -> str:
    """What the run takes from the Hub, in words; empty for nothing."""
    if config is None:
        return ""
    parts = [f"the {kind} {name}" for name, kind in hub_repositories(config)]
    return " and ".join([*parts, *(["a place for the trained model"] * config.release.push_to_hub)])


def hub_repositories(config: RunConfig) -> list[tuple[str, Literal["model", "dataset"]]]:
    """(name, kind) of every repository of the Hub that the run reads."""
    model = hub_model(config)
    found: list[tuple[str, Literal["model", "dataset"]]] = [] if model is None else [(model, "model")]
    paths = [source.path for source in train_sources(config.data)] + list(config.data.validation)
    sources = (hub_dataset(path, config) for path in paths)
    return found + [(source.name, "dataset") for source in sources if source is not None]


def hub_dataset(path: str, config: RunConfig) -> HubSource | None:
    """What a source names on the Hub; documents of pretraining are always local."""
    return None if config.recipe == "pretrain" else hub_source(path, Path.cwd())


def is_fetched(source: HubSource, config: RunConfig, environ: Mapping[str, str]) -> bool:
    """Whether a dataset of the Hub is here already: exported for a preparation, or in the Hub's own cache."""
    name = source.name.replace("/", "--")
    exported = (Path(config.data.store_dir) / HUB_DIR).glob(f"{name}-*/")
    return any(exported) or (hub_home(environ) / "hub" / f"datasets--{name}").is_dir()


def hub_model(config: RunConfig) -> str | None:
    """The id of the model on the Hub that the run starts from, if it does."""
    path = config.model.path
    return None if path is None or is_local(path) or Path(path).is_dir() else path


def planned_repository(config: RunConfig) -> str | None:
    """OWNER/NAME that the trained model goes to, as far as the configuration names it."""
    return config.release.repo


def checkpoint_bytes(config: RunConfig) -> int | None:
    """Bytes of one checkpoint: trained weights in fp32 and two moments of AdamW; None where the shape is not known."""
    shape = planned_shape(config)
    if shape is None:
        return None
    trained = count_parameters(shape, lora=config.lora).trainable
    return trained * CHECKPOINT_BYTES * (2 if config.recipe == "gad" and config.gad.stage != "seqkd" else 1)


def planned_disk(config: RunConfig) -> int | None:
    """Bytes of all checkpoints that a run keeps, and of one more while it is written."""
    one = checkpoint_bytes(config)
    if one is None:
        return None
    kept = config.checkpoint.keep_last + 1  # and the best one
    if config.train.total_steps is not None:
        kept = min(kept, -(-config.train.total_steps // config.checkpoint.save_every))
    return (kept + 1) * one


def disk_needs(config: RunConfig | None, environ: Mapping[str, str]) -> list[Need]:
    """What will be written where; without a configuration only the places."""
    home = hub_home(environ)
    if config is None:
        return [Need(Path.cwd(), "a run", 0), Need(home, "the Hub's cache", 0)]
    run = run_place(config)
    saved = max(0, (planned_disk(config) or 0) - _held(RunDir(run).checkpoints))
    needs = [
        Need(run, "checkpoints", saved),
        _data_need(config),
    ]
    name, shape = hub_model(config), planned_shape(config)
    if name is not None and shape is not None:
        size = count_parameters(shape).total * STORED_BYTES
        kept = _held(home / "hub" / f"models--{name.replace('/', '--')}" / "blobs")
        needs.append(Need(home, f"the model {name}", max(0, size - kept)))
    return needs


def _data_need(config: RunConfig) -> Need:
    """The token store, and the copies of what lies in object storage; a store that cannot be asked is named."""
    remote = [path for path in _sources(config) if is_remote(path)]
    text, to_fetch, unknown = text_bytes(config), 0, []
    for path in remote:
        found = _remote_sizes(path, config)
        if found is None:
            unknown.append(path)
            continue
        sizes, is_here = found
        text += sum(text_size(Path(name), size) for name, size in sizes.items())
        to_fetch += 0 if is_here else sum(sizes.values())
    note = f"{', '.join(unknown)} cannot be asked, and is not counted" if unknown else ""
    what = "prepared data" + (" and what is fetched for it" if to_fetch else "")
    return Need(Path(config.data.store_dir), what, int(STORE_SHARE * text) + to_fetch, note)


def _remote_sizes(path: str, config: RunConfig) -> tuple[dict[str, int], bool] | None:
    """None for a store that does not answer at once, or for which no library is installed."""
    from trainway.data.remote_sources import object_sizes

    try:
        return object_sizes(path, Path(config.data.store_dir).expanduser(), Backoff(attempts=1))
    except UserError:
        return None  # the check of the data says why


def text_bytes(config: RunConfig) -> int:
    """About how many bytes of text the local sources hold; what is missing counts as nothing."""
    total = 0
    for pattern in _sources(config):
        for place in () if is_remote(pattern) else _places(pattern):
            with suppress(OSError):
                total += text_size(place, place.stat().st_size)
    return total


def _sources(config: RunConfig) -> list[str]:
    return [source.path for source in train_sources(config.data)] + list(config.data.validation)


def memory_needs(config: RunConfig, ranks: int, world_size: int) -> tuple[int | None, str]:
    """(bytes of one rank by the plan, the changes that save most); (None, "") where the shape is not known."""
    shape = planned_shape(config)
    if shape is None:
        return None, ""
    geometry = resolve_geometry(config, world_size)
    advice = oom_advice(config, shape, geometry, ranks=max(ranks, world_size))
    return plan_memory(config, shape, geometry).total, "; ".join(map(str, advice[:3]))


def host_needs(config: RunConfig, ranks: int, world_size: int, *, on_cpu: bool) -> int | None:
    """Bytes of this machine's own memory: what is offloaded, copies of the state, and all of it without a GPU."""
    shape = planned_shape(config)
    if shape is None:
        return None
    estimate = plan_memory(config, shape, resolve_geometry(config, world_size), on_cpu=on_cpu)
    return (estimate.total if on_cpu else estimate.host) * ranks


def check_geometry(config: RunConfig, ranks: int, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the batch spreads evenly over the processes that there are."""
    try:
        geometry = resolve_geometry(config, world_size(config, ranks, environ))
    except UserError as error:
        yield fault("geometry", error)
        return
    yield ok(
        "geometry",
        f"{geometry.global_batch_size} rows a step: {geometry.micro_batch_size} x {geometry.grad_accum_steps} x "
        f"{geometry.world_size} process{'es' * (geometry.world_size > 1)}",
    )


def world_size(config: RunConfig, ranks: int, environ: Mapping[str, str]) -> int:
    """Processes on all nodes. Raises ConfigError where the environment contradicts itself."""
    if not any(environ.get(name) for name in ("NUM_NODES", "WORLD_SIZE")):
        return ranks
    return ranks * plan_meeting([], ranks, config.engine, environ).nodes


def on_cpu(subject: Subject, facts: GpuFacts) -> bool:
    """Whether training takes the CPU; not where the driver of GPUs merely does not answer."""
    return not facts.fault and not visible_numbers(facts, subject.environ)


def _places(pattern: str) -> Sequence[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return [place for place in path.rglob("*") if place.is_file()]
    if glob.has_magic(pattern) and not path.exists():
        return [Path(match) for match in glob.iglob(str(path), recursive=True) if os.path.isfile(match)]
    return [path]


def _held(folder: Path) -> int:
    total = 0
    for place in folder.rglob("*") if folder.is_dir() else ():
        with suppress(OSError):
            total += place.lstat().st_size if place.is_file() else 0
    return total

"""The GPUs as their driver describes them: how many, free memory, health, and who else is on them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from trainway.doctor.findings import Finding, failure, gib, listed, ok, warning
from trainway.launch.devices import VISIBLE

ASK_S = 60.0
MIB = 2**20
IDLE_SHARE = 0.02
"""Share of a GPU's memory that its driver takes by itself."""
SLOWED = {
    "hw_thermal_slowdown": "it is too hot",
    "sw_thermal_slowdown": "it is near its highest temperature",
    "hw_power_brake_slowdown": "its power supply asks for less",
    "hw_slowdown": "its hardware has slowed it down",
}
_RESET = "`nvidia-smi --gpu-reset -i {}` while nothing runs on it; on a rented machine, give it back and take another"


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU."""

    pid: int
    name: str
    num_bytes: int


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi describes it. Sizes in bytes."""

    uuid: str
    name: str
    total: int
    used: int
    holders: tuple[Holder, ...] = ()
    uncorrected_errors: int = 0
    repair: str = ""
    """What its memory waits for: `pending` a reset, or `failed`."""
    slowed_by: tuple[str, ...] = ()
    is_split: bool = False
    """MIG: cut into instances."""

    @property
    def free(self) -> int:
        return self.total - self.used


@dataclass(frozen=True)
class GpuFacts:
    """What nvidia-smi says. `cuda`: the newest CUDA that the driver speaks. `fault`: why it said nothing."""

    driver: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    fault: str = ""
    has_devices: bool = False
    """There are device files, whatever nvidia-smi says."""


def probe_gpus(command: Sequence[str] = ("nvidia-smi", "-q", "-x"), devices: Path = Path("/dev")) -> GpuFacts:
    """Ask the driver. Never fails: what is wrong stands in `fault`; a machine without a driver has none of it."""
    has_devices = any(path.name[6:].isdigit() for path in devices.glob("nvidia*"))
    try:
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except FileNotFoundError:
        missing = "there are devices of NVIDIA, and no nvidia-smi" if has_devices else ""
        return GpuFacts(fault=missing, has_devices=has_devices)
    except OSError as error:
        return GpuFacts(fault=f"{command[0]}: {error.strerror}", has_devices=has_devices)
    try:
        said, _ = asked.communicate(timeout=ASK_S)
    except subprocess.TimeoutExpired:
        asked.kill()  # and no wait: a process that hangs in the driver cannot be ended
        return GpuFacts(fault=f"{command[0]} did not answer within {ASK_S:g} s", has_devices=has_devices)
    if asked.returncode:
        text = said.decode(errors="replace").strip()
        if "No devices were found" in text:
            return GpuFacts(has_devices=has_devices)
        return GpuFacts(fault=text[:300] or f"{command[0]} ends with {asked.returncode}", has_devices=True)
    return read_smi(said, has_devices)


def read_smi(said: bytes, has_devices: bool = True) -> GpuFacts:
    """The facts in what `nvidia-smi -q -x` prints; fields that a driver does not have count as empty."""
    try:
        root = ElementTree.fromstring(said)
    except ElementTree.ParseError as error:
        return GpuFacts(fault=f"nvidia-smi says what cannot be read: {error}", has_devices=has_devices)
    return GpuFacts(
        driver=root.findtext("driver_version", "").strip(),
        cuda=root.findtext("cuda_version", "").strip(),
        gpus=tuple(_gpu(element) for element in root.iter("gpu")),
        has_devices=has_devices,
    )


def visible_numbers(facts: GpuFacts, environ: Mapping[str, str]) -> list[int]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, by number: CUDA takes them up to the first that does not exist."""
    told = environ.get(VISIBLE)
    if told is None:
        return list(range(len(facts.gpus)))
    found: list[int] = []
    for word in filter(None, (part.strip() for part in told.split(","))):
        place = _place(word, facts.gpus)
        if place is None or place in found:
            break
        found.append(place)
    return found


def visible_facts(facts: GpuFacts, environ: Mapping[str, str]) -> GpuFacts:
    """The same without the GPUs that CUDA_VISIBLE_DEVICES hides."""
    return replace(facts, gpus=tuple(facts.gpus[number] for number in visible_numbers(facts, environ)))


def check_driver(facts: GpuFacts, *, paid: bool) -> Iterator[Finding]:
    if facts.fault:
        yield failure(
            "driver",
            "the driver of the GPUs does not answer",
            facts.fault,
            "restart the machine, or load the driver anew (`sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm`); "
            "in Docker: --gpus all; a rented machine: give it back and take another",
        )
    elif facts.gpus:
        kinds = sorted({gpu.name for gpu in facts.gpus})
        count = f"{len(facts.gpus)} x {kinds[0]}" if len(kinds) == 1 else f"{len(facts.gpus)} GPUs"
        yield ok("driver", f"{count}; driver {facts.driver}, which speaks CUDA up to {facts.cuda or '?'}")
    elif paid:
        yield failure(
            "driver",
            "this machine is paid for, and shows no GPU",
            "neither nvidia-smi nor a device of NVIDIA is there",
            "give it back and take one with a GPU; in Docker: --gpus all; in Kubernetes: limits: nvidia.com/gpu",
        )
    else:
        yield ok("driver", "no GPU of NVIDIA: training takes the CPU")


def check_count(
    facts: GpuFacts, environ: Mapping[str, str], ranks: int, chosen: Sequence[int]
) -> Iterator[Finding]:
    """ranks: processes that are asked for here; chosen: engine.gpus."""
    if facts.fault:
        return  # the driver says nothing of its GPUs
    visible = visible_numbers(facts, environ)
    told = [word.strip() for word in environ.get(VISIBLE, "").split(",")]
    told = [word for word in told if word not in ("", "-1", "NoDevFiles")]
    unknown = [word for word in told if _place(word, facts.gpus) is None]
    if told and (unknown or len(visible) < len(told)):
        what = (
            f"{VISIBLE} names {listed(unknown)}"
            if unknown
            else f"{VISIBLE} names a GPU twice: {environ[VISIBLE]}"
        )
        has = f"this machine has {_numbers(len(facts.gpus))}"
        yield failure(
            "visible-devices",
            what,
            f"{has}; CUDA hides that one and every one after it, so {len(visible)} are left",
            f"`nvidia-smi -L` lists them; unset {VISIBLE}, or name each once",
        )
    if not facts.gpus:
        return
    missing = [number for number in chosen if number not in visible]
    if missing:
        yield failure(
            "gpus",
            f"engine.gpus names {listed(missing)}",
            f"{_numbers(len(visible))} can be used here",
            "correct engine.gpus; `nvidia-smi -L` lists the GPUs",
        )
    elif visible and ranks > len(chosen or visible):
        available = len(chosen or visible)
        yield failure(
            "gpus",
            f"{ranks} processes are asked for, with {available} GPU{'s' * (available > 1)}",
            "each process drives one GPU",
            f"use engine.nproc={available}, or take a machine with {ranks} GPUs",
        )
    elif visible:
        yield ok("gpus", f"{ranks} process{'es' * (ranks > 1)} on {_numbers(len(visible))}")
    kinds = sorted({facts.gpus[number].name for number in visible})
    if len(kinds) > 1:
        yield warning(
            "gpu-kinds",
            f"the GPUs are of different kinds: {', '.join(kinds)}",
            "every step takes as long as the slowest, and the memory of the smallest decides",
            "name GPUs of one kind: engine.gpus=0,1",
        )


def check_memory(
    facts: GpuFacts, used: Sequence[int], needed: int | None, advice: str = ""
) -> Iterator[Finding]:
    """used: numbers of the run's GPUs; needed: bytes of one rank by the plan; advice: what would save most."""
    for number in used:
        gpu = facts.gpus[number]
        label = f"GPU {number}: {gib(gpu.free)} of {gib(gpu.total)} are free"
        if needed is not None and needed > gpu.free:
            too_small = needed > gpu.total
            held = "even an empty one is too small" if too_small else f"{_held(gpu)}"
            cure = advice or "spread the model (engine.name=fsdp), or take a larger GPU"
            yield failure(
                "gpu-memory",
                f"{label}, and the plan asks for {gib(needed)}",
                f"{held}; the run would end with an out-of-memory error in its first step",
                cure if too_small else f"{_end(gpu)}; or {cure}",
            )
        elif gpu.used > IDLE_SHARE * gpu.total:
            yield warning("gpu-memory", label, f"{_held(gpu)}: it shares the GPU's time too", _end(gpu))
        else:
            plan = f", the plan asks for {gib(needed)}" if needed is not None else ""
            yield ok("gpu-memory", f"{label}{plan}")


def check_health(facts: GpuFacts, used: Sequence[int]) -> Iterator[Finding]:
    sick = False
    for number in used:
        gpu = facts.gpus[number]
        wrong = [f"{gpu.uncorrected_errors} uncorrected errors of its memory"] * bool(gpu.uncorrected_errors)
        wrong += [
            f"a repair of its memory {'has failed' if gpu.repair == 'failed' else 'waits for a reset'}"
        ] * bool(gpu.repair)
        if wrong:
            sick = True
            yield failure(
                "gpu-health",
                f"GPU {number}: {' and '.join(wrong)}",
                "it ends programs with an ECC error, or is about to",
                _RESET.format(number),
            )
        if gpu.slowed_by:
            sick = True
            yield warning(
                "gpu-health",
                f"GPU {number} is slowed down: {SLOWED[gpu.slowed_by[0]]}",
                "every step of all ranks waits for the slowest GPU",
                "see to its cooling and power (`nvidia-smi -q -d PERFORMANCE`), or take another machine",
            )
        if gpu.is_split:
            sick = True
            yield warning(
                "gpu-health",
                f"GPU {number} is cut into instances (MIG)",
                "a process sees one instance, and NCCL does not connect several",
                f"sudo nvidia-smi -i {number} -mig 0, or train on one process",
            )
    if used and not sick:
        yield ok("gpu-health", "no memory errors, no slowdown")


def _gpu(element: ElementTree.Element) -> Gpu:
    def text(path: str) -> str:
        return (element.findtext(path) or "").strip()

    events = [
        entry
        for part in ("clocks_event_reasons", "clocks_throttle_reasons")
        for entry in element.iterfind(f"{part}/*")
    ]
    active = {
        entry.tag.partition("_reason_")[2] for entry in events if (entry.text or "").strip() == "Active"
    }
    errors = [
        entry
        for entry in element.iterfind("ecc_errors/volatile/*")
        if entry.tag.partition("_")[2].startswith("uncorr")
    ]
    errors += element.findall("ecc_errors/volatile/double_bit/total")  # before Ampere
    failed = text("remapped_rows/remapped_row_failure") == "Yes"
    pending = "Yes" in (text("remapped_rows/remapped_row_pending"), text("retired_pages/pending_retirement"))
    return Gpu(
        uuid=text("uuid"),
        name=text("product_name"),
        total=_bytes(text("fb_memory_usage/total")),
        used=_bytes(text("fb_memory_usage/used")),
        holders=tuple(
            Holder(
                int(entry.findtext("pid") or 0),
                (entry.findtext("process_name") or "").strip(),
                _bytes(entry.findtext("used_memory") or ""),
            )
            for entry in element.iterfind("processes/process_info")
        ),
        uncorrected_errors=sum(_number(entry.text or "") for entry in errors),
        repair="failed" if failed else "pending" if pending else "",
        slowed_by=tuple(name for name in SLOWED if name in active),
        is_split=text("mig_mode/current_mig") == "Enabled",
    )


def _place(word: str, gpus: Sequence[Gpu]) -> int | None:
    if word.isdigit():
        return int(word) if int(word) < len(gpus) else None
    if word.startswith("MIG-"):
        return next((number for number, gpu in enumerate(gpus) if gpu.is_split), None)
    return next((number for number, gpu in enumerate(gpus) if word and gpu.uuid.startswith(word)), None)


def _numbers(count: int) -> str:
    return {0: "no GPU", 1: "GPU 0 alone"}.get(count, f"{count} GPUs")


def _held(gpu: Gpu) -> str:
    if not gpu.holders:
        return f"{gib(gpu.used)} are held by processes that cannot be seen from here (another container?)"
    names = [
        f"process {item.pid} ({Path(item.name).name or '?'}) holds {gib(item.num_bytes)}"
        for item in gpu.holders
    ]
    return listed(names)


def _end(gpu: Gpu) -> str:
    if not gpu.holders:
        return "look on the host (`nvidia-smi` there), or take another GPU"
    return f"let it end, or end it: kill {' '.join(str(item.pid) for item in gpu.holders)}"


def _bytes(text: str) -> int:
    return _number(text.removesuffix("MiB")) * MIB


def _number(text: str) -> int:
    text = text.strip()
    return int(text) if text.isdigit() else 0

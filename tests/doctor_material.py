"""What the doctor's tests break: nvidia-smi's answers, a place with its environment, and small disks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes_hub import FakeHub, serve
from trainway.config.load import load_config
from trainway.config.schema import RunConfig
from trainway.doctor.gpu import GpuFacts, probe_gpus

TOKEN = "hf_" + "aB3" * 12
H200 = "NVIDIA H200"


def documented_cures() -> dict[tuple[str, str], list[str]]:
    """{(name, level): what stands in backticks as the cure} of the table in docs/doctor.md."""
    text = (Path(__file__).parents[1] / "docs/doctor.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| (warning|failure) \| .+ \| (.+) \|$", text, re.MULTILINE)
    found = {(name, level): re.findall(r"`([^`]+)`", cure) for name, level, cure in rows}
    assert len(rows) == len(found) > 50
    return found


@dataclass
class Place:
    """A directory of one's own, and what a test may break around it. Everything is undone at its end."""

    path: Path
    monkeypatch: pytest.MonkeyPatch
    stack: ExitStack

    def config(self, *words: str, **changes: Any) -> RunConfig:
        """A valid configuration whose files lie here."""
        base: dict[str, Any] = {
            "run_dir": str(self.path / "run"),
            "data": {"train": [str(self.path / "corpus.jsonl")], "store_dir": str(self.path / "store")},
            "train": {"total_steps": 20, "global_batch_size": 8, "micro_batch_size": 2},
            "schedule": {"warmup_steps": 2},
        }
        for key, value in changes.items():
            base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
        return load_config(base, words, environ={}).config

    def chats(self, *words: str, **changes: Any) -> RunConfig:
        """The same for fine-tuning."""
        model = {"path": str(self.path / "model"), **changes.pop("model", {})}
        return self.config(*words, recipe="sft", model=model, **changes)

    def write(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def corpus(self, text: str = '{"text": "one document"}\n') -> Path:
        return self.write("corpus.jsonl", text)

    def hub(self, **login: Any) -> FakeHub:
        """A Hub that knows TOKEN; `login` is what it says of it."""
        hub = FakeHub()
        hub.token, hub.login = TOKEN, login
        return self.stack.enter_context(serve(hub))

    def process(self, *words: str) -> subprocess.Popen[bytes]:
        """A real process with these words on its command line, until the end of the test."""
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *words])
        self.stack.callback(started.wait)
        self.stack.callback(started.kill)
        return started

    def smi(self, answer: str, code: int = 0) -> GpuFacts:
        """What is made of an nvidia-smi that prints `answer` and ends with `code`: a real program."""
        said = self.write("answer", answer)
        program = self.write("nvidia-smi", f'#!/bin/sh\ncat "{said}"\nexit {code}\n')
        program.chmod(0o755)
        return probe_gpus((str(program), "-q", "-x"), devices=self.path / "dev")

    def disk(self, options: str) -> Path:
        """A small file system in memory, mounted with these options; skips where mounting is not allowed."""
        disk = self.path / "disk"
        disk.mkdir(exist_ok=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True)
        if made.returncode:
            pytest.skip("mounting a small disk takes root")
        self.stack.callback(subprocess.run, ["umount", disk], check=True)
        return disk


@contextmanager
def place(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(path)
    with ExitStack() as stack:
        yield Place(path, monkeypatch, stack)


def gpu_xml(
    number: int = 0,
    *,
    name: str = H200,
    total: int = 143771,
    used: int = 4,
    holders: dict[int, int] | None = None,
    events: str = "",
    dram_uncorrectable: str = "0",
    remap_failure: str = "No",
    mig: str = "Disabled",
) -> str:
    """One GPU as `nvidia-smi -q -x` of driver 570 writes it, cut to what is read. holders: {pid: MiB}."""
    processes = "".join(
        f"<process_info><pid>{pid}</pid><type>C</type><process_name>/usr/bin/python</process_name>"
        f"<used_memory>{size} MiB</used_memory></process_info>"
        for pid, size in (holders or {}).items()
    )
    reasons = "".join(
        f"<clocks_event_reason_{reason}>{'Active' if reason == events else 'Not Active'}</clocks_event_reason_{reason}>"
        for reason in (
            "gpu_idle",
            "sw_power_cap",
            "hw_slowdown",
            "hw_thermal_slowdown",
            "sw_thermal_slowdown",
        )
    )
    return (
        f'<gpu id="00000000:0{number + 1}:00.0"><product_name>{name}</product_name><uuid>GPU-{number}bf2-77</uuid>'
        f"<mig_mode><current_mig>{mig}</current_mig></mig_mode>"
        f"<clocks_event_reasons>{reasons}</clocks_event_reasons>"
        f"<fb_memory_usage><total>{total} MiB</total><reserved>600 MiB</reserved><used>{used} MiB</used></fb_memory_usage>"
        f"<ecc_errors><volatile><sram_correctable>7</sram_correctable>"
        f"<sram_uncorrectable_parity>0</sram_uncorrectable_parity>"
        f"<dram_uncorrectable>{dram_uncorrectable}</dram_uncorrectable></volatile>"
        f"<aggregate><dram_uncorrectable>9</dram_uncorrectable></aggregate></ecc_errors>"
        f"<remapped_rows><remapped_row_pending>No</remapped_row_pending>"
        f"<remapped_row_failure>{remap_failure}</remapped_row_failure></remapped_rows>"
        f"<processes>{processes}</processes></gpu>"
    )


def smi_xml(*gpus: str, driver: str = "570.124.06", cuda: str = "12.8") -> str:
    """A whole answer of `nvidia-smi -q -x`; one healthy GPU without any."""
    inner = "".join(gpus) or gpu_xml()
    return (
        '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>'
        f"<driver_version>{driver}</driver_version><cuda_version>{cuda}</cuda_version>{inner}</nvidia_smi_log>"
    )


def ticking(step: float) -> Callable[[], float]:
    """A clock that goes on by `step` seconds each time it is asked."""
    now = iter(range(10**6))
    return lambda: step * next(now)


def http_date(offset_s: float) -> str:
    """A server's clock that is off by so much, as HTTP writes it."""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + offset_s))


def shards(folder: Path, count: int = 3) -> Path:
    """Real shards with their manifest, made by the sharder."""
    from trainway.config.schema import ShardConfig
    from trainway.data.shard import shard

    raw = folder.parent / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": f"document {i} says this"}) + "\n" for i in range(10 * count)))
    shard(ShardConfig(inputs=(str(raw),), out=str(folder), lines_per_shard=10, format="jsonl"))
    return folder

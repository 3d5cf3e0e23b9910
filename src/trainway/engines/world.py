"""The processes of a run: who this one is, which device it drives, and the few collectives that Trainway needs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import psutil
import torch
import torch.distributed as dist

from trainway.config.schema import EngineConfig
from trainway.engines.pulse import Pulse
from trainway.errors import ConfigError, EnvironmentFault, PeerFailed

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """One process among `world_size`; `device` is its own."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    closing: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)
    """What an engine wants to be done before the process group is left."""
    store: dist.Store | None = field(default=None, repr=False, compare=False)
    """Where the ranks of a run of several processes have met."""
    pulse: Pulse = field(default_factory=Pulse, repr=False, compare=False)
    """What this process is in, for those who watch the run."""

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks, in double precision; the same result on every rank."""
        if self.world_size == 1:
            return [float(v) for v in values]
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        found: list[float] = totals.tolist()  # device→host sync
        self.pulse.tick()
        return found

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        """Every rank's array [n] of int32, n its own, by rank; the same on every rank."""
        if self.world_size == 1:
            return [values]
        sizes = [
            int(size) for size in self.sum(*(len(values) * (r == self.rank) for r in range(self.world_size)))
        ]
        room = torch.zeros(max(sizes), dtype=torch.int32, device=self.device)
        room[: len(values)] = torch.from_numpy(values.astype(np.int32, copy=False))
        found = [torch.empty_like(room) for _ in sizes]
        dist.all_gather(found, room)
        return [tensor[:size].cpu().numpy() for tensor, size in zip(found, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def together(self, action: Callable[[], Result]) -> Result:
        """Run `action` here as every rank does; when it fails on one, all raise, and none waits for one that is gone.

        Raises:
            PeerFailed: it succeeded here and failed on another rank.
        """
        failure: Exception | None = None
        result: Result | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        (failures,) = self.sum(failure is not None)
        if failure is not None:
            raise failure
        if failures:
            raise PeerFailed("another rank failed")
        return cast(Result, result)

    def from_main(self, value: Any) -> Any:
        """Give every rank rank 0's value (anything that JSON can hold)."""
        if self.world_size == 1:
            return value
        # Length, then bytes: a fixed-size tensor collective, so that nothing is unpickled from the network.
        text = json.dumps(value).encode() if self.is_main else b""
        size = torch.tensor([len(text)], device=self.device)
        dist.broadcast(size, src=0)
        data = torch.empty(int(size.item()), dtype=torch.uint8, device=self.device)
        if self.is_main:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(data, src=0)
        return json.loads(bytes(data.cpu().numpy()))


@contextmanager
def open_world(engine: EngineConfig, num_threads: int | None = None) -> Iterator[World]:
    """Join the process group that torchrun's variables describe (none for one process) and leave it at the end.

    Raises:
        ConfigError: the engine does not fit the number of processes.
        EnvironmentFault: a rank has no GPU of its own.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if engine.name == "single" and world_size > 1:
        raise ConfigError(
            f"engine.name is single, but {world_size} processes were started",
            "the single engine would train the same model once per process",
            "set engine.name=ddp, or start one process",
        )
    torch.set_num_threads(num_threads or thread_share(local_world_size))
    device = own_device(local_rank)
    if world_size == 1 and engine.name not in ("fsdp", "zero2", "zero3"):
        world = World(rank, local_rank, world_size, local_world_size, device)
        with world.closing:
            yield world
        return
    timeout = timedelta(seconds=engine.timeout_s)
    store = meeting_store(timeout)
    world = World(rank, local_rank, world_size, local_world_size, device, store=store)
    join_group(world, timeout)
    try:
        with world.closing:
            yield world
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def meeting_store(timeout: timedelta) -> dist.Store:
    """The store of the ranks, where the launcher's variables say; one of its own for a process without a launcher."""
    if "RANK" not in os.environ:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # no agent keeps a store: the first rank does, and does not wait for the others here
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_first = os.environ["RANK"] == "0"
        return dist.TCPStore(*place, is_master=is_first, timeout=timeout, wait_for_workers=False)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return cast(dist.Store, store)


def join_group(world: World, timeout: timedelta) -> None:
    """Make the default process group of the ranks that meet in `world.store`."""
    on_gpu = world.device.type == "cuda"
    assert world.store is not None
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=timeout,
        device_id=world.device if on_gpu else None,
        store=dist.PrefixStore("group", world.store),
        rank=world.rank,
        world_size=world.world_size,
    )


def own_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise EnvironmentFault(
            f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}",
            "more processes were started than GPUs are visible",
            "lower --nproc, or widen CUDA_VISIBLE_DEVICES",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def thread_share(local_world_size: int) -> int:
    """CPU threads of one rank: the physical cores divided among the ranks of this machine."""
    return max(1, _physical_cores() // local_world_size)


def _physical_cores() -> int:
    # A container may be allowed fewer cores than the machine has.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or allowed, allowed)

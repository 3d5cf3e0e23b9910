"""The ranks of the smoke test: a place to exchange small facts, which works before and without collective operations."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from trainway.engines.world import World


@dataclass(frozen=True)
class Group:
    """The ranks, and where each of them runs."""

    world: World
    store: dist.Store
    hosts: tuple[str, ...]

    def exchange(self, name: str, value: Any) -> list[Any]:
        """Every rank's value (anything that JSON can hold), by rank; `name` is used once."""
        return exchange(self.store, self.world.rank, self.world.world_size, name, value)


def exchange(store: dist.Store, rank: int, world_size: int, name: str, value: Any) -> list[Any]:
    """As `Group.exchange`: rank 0 collects, so that the store is asked twice per rank."""
    store.set(f"{name}/{rank}", json.dumps(value))
    if rank == 0:
        found = [json.loads(store.get(f"{name}/{other}")) for other in range(world_size)]
        store.set(f"{name}/all", json.dumps(found))
        return found
    told: list[Any] = json.loads(store.get(f"{name}/all"))
    return told


def digest(*tensors: torch.Tensor) -> str:
    """xxh3_128 of the tensors' bytes."""
    hashed = xxhash.xxh3_128()
    for tensor in tensors:
        hashed.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

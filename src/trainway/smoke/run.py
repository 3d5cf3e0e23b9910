"""The smoke test as one rank runs it: the checks in order, each said as it ends, under a watch that names who hangs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from trainway.engines.heartbeat import Member, Roll, Verdict, own_member
from trainway.engines.verdicts import describe_fault
from trainway.engines.watch import Watch
from trainway.engines.world import World, join_group, meeting_store, own_device, thread_share
from trainway.errors import EnvironmentFault, ExitCode
from trainway.smoke.group import Group, exchange
from trainway.smoke.learning import Learning, check_data, make_material
from trainway.smoke.ranks import check_network, check_ranks, describe_rank
from trainway.smoke.report import Check, SmokeSettings, as_json, exit_code, verdict
from trainway.smoke.speed import check_all_reduce, check_matrix_products

PATIENCE_S = 15.0
"""Time that a rank which is asked to end takes to learn whether another one has died."""
_PATIENCE = 20
"""Collective operations may wait for so many times the test's own limit: the watch is to speak first."""


def run_smoke(settings: SmokeSettings, *, as_json: bool = False) -> int:
    """Run the test on this rank; the exit code is the same on every rank."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings.check(world_size)
    local_rank = int(os.environ["LOCAL_RANK"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    device = own_device(local_rank)
    torch.set_num_threads(thread_share(local_world_size))
    store = _meet(settings)
    store.set_timeout(timedelta(seconds=_PATIENCE * settings.timeout_s))
    world = World(rank, local_rank, world_size, local_world_size, device, store=store)
    said = Said(settings, as_json=as_json, speaks=rank == 0)
    missing = wait_for_all(store, world, settings.timeout_s)
    if missing:
        absent = ", ".join(map(str, missing))
        # those that are here say it; the lowest of them speaks for all
        said.speaks = rank == min(set(range(world_size)) - set(missing))
        said.add(
            Check(
                "ranks", "FAIL", f"of {world_size} ranks these did not come: {absent}", {"missing": missing}
            )
        )
        return said.end()
    watch = Watch(
        world.pulse, rank, world_size, store, said.fault,
        stall_s=settings.timeout_s, long_stall_s=settings.timeout_s,
    )  # fmt: skip
    with watch, _ended_by_signal():
        try:
            for check in run_checks(settings, world, store):
                said.add(check)
        except RuntimeError as error:  # what collective operations raise
            watch.hear()
            first = str(error).strip().partition("\n")[0]
            raise EnvironmentFault(
                f"rank {rank} failed in: {world.pulse.phase}", f"{type(error).__name__}: {first}",
                "NCCL_DEBUG=INFO says more about a network of GPUs",
            ) from error  # fmt: skip
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return said.end()


def run_checks(settings: SmokeSettings, world: World, store: dist.Store) -> Iterator[Check]:
    """Every check in order, the ones by which a later one would hang first."""
    started = time.perf_counter()
    world.pulse.enter("meeting")
    found = exchange(store, world.rank, world.world_size, "ranks", describe_rank(world, settings))
    yield check_ranks(found)
    yield check_network(found)
    if len({one["device"] == "cpu" for one in found}) > 1:
        return  # no backend joins them
    group = Group(world, store, tuple(one["host"] for one in found))
    world.pulse.enter("process group")
    join_group(world, timedelta(seconds=_PATIENCE * settings.timeout_s))
    world.barrier()
    joined = time.perf_counter()
    world.pulse.enter("data")
    material = make_material(settings)
    yield check_data(settings, group, material)
    learning = Learning(settings, group, material)
    yield learning.check_gradients()
    learning.train()
    world.pulse.enter("weights")
    yield learning.check_weights()
    yield learning.check_loss()
    yield check_all_reduce(settings, group)
    yield check_matrix_products(group)
    world.pulse.enter("end")
    world.barrier()
    times = {"meeting_s": joined - started, **learning.timing(), "total_s": time.perf_counter() - started}
    text = f"met in {times['meeting_s']:.1f} s, {times['step_s'] * 1e3:.1f} ms a step, "
    text += f"{times['samples_per_s']:,.0f} samples/s, {times['total_s']:.1f} s in all"
    yield Check("timing", "ok", text, times)


def wait_for_all(store: dist.Store, world: World, timeout_s: float) -> list[int]:
    """The ranks that have not come in time."""
    roll, end = Roll(store, own_member(world.rank), world.world_size), time.monotonic() + timeout_s
    while missing := roll.absent():
        if time.monotonic() > end:
            return missing
        time.sleep(0.05)
    return []


def _meet(settings: SmokeSettings) -> dist.Store:
    try:
        return meeting_store(timedelta(seconds=settings.timeout_s))
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise EnvironmentFault(
            f"rank {os.environ['RANK']} ({socket.gethostname()}) does not reach rank 0 at {place}",
            str(error).strip().partition("\n")[0],
            "see that rank 0 was started, and that the port is open between the machines",
        ) from error


class Said:
    """What was found so far, and the one who says it: rank 0, or in its place who found that a rank hangs."""

    def __init__(self, settings: SmokeSettings, *, as_json: bool, speaks: bool) -> None:
        self.speaks = speaks
        self._settings, self._as_json = settings, as_json
        self._checks: list[Check] = []

    def add(self, check: Check) -> None:
        self._checks.append(check)
        if self.speaks and not self._as_json:
            print(check, flush=True)

    def end(self) -> int:
        """Say the verdict; the exit code."""
        if self.speaks:
            print(
                as_json(self._settings, self._checks) if self._as_json else verdict(self._checks), flush=True
            )
        return exit_code(self._checks)

    def fault(
        self, found: Verdict, ours: bool, members: Mapping[int, Member], words: Mapping[int, str]
    ) -> None:
        """Say who keeps the test from going on, and end this process."""
        self.speaks = ours
        what, why, _ = describe_fault(found, members, words)
        bad = sorted(found.ranks)
        hosts = [members[rank].host for rank in bad if rank in members]
        self.add(
            Check("answers", "FAIL", f"{what}: {why}", {"bad_ranks": bad, "hosts": hosts, "in": found.phase})
        )
        self.end()
        sys.stdout.flush()
        os._exit(ExitCode.ENVIRONMENT)


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """A launcher asks the other ranks to end as soon as one is gone: who that was is found out first."""

    def ask(number: int, frame: FrameType | None) -> None:
        timer = threading.Timer(PATIENCE_S, lambda: os._exit(128 + number))
        timer.daemon = True
        timer.start()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

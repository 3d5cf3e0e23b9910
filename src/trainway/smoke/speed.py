"""How fast the cluster is: all-reduce by size, latency, and the matrix products of each rank."""

from __future__ import annotations

from statistics import median_high

import torch
import torch.distributed as dist

from trainway.smoke.group import Group, now
from trainway.smoke.report import Check, SmokeSettings, name_ranks

SMALLEST_BYTES = 4 << 10
LARGEST_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
LATENCY_BYTES = 4
SIZE_S = 0.25
"""Time spent on one size."""
MOST_REPEATS = 200

PRODUCT_SIZE = {"cpu": 512, "cuda": 8192}
ROUND_S = 0.25
SLOW_SHARE = 0.8
"""A rank below this share of the median is slow."""
MOST_ROUNDS = 8
"""A rank counts as slow that was so in every round: what is short-lived has passed by then."""


def check_all_reduce(settings: SmokeSettings, group: Group) -> Check:
    """Bandwidth by size, and latency. Algorithm bandwidth is bytes / time; bus bandwidth is what each link carries,
    algorithm x 2 (n - 1) / n, comparable between numbers of ranks (nccl-tests, PERFORMANCE.md)."""
    world = group.world
    if world.world_size == 1:
        return Check("all-reduce", "ok", "one rank: nothing to exchange", {"sizes": []})
    rows, wrong = [], []
    sizes = [LATENCY_BYTES]
    size = SMALLEST_BYTES
    while size <= LARGEST_BYTES[world.device.type]:
        sizes.append(size)
        size *= 4
    for size in sizes:
        world.pulse.enter(f"all-reduce of {show_bytes(size)}")
        seconds, right = _time_all_reduce(group, size)
        algorithm = size / seconds / 1e9
        bus = algorithm * 2 * (world.world_size - 1) / world.world_size
        rows.append({"bytes": size, "seconds": seconds, "algorithm_gb_s": algorithm, "bus_gb_s": bus})
        if not right:
            wrong.append(show_bytes(size))
    latency, rows = rows[0]["seconds"], rows[1:]
    figures = {"latency_s": latency, "sizes": rows}
    best = rows[-1]["bus_gb_s"]
    shown = ", ".join(f"{show_bytes(int(row['bytes']))} {row['bus_gb_s']:.3g}" for row in rows)
    text = f"latency {latency * 1e6:,.0f} us; bus GB/s: {shown}"
    if wrong:
        return Check("all-reduce", "FAIL", f"wrong sums at {', '.join(wrong)}; {text}", figures)
    if best < settings.min_bandwidth:
        said = f"{best:.3g} GB/s at {show_bytes(int(rows[-1]['bytes']))}, below --min-bandwidth {settings.min_bandwidth:g}"
        return Check("all-reduce", "FAIL", f"{said}; {text}", figures)
    return Check("all-reduce", "ok", text, figures)


def _time_all_reduce(group: Group, size: int) -> tuple[float, bool]:
    """Seconds of one all-reduce of so many bytes, as the slowest rank sees it, and whether the sum was right."""
    world = group.world
    tensor = torch.empty(size // 4, dtype=torch.float32, device=world.device)
    tensor.fill_(world.rank + 1)
    started = now(world.device)
    dist.all_reduce(tensor)
    first = now(world.device) - started
    right = bool((tensor == world.world_size * (world.world_size + 1) / 2).all())  # exact in fp32
    started = now(world.device)
    dist.all_reduce(tensor.zero_())
    (wrong, first) = world.sum(not right, now(world.device) - started)  # the first one connected
    repeats = int(min(MOST_REPEATS, max(1, SIZE_S * world.world_size / first)))
    dist.barrier()
    started = now(world.device)
    for _ in range(repeats):
        dist.all_reduce(tensor)
    slowest = torch.tensor(
        [(now(world.device) - started) / repeats], dtype=torch.float64, device=world.device
    )
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item(), not wrong  # device→host sync


def check_matrix_products(group: Group) -> Check:
    """What each rank computes while all of them do; a slow or throttled device is named.

    Rounds are repeated while a rank is slow, and each rank counts by its best one.
    """
    world = group.world
    n = PRODUCT_SIZE[world.device.type]
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=world.device, dtype=dtype) for _ in range(2))
    best = [0.0] * world.world_size
    for number in range(MOST_ROUNDS):
        world.pulse.enter(f"matrix products, round {number + 1}")
        dist.barrier()
        found = group.exchange(f"products/{number}", _round(a, b))
        best = [max(pair) for pair in zip(best, found, strict=True)]
        slow = slow_ranks(best)
        if not slow and number > 0:  # the first round warms up
            break
    usual = median_high(best)
    kind = f"{n}x{n} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
    figures = {"flops": best, "median_flops": usual, "slow_ranks": slow}
    if slow:
        said = ", ".join(f"{name_ranks([r], group.hosts)} {best[r] / usual:.0%}" for r in slow)
        text = f"slow: {said} of the median {show_flops(usual)} ({kind})"
        return Check("matrix products", "FAIL", text, figures)
    text = f"{show_flops(min(best))} to {show_flops(max(best))} a rank ({kind})"
    return Check("matrix products", "ok", text, figures)


def slow_ranks(flops: list[float]) -> list[int]:
    """The ranks below SLOW_SHARE of the median, of two ranks the faster one's speed."""
    usual = median_high(flops)
    return [rank for rank, speed in enumerate(flops) if speed < SLOW_SHARE * usual]


def _round(a: torch.Tensor, b: torch.Tensor) -> float:
    """FLOP/s over a round: what is sustained, not what the best product gave."""
    n, done = a.shape[0], 0
    (a @ b).sum().item()
    started = ended = now(a.device)
    while ended - started < ROUND_S:
        for _ in range(4):
            a @ b
        done += 4
        ended = now(a.device)
    return 2 * n**3 * done / (ended - started)


def show_bytes(size: int) -> str:
    for unit, shift in (("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size >> shift} {unit}"
    return f"{size} B"


def show_flops(flops: float) -> str:
    return f"{flops / 1e12:,.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.1f} GFLOP/s"

"""A tiny model learns on all ranks together: its data, its gradients and its loss, against what one process finds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainway.smoke.group import Group, digest, now
from trainway.smoke.report import Check, SmokeSettings, name_ranks, odd_ones

HIDDEN = 256
TOLERANCE = 1e-3
"""Relative error of a gradient: what the order of sums explains is a thousandth of it."""
LEAST_FALL = 0.1
"""Share by which the loss must fall."""


@dataclass(frozen=True)
class Material:
    """All the samples. Exact in binary: the same on every machine, whatever its mathematics library."""

    features: torch.Tensor
    """[N, F]"""
    labels: torch.Tensor
    """[N]"""


def make_material(settings: SmokeSettings) -> Material:
    """Classes around corners of a cube that lie far apart, so that a small model must tell them apart."""
    rng = np.random.default_rng(settings.seed)
    corners = rng.integers(0, 2, (settings.classes, settings.features)) - 0.5
    labels = rng.integers(0, settings.classes, settings.samples)
    noise = rng.integers(-8, 9, (settings.samples, settings.features)) / 8
    return Material(
        torch.from_numpy((corners[labels] + noise).astype(np.float32)),
        torch.from_numpy(labels.astype(np.int64)),
    )


def rows_of(settings: SmokeSettings, epoch: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The rows that a rank takes in each step of an epoch; a last batch that is not full is left out."""
    order = np.random.default_rng((settings.seed, epoch)).permutation(settings.samples)
    size = settings.batch_size
    return [order[at : at + size][rank::world_size] for at in range(0, len(order) - size + 1, size)]


def shard_digest(settings: SmokeSettings, material: Material, rank: int, world_size: int) -> str:
    """Of the samples that a rank learns in the first epoch, in its order."""
    rows = torch.from_numpy(np.concatenate(rows_of(settings, 0, rank, world_size)))
    return digest(material.features[rows], material.labels[rows])


def check_data(settings: SmokeSettings, group: Group, own: Material) -> Check:
    """Every rank holds the rows that the others expect it to hold, after their way to its device and back."""
    world = group.world
    expected = [shard_digest(settings, own, rank, world.world_size) for rank in range(world.world_size)]
    there = Material(own.features.to(world.device), own.labels.to(world.device))
    back = Material(there.features.cpu(), there.labels.cpu())
    held = shard_digest(settings, back, world.rank, world.world_size)
    found = group.exchange("data", {"expected": expected, "held": held})
    odd = odd_ones([one["expected"] for one in found])
    right = max((one["expected"] for one in found), key=[one["expected"] for one in found].count)
    bad = sorted({*odd, *(rank for rank, one in enumerate(found) if one["held"] != right[rank])})
    rows = sum(map(len, rows_of(settings, 0, 0, world.world_size)))
    figures = {"digests": [one["held"] for one in found]}
    if bad:
        text = f"{name_ranks(bad, group.hosts)} holds other data than expected"
        return Check("data", "FAIL", text, {**figures, "bad_ranks": bad})
    each = f"about {rows:,} rows a rank" if world.world_size > 1 else f"{rows:,} rows"
    return Check(
        "data", "ok", f"{each}, as expected on every rank ({found[0]['held'][:8]} on rank 0)", figures
    )


@dataclass
class Learning:
    """The model in training, and what was seen of it."""

    settings: SmokeSettings
    group: Group
    material: Material

    def __post_init__(self) -> None:
        torch.manual_seed(self.settings.seed)
        device = self.group.world.device
        self.model = nn.Sequential(
            nn.Linear(self.settings.features, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, self.settings.classes),
        ).to(device)
        self.losses: list[float] = []
        self.step_s: list[float] = []

    def loss(self, module: nn.Module, rows: np.ndarray) -> torch.Tensor:
        """Sum over the rows, as a share of the global batch."""
        device, index = self.group.world.device, torch.from_numpy(rows)
        logits = module(self.material.features[index].to(device))
        total = nn.functional.cross_entropy(logits, self.material.labels[index].to(device), reduction="sum")
        return total / self.settings.batch_size

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def check_gradients(self) -> Check:
        """The first batch's gradient: that of one process on every rank, and after the all-reduce the same, bit for bit."""
        world, group = self.group.world, self.group
        whole = np.concatenate(
            [rows_of(self.settings, 0, r, world.world_size)[0] for r in range(world.world_size)]
        )
        world.pulse.enter("gradient of one process")
        self.loss(self.model, whole).backward()
        alone = self.gradient().clone()
        self.model.zero_grad(set_to_none=True)
        world.pulse.enter("gradient of all ranks")
        ddp = self._ddp()
        (
            self.loss(ddp, rows_of(self.settings, 0, world.rank, world.world_size)[0]) * world.world_size
        ).backward()
        together = self.gradient()
        error = float((together - alone).norm() / alone.norm())  # device→host sync
        own = {
            "alone": [float(alone.norm()), float((alone * _signs(alone)).sum())],
            "digest": digest(together),
            "norm": float(together.norm()),
            "error": error if np.isfinite(error) else 1e9,
        }
        del ddp
        found = group.exchange("gradients", own)
        return _judge_gradients(group, found)

    def train(self) -> None:
        """All epochs; the losses are those of the global batches."""
        world, settings = self.group.world, self.settings
        self.model.zero_grad(set_to_none=True)
        ddp = self._ddp()
        optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr)
        for epoch in range(settings.epochs):
            for rows in rows_of(settings, epoch, world.rank, world.world_size):
                step = len(self.losses) + 1
                world.pulse.enter("training", step)
                started = now(world.device)
                optimizer.zero_grad(set_to_none=True)
                loss = self.loss(ddp, rows)
                (loss * world.world_size).backward()  # DDP takes the mean over ranks; the sum is meant
                optimizer.step()
                (total,) = world.sum(loss.item())  # device→host sync
                self.step_s.append(time.perf_counter() - started)
                self.losses.append(total)

    def check_weights(self) -> Check:
        """After training the ranks hold the same weights, bit for bit."""
        found = self.group.exchange("weights", digest(*self.model.state_dict().values()))
        if odd := odd_ones(found):
            return Check(
                "weights",
                "FAIL",
                f"{name_ranks(odd, self.group.hosts)} ended with other weights",
                {"bad_ranks": odd},
            )
        return Check(
            "weights", "ok", f"the same on every rank after {len(self.losses)} steps ({found[0][:8]})"
        )

    def check_loss(self) -> Check:
        """The loss has fallen: from the first step to the last quarter of them."""
        first, last = self.losses[0], float(np.mean(self.losses[-max(1, len(self.losses) // 4) :]))
        fell = last < first * (1 - LEAST_FALL)  # not so for NaN
        shown = [value if np.isfinite(value) else None for value in (first, last)]  # JSON knows no NaN
        figures = {"first": shown[0], "last": shown[1], "steps": len(self.losses)}
        text = (
            f"{'fell' if fell else 'did not fall'} from {first:.4f} to {last:.4f} in {len(self.losses)} steps"
        )
        return Check("loss", "ok" if fell else "FAIL", text, figures)

    def timing(self) -> dict[str, float]:
        """Of a step: seconds, and samples per second over all ranks."""
        usual = median(self.step_s)
        return {"step_s": usual, "samples_per_s": self.settings.batch_size / usual}

    def _ddp(self) -> DistributedDataParallel:
        device = self.group.world.device
        return DistributedDataParallel(
            self.model, device_ids=[device.index] if device.type == "cuda" else None
        )


def _judge_gradients(group: Group, found: list[dict[str, object]]) -> Check:
    problems: list[str] = []
    bad: set[int] = set()
    alone = np.array([one["alone"] for one in found])  # [R, 2]
    usual = np.median(alone, axis=0)
    if len(found) == 2:
        usual = alone[0]  # there is no majority of two
    wrong = [
        rank
        for rank in range(len(found))
        if not np.allclose(alone[rank], usual, rtol=TOLERANCE, atol=TOLERANCE * abs(usual[0]))
    ]
    if wrong:
        norms = ", ".join(f"{alone[rank][0]:.6g}" for rank in wrong)
        problems.append(
            f"{name_ranks(wrong, group.hosts)} computes another gradient of the same batch: norm {norms} instead of {usual[0]:.6g}"
        )
        bad |= set(wrong)
    if odd := odd_ones([one["digest"] for one in found]):
        problems.append(f"{name_ranks(odd, group.hosts)} has another gradient after the all-reduce")
        bad |= set(odd)
    worst = max(float(one["error"]) for one in found)  # type: ignore[arg-type]
    if worst > TOLERANCE and not bad:
        problems.append(
            f"the all-reduced gradient is not that of one process: off by {worst:.1e} of its norm"
        )
    figures = {"norm": found[0]["norm"], "error": worst, "bad_ranks": sorted(bad)}
    if problems:
        return Check("gradients", "FAIL", "; ".join(problems), figures)
    text = f"the same on every rank ({str(found[0]['digest'])[:8]}), and that of one process to {worst:.0e}"
    return Check("gradients", "ok", text, figures)


def _signs(like: torch.Tensor) -> torch.Tensor:
    # a direction that differs from the norm's: two wrong gradients seldom agree in both
    return 1.0 - 2.0 * (torch.arange(like.numel(), device=like.device) % 3 == 0).to(like.dtype)

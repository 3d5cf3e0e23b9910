"""One rank of small runs of a discriminator, alone or beside a student: `python -m tests.discriminator_worker JOBS`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.base_models import tiny_tokenizer
from trainway.checkpoint.snapshot import write_snapshot
from trainway.config.schema import EngineConfig, LoraConfig, RunConfig
from trainway.engines import build_learner
from trainway.engines.base import Learner
from trainway.engines.precision import autocast, choose_precision
from trainway.engines.world import World, open_world
from trainway.models.attention import use_packed_attention
from trainway.models.base import BaseModel, BaseWeights, build_base, find_base
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.discriminator import (
    DiscriminatorLoss,
    DiscriminatorWeights,
    adapt_discriminator,
    build_discriminator,
    scoring_tokenizer,
)
from trainway.models.fused import fuse_blocks
from trainway.models.load import InitialWeights
from trainway.models.lora import AdaptedWeights, inject_lora

STEPS = 6
LORA = LoraConfig(
    enabled=True, r=4, alpha=8.0, target_modules=("all-linear",), modules_to_save=("lm_head", "model.norm")
)
SEEN = "seen.json"


class Job(NamedTuple):
    out: str
    base: str
    engine: str
    lora: bool = False
    packed: bool = True
    precision: str = "fp32"
    start: str = ""
    student: bool = False


def main(jobs: list[Job]) -> None:
    """Run jobs one after the other in the same process group."""
    nproc = int(os.environ.get("WORLD_SIZE", 1))
    with open_world(EngineConfig(name="ddp" if nproc > 1 else "single"), num_threads=1) as world:
        for job in jobs:
            train(job, world)
            world.barrier()


def train(job: Job, world: World) -> None:
    Path(job.out).mkdir(parents=True, exist_ok=True)
    base = find_base(job.base, cache=Path(job.base).parent / "cache")
    run = Run(job, base, world)
    records = []
    for step in range(STEPS // 2 if job.start else 0, STEPS):
        records.append(run.discriminator_step(step))
        if job.student:
            run.student_step(step)
        if step == STEPS // 2 - 1:
            run.save(Path(job.out) / "middle")
    run.save(Path(job.out) / "end")
    if world.is_main:
        kinds = sorted({str(kind) for kind in run.loss.kinds})
        (Path(job.out) / SEEN).write_text(json.dumps({"records": records, "head": kinds}))


class WatchedLoss(DiscriminatorLoss):
    """Notes the type that the head's weights have when they are used."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.kinds: set[torch.dtype] = set()

    def _scores(self, hidden: Tensor) -> Tensor:
        self.kinds.add(self.model.get_submodule("score").weight.dtype)
        return super()._scores(hidden)


class Run:
    """A discriminator, and the student beside it where there is one, each with a learning rate of its own."""

    def __init__(self, job: Job, base: BaseModel, world: World) -> None:
        self.job, self.world = job, world
        lower = torch.bfloat16 if job.lora and job.precision == "bf16" else torch.float32
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = scoring_tokenizer(tokenizer)
        discriminator = build_discriminator(base, dtype=lower, pad_id=self.tokenizer.pad_token_id)
        weights: InitialWeights = DiscriminatorWeights.of(BaseWeights(base), discriminator, seed=5)
        if job.lora:
            adapt_discriminator(discriminator, LORA, base.source)
            weights = AdaptedWeights(weights, seed=5)
        self.loss = WatchedLoss(_prepared(discriminator))
        self.learner = build_learner(_config(job, 1e-2), self.loss, discriminator, world, weights)
        if job.start:
            self.learner.read(Path(job.start))
        if not job.student:
            return
        student = build_base(base, dtype=lower)
        weights = BaseWeights(base)
        if job.lora:
            lora = LORA.model_copy(update={"modules_to_save": ("model.norm",)})  # its head is tied
            inject_lora(student, lora, base.source)
            weights = AdaptedWeights(weights, seed=5)
        module = CausalLMLoss(_prepared(student))
        self.student = build_learner(_config(job, 3e-3), module, student, world, weights)

    def discriminator_step(self, step: int) -> list[float]:
        """A step of Bradley and Terry's loss; [loss, gradient norm, scores before it ...]."""
        held = self._student_state()
        everyone = sequences(step)
        numbers, batches = self._share(everyone)
        with torch.no_grad(), autocast(self._precision(), self.world.device):
            scores = [self.learner.module(*batch) for batch in batches]
        found = torch.zeros(len(everyone))
        for own, part in zip(numbers, scores, strict=True):
            found[own] = part
        assert found.dtype == torch.float32
        found = torch.tensor(self.world.sum(*found.tolist()), dtype=torch.float64)
        gap = found[1::2] - found[::2]  # the student's answers stand behind the teacher's
        loss = torch.nn.functional.softplus(gap).mean()
        coefficients = torch.stack([-gap.sigmoid(), gap.sigmoid()], 1).flatten().float() / len(gap)
        for i, (own, batch) in enumerate(zip(numbers, batches, strict=True)):
            with self.learner.micro_step(sync=i == len(batches) - 1):
                part = self.learner.module(*batch, coefficients[own])
                assert part.shape == () and part.dtype == torch.float32
                self.learner.backward(part, scale=1.0)
        norm = self.learner.step(1.0, 1.0, lambda _: True)
        assert self._student_state() == held, "a step of the discriminator has changed the student"
        return [loss.item(), norm, *found.tolist()]

    def student_step(self, step: int) -> None:
        held = state_hash(self.learner)
        before = self._fixed_scores()
        ids = torch.stack([sequence[:3] for sequence in sequences(step)])
        own = ids[self.world.rank :: self.world.world_size]
        with self.student.micro_step(sync=True):
            self.student.backward(self.student.module(own, own), scale=1 / ids.numel())
        self.student.step(1.0, 1.0, lambda _: True)
        assert state_hash(self.learner) == held, "a step of the student has changed the discriminator"
        assert torch.equal(self._fixed_scores(), before)

    def save(self, directory: Path) -> None:
        learners = (
            {"": self.student, "discriminator": self.learner} if self.job.student else {"": self.learner}
        )
        for name, learner in learners.items():
            write_snapshot(learner.snapshot(), directory / name, learner.model, self.tokenizer)

    def _share(self, everyone: list[Tensor]) -> tuple[list[list[int]], list[tuple[Any, ...]]]:
        """Micro-batches of two sequences each, dealt over the ranks; the last rank may have an empty one."""
        pairs = [[number, number + 1] for number in range(0, len(everyone), 2)]
        rounds = -(-len(pairs) // self.world.world_size)
        own = pairs[self.world.rank :: self.world.world_size]
        own += [[] for _ in range(rounds - len(own))]
        make = packed if self.job.packed else padded
        return own, [make([everyone[number] for number in numbers]) for numbers in own]

    def _fixed_scores(self) -> Tensor:
        with torch.no_grad():
            return self.learner.module(*packed(sequences(99)))

    def _student_state(self) -> tuple[str, float]:
        if not self.job.student:
            return "", 0.0
        ids = torch.stack([sequence[:3] for sequence in sequences(99)])
        with torch.no_grad():
            return state_hash(self.student), self.student.module(ids, ids).item()

    def _precision(self) -> Any:
        zero = self.job.engine.startswith("zero")  # its model is in that type already
        return "fp32" if zero else choose_precision(self.job.precision, self.world.device)  # type: ignore[arg-type]


def sequences(step: int) -> list[Tensor]:
    """Five pairs of 3 to 14 tokens; tokens of padding and ends are among them, and in the last place."""
    generator = torch.Generator().manual_seed(100 + step)
    lengths = torch.randint(3, 15, (10,), generator=generator).tolist()
    found = [torch.randint(0, 80, (length,), generator=generator) for length in lengths]
    for sequence in found[::3]:
        sequence[-1] = 2
    return found


def packed(sequences: list[Tensor]) -> tuple[Any, ...]:
    """One row of whole sequences: input_ids, position_ids, boundaries, last."""
    ends = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.long).cumsum(0)
    boundaries = (0, *ends.tolist())
    positions = [torch.arange(stop - start) for start, stop in pairwise(boundaries)]
    empty = torch.zeros(0, dtype=torch.long)
    ids = torch.cat([empty, *sequences])
    return ids[None], torch.cat([empty, *positions])[None], boundaries, ends - 1


def padded(sequences: list[Tensor]) -> tuple[Any, ...]:
    """A row for each sequence, filled with the end token, which is one of theirs too."""
    longest = max((len(sequence) for sequence in sequences), default=0)
    ids = torch.full((len(sequences), longest), 2)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    last = [row * longest + len(sequence) - 1 for row, sequence in enumerate(sequences)]
    positions = torch.arange(longest).expand(len(sequences), longest)
    return ids, positions, None, torch.tensor(last, dtype=torch.long)


def state_hash(learner: Learner) -> str:
    """Of every byte of this rank's weights and optimiser state."""
    snapshot, digest = learner.snapshot(), hashlib.blake2b()
    pieces = dict(snapshot.weights)
    for name, slot in snapshot.slots.items():
        pieces |= {f"{name}/{key}": piece for key, piece in slot.tensors.items()}
    for name, piece in pieces.items():
        digest.update(name.encode())
        digest.update(piece.tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _prepared(model: Any) -> Any:
    use_packed_attention(model)
    fuse_blocks(model)
    return model.train()


def _config(job: Job, lr: float) -> RunConfig:
    # eps: no step is made of the rounding of a gradient that is nearly zero
    optim = {"lr": lr, "eps": 1e-6}
    return RunConfig.model_validate(
        {"engine": {"name": job.engine}, "optim": optim, "train": {"precision": job.precision}}
    )


if __name__ == "__main__":
    main([Job(*job) for job in json.loads(sys.argv[1])])

"""One rank of small runs whose model answers between its steps: `python -m tests.rollout_worker JOBS`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from tests.lora_models import Stored, on_meta, plain
from tests.lora_worker import take_step
from trainway.config.schema import EngineConfig, RunConfig
from trainway.engines import build_learner
from trainway.engines.base import Learner
from trainway.engines.world import World, open_world
from trainway.models.attention import use_packed_attention
from trainway.models.causal_lm import CausalLMLoss
from trainway.rollout.base import Request, RolloutEngine, Sampling
from trainway.rollout.continuous import ContinuousRollout
from trainway.rollout.transformers import TransformersRollout

STEPS = 3
SAMPLING = Sampling(20, 1.0, 0.95, (2, 9, 17, 33))
SHARES = ((7, 0), (2, 5), (5, 2), (0, 7))
"""Requests that each of two ranks answers, before every step and after the last."""


class Job(NamedTuple):
    out: str
    engine: str
    rollouts: str = ""
    """static, continuous, or nothing: training alone."""
    family: str = "llama"
    precision: str = "fp32"
    offload: str = "none"
    sharding: str = "full"


def main(jobs: str) -> None:
    """Run each of `jobs`, a JSON list of `Job`s, one after the other in the same process group."""
    nproc = int(os.environ.get("WORLD_SIZE", 1))
    with open_world(EngineConfig(name="ddp" if nproc > 1 else "single"), num_threads=1) as world:
        for job in json.loads(jobs):
            run(Job(*job), world)
            world.barrier()


def run(job: Job, world: World) -> None:
    """Write `records-RANK.json`: losses and norms of the steps, this rank's answers, and a digest of its weights."""
    shards = 1 if job.sharding == "hybrid" else None
    config = RunConfig.model_validate(
        {
            "engine": {
                "name": job.engine,
                "cpu_offload": job.offload,
                "sharding": job.sharding,
                "shard_ranks": shards,
            },
            "optim": {"lr": 1e-2},
            "train": {"precision": job.precision},
        }
    )
    model = on_meta(job.family)
    use_packed_attention(model)
    learner = build_learner(config, CausalLMLoss(model), model, world, Stored(plain(job.family).state_dict()))
    kinds: dict[str, Any] = {"static": TransformersRollout, "continuous": ContinuousRollout}
    engine = kinds[job.rollouts](learner, 4) if job.rollouts else None
    steps, rounds = [], []
    for step in range(STEPS + 1):
        if engine is not None:
            rounds.append(answer(engine, world, step))
            assert not learner.is_sharded or no_matrix_is_whole(learner)
        if step < STEPS:
            steps.append([value.hex() for value in take_step(learner, world, step)])
    records = {"steps": steps, "answers": rounds, "weights": digest(learner)}
    Path(job.out, f"records-{world.rank}.json").write_text(json.dumps(records))


def requests() -> list[Request]:
    """Seven, of 1 to 25 tokens and 1 to 3 answers."""
    generator = np.random.default_rng(2)
    return [
        Request(generator.integers(3, 64, length).astype(np.int32), tuple(range(10 * i, 10 * i + 1 + i % 3)))
        for i, length in enumerate((4, 25, 1, 12, 12, 7, 18))
    ]


def answer(engine: RolloutEngine, world: World, step: int) -> dict[int, list[list[int]]]:
    """This rank's share of the answers, by request."""
    own = range(7)
    if world.world_size > 1:
        first = SHARES[step][0]
        own = range(first) if world.rank == 0 else range(first, 7)
    engine.sync()
    groups = engine.generate([requests()[i] for i in own], SAMPLING)
    return {i: [r.tokens.tolist() for r in group] for i, group in zip(own, groups, strict=True)}


def no_matrix_is_whole(learner: Learner) -> bool:
    """What was gathered for the answers is given back: FSDP has its own tensors again, DeepSpeed empty ones."""
    return all(isinstance(p, DTensor) or p.numel() == 0 for p in learner.model.parameters() if p.ndim != 1)


def digest(learner: Learner) -> str:
    """Of every bit of the weights that this rank holds."""
    found = hashlib.sha256()
    for piece in learner.pieces.values():
        found.update(piece.tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1])

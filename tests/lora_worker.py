"""One rank of small runs with adapters: `python -m tests.lora_worker JOBS`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.lora_models import EXPERTS, Stored, on_meta, plain
from trainway.checkpoint.snapshot import Staging, write_snapshot
from trainway.config.schema import EngineConfig, LoraConfig, RunConfig
from trainway.engines import build_learner
from trainway.engines.base import Learner
from trainway.engines.world import World, open_world
from trainway.models.attention import use_packed_attention
from trainway.models.causal_lm import CausalLMLoss
from trainway.models.checkpointing import checkpoint_activations
from trainway.models.lora import AdaptedWeights, check_gradients, inject_lora

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ("all-linear",), "modules_to_save": ("lm_head",)}),
    "dora": ("llama", {"use_dora": True}),
    "experts": ("qwen3-moe", {"target_parameters": EXPERTS}),
    "one-layer": ("llama", {"target_modules": (r".*\.1\.self_attn\.q_proj",)}),
}
STEPS = 4


def main(jobs: str) -> None:
    """Run each of `jobs`, a JSON list of `Job`s, one after the other in the same process group."""
    nproc = int(os.environ.get("WORLD_SIZE", 1))
    with open_world(EngineConfig(name="ddp" if nproc > 1 else "single"), num_threads=1) as world:
        for job in json.loads(jobs):
            train(Job(*job), world)
            world.barrier()


class Job(NamedTuple):
    out: str
    case: str
    engine: str
    start: str = ""
    precision: str = "fp32"
    dtype: str = "float32"


def train(job: Job, world: World) -> None:
    family, settings = CASES[job.case]
    config = RunConfig.model_validate(
        {
            "engine": {"name": job.engine},
            "optim": {"lr": 1e-2},
            "train": {"precision": job.precision},
            "seed": 3,
        }
    )
    dtype = getattr(torch, job.dtype)
    base = plain(family, dtype).state_dict()
    model = on_meta(family, dtype)
    inject_lora(model, LoraConfig(**{"enabled": True, "r": 4, "alpha": 8.0, **settings}), base="org/base")
    use_packed_attention(model)
    checkpoint_activations(model.model.layers, "full")
    weights = AdaptedWeights(Stored(base), config.seed)
    learner = build_learner(config, CausalLMLoss(model), model, world, weights)
    if job.start:
        learner.read(Path(job.start))
    records = []
    for step in range(STEPS // 2 if job.start else 0, STEPS):
        records.append(take_step(learner, world, step))
        if step == 0:
            check_gradients(model, learner.snapshot(), world.sum)
        if step == STEPS // 2 - 1:
            write_snapshot(learner.snapshot(), Path(job.out) / "middle", model, None)
    staging = Staging()
    staging.begin(learner.snapshot())
    write_snapshot(staging.result(), Path(job.out) / "end", model, None)
    if world.is_main:
        (Path(job.out) / "records.json").write_text(json.dumps(records))
    assert_frozen(learner, weights)


def take_step(learner: Learner, world: World, step: int) -> list[float]:
    ids, labels = batch(step)
    rows = torch.arange(4).chunk(world.world_size)[world.rank].chunk(2)
    total = 0.0
    for i, part in enumerate(rows):
        with learner.micro_step(sync=i == len(rows) - 1):
            loss = learner.module(ids[part], labels[part], torch.arange(12).expand(len(part), 12))
        learner.backward(loss, scale=1 / int((labels != -100).sum()))
        total += loss.item()
    norm = learner.step(1.0, 1.0, lambda _: True)
    return [*world.sum(total), norm]


def assert_frozen(learner: Any, weights: AdaptedWeights) -> None:
    """The base is, bit for bit, what it was."""
    frozen = {name: piece for name, piece in learner.pieces.items() if not piece.tensor.requires_grad}
    assert len(frozen) > 10
    fresh = {
        name: replace(piece, tensor=torch.full_like(piece.tensor, 7.0)) for name, piece in frozen.items()
    }
    with torch.no_grad():
        weights(fresh.items())
    for name, piece in frozen.items():
        assert torch.equal(piece.tensor, fresh[name].tensor), f"{name} has changed"


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[4, 12] twice; rows have 11, 8, 5 and 2 targets: a mean of the ranks' means would be wrong."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(3, 64, (4, 12), generator=generator)
    labels = torch.roll(ids, -1, 1)
    for row in range(4):
        labels[row, 11 - 3 * row :] = -100
    return ids, labels


if __name__ == "__main__":
    main(sys.argv[1])

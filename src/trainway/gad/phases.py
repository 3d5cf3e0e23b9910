"""The phases of a step: the student answers, the discriminator scores and learns, the student learns.

All ranks call each function together. What is global, a step's answers and their scores, is the same on every rank;
which rank computes what follows from the lengths of the answers alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trainway.config.schema import GadConfig, RolloutConfig
from trainway.data.teacher_rows import TeacherRow
from trainway.engines.base import Learner
from trainway.engines.precision import Precision, autocast
from trainway.engines.world import World
from trainway.gad.losses import BradleyTerry, PolicyStats, bradley_terry, pool_stats
from trainway.gad.sequences import Exchange, ExchangeBatch, deal, lay_out
from trainway.gad.student import LogProbs, Policy
from trainway.rollout.base import Request, Rollout, RolloutEngine, Sampling, rollout_seed


@dataclass(frozen=True)
class Players:
    """Who takes part, and how their answers are laid out."""

    gad: GadConfig
    rollout: RolloutConfig
    world: World
    student: Learner
    discriminator: Learner | None
    engine: RolloutEngine
    precision: Precision
    """Of forward passes; fp32 where the engine itself sees to another."""
    pad_id: int
    packed: bool
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the phases of the step in hand, by name."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.world.pulse.enter(name, long=name == "rollout")
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def batches(self, answers: Sequence[Exchange]) -> list[ExchangeBatch]:
        """This rank's micro-batches of some answers; every rank has as many."""
        dealt = deal([answer.length for answer in answers], self.gad.tokens_per_gpu, self.world.world_size)
        return [
            lay_out(answers, members, self.pad_id, packed=self.packed) for members in dealt[self.world.rank]
        ]


@dataclass(frozen=True)
class Update:
    """What one optimiser step of a model was like, over all ranks."""

    loss: float
    grad_norm: float


Optimize = Callable[[Learner, float], float]
"""Takes the optimiser step of a learner whose global loss that is; returns the gradient norm."""


# ---- answers


def write_answers(
    players: Players, rows: Sequence[TeacherRow], seeds: Sequence[tuple[int, ...]], sampling: Sampling
) -> list[list[Rollout]]:
    """The student's answers to `rows`, one for each of its seeds: a rank writes every world_size-th row's."""
    world, engine = players.world, players.engine
    own = range(world.rank, len(rows), world.world_size)
    requests = [Request(rows[index].prompt, seeds[index]) for index in own]
    engine.sync()
    written = world.together(lambda: engine.generate(requests, sampling))
    flat = [answer for answers in written for answer in answers]
    # lengths, then whether they were truncated, then all tokens
    sizes = np.array([len(answer.tokens) for answer in flat], dtype=np.int32)
    cut = np.array([answer.truncated for answer in flat], dtype=np.int32)
    tokens = np.concatenate([answer.tokens for answer in flat]) if flat else np.empty(0, dtype=np.int32)
    shares = [world.gather(values) for values in (sizes, cut, tokens)]
    found: list[list[Rollout]] = [[] for _ in rows]
    for rank, (lengths, ends, words) in enumerate(zip(*shares, strict=True)):
        begins = np.cumsum(lengths) - lengths
        place = 0
        for index in range(rank, len(rows), world.world_size):
            for _ in seeds[index]:
                text = words[begins[place] : begins[place] + lengths[place]]
                found[index].append(Rollout(text, bool(ends[place])))
                place += 1
    return found


def step_seeds(players: Players, rows: Sequence[TeacherRow], seed: int, step: int) -> list[tuple[int, ...]]:
    """A seed for every answer of a step: a function of the run's seed, the step and the row."""
    count = players.rollout.num_per_prompt
    return [tuple(rollout_seed(seed, step, row.id, index) for index in range(count)) for row in rows]


# ---- the discriminator


@torch.no_grad()
def score(players: Players, parts: Sequence[ExchangeBatch], count: int) -> torch.Tensor:
    """The discriminator's score of each of `count` answers, of which `parts` are this rank's micro-batches; [count]
    fp64 on the CPU, the same on every rank. Its weights stay as they are."""
    found = torch.zeros(count, dtype=torch.float64)
    for part in parts:
        with _forward(players):
            scores = _judge(players, part)
        found[list(part.members)] = scores.double().cpu()  # device→host sync
    return torch.tensor(players.world.sum(*found.tolist()), dtype=torch.float64)


def compare(scores: torch.Tensor, num_prompts: int) -> BradleyTerry:
    """The Bradley-Terry loss of scores as `all_exchanges` lays them out: the answers of each prompt, then the teacher's."""
    student, teacher = scores[:-num_prompts], scores[-num_prompts:]
    return bradley_terry(teacher, student.view(num_prompts, -1))


def all_exchanges(rows: Sequence[TeacherRow], written: Sequence[Sequence[Rollout]]) -> list[Exchange]:
    """The student's answers to each row, one after the other, then the teacher's."""
    own = [
        Exchange(row.prompt, answer.tokens)
        for row, answers in zip(rows, written, strict=True)
        for answer in answers
    ]
    return own + teacher_exchanges(rows)


def teacher_exchanges(rows: Sequence[TeacherRow]) -> list[Exchange]:
    return [Exchange(row.prompt, row.response) for row in rows]


def train_discriminator(
    players: Players, parts: Sequence[ExchangeBatch], pairs: BradleyTerry, optimize: Optimize
) -> Update:
    """One step on the loss of `pairs`, whose scores `score` has given for the answers in `parts`.

    The chain rule in two passes: scores come first, so that the loss may compare answers that lie in other
    micro-batches, on other ranks; what goes backward is each score times the loss's derivative by it.
    """
    learner = _discriminator(players)
    slopes = torch.cat([pairs.d_student.flatten(), pairs.d_teacher])  # as `all_exchanges` lays them out
    for number, part in enumerate(parts):
        own = slopes[list(part.members)].to(players.world.device, torch.float32)
        with learner.micro_step(sync=number == len(parts) - 1):
            learner.backward(_judge(players, part, own), scale=1.0)
    loss = pairs.loss.item()
    return Update(loss, optimize(learner, loss))


def _discriminator(players: Players) -> Learner:
    assert players.discriminator is not None
    return players.discriminator


def _judge(players: Players, part: ExchangeBatch, *coefficients: torch.Tensor) -> torch.Tensor:
    """The discriminator's forward pass of a micro-batch; see `DiscriminatorLoss.forward`."""
    device = players.world.device
    batch = part.batch.to(device)
    found: torch.Tensor = _discriminator(players).module(
        batch.input_ids, batch.position_ids, batch.boundaries, part.last.to(device), *coefficients
    )
    return found


# ---- the student


def imitate(players: Players, answers: Sequence[Exchange], optimize: Optimize) -> Update:
    """One step on the cross-entropy of the answers, summed over their tokens and divided by their number."""
    learner, total = players.student, sum(len(answer.response) for answer in answers)
    parts = players.batches(answers)
    nats = 0.0
    for number, part in enumerate(parts):
        with learner.micro_step(sync=number == len(parts) - 1):
            loss = _ask(players, part)
            learner.backward(loss, scale=1 / total)
        nats += loss.item()  # device→host sync
    (nats,) = players.world.sum(nats)
    return Update(nats / total, optimize(learner, nats / total))


@torch.no_grad()
def cross_entropy(players: Players, answers: Sequence[Exchange]) -> tuple[float, int]:
    """Nats and tokens of the answers under the student, over all ranks."""
    nats = 0.0
    for part in players.batches(answers):
        with _forward(players):
            nats += _ask(players, part).item()  # device→host sync
    (nats,) = players.world.sum(nats)
    return nats, sum(len(answer.response) for answer in answers)


def _ask(players: Players, part: ExchangeBatch, objective: Policy | LogProbs | None = None) -> Any:
    """The student's forward pass of a micro-batch; see `StudentLoss.forward`."""
    batch = part.batch.to(players.world.device)
    return players.student.module(
        batch.input_ids,
        batch.labels,
        batch.position_ids,
        batch.boundaries,
        batch.targets,
        objective=objective,
    )


@dataclass(frozen=True)
class Reference:
    """The student that the adversarial stage began with: its trained weights, as this rank holds them."""

    weights: dict[str, torch.Tensor]

    @contextmanager
    def in_place(self, learner: Learner) -> Iterator[None]:
        """The learner computes with these weights; its own are kept here meanwhile, and come back unchanged."""
        learner.exchange(self.weights)
        try:
            yield
        finally:
            learner.exchange(self.weights)


def reinforce(
    players: Players,
    answers: Sequence[Exchange],
    advantages: torch.Tensor,
    reference: Reference | None,
    optimize: Optimize,
    *,
    num_updates: int = 1,
) -> tuple[Update, PolicyStats]:
    """The student's steps on the policy loss: `num_updates` of equal shares of the answers, in order.

    advantages: [answers]. Returns the means of loss and norm over the updates, and the statistics of all tokens and
    ranks. With several updates the probabilities before the first one are what ratios refer to.
    """
    share = len(answers) // num_updates
    shares = [slice(start, start + share) for start in range(0, len(answers), share)]
    dealt = [players.batches(answers[own]) for own in shares]
    references = _log_probs(players, dealt, reference) if reference is not None else None
    befores = _log_probs(players, dealt, None) if num_updates > 1 else None
    losses, norms, stats = [], [], []
    for number, (own, parts) in enumerate(zip(shares, dealt, strict=True)):
        total = sum(len(answer.response) for answer in answers[own])
        before = [None] * len(parts) if befores is None else befores[number]
        anchor = [None] * len(parts) if references is None else references[number]
        loss, found = _policy_gradient(players, parts, advantages[own], total, before, anchor)
        losses.append(loss)
        norms.append(optimize(players.student, loss))
        stats.append(found)
    return Update(sum(losses) / num_updates, sum(norms) / num_updates), _over_ranks(players.world, stats)


def _policy_gradient(
    players: Players,
    parts: Sequence[ExchangeBatch],
    advantages: torch.Tensor,
    total: int,
    before: Sequence[torch.Tensor | None],
    anchor: Sequence[torch.Tensor | None],
) -> tuple[float, torch.Tensor]:
    """Forward and backward of one update; the global loss per token, and this rank's statistics."""
    gad, learner, device = players.gad, players.student, players.world.device
    stats, summed = [], 0.0
    for number, (part, old, ref) in enumerate(zip(parts, before, anchor, strict=True)):
        lengths = torch.tensor(part.response_lengths, dtype=torch.int64)
        objective = Policy(
            temperature=players.rollout.temperature,
            advantages=advantages[list(part.members)].float().repeat_interleave(lengths).to(device),  # [N]
            old_logp=old,
            ref_logp=ref,
            clip_range=gad.clip_range,
            dual_clip=gad.dual_clip,
            kl_coef=gad.kl_coef,
        )
        with learner.micro_step(sync=number == len(parts) - 1):
            loss, found = _ask(players, part, objective)
            learner.backward(loss, scale=1 / total)
        summed += loss.item()  # device→host sync
        stats.append(found.double().cpu())
    (summed,) = players.world.sum(summed)
    return summed / total, torch.stack(stats)


def _over_ranks(world: World, stats: Sequence[torch.Tensor]) -> PolicyStats:
    """The statistics of all micro-batches [m, 6] of all ranks."""
    own = torch.stack(pool_stats(torch.cat(list(stats))))
    ranks = [own * (rank == world.rank) for rank in range(world.world_size)]
    table = torch.tensor(world.sum(*torch.cat(ranks).tolist()), dtype=torch.float64)
    return pool_stats(table.view(world.world_size, -1))


@torch.no_grad()
def _log_probs(
    players: Players, dealt: Sequence[Sequence[ExchangeBatch]], reference: Reference | None
) -> list[list[torch.Tensor]]:
    """Of each micro-batch its tokens' log-probabilities, under the reference or the student as it is."""
    objective = LogProbs(players.rollout.temperature)

    def of(part: ExchangeBatch) -> torch.Tensor:
        with _forward(players):
            found: torch.Tensor = _ask(players, part, objective)[0]
        return found

    with reference.in_place(players.student) if reference is not None else nullcontext():
        return [[of(part) for part in parts] for parts in dealt]


def _forward(players: Players) -> AbstractContextManager[object]:
    """A forward pass without a backward one, in the arithmetic of training."""
    return autocast(players.precision, players.world.device)

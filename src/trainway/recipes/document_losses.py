"""The loss of each document of a split, and how sure their mean is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from trainway.data.batch import Batch
from trainway.data.store import TokenSplit
from trainway.engines.precision import Precision, autocast
from trainway.engines.world import World
from trainway.gad.student import LogProbs, StudentLoss
from trainway.losses import IGNORE_INDEX

Z_95 = 1.959964
"""Quantile of the normal distribution for an interval of 95 %."""


@dataclass(frozen=True)
class DocumentLosses:
    """Sums over the targets of each of D documents; a document that was not read has none."""

    nats: np.ndarray  # [D] float64
    tokens: np.ndarray  # [D] int64
    text_bytes: np.ndarray  # [D] int64, UTF-8 bytes of the targets

    def part(self, start: int, stop: int) -> DocumentLosses:
        """The documents [start, stop) alone."""
        own = slice(start, stop)
        return DocumentLosses(self.nats[own], self.tokens[own], self.text_bytes[own])

    @classmethod
    def joined(cls, parts: Iterable[DocumentLosses]) -> DocumentLosses:
        """The documents of all parts, in order."""
        parts = list(parts)
        return cls(
            np.concatenate([part.nats for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.text_bytes for part in parts]),
        )

    def figures(self) -> dict[str, float | None]:
        """By the names of metrics.jsonl, as `training.evaluate.evaluate_batches` defines them, with 95 % intervals."""
        nats, tokens, text_bytes = self.nats.sum(), int(self.tokens.sum()), int(self.text_bytes.sum())
        loss = nats / tokens if tokens else math.nan
        bpb = nats / math.log(2) / text_bytes if text_bytes else math.nan
        around, bits_around = half_width(self.nats, self.tokens), half_width(self.nats, self.text_bytes)
        bits_around = None if bits_around is None else bits_around / math.log(2)
        return {
            "val/loss": float(loss),
            **_bounds("val/loss", float(loss), around),
            "val/ppl": math.exp(min(float(loss), 700.0)),  # exp overflows a double past 709
            "val/bpb": float(bpb),
            **_bounds("val/bpb", float(bpb), bits_around),
            "val/tokens": tokens,
            "val/bytes": text_bytes,
            "val/documents": int(np.count_nonzero(self.tokens)),
        }


def difference(model: DocumentLosses, first: DocumentLosses) -> dict[str, float | None]:
    """bpb, low, high: bits per byte of `model` less those of `first`, paired by document; empty for other texts.

    A document that is hard is so for both: the interval is far narrower than the two models' own ones suggest.
    """
    same = np.array_equal(model.text_bytes, first.text_bytes)
    if not same or not model.text_bytes.sum():
        return {}
    bits = (model.nats - first.nats) / math.log(2)
    mean = float(bits.sum() / model.text_bytes.sum())
    around = half_width(bits, model.text_bytes)
    low, high = _bounds("", mean, around).values()
    return {"bpb": mean, "low": low, "high": high}


def half_width(sums: np.ndarray, weights: np.ndarray) -> float | None:
    """Half the 95 % interval of sum(sums) / sum(weights) over documents, [D] each; None for fewer than two documents.

    The tokens of a document are not independent, so documents are what is drawn: the variance is that of a ratio
    estimator over clusters, linearised (Cochran 1977, Sampling Techniques, chapter 6).
    """
    read = weights > 0
    count, total = int(np.count_nonzero(read)), float(weights.sum())
    if count < 2:
        return None
    residuals = sums[read] - sums[read].sum() / total * weights[read]
    variance = count / (count - 1) * float(np.square(residuals).sum()) / total**2
    return Z_95 * math.sqrt(variance)


@torch.no_grad()
def document_losses(
    module: StudentLoss,
    split: TokenSplit,
    batches: Callable[[TokenSplit], Iterable[Batch]],
    token_bytes: np.ndarray,
    world: World,
    precision: Precision,
    progress: Callable[[int], None],
) -> DocumentLosses:
    """Evaluate this rank's rows of `split`, and sum over all ranks; the same on every rank.

    batches: the rows of a split; progress: is told this rank's tokens so far.
    """
    count = split.num_documents
    nats, tokens, text_bytes = np.zeros(count), np.zeros(count), np.zeros(count)
    done = 0
    module.eval()
    for batch, numbered in zip(batches(split), batches(split.document_numbers()), strict=True):
        documents = numbered.labels[numbered.labels != IGNORE_INDEX].numpy()
        targets = batch.labels[batch.labels != IGNORE_INDEX].numpy()
        if len(targets):
            nll = _nll(module, batch, world, precision)
            nats += np.bincount(documents, nll, minlength=count)
            tokens += np.bincount(documents, minlength=count)
            text_bytes += np.bincount(documents, token_bytes[targets], minlength=count)
        done += batch.num_tokens
        progress(done)
    if world.world_size > 1:
        sums = world.sum(*nats.tolist(), *tokens.tolist(), *text_bytes.tolist())
        nats, tokens, text_bytes = np.split(np.array(sums), 3)
    return DocumentLosses(nats, tokens.astype(np.int64), text_bytes.astype(np.int64))


def _nll(module: StudentLoss, batch: Batch, world: World, precision: Precision) -> np.ndarray:
    """Nats of each target, [N] float64, in the order of the labels."""
    places = batch.targets
    if places is None:
        places = (batch.labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    places, batch = places.to(world.device), batch.to(world.device)
    with autocast(precision, world.device):
        log_probs, _ = module(
            batch.input_ids, batch.labels, batch.position_ids, batch.boundaries, places, LogProbs(1.0)
        )
    found: np.ndarray = -log_probs.double().cpu().numpy()  # device→host sync
    return found


def _bounds(name: str, value: float, around: float | None) -> dict[str, float | None]:
    return {
        f"{name}_low": None if around is None else value - around,
        f"{name}_high": None if around is None else value + around,
    }

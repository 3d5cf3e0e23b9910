"""The loss of each document, whatever rows it was cut or packed into, and how sure their mean is."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from trainway.config.schema import EngineConfig
from trainway.data.loader import validation_batches
from trainway.data.store import TokenSplit
from trainway.engines.world import open_world
from trainway.recipes.document_losses import DocumentLosses, difference, document_losses, half_width

VOCABULARY = 50
TOKEN_BYTES = np.arange(VOCABULARY) % 4


class CountsLabels:
    """A model whose loss of a token is the token's id: sums can be told from the documents alone."""

    def eval(self) -> None:
        pass

    def __call__(self, ids: Any, labels: Any, positions: Any, boundaries: Any, places: Any, how: Any) -> Any:
        return -labels.flatten()[places].float(), None


def documents(masked: bool) -> tuple[TokenSplit, list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(3)
    lengths = [1, 2, 40, 3, 17, 16, 29, 2]
    tokens = [rng.integers(1, VOCABULARY, length) for length in lengths]
    masks = [rng.integers(0, 2, length).astype(np.uint8) for length in lengths]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    split = TokenSplit.from_arrays(
        np.concatenate(tokens).astype(np.uint16), starts, 0, mask=np.concatenate(masks) if masked else None
    )
    return split, tokens, masks


def losses(split: TokenSplit, packing: str, seq_len: int, max_tokens: int | None = None) -> DocumentLosses:
    batches = partial(
        validation_batches, seq_len=seq_len, micro_batch_size=2, packing=packing, max_tokens=max_tokens
    )
    seen: list[int] = []
    with open_world(EngineConfig()) as world:
        found = document_losses(CountsLabels(), split, batches, TOKEN_BYTES, world, "fp32", seen.append)  # type: ignore[arg-type]
    assert seen == sorted(seen)
    assert seen[-1] > 0
    return found


@pytest.mark.parametrize("seq_len", [8, 16, 64, 256])
def test_a_document_that_is_cut_by_windows_is_one(seq_len: int) -> None:
    split, tokens, _ = documents(masked=False)
    found = losses(split, "documents", seq_len)
    assert found.nats.tolist() == [float(own[1:].sum()) for own in tokens]  # nothing predicts its first token
    assert found.tokens.tolist() == [len(own) - 1 for own in tokens]
    assert found.text_bytes.tolist() == [int(TOKEN_BYTES[own[1:]].sum()) for own in tokens]


def test_in_one_stream_a_documents_first_token_is_its_own() -> None:
    split, tokens, _ = documents(masked=False)
    found = losses(split, "concat", 16)
    assert found.nats.tolist() == [0.0, *(float(own.sum()) for own in tokens[1:])]


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_of_conversations_the_supervised_tokens_alone_count(packing: str) -> None:
    split, tokens, masks = documents(masked=True)
    found = losses(split, packing, 40)
    wanted = [float(own[1:][mask[1:] == 1].sum()) for own, mask in zip(tokens, masks, strict=True)]
    assert found.nats.tolist() == wanted
    assert found.tokens.tolist() == [int(mask[1:].sum()) for mask in masks]


def test_what_was_not_read_has_no_targets() -> None:
    split, _, _ = documents(masked=False)
    found = losses(split, "documents", 8, max_tokens=16)
    assert 0 < found.tokens.sum() <= 16
    assert found.figures()["val/documents"] == np.count_nonzero(found.tokens) < split.num_documents


def test_figures() -> None:
    found = DocumentLosses(np.array([2.0, 6.0, 0.0]), np.array([2, 2, 0]), np.array([3, 5, 0])).figures()
    residual = 2.0  # 2 - 2 * 2 and 6 - 2 * 2, of a mean of 2 nats a token
    around = 1.959964 * math.sqrt(2 / 1 * 2 * residual**2) / 4
    assert found["val/loss"] == 2.0
    assert found["val/ppl"] == pytest.approx(math.e**2)
    assert found["val/bpb"] == pytest.approx(8 / math.log(2) / 8)
    assert (found["val/tokens"], found["val/bytes"], found["val/documents"]) == (4, 8, 2)
    assert found["val/loss_high"] == pytest.approx(2.0 + around)
    assert found["val/loss_low"] == pytest.approx(2.0 - around)


def test_one_document_has_no_interval() -> None:
    found = DocumentLosses(np.array([3.0]), np.array([2]), np.array([4])).figures()
    assert (found["val/loss"], found["val/loss_low"], found["val/loss_high"]) == (1.5, None, None)


def some(seed: int, count: int = 300) -> DocumentLosses:
    """Documents of very different lengths, some far harder than others."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 400, count)
    return DocumentLosses(tokens * rng.gamma(9.0, 0.3, count), tokens, tokens * 4)


def test_the_interval_is_that_of_a_bootstrap_over_documents() -> None:
    found = some(0)
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, len(found.nats), (4000, len(found.nats)))
    ratios = found.nats[drawn].sum(1) / found.tokens[drawn].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    half = half_width(found.nats, found.tokens)
    assert half is not None
    assert 2 * half == pytest.approx(high - low, rel=0.05)


def test_a_difference_is_paired_by_document() -> None:
    first = some(0)
    noise = np.random.default_rng(2).normal(0.05, 0.02, len(first.nats))
    second = DocumentLosses(first.nats + first.tokens * noise, first.tokens, first.text_bytes)
    found = difference(second, first)
    assert found["bpb"] == pytest.approx(0.05 / math.log(2) / 4, rel=0.1)
    assert found["low"] is not None
    assert found["low"] > 0  # though the two models' own intervals overlap
    assert first.figures()["val/bpb_high"] > second.figures()["val/bpb_low"]  # type: ignore[operator]
    assert difference(first, first) == {"bpb": 0.0, "low": 0.0, "high": 0.0}


def test_other_texts_have_no_difference() -> None:
    first = some(0)
    assert difference(first.part(0, 100), first.part(1, 101)) == {}
    assert difference(first.part(0, 100), first) == {}


def test_parts_make_the_whole() -> None:
    whole = some(4)
    again = DocumentLosses.joined([whole.part(0, 70), whole.part(70, 300)])
    assert np.array_equal(again.nats, whole.nats)
    assert again.figures() == whole.figures()


def test_a_loss_that_is_no_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    split, _, _ = documents(masked=False)
    monkeypatch.setattr(
        CountsLabels, "__call__", lambda *arguments: (torch.full((len(arguments[5]),), math.nan), None)
    )
    assert math.isnan(losses(split, "documents", 8).figures()["val/loss"])  # type: ignore[arg-type]

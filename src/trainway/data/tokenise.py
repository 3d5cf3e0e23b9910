"""Documents to tokens on all cores: reading, encoding, converting and writing overlap, in a fixed order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from trainway.data.store import StoreWriter
from trainway.data.tokenizer import text_encoder

BATCH_BYTES = 2 << 20  # small enough for the caches, large enough for many cores
ENCODER_THREADS = 3
"""Each feeds the tokenizer's own threads: one converts ids while the batch of another is encoded."""


def tokenise(
    texts: Iterable[tuple[str, str, int]], tokenizer: PreTrainedTokenizerFast, writer: StoreWriter
) -> None:
    """Reading and writing in this thread, encoding in others: the tokenizer's own threads always have work.

    The batches are written in the order in which they were read, so the store depends on its input alone.
    """
    encode = _Encoder(tokenizer, writer.dtype)
    pending: deque[Future[list[_Encoded]]] = deque()
    with ThreadPoolExecutor(ENCODER_THREADS, "encoder") as threads:
        try:
            for batch in _batches(texts):
                if len(pending) > ENCODER_THREADS:
                    _append(writer, pending.popleft())
                pending.append(threads.submit(encode, batch))
            while pending:
                _append(writer, pending.popleft())
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _batches(texts: Iterable[tuple[str, str, int]]) -> Iterator[list[tuple[str, str, int]]]:
    batch: list[tuple[str, str, int]] = []
    size = 0
    for item in texts:
        if batch and size + item[2] > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item[2]
    if batch:
        yield batch


@dataclass(frozen=True)
class _Encoded:
    split: str
    tokens: np.ndarray  # [sum of lengths]
    lengths: np.ndarray  # [documents] int64
    text_bytes: int


class _Encoder:
    """Turns a batch of texts into the arrays that the store keeps."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, dtype: np.dtype[Any]) -> None:
        self._backend: Tokenizer = text_encoder(tokenizer)
        self._dtype = dtype
        self._before = [tokenizer.bos_token_id] if has_bos(tokenizer) else []
        self._after = [tokenizer.eos_token_id]

    def __call__(self, batch: list[tuple[str, str, int]]) -> list[_Encoded]:
        encodings = self._backend.encode_batch_fast([text for _, text, _ in batch], add_special_tokens=False)
        result = []
        for split in dict.fromkeys(item[0] for item in batch):
            chosen = [index for index, item in enumerate(batch) if item[0] == split]
            extra = len(self._before) + len(self._after)
            lengths = np.array([len(encodings[index]) + extra for index in chosen], dtype=np.int64)
            tokens = np.empty(int(lengths.sum()), dtype=self._dtype)
            at = 0
            for index, length in zip(chosen, lengths.tolist(), strict=True):
                ids = np.fromiter(encodings[index].ids, self._dtype, length - extra)
                tokens[at : at + len(self._before)] = self._before
                tokens[at + len(self._before) : at + length - 1] = ids
                tokens[at + length - 1] = self._after[0]
                at += length
            result.append(_Encoded(split, tokens, lengths, sum(batch[index][2] for index in chosen)))
        return result


def _append(writer: StoreWriter, future: Future[list[_Encoded]]) -> None:
    for encoded in future.result():
        writer.append(encoded.split, encoded.tokens, encoded.lengths, encoded.text_bytes)


def has_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether documents begin with the tokenizer's bos token."""
    # Where one token is both (GPT-2), a single one between documents separates them.
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id

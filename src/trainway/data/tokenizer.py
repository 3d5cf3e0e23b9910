"""The tokenizer: trains a byte-level BPE, loads one of any origin, and says what bytes a token stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainway.config.schema import TokenizerConfig
from trainway.errors import ConfigError, DataError
from trainway.files import disk_faults, read_json

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

# The pattern of GPT-4 and Llama 3: digits in groups of one to three, runs of whitespace kept together.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UNBOUNDED_LENGTH = 10**30  # transformers' own mark for "no limit"

_USUAL_BOS = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<bos>")
_USUAL_EOS = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "[EOS]", "<eos>", "<|eot_id|>")
_USUAL_PAD = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>")

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all or 0 where unknown, label)."""


def train_tokenizer(
    texts: Iterable[str],
    config: TokenizerConfig,
    out: Path,
    *,
    progress: Progress | None = None,
    total: int = 0,
) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE on `texts` and save it in Hugging Face's format in the directory `out`.

    <|bos|>, <|eos|>, <|pad|> and the configured special tokens have the first ids. The same texts give the
    same tokenizer. `total` is the expected bytes of text, for `progress`. Raises ConfigError when vocab_size
    does not hold the 256 bytes and the special tokens.
    """
    specials = list(dict.fromkeys((BOS, EOS, PAD, *config.special_tokens)))
    if config.vocab_size < 256 + len(specials):
        raise ConfigError(
            f"tokenizer.vocab_size {config.vocab_size} is too small",
            f"256 bytes and {len(specials)} special tokens need {256 + len(specials)}",
            f"set tokenizer.vocab_size to at least {256 + len(specials)}",
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_reported(texts, progress, total), trainer)
    tokenizer = _wrap(backend, BOS, EOS, PAD)
    save_tokenizer(tokenizer, out)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save a bundle in the directory `out`. Raises EnvironmentFault when the disk is full or read-only."""
    with disk_faults(out):
        try:
            tokenizer.save_pretrained(out)
        except OSError:
            raise
        except Exception as error:  # the tokenizers library reports the disk's faults as bare Exceptions
            if code := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(code[1]), str(error)) from error
            raise


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a bundle directory or a bare tokenizer.json; nothing is downloaded and no code of the bundle runs.

    Special tokens that the bundle does not name are found by their usual names; pad falls back to eos.
    Raises DataError when a file is missing or corrupt, or when there is no end-of-document token.
    """
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        why = f"{path} holds no tokenizer.json" if path.is_dir() else "no such file or directory"
        raise DataError(
            f"tokenizer {path}: cannot be loaded",
            why,
            "correct tokenizer.path, or leave it empty to train one",
        )
    read_json(file)  # a clear error for a damaged file, with its line
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        fix = "restore it, or make it anew"
        raise DataError(f"{file}: not a tokenizer of the tokenizers library", str(error), fix) from error
    if not path.is_dir():
        return _completed(_wrap(backend, None, None, None), file)
    named = path / "tokenizer_config.json"
    settings = read_json(named) if named.exists() else {}
    if not isinstance(settings, dict):
        raise DataError(f"{named}: not a JSON object", fix="restore it, or make it anew")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise DataError(
            f"tokenizer {path}: cannot be loaded", str(error), "restore it, or make it anew"
        ) from error
    return _completed(tokenizer, path)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """xxh3_128 of what decides the ids: the backend without padding and truncation, and the special ids."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("padding", None)
    content.pop("truncation", None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    text = json.dumps([content, special], sort_keys=True, ensure_ascii=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """UTF-8 bytes of each id: [vocab_size] int32, 0 for special tokens; exact for byte-level BPE."""
    backend = tokenizer.backend_tokenizer
    counts = np.zeros(vocab_size(tokenizer), dtype=np.int32)
    byte_level = "ByteLevel" in json.dumps(json.loads(backend.to_str()).get("decoder"))
    added = backend.get_added_tokens_decoder()
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index in added:
            counts[index] = 0 if added[index].special else len(added[index].content.encode())
        elif byte_level:
            counts[index] = len(token)  # one character stands for one byte
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            counts[index] = 1
        else:
            counts[index] = len(token.replace("▁", " ").removeprefix("##").encode())
    for special in {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}:
        counts[special] = 0
    return counts


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The highest id plus one: the rows that an embedding needs."""
    return int(max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the backend for raw text: "<|eos|>" in a document is text, never the special token."""
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    own = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for token in content["added_tokens"]:
        token["special"] = token["special"] or token["id"] in own  # only special ones are kept out of text
    encoder = Tokenizer.from_str(json.dumps(content))
    encoder.encode_special_tokens = True
    encoder.no_padding()
    encoder.no_truncation()
    return encoder


def _reported(texts: Iterable[str], progress: Progress | None, total: int) -> Iterator[str]:
    done = shown = 0
    for text in texts:
        yield text
        done += len(text)
        if progress and done - shown >= 1 << 20:
            shown = done
            progress(done, max(total, done), "tokenizer: reading")
    if progress:
        total = max(total, done)  # held-out documents are expected but not read
        progress(total, total, "tokenizer: reading")
        progress(total, total, "tokenizer: learning merges")


def _wrap(backend: Tokenizer, bos: str | None, eos: str | None, pad: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        model_max_length=UNBOUNDED_LENGTH,
    )


def _completed(tokenizer: PreTrainedTokenizerFast, path: Path) -> PreTrainedTokenizerFast:
    vocabulary = tokenizer.get_vocab()
    if tokenizer.bos_token is None:
        tokenizer.bos_token = next((name for name in _USUAL_BOS if name in vocabulary), None)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = next((name for name in _USUAL_EOS if name in vocabulary), None)
    if tokenizer.eos_token is None or tokenizer.eos_token not in vocabulary:
        raise DataError(
            f"tokenizer {path}: has no end-of-document token",
            f"none of {', '.join(_USUAL_EOS)} is in its vocabulary, and its configuration names none",
            'name one as "eos_token" in a tokenizer_config.json beside tokenizer.json',
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = next((name for name in _USUAL_PAD if name in vocabulary), tokenizer.eos_token)
    return tokenizer
